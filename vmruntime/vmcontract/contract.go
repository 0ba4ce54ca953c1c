// Package vmcontract is the test suite that every vmruntime.Driver passes. It boots real VMMs (or a fake
// one with a real agent behind it), so callers put it behind the integration build tag. It needs root.
//
// It holds tests only; nothing but tests imports it.
package vmcontract

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/crivm/crivm/agentproto"
	"github.com/crivm/crivm/vmruntime"
)

// Options tell the suite what it runs against.
type Options struct {
	// New returns a driver and a template: Kernel, Initrd, Cmdline, VCPUs, memory and their ceilings. It is
	// called for each test, and in a process of its own for the tests of a daemon that died.
	New func(t *testing.T) (vmruntime.Driver, vmruntime.Spec)
	// RealGuest says that a Linux kernel boots: panics, NICs and console output are tested.
	RealGuest bool
	// Boot bounds a boot until the agent answers; 0 is two minutes.
	Boot time.Duration
	// NonsenseFailsStart says that Start itself fails for a kernel that is no kernel.
	NonsenseFailsStart bool
	// Skip names tests that this VMM cannot pass, with the reason.
	Skip map[string]string
}

// childEnv makes the test process be the daemon that dies; its value is the VM's directory.
const childEnv = "VMCONTRACT_DAEMON_DIR"

// suite is the state of one test.
type suite struct {
	Options
	top string // name of the top-level test, to find it again in a child process
}

// Run runs the suite as subtests of t, which must be a top-level test.
func Run(t *testing.T, o Options) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: starts VMMs in namespaces and cgroups")
	}
	if o.Boot == 0 {
		o.Boot = 2 * time.Minute
	}
	s := &suite{Options: o, top: t.Name()}
	if dir := os.Getenv(childEnv); dir != "" {
		s.daemon(t, dir)
		return
	}
	for _, c := range []struct {
		name string
		real bool // needs a real guest
		test func(*testing.T)
	}{
		{"Running", false, s.testRunning},
		{"Resize", true, s.testResize},
		{"Network", true, s.testNetwork},
		{"Share", true, s.testShare},
		{"ShutdownByGuest", false, s.testShutdownByGuest},
		{"ShutdownTimesOut", false, s.testShutdownTimesOut},
		{"VMMKilled", false, s.testVMMKilled},
		{"GuestPanics", true, s.testGuestPanics},
		{"GuestReboots", true, s.testGuestReboots},
		{"NoAgent", true, s.testNoAgent},
		{"ConsoleFlood", true, s.testConsoleFlood},
		{"NonsenseKernel", true, s.testNonsenseKernel},
		{"Unprivileged", true, s.testUnprivileged},
		{"BadSpec", false, s.testBadSpec},
		{"DaemonDies", false, s.testDaemonDies},
		{"DaemonAndVMDie", false, s.testDaemonAndVMDie},
		{"Sweep", false, s.testSweep},
		{"NothingThere", false, s.testNothingThere},
	} {
		t.Run(c.name, func(t *testing.T) {
			if why := o.Skip[c.name]; why != "" {
				t.Skip(why)
			}
			if c.real && !o.RealGuest {
				t.Skip("needs a guest with a real kernel")
			}
			c.test(t)
		})
	}
}

// cgroup is where the VMs of the suite are accounted.
func cgroup(name string) vmruntime.Cgroup {
	return vmruntime.Cgroup{Parent: "/crivmtest-contract", Name: name}
}

// spec returns a driver and a Spec with a directory of its own. When the test ends, nothing may be left of
// it, no matter how the test went.
func (s *suite) spec(t *testing.T) (vmruntime.Driver, vmruntime.Spec) {
	t.Helper()
	driver, spec := s.New(t)
	dir, err := os.MkdirTemp("", "vmc")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o711); err != nil { // the VMM may be another user
		t.Fatal(err)
	}
	spec.ID, spec.Dir = filepath.Base(dir), dir
	spec.Process.Cgroup = cgroup(spec.ID)
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("console: %s\nVMM log: %s", vmruntime.TailFile(dir+"/console.log"), vmruntime.TailFile(dir+"/vmm.log"))
		}
		ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		defer cancel()
		if err := driver.Sweep(ctx, spec.ID, dir); err != nil {
			t.Errorf("sweep: %v", err)
		}
		nothingLeft(t, spec)
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return driver, spec
}

// start boots a VM that is killed when the test ends.
func (s *suite) start(t *testing.T, driver vmruntime.Driver, spec vmruntime.Spec) vmruntime.VM {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), s.Boot)
	defer cancel()
	begin := time.Now()
	vm, err := driver.Start(ctx, spec)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("VMM runs after %v", time.Since(begin).Round(time.Millisecond))
	t.Cleanup(func() { kill(t, vm) })
	return vm
}

func kill(t *testing.T, vm vmruntime.VM) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	if err := vm.Kill(ctx); err != nil {
		t.Errorf("kill: %v", err)
	}
}

// connect waits for the agent's hello.
func (s *suite) connect(t *testing.T, vm vmruntime.VM) *agentproto.Client {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), s.Boot)
	defer cancel()
	begin := time.Now()
	for {
		c, err := agentproto.Connect(ctx, vm)
		if err == nil {
			t.Logf("agent answers after %v", time.Since(begin).Round(time.Millisecond))
			t.Cleanup(func() { c.Close() })
			return c
		}
		// Hello gives up after a minute by itself; a guest under load may need longer.
		if ctx.Err() != nil || s.over(vm) {
			t.Fatalf("connect to agent: %v", err)
		}
	}
}

func (s *suite) over(vm vmruntime.VM) bool {
	select {
	case <-vm.Done():
		return true
	default:
		return false
	}
}

// within waits for a VM's end.
func within(t *testing.T, vm vmruntime.VM, d time.Duration) vmruntime.Exit {
	t.Helper()
	begin := time.Now()
	select {
	case <-vm.Done():
		t.Logf("ended after %v: %+v", time.Since(begin).Round(time.Millisecond), vm.Exit())
		return vm.Exit()
	case <-time.After(d):
		t.Fatalf("VM has not ended within %v", d)
		panic("not reached")
	}
}

// nothingLeft checks that no process, cgroup or file of the VM is left, but its logs.
func nothingLeft(t *testing.T, spec vmruntime.Spec) {
	t.Helper()
	procs, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range procs {
		b, err := os.ReadFile(p)
		if err == nil && bytes.Contains(b, []byte(spec.Dir)) && !bytes.Contains(b, []byte("go\x00test")) {
			t.Errorf("process left: %s %s", p, bytes.ReplaceAll(b, []byte{0}, []byte(" ")))
		}
	}
	entries, err := os.ReadDir(spec.Dir)
	if err != nil {
		t.Error(err)
	}
	for _, e := range entries {
		if n := e.Name(); !strings.HasSuffix(n, ".log") && !strings.HasPrefix(n, "test-") {
			t.Errorf("file left: %s/%s", spec.Dir, n)
		}
	}
	if c := spec.Process.Cgroup; c.Name != "" {
		for _, pattern := range []string{"/sys/fs/cgroup/*%s/%s", "/sys/fs/cgroup%s/%s"} {
			left, err := filepath.Glob(fmt.Sprintf(pattern, c.Parent, c.Name))
			if err != nil {
				t.Fatal(err)
			}
			for _, l := range left {
				t.Errorf("cgroup left: %s", l)
			}
		}
	}
}
