package cloudhypervisor

import (
	"context"
	"errors"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/crivm/crivm/vmruntime"
	"github.com/crivm/crivm/vmruntime/chclient"
	"github.com/crivm/crivm/vmruntime/vmtest"
)

// orphan is a booted VMM whose daemon has gone: nobody reads its events or its console.
func orphan(t *testing.T, f *fixture) *vmruntime.Process {
	t.Helper()
	k, err := prepare(f.spec.Dir, f.spec.Process)
	if err != nil {
		t.Fatal(err)
	}
	defer k.events.Close()
	defer k.ready.Close()
	p, err := vmruntime.Launch(f.ctx(), vmruntime.LaunchSpec{
		Dir: f.spec.Dir, Path: f.binary, ExtraFiles: []*os.File{k.api, k.fifo},
		Args: []string{"--api-socket", "fd=3", "--event-monitor", "path=" + eventsPath(f.spec.Dir)},
	})
	k.closeInherited()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := f.driver.Sweep(f.ctx(), f.spec.ID, f.spec.Dir); err != nil {
			t.Error(err)
		}
	})
	return p
}

func boot(t *testing.T, f *fixture) {
	t.Helper()
	c := chclient.New(apiPath(f.spec.Dir))
	if err := c.Create(f.ctx(), f.driver.vmConfig(f.spec)); err != nil {
		t.Fatal(err)
	}
	if err := c.Boot(f.ctx()); err != nil {
		t.Fatal(err)
	}
}

func (f *fixture) reattach() (*vm, error) {
	v, err := f.newDriver(Config{}).Reattach(f.ctx(), f.spec.ID, f.spec.Dir)
	if err != nil {
		return nil, err
	}
	f.killLater(v)
	return v.(*vm), nil
}

func TestReattach(t *testing.T) {
	f := newFixture(t)
	p := orphan(t, f)
	boot(t, f)
	v, err := f.reattach()
	if err != nil {
		t.Fatal(err)
	}
	if v.PID() != p.PID() {
		t.Errorf("pid %d, want %d", v.PID(), p.PID())
	}
	dial(t, f, v)
	// What the guest wrote while nobody was there is not lost.
	eventually(t, "console", func() bool { return strings.Contains(v.Console(), "agent serves") })
	if err := syscall.Kill(v.PID(), vmtest.SignalReboot); err != nil {
		t.Fatal(err)
	}
	if e := f.died(v); e.Reason != "guest rebooted" {
		t.Errorf("exit %+v", e)
	}
}

func TestEventsWithoutDaemonAreSeen(t *testing.T) {
	for name, tc := range map[string]struct {
		signal syscall.Signal
		faults vmtest.Faults
		reason string
	}{
		"reboot": {vmtest.SignalReboot, vmtest.Faults{}, "guest rebooted"},
		"panic":  {vmtest.SignalPanic, vmtest.Faults{}, "guest kernel panicked"},
		// Events may have been dropped: no matter which.
		"flood": {vmtest.SignalFlood, vmtest.Faults{EventFlood: 5000}, "VMM's event stream is unusable: more events than were read"},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFixture(t)
			p := orphan(t, f)
			boot(t, f)
			vmtest.Inject(t, f.spec.Dir, tc.faults)
			if err := syscall.Kill(p.PID(), tc.signal); err != nil {
				t.Fatal(err)
			}
			want := 450 // bytes: more than vmm/starting, vm/booting and vm/booted
			if tc.faults.EventFlood > 0 {
				want = 200 << 10
			}
			eventually(t, "events", func() bool { return waitingEvents(t, f.spec.Dir) >= want })
			v, err := f.reattach()
			if err != nil {
				t.Fatal(err)
			}
			if e := f.died(v); e.Reason != tc.reason {
				t.Errorf("exit %+v", e)
			}
		})
	}
}

// Many events are harmless as long as a daemon reads.
func TestManyEventsWithDaemon(t *testing.T) {
	f := newFixture(t)
	vmtest.Inject(t, f.spec.Dir, vmtest.Faults{EventFlood: 200})
	v := f.start()
	for range 3 {
		if err := syscall.Kill(v.PID(), vmtest.SignalFlood); err != nil {
			t.Fatal(err)
		}
	}
	dial(t, f, v)
	if err := syscall.Kill(v.PID(), vmtest.SignalPanic); err != nil {
		t.Fatal(err)
	}
	if e := f.died(v); e.Reason != "guest kernel panicked" {
		t.Errorf("exit %+v", e)
	}
}

func TestReattachWhatWasNeverBooted(t *testing.T) {
	for name, create := range map[string]bool{"nothing created": false, "created": true} {
		t.Run(name, func(t *testing.T) {
			f := newFixture(t)
			p := orphan(t, f)
			if create {
				if err := chclient.New(apiPath(f.spec.Dir)).Create(f.ctx(), f.driver.vmConfig(f.spec)); err != nil {
					t.Fatal(err)
				}
			}
			if _, err := f.reattach(); !errdefs.IsNotFound(err) {
				t.Errorf("reattach: %v", err)
			}
			select {
			case <-p.Done():
			case <-time.After(5 * time.Second):
				t.Error("the VMM still runs")
			}
			wantFiles(t, f.spec.Dir, "vmm.log")
		})
	}
}

// A daemon that was killed while it read an event leaves the rest of it.
func TestReattachAmidAnEvent(t *testing.T) {
	f := newFixture(t)
	orphan(t, f)
	boot(t, f)
	r, err := os.OpenFile(eventsPath(f.spec.Dir), os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.Read(make([]byte, 50)); err != nil {
		t.Fatal(err)
	}
	r.Close()
	v, err := f.reattach()
	if err != nil {
		t.Fatal(err)
	}
	dial(t, f, v)
	if err := syscall.Kill(v.PID(), vmtest.SignalReboot); err != nil {
		t.Fatal(err)
	}
	if e := f.died(v); e.Reason != "guest rebooted" {
		t.Errorf("exit %+v", e)
	}
}

func waitingEvents(t *testing.T, dir string) int {
	t.Helper()
	f, err := os.OpenFile(eventsPath(dir), os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	n, _, err := pipeFill(f)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func TestReattachWithoutConsole(t *testing.T) {
	f := newFixture(t)
	orphan(t, f)
	boot(t, f)
	if err := os.Remove(serialPath(f.spec.Dir)); err != nil {
		t.Fatal(err)
	}
	v, err := f.reattach()
	if err != nil {
		t.Fatal(err)
	}
	dial(t, f, v)
}

// A VMM that does not answer may still run its guest: nothing is done to it.
func TestReattachToVMMThatHangs(t *testing.T) {
	f := newFixture(t)
	p := orphan(t, f)
	boot(t, f)
	vmtest.Inject(t, f.spec.Dir, vmtest.Faults{Hang: "vm.info"})
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if _, err := f.driver.Reattach(ctx, f.spec.ID, f.spec.Dir); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("reattach: %v", err)
	}
	select {
	case <-p.Done():
		t.Error("the VMM was ended")
	default:
	}
}
