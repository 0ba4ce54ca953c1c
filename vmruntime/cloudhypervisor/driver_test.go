package cloudhypervisor

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/crivm/crivm/agentproto"
	"github.com/crivm/crivm/vmruntime"
	"github.com/crivm/crivm/vmruntime/vmtest"
)

func TestStartAndTalkToTheAgent(t *testing.T) {
	f := newFixture(t)
	v := f.start()
	c, err := agentproto.Connect(f.ctx(), v)
	if err != nil {
		t.Fatal(err)
	}
	if c.Info().GetAgentVersion() != "fake" {
		t.Errorf("agent says %v", c.Info())
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	select {
	case <-v.ready:
	case <-time.After(5 * time.Second):
		t.Error("the agent's ready event was lost")
	}
	eventually(t, "console", func() bool { return strings.Contains(v.Console(), "agent serves") })
	if err := v.Kill(f.ctx()); err != nil {
		t.Fatal(err)
	}
	e := f.died(v)
	if e.Reason != "killed" || e.Signal != int(syscall.SIGKILL) || time.Since(e.At) > time.Minute {
		t.Errorf("exit %+v", e)
	}
	if err := v.Kill(f.ctx()); err != nil {
		t.Errorf("second kill: %v", err)
	}
	wantFiles(t, f.spec.Dir, "console.log", "vmm.log")
	if _, err := v.Dial(f.ctx()); !errdefs.IsUnavailable(err) {
		t.Errorf("dial a dead VM: %v", err)
	}
	if err := v.AddDisk(f.ctx(), vmruntime.Disk{Serial: "x", Path: "/x"}); !errdefs.IsUnavailable(err) {
		t.Errorf("add a disk to a dead VM: %v", err)
	}
}

// eventually waits for what comes soon by itself.
func eventually(t *testing.T, what string, f func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !f(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within 10 s", what)
		}
	}
}

func wantFiles(t *testing.T, dir string, want ...string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, e := range entries {
		if e.Name() != "faults.json" {
			got = append(got, e.Name())
		}
	}
	if strings.Join(got, " ") != strings.Join(want, " ") {
		t.Errorf("%s holds %v, want %v", dir, got, want)
	}
}

func TestStartFailures(t *testing.T) {
	for _, tc := range []struct {
		name   string
		faults vmtest.Faults
		change func(*vmruntime.Spec)
		text   string
	}{
		{"exits at once", vmtest.Faults{ExitAtStart: 1}, nil, "status 1"},
		{"says why", vmtest.Faults{ExitAtStart: 1}, nil, "fault injected at start"},
		{"crashes while it is asked", vmtest.Faults{CrashAfter: 2}, nil, "SIGKILL"},
		{"create refused", vmtest.Faults{Fail: "vm.create"}, nil, "vm.create: Error from API: fault injected"},
		{"boot refused, console told", vmtest.Faults{Fail: "vm.boot", Console: "hello"}, nil, "vm.boot: Error from API: fault injected"},
		{"garbage", vmtest.Faults{Garbage: "*"}, nil, "vmm.ping"},
		{"no kernel", vmtest.Faults{}, func(s *vmruntime.Spec) { s.Kernel = "/nonexistent" }, "Cannot open kernel file"},
		{"no disk", vmtest.Faults{}, func(s *vmruntime.Spec) { s.Disks[0].Path = "/nonexistent" }, "/nonexistent"},
		{"no tap", vmtest.Faults{}, func(s *vmruntime.Spec) {
			s.NICs = []vmruntime.NIC{{ID: "eth0", Tap: "crivm-none", MAC: "02:00:00:00:00:01"}}
		}, "crivm-none"},
		{"unfit version since New", vmtest.Faults{Version: "v51.1"}, nil, "CVE-2026-45782"},
		{"boot forgotten", vmtest.Faults{Drop: "vm.boot"}, nil, "vm.boot"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f := newFixture(t)
			if tc.change != nil {
				tc.change(&f.spec)
			}
			vmtest.Inject(t, f.spec.Dir, tc.faults)
			v, err := f.driver.Start(f.ctx(), f.spec)
			if err == nil {
				v.Kill(f.ctx())
				t.Fatal("started")
			}
			if !strings.Contains(err.Error(), tc.text) {
				t.Errorf("error %v", err)
			}
			if _, err := vmruntime.Adopt(f.spec.Dir); !errdefs.IsNotFound(err) {
				t.Errorf("process left: %v", err)
			}
			for _, name := range []string{"api.sock", "events", "run", "vmm.json"} {
				if _, err := os.Lstat(filepath.Join(f.spec.Dir, name)); !errors.Is(err, os.ErrNotExist) {
					t.Errorf("%s left: %v", name, err)
				}
			}
		})
	}
}

func TestStartClearsRemains(t *testing.T) {
	f := newFixture(t)
	if err := os.Mkdir(runPath(f.spec.Dir), 0o700); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{apiPath(f.spec.Dir), eventsPath(f.spec.Dir), vsockPath(f.spec.Dir), serialPath(f.spec.Dir), consolePath(f.spec.Dir), logPath(f.spec.Dir)} {
		if err := os.WriteFile(path, []byte("stale"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	v := f.start()
	dial(t, f, v)
	if strings.Contains(v.Console(), "stale") {
		t.Errorf("console of an earlier VM: %q", v.Console())
	}
}

func TestStartIsBoundedByItsContext(t *testing.T) {
	f := newFixture(t)
	vmtest.Inject(t, f.spec.Dir, vmtest.Faults{Hang: "vm.boot"})
	ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
	defer cancel()
	_, err := f.driver.Start(ctx, f.spec)
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("start: %v", err)
	}
	if _, err := vmruntime.Adopt(f.spec.Dir); !errdefs.IsNotFound(err) {
		t.Errorf("process left: %v", err)
	}
}

func TestSpecIsChecked(t *testing.T) {
	f := newFixture(t)
	for name, change := range map[string]func(*vmruntime.Spec){
		"long directory":  func(s *vmruntime.Spec) { s.Dir = "/" + strings.Repeat("x", 60) },
		"relative kernel": func(s *vmruntime.Spec) { s.Kernel = "vmlinux" },
		"no vCPU":         func(s *vmruntime.Spec) { s.VCPUs = 0 },
		"ceiling":         func(s *vmruntime.Spec) { s.MaxVCPUs = 0 },
		"odd memory":      func(s *vmruntime.Spec) { s.MemoryBytes++ },
		"memory ceiling":  func(s *vmruntime.Spec) { s.MaxMemoryBytes = 1 },
		"long serial":     func(s *vmruntime.Spec) { s.Disks[0].Serial = strings.Repeat("x", 21) },
		"odd serial":      func(s *vmruntime.Spec) { s.Disks[0].Serial = "a,b" },
		"same serial":     func(s *vmruntime.Spec) { s.Disks = append(s.Disks, s.Disks[0]) },
		"NIC without tap": func(s *vmruntime.Spec) { s.NICs = []vmruntime.NIC{{ID: "a"}} },
	} {
		s := f.spec
		s.Disks = append([]vmruntime.Disk(nil), f.spec.Disks...)
		change(&s)
		if _, err := f.driver.Start(f.ctx(), s); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestEnds(t *testing.T) {
	for _, tc := range []struct {
		name   string
		signal syscall.Signal
		reason string
	}{
		{"reboot", vmtest.SignalReboot, "guest rebooted"},
		{"panic", vmtest.SignalPanic, "guest kernel panicked"},
		{"vCPU error with status 0", vmtest.SignalVCPUError, "VMM failed: VCPU generated error: injected"},
		{"killed by another", syscall.SIGKILL, "VMM was killed by signal 9 (SIGKILL)"},
		{"terminated", syscall.SIGTERM, "guest powered off"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f := newFixture(t)
			v := f.start()
			dial(t, f, v)
			start := time.Now()
			if err := syscall.Kill(v.PID(), tc.signal); err != nil {
				t.Fatal(err)
			}
			e := f.died(v)
			if e.Reason != tc.reason {
				t.Errorf("exit %+v", e)
			}
			if d := time.Since(start); d > 2*time.Second {
				t.Errorf("noticed after %v", d)
			}
		})
	}
}

func TestExitReason(t *testing.T) {
	const refused = "cloud-hypervisor:   0.0319s: <vmm> ERROR:vmm/src/lib.rs:2750 -- Error when adding new disk to the VM\n"
	for _, tc := range []struct {
		exit vmruntime.Exit
		gone bool
		log  string
		want string
	}{
		{vmruntime.Exit{}, true, "", "guest powered off"},
		{vmruntime.Exit{}, true, refused, "guest powered off"},
		{vmruntime.Exit{}, false, "", "VMM exited"},
		{vmruntime.Exit{}, true, refused + "cloud-hypervisor:   1s: <_disk0_q0> ERROR:a.rs:1 -- Error running worker\n" + refused, "VMM failed: Error running worker"},
		{vmruntime.Exit{}, true, "thread 'vcpu0' panicked at a.rs:1:\nno\n", "VMM failed: thread 'vcpu0' panicked at a.rs:1:"},
		{vmruntime.Exit{Code: 1}, false, refused + "Error: no kernel\n", "VMM exited with status 1: Error: no kernel"},
		{vmruntime.Exit{Code: 1}, false, refused, "VMM exited with status 1: Error when adding new disk to the VM"},
		{vmruntime.Exit{Code: -1, Signal: 31}, false, "", "VMM was killed by its seccomp filter"},
		{vmruntime.Exit{Code: -1, Signal: 9}, false, "", "VMM was killed by signal 9 (SIGKILL)"},
		{vmruntime.Exit{Code: -1}, false, "", "VMM is gone"},
		{vmruntime.Exit{Code: -1}, true, "", "guest powered off"},
	} {
		if got := exitReason(tc.exit, tc.gone, tc.log); got != tc.want {
			t.Errorf("%+v, guest gone %v, %q: %q, want %q", tc.exit, tc.gone, tc.log, got, tc.want)
		}
	}
}

func dial(t *testing.T, f *fixture, v vmruntime.VM) {
	t.Helper()
	conn, err := v.Dial(f.ctx())
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
}

func TestShutdown(t *testing.T) {
	t.Run("by the agent", func(t *testing.T) {
		f := newFixture(t)
		v := f.start()
		c, err := agentproto.Connect(f.ctx(), v)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if _, err := c.Shutdown(f.ctx(), &agentproto.ShutdownRequest{}); err != nil {
			t.Fatal(err)
		}
		if err := v.Shutdown(f.ctx()); err != nil {
			t.Error(err)
		}
		if e := f.died(v); e.Reason != "guest powered off" || e.Code != 0 || e.Signal != 0 {
			t.Errorf("exit %+v", e)
		}
		wantFiles(t, f.spec.Dir, "console.log", "vmm.log")
	})
	t.Run("guest does not listen", func(t *testing.T) {
		f := newFixture(t)
		v := f.start()
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		if err := v.Shutdown(ctx); err != nil {
			t.Error(err)
		}
		if e := f.died(v); e.Reason != "guest did not power off in time" {
			t.Errorf("exit %+v", e)
		}
	})
	t.Run("VMM stays without its guest", func(t *testing.T) {
		f := newFixture(t)
		vmtest.Inject(t, f.spec.Dir, vmtest.Faults{IgnorePowerOff: true})
		v := f.start()
		c, err := agentproto.Connect(f.ctx(), v)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if _, err := c.Shutdown(f.ctx(), &agentproto.ShutdownRequest{}); err != nil {
			t.Fatal(err)
		}
		if e := f.died(v); e.Reason != "guest powered off, and the VMM did not exit" {
			t.Errorf("exit %+v", e)
		}
	})
}

func TestEventStreamThatIsNone(t *testing.T) {
	f := newFixture(t)
	vmtest.Inject(t, f.spec.Dir, vmtest.Faults{EventGarbage: "hello\n"})
	v := f.start()
	if e := f.died(v); !strings.HasPrefix(e.Reason, "VMM's event stream is unusable") {
		t.Errorf("exit %+v", e)
	}
}

func TestNew(t *testing.T) {
	f := newFixture(t)
	for _, tc := range []struct {
		name  string
		c     Config
		class func(error) bool
	}{
		{"no program", Config{Binary: "/nonexistent"}, errdefs.IsNotFound},
		{"seccomp", Config{Binary: f.binary, Seccomp: "maybe"}, errdefs.IsInvalidArgument},
		{"landlock", Config{Binary: f.binary, Landlock: "maybe"}, errdefs.IsInvalidArgument},
		{"segments", Config{Binary: f.binary, PCISegments: 97}, errdefs.IsInvalidArgument},
	} {
		if _, err := New(tc.c); !tc.class(err) {
			t.Errorf("%s: %v", tc.name, err)
		}
	}
	vmtest.Inject(t, filepath.Dir(f.binary), vmtest.Faults{Version: "v52.0"})
	if _, err := New(Config{Binary: f.binary}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("v52.0: %v", err)
	}
	var d vmruntime.Driver = f.driver
	if d.Name() != "cloudhypervisor" {
		t.Error(d.Name())
	}
}

func TestManyAtOnce(t *testing.T) {
	f := newFixture(t)
	var wg sync.WaitGroup
	for range 20 {
		spec := newSpec(t)
		wg.Go(func() {
			v, err := f.driver.Start(f.ctx(), spec)
			if err != nil {
				t.Error(err)
				return
			}
			f.killLater(v)
			c, err := agentproto.Connect(f.ctx(), v)
			if err != nil {
				t.Error(err)
				return
			}
			c.Close()
		})
	}
	wg.Wait()
}
