package vmcontract

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/crivm/crivm/agentproto"
	"github.com/crivm/crivm/vmruntime"
)

// endSeen is how soon a VM's end has to be noticed.
const endSeen = 2 * time.Second

func (s *suite) testShutdownByGuest(t *testing.T) {
	driver, spec := s.spec(t)
	vm := s.start(t, driver, spec)
	agent := s.connect(t, vm)
	if _, err := agent.Shutdown(t.Context(), &agentproto.ShutdownRequest{}); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := vm.Shutdown(ctx); err != nil {
		t.Fatal(err)
	}
	if e := within(t, vm, 0+endSeen); e.Signal != 0 || e.Reason == "" || e.At.IsZero() {
		t.Errorf("exit %+v, want a power-off", e)
	}
	if ctx.Err() != nil {
		t.Error("the guest did not power off by itself")
	}
	nothingLeft(t, spec)
	s.checkDead(t, vm)
}

func (s *suite) testShutdownTimesOut(t *testing.T) {
	driver, spec := s.spec(t)
	vm := s.start(t, driver, spec)
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond) // nobody asked the guest
	defer cancel()
	if err := vm.Shutdown(ctx); err != nil {
		t.Fatal(err)
	}
	if e := within(t, vm, 0+endSeen); e.Reason == "" {
		t.Errorf("exit %+v", e)
	}
	for range 2 { // idempotent
		kill(t, vm)
	}
	nothingLeft(t, spec)
	s.checkDead(t, vm)
}

// checkDead: all calls on a dead VM fail at once, those that undo something may also succeed.
func (s *suite) checkDead(t *testing.T, vm vmruntime.VM) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	if c, err := vm.Dial(ctx); !errdefs.IsUnavailable(err) {
		if err == nil {
			c.Close()
		}
		t.Errorf("dial a dead VM: %v", err)
	}
	if err := vm.AddDisk(ctx, vmruntime.Disk{Serial: "late", Path: "/dev/null"}); !errdefs.IsUnavailable(err) {
		t.Errorf("add a disk to a dead VM: %v", err)
	}
	if err := vm.Pause(ctx); !errdefs.IsUnavailable(err) {
		t.Errorf("pause a dead VM: %v", err)
	}
	if err := vm.Shutdown(ctx); err != nil {
		t.Errorf("shutdown of a dead VM: %v", err)
	}
}

func (s *suite) testVMMKilled(t *testing.T) {
	driver, spec := s.spec(t)
	vm := s.start(t, driver, spec)
	agent := s.connect(t, vm)
	waiting := make(chan error, 1)
	conn, err := vm.Dial(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	go func() {
		_, err := conn.Read(make([]byte, 1))
		waiting <- err
	}()
	if err := unix.Kill(vm.PID(), unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	e := within(t, vm, endSeen)
	if e.Reason == "" || e.At.IsZero() || (e.Signal != int(unix.SIGKILL)) {
		t.Errorf("exit %+v, want killed by signal 9", e)
	}
	for what, ch := range map[string]<-chan struct{}{"agent client": agent.Done()} {
		select {
		case <-ch:
		case <-time.After(endSeen):
			t.Errorf("%s has not noticed", what)
		}
	}
	select {
	case err := <-waiting:
		if err == nil {
			t.Error("a stream of a dead VM delivered something")
		}
	case <-time.After(endSeen):
		t.Error("a stream of a dead VM still waits")
	}
	s.checkDead(t, vm)
	kill(t, vm)
	nothingLeft(t, spec)
}

func (s *suite) testNonsenseKernel(t *testing.T) {
	driver, spec := s.spec(t)
	spec.Kernel = filepath.Join(spec.Dir, "test-kernel")
	if err := os.WriteFile(spec.Kernel, []byte(strings.Repeat("this is no kernel\n", 1000)), 0o644); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), s.Boot)
	defer cancel()
	vm, err := driver.Start(ctx, spec)
	if err == nil {
		defer kill(t, vm)
		if s.NonsenseFailsStart {
			t.Fatal("start did not fail")
		}
		if _, err := vm.Dial(ctx); !errdefs.IsUnavailable(err) {
			t.Errorf("dial: %v", err)
		}
		return
	}
	t.Log(err)
	if !strings.Contains(err.Error(), spec.ID) || len(err.Error()) < 40 {
		t.Errorf("error does not say enough: %v", err)
	}
	// Nothing is left without any further call.
	nothingLeft(t, spec)
}

func (s *suite) testBadSpec(t *testing.T) {
	for name, change := range map[string]func(*vmruntime.Spec){
		"no vCPUs":            func(s *vmruntime.Spec) { s.VCPUs = 0 },
		"ceiling below vCPUs": func(s *vmruntime.Spec) { s.MaxVCPUs = s.VCPUs - 1 },
		"odd memory":          func(s *vmruntime.Spec) { s.MemoryBytes++; s.MaxMemoryBytes++ },
		"ceiling below":       func(s *vmruntime.Spec) { s.MaxMemoryBytes = s.MemoryBytes - 1 },
		"long directory":      func(s *vmruntime.Spec) { s.Dir += "/" + strings.Repeat("x", 60) },
		"bad serial":          func(s *vmruntime.Spec) { s.Disks = []vmruntime.Disk{{Serial: "a,b", Path: "/dev/null"}} },
		"long serial": func(s *vmruntime.Spec) {
			s.Disks = []vmruntime.Disk{{Serial: strings.Repeat("x", 21), Path: "/dev/null"}}
		},
		"same serial twice": func(s *vmruntime.Spec) {
			s.Disks = []vmruntime.Disk{{Serial: "a", Path: "/dev/null"}, {Serial: "a", Path: "/dev/zero"}}
		},
		"missing disk": func(s *vmruntime.Spec) { s.Disks = []vmruntime.Disk{{Serial: "a", Path: "/nonexistent/disk"}} },
		"missing tap": func(s *vmruntime.Spec) {
			s.NICs = []vmruntime.NIC{{ID: "a", Tap: "no-such-tap", MAC: "02:00:00:00:00:01"}}
		},
		"missing netns": func(s *vmruntime.Spec) { s.Process.NetnsPath = "/nonexistent/netns" },
	} {
		t.Run(name, func(t *testing.T) {
			driver, spec := s.spec(t)
			bad := spec
			change(&bad)
			vm, err := driver.Start(t.Context(), bad)
			if err == nil {
				kill(t, vm)
				t.Fatal("no error")
			}
			t.Log(err)
			nothingLeft(t, spec)
		})
	}
	t.Run("cancelled", func(t *testing.T) {
		driver, spec := s.spec(t)
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if vm, err := driver.Start(ctx, spec); !errors.Is(err, context.Canceled) {
			if err == nil {
				kill(t, vm)
			}
			t.Errorf("got %v", err)
		}
		nothingLeft(t, spec)
	})
}

func (s *suite) testSweep(t *testing.T) {
	driver, spec := s.spec(t)
	vm := s.start(t, driver, spec)
	for range 2 {
		if err := driver.Sweep(t.Context(), spec.ID, spec.Dir); err != nil {
			t.Fatal(err)
		}
		within(t, vm, endSeen)
		nothingLeft(t, spec)
	}
}

func (s *suite) testNothingThere(t *testing.T) {
	driver, spec := s.spec(t)
	if vm, err := driver.Reattach(t.Context(), spec.ID, spec.Dir); !errdefs.IsNotFound(err) {
		t.Errorf("reattach to nothing: %v, %v", vm, err)
	}
	if err := driver.Sweep(t.Context(), spec.ID, spec.Dir); err != nil {
		t.Errorf("sweep of nothing: %v", err)
	}
	// Kill and Start race in a daemon that gives up on a boot: all ends well in any order.
	vm := s.start(t, driver, spec)
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() { kill(t, vm) })
	}
	wg.Wait()
	within(t, vm, endSeen)
	nothingLeft(t, spec)
}
