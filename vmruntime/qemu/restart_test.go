//go:build integration

package qemu

import (
	"context"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/crivm/crivm/agentproto"
	"github.com/crivm/crivm/vmruntime"
)

// boot starts a VM of this driver and waits for its agent.
func boot(t *testing.T, d *Driver) (*VM, *agentproto.Client) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes mount namespaces")
	}
	spec := template(t)
	dir, err := os.MkdirTemp("", "vmq")
	if err != nil {
		t.Fatal(err)
	}
	spec.ID, spec.Dir = filepath.Base(dir), dir
	t.Cleanup(func() {
		if err := d.Sweep(context.Background(), spec.ID, dir); err != nil {
			t.Error(err)
		}
		os.RemoveAll(dir)
	})
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	v, err := d.Start(ctx, spec)
	if err != nil {
		t.Fatal(err)
	}
	vm := v.(*VM)
	t.Cleanup(func() {
		if err := vm.Kill(context.Background()); err != nil {
			t.Error(err)
		}
	})
	agent, err := agentproto.Connect(ctx, vm)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { agent.Close() })
	return vm, agent
}

func zeros(t *testing.T, vm *VM, serial string) vmruntime.Disk {
	t.Helper()
	d := vmruntime.Disk{Serial: serial, Path: filepath.Join(vm.spec.Dir, "test-"+serial)}
	if err := os.WriteFile(d.Path, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	return d
}

// A daemon died at each point of an addition or a removal; the next one knows what is what.
func TestReconcile(t *testing.T) {
	d := New(Config{Accel: TCG})
	old, _ := boot(t, d)
	ctx := t.Context()
	disks := map[string]vmruntime.Disk{}
	add := func(serial string, p phase, backend, frontEnd bool) {
		t.Helper()
		disk := zeros(t, old, serial)
		disks[serial] = disk
		dev, err := old.state.put(device{Phase: p, Disk: &disk})
		if err != nil {
			t.Fatal(err)
		}
		if backend {
			if err := old.addBackend(ctx, dev); err != nil {
				t.Fatal(err)
			}
		}
		if frontEnd {
			if err := old.command(ctx, "device_add", frontend(dev), nil); err != nil {
				t.Fatal(err)
			}
		}
	}
	add("add-recorded", adding, false, false)
	add("add-backend", adding, true, false)
	add("add-done", adding, true, true)
	add("remove-recorded", removing, true, true)
	add("remove-frontend", removing, true, false)
	add("remove-done", removing, false, false)
	if err := old.state.save(); err != nil {
		t.Fatal(err)
	}
	old.monitor.Close()
	old.console.close()
	old.agent.close()
	old.agent.init(old.agent.path)

	v, err := d.Reattach(ctx, old.spec.ID, old.spec.Dir)
	if err != nil {
		t.Fatal(err)
	}
	vm := v.(*VM)
	for serial, want := range map[string]phase{
		"add-recorded": "", "add-backend": "", "add-done": plugged,
		"remove-recorded": removing, "remove-frontend": "", "remove-done": "",
	} {
		if got := vm.state.Devices["disk-"+serial].Phase; got != want {
			t.Errorf("%s is %q, want %q", serial, got, want)
		}
	}
	var nodes []struct {
		Name string `json:"node-name"`
	}
	if err := vm.command(ctx, "query-named-block-nodes", nil, &nodes); err != nil {
		t.Fatal(err)
	}
	for _, n := range nodes {
		switch n.Name {
		case "disk-add-backend", "disk-remove-frontend":
			t.Errorf("back end %s is left", n.Name)
		}
	}
	// All can be removed, and then added.
	for serial, disk := range disks {
		if err := vm.RemoveDisk(ctx, serial); err != nil {
			t.Errorf("remove %s: %v", serial, err)
		}
		if err := vm.AddDisk(ctx, disk); err != nil {
			t.Errorf("add %s: %v", serial, err)
		}
	}
}

// A lost monitor connection is made anew by the next call; events count on either.
func TestMonitorReconnects(t *testing.T) {
	vm, agent := boot(t, New(Config{Accel: TCG}))
	for range 3 {
		vm.monitor.Close()
		disk := zeros(t, vm, "disk")
		if err := vm.AddDisk(t.Context(), disk); err != nil {
			t.Fatal(err)
		}
		vm.monitor.Close()
		if err := vm.RemoveDisk(t.Context(), disk.Serial); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := agent.Shutdown(t.Context(), &agentproto.ShutdownRequest{}); err != nil {
		t.Fatal(err)
	}
	select {
	case <-vm.Done():
	case <-time.After(time.Minute):
		t.Fatal("the guest does not power off")
	}
	if r := vm.Exit().Reason; r != "guest powered off" {
		t.Errorf("reason %q", r)
	}
}
