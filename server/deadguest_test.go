package server

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crivm/crivm/vmruntime"
	"github.com/crivm/crivm/vmruntime/vmtest"
)

// children of a process.
func children(t *testing.T, pid int) (found []int) {
	t.Helper()
	entries, err := os.ReadDir("/proc")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		text, err := os.ReadFile(filepath.Join("/proc", e.Name(), "stat"))
		if err != nil {
			continue
		}
		var child, parent int
		var state string
		if _, err := fmt.Sscanf(string(text[:strings.IndexByte(string(text), ' ')]), "%d", &child); err != nil {
			continue
		}
		if _, err := fmt.Sscanf(string(text[strings.LastIndexByte(string(text), ')')+1:]), " %s %d", &state, &parent); err == nil && parent == pid {
			found = append(found, child)
		}
	}
	return found
}

// TestDeadAndLyingGuests: each way in which a VM ends, or its guest stops being one, is noticed in time, told by records
// and events with a reason, and stopped and removed within seconds; the other pod notices nothing.
func TestDeadAndLyingGuests(t *testing.T) {
	const health = 5 * time.Second // a busy machine silences the other guest for seconds
	signal := func(s syscall.Signal) func(*testing.T, *rig, string, vmruntime.VM) {
		return func(t *testing.T, _ *rig, _ string, vm vmruntime.VM) {
			if err := syscall.Kill(vm.PID(), s); err != nil {
				t.Error(err)
			}
		}
	}
	r := newRig(t)
	r.setHealth(health)
	r.restart()
	other := r.runPod("other")
	well := r.run(other, "well", "exec sleep 1000")
	for _, test := range []struct {
		name    string
		hurt    func(*testing.T, *rig, string, vmruntime.VM)
		message string        // in the containers' exit
		limit   time.Duration // to be noticed; 0: never, the pod goes on
	}{
		{"VMM killed", signal(syscall.SIGKILL), "signal 9", 2 * time.Second},
		{"guest panics", signal(vmtest.SignalPanic), "panic", 2 * time.Second},
		{"guest reboots", signal(vmtest.SignalReboot), "reboot", 2 * time.Second},
		{"vCPU error", signal(vmtest.SignalVCPUError), "VCPU", 2 * time.Second},
		{"agent killed, triple fault", func(t *testing.T, _ *rig, _ string, vm vmruntime.VM) {
			for _, pid := range children(t, vm.PID()) {
				syscall.Kill(pid, syscall.SIGKILL)
			}
		}, "reboot", 2 * time.Second},
		{"VMM hangs", signal(syscall.SIGSTOP), "silent", health + 2*time.Second},
		{"agent silent", func(t *testing.T, _ *rig, _ string, vm vmruntime.VM) {
			for _, pid := range children(t, vm.PID()) {
				syscall.Kill(pid, syscall.SIGSTOP)
			}
		}, "silent", health + 2*time.Second},
		{"transport reset", func(_ *testing.T, r *rig, pod string, _ vmruntime.VM) { r.sandbox(pod).disconnect() }, "", 0},
		{"virtio devices reset", func(t *testing.T, r *rig, pod string, vm vmruntime.VM) {
			rec, err := r.store.Sandbox(pod)
			if err != nil {
				t.Fatal(err)
			}
			vmtest.Inject(t, rec.VMDir, vmtest.Faults{EventFlood: 20})
			signal(vmtest.SignalFlood)(t, r, pod, vm)
		}, "", 0},
	} {
		t.Run(test.name, func(t *testing.T) {
			pod := r.runPod("a")
			id, waits := r.run(pod, "c", "exec sleep 1000"), r.create(pod, "d", "true")
			vm, err := r.sandbox(pod).machine()
			if err != nil {
				t.Fatal(err)
			}
			events := r.events.subscribe()
			defer r.events.unsubscribe(events)
			start := time.Now()
			test.hurt(t, r, pod, vm)
			if test.limit == 0 {
				for range 5 {
					if out, err := r.ExecSync(t.Context(), &cri.ExecSyncRequest{ContainerId: id, Cmd: []string{"echo", "on"}, Timeout: 20}); err != nil || string(out.GetStdout()) != "on\n" {
						t.Errorf("exec: %v (%v)", out, err)
					}
				}
				if !r.Server.ready(pod) {
					t.Error("the sandbox is not READY any more")
				}
				r.RemovePodSandbox(t.Context(), &cri.RemovePodSandboxRequest{PodSandboxId: pod})
				return
			}
			exec := make(chan error, 1)
			go func() {
				_, err := r.ExecSync(t.Context(), &cri.ExecSyncRequest{ContainerId: well, Cmd: []string{"true"}, Timeout: 20})
				exec <- err
			}()
			stopped := map[string]bool{}
			for limit := time.After(test.limit + 20*time.Second); len(stopped) < 3; {
				select {
				case e := <-events.queue:
					if e.GetContainerEventType() == cri.ContainerEventType_CONTAINER_STOPPED_EVENT {
						stopped[e.GetContainerId()] = true
					}
				case <-limit:
					t.Fatalf("events came of %v", stopped)
				}
			}
			if took := time.Since(start); took > test.limit && !raceDetector {
				t.Errorf("told after %s", took)
			} else {
				t.Logf("told after %s", took.Round(time.Millisecond))
			}
			if !stopped[pod] || !stopped[id] || !stopped[waits] {
				t.Errorf("events came of %v", stopped)
			}
			for _, c := range []string{id, waits} {
				if s := r.exit(c); s.GetExitCode() == 0 || s.GetReason() != reasonError || !strings.Contains(strings.ToLower(s.GetMessage()), strings.ToLower(test.message)) {
					t.Errorf("container is %v", s)
				}
			}
			if r.Server.ready(pod) {
				t.Error("the sandbox is READY")
			}
			if err := <-exec; err != nil {
				t.Errorf("exec in the other pod: %v", err)
			}
			start = time.Now()
			_, stopErr := r.StopPodSandbox(t.Context(), &cri.StopPodSandboxRequest{PodSandboxId: pod})
			_, removeErr := r.RemovePodSandbox(t.Context(), &cri.RemovePodSandboxRequest{PodSandboxId: pod})
			if err := errors.Join(stopErr, removeErr); err != nil || time.Since(start) > 10*time.Second {
				t.Errorf("stop and remove: %v after %s", err, time.Since(start))
			}
			if !gone(vm.PID()) {
				t.Error("the VMM is still there")
			}
		})
	}
}

// unkillable is a driver whose VMs do not end while it is stuck, like processes that wait for a dead disk.
type unkillable struct {
	Driver
	stuck atomic.Bool
}

func (d *unkillable) Start(ctx context.Context, s vmruntime.Spec) (vmruntime.VM, error) {
	vm, err := d.Driver.Start(ctx, s)
	if err != nil {
		return nil, err
	}
	return unkillableVM{vm, d}, nil
}

type unkillableVM struct {
	vmruntime.VM
	d *unkillable
}

func (v unkillableVM) Kill(ctx context.Context) error {
	if v.d.stuck.Load() {
		return fmt.Errorf("killed process %d has not ended: %w", v.PID(), errdefs.ErrUnavailable)
	}
	return v.VM.Kill(ctx)
}

// TestUnkillableVMM: what cannot be ended now is said, is NOTREADY meanwhile, and ends with a later try. Nothing that its
// VM may still use is taken from it.
func TestUnkillableVMM(t *testing.T) {
	r := newRig(t)
	handler := r.opts.Handlers[""]
	driver := &unkillable{Driver: handler.Driver}
	handler.Driver = driver
	r.opts.Handlers[""] = handler
	r.restart()
	pod := r.runPod("a")
	rec, err := r.store.Sandbox(pod)
	if err != nil {
		t.Fatal(err)
	}
	driver.stuck.Store(true)
	for range 2 {
		if _, err := r.StopPodSandbox(t.Context(), &cri.StopPodSandboxRequest{PodSandboxId: pod}); !errdefs.IsUnavailable(err) {
			t.Errorf("stop: %v", err)
		}
		if _, err := r.RemovePodSandbox(t.Context(), &cri.RemovePodSandboxRequest{PodSandboxId: pod}); !errdefs.IsUnavailable(err) {
			t.Errorf("remove: %v", err)
		}
	}
	for _, path := range []string{rec.NetnsPath, filepath.Join(rec.Dir, "scratch.img"), rec.VMDir} {
		if _, err := os.Stat(path); err != nil {
			t.Errorf("taken from a VM that may run: %v", err)
		}
	}
	if status, err := r.PodSandboxStatus(t.Context(), &cri.PodSandboxStatusRequest{PodSandboxId: pod}); err != nil || status.GetStatus().GetState() != cri.PodSandboxState_SANDBOX_NOTREADY {
		t.Errorf("sandbox is %v (%v)", status, err)
	}
	driver.stuck.Store(false)
	if _, err := r.RemovePodSandbox(t.Context(), &cri.RemovePodSandboxRequest{PodSandboxId: pod}); err != nil {
		t.Error(err)
	}
}

// killAll ends the VMMs of pods one after the other and returns how long it took until the record and the event said so.
func (r *rig) killAll() (took []time.Duration) {
	r.t.Helper()
	events := r.events.subscribe()
	defer r.events.unsubscribe(events)
	for _, rec := range r.store.Sandboxes() {
		vm, err := r.sandbox(rec.ID).machine()
		if err != nil {
			r.t.Fatal(err)
		}
		start := time.Now()
		if err := syscall.Kill(vm.PID(), syscall.SIGKILL); err != nil {
			r.t.Fatal(err)
		}
		for limit := time.After(20 * time.Second); ; {
			var e *cri.ContainerEventResponse
			select {
			case e = <-events.queue:
			case <-limit:
				r.t.Fatalf("no event of the death of %s", rec.ID)
			}
			if e.GetContainerId() == rec.ID && e.GetContainerEventType() == cri.ContainerEventType_CONTAINER_STOPPED_EVENT {
				break
			}
		}
		if r.Server.ready(rec.ID) {
			r.t.Errorf("sandbox %s is READY after the event", rec.ID)
		}
		took = append(took, time.Since(start))
	}
	slices.Sort(took)
	return took
}
