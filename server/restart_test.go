package server

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crivm/crivm/server/store"
	"github.com/crivm/crivm/vmruntime"
)

// unplugs is a driver that notes which disks are unplugged.
type unplugs struct {
	Driver
	mu    sync.Mutex
	disks []string
}

func (d *unplugs) Reattach(ctx context.Context, id, dir string) (vmruntime.VM, error) {
	vm, err := d.Driver.Reattach(ctx, id, dir)
	if err != nil {
		return nil, err
	}
	return unplugsVM{vm, d}, nil
}

type unplugsVM struct {
	vmruntime.VM
	d *unplugs
}

func (v unplugsVM) RemoveDisk(ctx context.Context, serial string) error {
	v.d.mu.Lock()
	v.d.disks = append(v.d.disks, serial)
	v.d.mu.Unlock()
	return v.VM.RemoveDisk(ctx, serial)
}

// TestRestartKeepsSharedDisk: undoing a container that was being made leaves the disk that another one uses.
func TestRestartKeepsSharedDisk(t *testing.T) {
	r := newRig(t)
	pod := r.runPod("a")
	id := r.run(pod, "c", "exec sleep 1000")
	rec, err := r.store.Container(id)
	if err != nil {
		t.Fatal(err)
	}
	rec.ID, rec.Name, rec.State = newID(), "half made", store.ContainerCreating
	if _, err := r.store.CreateContainer(rec); err != nil {
		t.Fatal(err)
	}
	handler := r.opts.Handlers[""]
	watched := &unplugs{Driver: handler.Driver}
	handler.Driver = watched
	r.opts.Handlers[""] = handler
	r.restart()
	if _, err := r.store.Container(rec.ID); !errdefs.IsNotFound(err) {
		t.Errorf("the container that was half made is still there (%v)", err)
	}
	if len(watched.disks) > 0 {
		t.Errorf("unplugged are %v", watched.disks)
	}
	for range 2 { // a retry takes nobody else's disk away
		if err := r.unplugImage(t.Context(), r.sandbox(pod), "somebody", rec.ImageDisk); err != nil {
			t.Error(err)
		}
	}
	if len(watched.disks) > 0 {
		t.Errorf("unplugged are %v", watched.disks)
	}
	if _, err := r.RemoveContainer(t.Context(), &cri.RemoveContainerRequest{ContainerId: id}); err != nil {
		t.Error(err)
	}
	if len(watched.disks) != 1 {
		t.Errorf("after the last user unplugged are %v", watched.disks)
	}
}

// TestRestartSettles: what a daemon left between two records is brought to an end by the next.
func TestRestartSettles(t *testing.T) {
	r := newRig(t)
	pod := r.runPod("a")
	id := r.run(pod, "c", "exec sleep 1000")
	half, err := r.store.Container(id)
	if err != nil {
		t.Fatal(err)
	}
	half.ID, half.Name, half.State = newID(), "half made", store.ContainerCreating
	orphan := half
	orphan.ID, orphan.Name, orphan.SandboxID, orphan.State = newID(), "without a sandbox", newID(), store.ContainerCreated
	for _, rec := range []store.Container{half, orphan} {
		if _, err := r.store.CreateContainer(rec); err != nil {
			t.Fatal(err)
		}
	}
	vm, err := r.sandbox(pod).machine()
	if err != nil {
		t.Fatal(err)
	}
	// NOTREADY is recorded before the containers are EXITED. That the VM still runs here stands for a VM that could
	// not be ended.
	r.Server.cancel()
	if _, err := r.store.UpdateSandbox(pod, func(rec *store.Sandbox) error {
		rec.State, rec.Reason = store.SandboxNotReady, "VM ended: so it said"
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	r.restart()
	if s := r.exit(id); s.GetExitCode() != 137 || s.GetMessage() != "VM ended: so it said" {
		t.Errorf("container of a NOTREADY sandbox is %v", s)
	}
	for _, rec := range []store.Container{half, orphan} {
		if _, err := r.store.Container(rec.ID); !errdefs.IsNotFound(err) {
			t.Errorf("container %q is still there (%v)", rec.Name, err)
		}
	}
	if process := vm.PID(); !gone(process) {
		t.Errorf("VMM %d still runs", process)
	}
}

// TestReboot: after a reboot of the host nothing runs, and all that is recorded says so.
func TestReboot(t *testing.T) {
	r := newRig(t)
	pod := r.runPod("a")
	id := r.run(pod, "c", "exec sleep 1000")
	vm, err := r.sandbox(pod).machine()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.store.UpdateSandbox(pod, func(rec *store.Sandbox) error { rec.BootID = "an earlier one"; return nil }); err != nil {
		t.Fatal(err)
	}
	r.stop()
	if err := vm.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	r.start()
	if s := r.exit(id); s.GetExitCode() != 137 || s.GetMessage() != "the host was rebooted" {
		t.Errorf("container after a reboot is %v", s)
	}
	status, err := r.PodSandboxStatus(t.Context(), &cri.PodSandboxStatusRequest{PodSandboxId: pod})
	if err != nil || status.GetStatus().GetState() != cri.PodSandboxState_SANDBOX_NOTREADY {
		t.Errorf("sandbox after a reboot is %v (%v)", status, err)
	}
}

// TestRestartWithoutLogs: a container whose log's directory is gone goes on, and its exit is noticed.
func TestRestartWithoutLogs(t *testing.T) {
	r := newRig(t)
	pod := r.runPod("a")
	end := filepath.Join(r.dir, "end")
	id := r.run(pod, "c", "until [ -e "+end+" ]; do echo on; sleep 0.05; done; exit 7")
	r.stop()
	if err := os.RemoveAll(filepath.Join(r.dir, "logs")); err != nil {
		t.Fatal(err)
	}
	r.start()
	if err := os.WriteFile(end, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if s := r.exit(id); s.GetExitCode() != 7 {
		t.Errorf("exit code %d, want 7", s.GetExitCode())
	}
}

// TestExitIsNotForgotten: an exit that cannot be recorded is recorded later.
func TestExitIsNotForgotten(t *testing.T) {
	r := newRig(t)
	tries := 0
	start := time.Now()
	r.untilDone("testing", "id", func() error {
		if tries++; tries < 2 {
			return errors.New("disk full")
		}
		return nil
	})
	if tries != 2 || time.Since(start) < recordRetry {
		t.Errorf("%d tries within %s", tries, time.Since(start))
	}
	r.Server.cancel()
	r.untilDone("testing", "id", func() error { return errors.New("disk full") }) // ends with the server
}

// gone tells whether a process has ended or ends within some seconds.
func gone(pid int) bool {
	for limit := time.Now().Add(5 * time.Second); time.Now().Before(limit); time.Sleep(time.Millisecond) {
		if ended(pid) {
			return true
		}
	}
	return false
}
