package qemu

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/containerd/errdefs"

	"github.com/crivm/crivm/vmruntime"
)

const (
	// removeWait bounds the wait for a guest to let go of a device, whatever ctx allows.
	removeWait = time.Minute
	// removePoll is how often a removal is looked up, in case its event was lost with a connection.
	removePoll = 2 * time.Second
)

// AddDisk plugs a disk. QEMU opens it as its own user.
func (vm *VM) AddDisk(ctx context.Context, d vmruntime.Disk) error {
	return vm.add(ctx, device{Disk: &d})
}

// RemoveDisk unplugs a disk and closes its file.
func (vm *VM) RemoveDisk(ctx context.Context, serial string) error {
	return vm.remove(ctx, device{Disk: &vmruntime.Disk{Serial: serial}}.id())
}

// ShowFile lets QEMU open a file of the host by another path.
func (vm *VM) ShowFile(source *os.File, path string) error {
	if err := vm.proc.ShowFile(source, path); err != nil {
		return fmt.Errorf("VM %s: %w", vm.spec.ID, err)
	}
	return nil
}

// ResizeDisk has QEMU look at the size of a block device again and tell the guest.
func (vm *VM) ResizeDisk(ctx context.Context, serial string, bytes int64) error {
	end, err := vm.change(ctx)
	if err != nil {
		return err
	}
	defer end()
	id := device{Disk: &vmruntime.Disk{Serial: serial}}.id()
	d, ok := vm.state.Devices[id]
	switch {
	case !ok:
		return fmt.Errorf("VM %s: resize %s: %w", vm.spec.ID, id, errdefs.ErrNotFound)
	case d.Disk.ReadOnly:
		return fmt.Errorf("VM %s: resize %s: QEMU changes the size of no read-only disk: %w", vm.spec.ID, id, errdefs.ErrNotImplemented)
	}
	if err := vm.command(ctx, "block_resize", map[string]any{"node-name": id, "size": bytes}, nil); err != nil {
		return fmt.Errorf("VM %s: resize %s: %w", vm.spec.ID, id, err)
	}
	return nil
}

// AddNIC plugs a NIC on a tap of the VM's network namespace.
func (vm *VM) AddNIC(ctx context.Context, n vmruntime.NIC) error {
	return vm.add(ctx, device{NIC: &n})
}

// RemoveNIC unplugs a NIC and closes its tap.
func (vm *VM) RemoveNIC(ctx context.Context, id string) error {
	return vm.remove(ctx, device{NIC: &vmruntime.NIC{ID: id}}.id())
}

// AddShare plugs a virtio-fs device. QEMU connects to the socket as its own user.
func (vm *VM) AddShare(ctx context.Context, s vmruntime.Share) error {
	if !vm.spec.SharedMemory {
		return fmt.Errorf("VM %s: share %s: guest memory is not shared: %w", vm.spec.ID, s.Tag, errdefs.ErrFailedPrecondition)
	}
	return vm.add(ctx, device{Share: &s})
}

// RemoveShare unplugs a virtio-fs device and disconnects, upon which its server ends.
func (vm *VM) RemoveShare(ctx context.Context, tag string) error {
	return vm.remove(ctx, device{Share: &vmruntime.Share{Tag: tag}}.id())
}

func (vm *VM) add(ctx context.Context, d device) error {
	if err := d.validate(); err != nil {
		return fmt.Errorf("VM %s: %w", vm.spec.ID, err)
	}
	end, err := vm.change(ctx)
	if err != nil {
		return err
	}
	defer end()
	if err := vm.addLocked(ctx, d); err != nil {
		return fmt.Errorf("VM %s: add %s: %w", vm.spec.ID, d.id(), err)
	}
	return nil
}

func (vm *VM) addLocked(ctx context.Context, d device) error {
	if old, ok := vm.state.Devices[d.id()]; ok && old.Phase == adding {
		if err := vm.resolve(ctx, old); err != nil { // an earlier attempt of which the outcome is unknown
			return err
		}
	}
	if old, ok := vm.state.Devices[d.id()]; ok {
		switch {
		case !old.same(d):
			return fmt.Errorf("another device has this name: %w", errdefs.ErrAlreadyExists)
		case old.Phase == removing:
			return fmt.Errorf("it is being removed: %w", errdefs.ErrFailedPrecondition)
		}
		return nil
	}
	d.Phase = adding
	d, err := vm.state.put(d)
	if err != nil {
		return err
	}
	if err := vm.state.save(); err != nil {
		delete(vm.state.Devices, d.id())
		return err
	}
	err = vm.addBackend(ctx, d)
	if err == nil {
		err = vm.command(ctx, "device_add", frontend(d), nil)
	}
	if err != nil {
		if !isRefusal(err) && vm.dead() == nil {
			return err // it may or may not be there; the next call finds out
		}
		return errors.Join(err, vm.forget(ctx, d))
	}
	return vm.setPhase(d, plugged)
}

// addBackend makes the host's side of a device.
func (vm *VM) addBackend(ctx context.Context, d device) error {
	switch {
	case d.Disk != nil:
		disk := *d.Disk
		if disk.Device != 0 {
			var err error
			if disk.Path, err = vm.proc.AddDevice(disk.Serial, disk.Device, disk.ReadOnly); err != nil {
				return refused(err)
			}
		}
		node, err := blockNode(disk)
		if err != nil {
			return refused(err)
		}
		return vm.command(ctx, "blockdev-add", node, nil)
	case d.NIC != nil:
		tap, err := vmruntime.OpenTap(vm.spec.Process.NetnsPath, d.NIC.Tap)
		if err != nil {
			return refused(err)
		}
		defer tap.Close()
		return vm.addTap(ctx, d.id(), tap)
	default:
		return vm.command(ctx, "chardev-add", map[string]any{"id": d.id(), "backend": map[string]any{
			"type": "socket", "data": map[string]any{
				"addr":   map[string]any{"type": "unix", "data": map[string]any{"path": d.Share.Socket}},
				"server": false,
			},
		}}, nil)
	}
}

// addTap hands a tap over. QEMU keeps a descriptor for the connection that sent it, so both commands have
// to travel on the same one.
func (vm *VM) addTap(ctx context.Context, id string, tap *os.File) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), commandWait)
	defer cancel()
	q, err := vm.connected(ctx)
	if err != nil {
		return err
	}
	if err := q.execute(ctx, "getfd", map[string]any{"fdname": id}, nil, tap); err != nil {
		return err
	}
	return q.execute(ctx, "netdev_add", map[string]any{"type": "tap", "id": id, "fd": id}, nil)
}

// removeBackend undoes addBackend; what is not there counts as removed.
func (vm *VM) removeBackend(ctx context.Context, d device) error {
	var command, key string
	switch {
	case d.Disk != nil:
		command, key = "blockdev-del", "node-name"
	case d.NIC != nil:
		command, key = "netdev_del", "id"
	default:
		command, key = "chardev-remove", "id"
	}
	var err error
	for range 50 { // the front end lets go of it shortly after DEVICE_DELETED
		err = vm.command(ctx, command, map[string]any{key: d.id()}, nil)
		if err == nil || !isRefusal(err) || absent(err) {
			break
		}
		time.Sleep(20 * time.Millisecond)
	}
	if absent(err) {
		return nil
	}
	return err
}

// absent reports whether QEMU says that a device or back end does not exist.
func absent(err error) bool {
	if err == nil || !isRefusal(err) {
		return false
	}
	s := err.Error()
	return errdefs.IsNotFound(err) || strings.Contains(s, "Failed to find node") || strings.Contains(s, "not found")
}

// refused marks an error of our own before anything reached QEMU, so that it is undone like a refusal.
func refused(err error) error { return &localError{err} }

type localError struct{ err error }

func (e *localError) Error() string { return e.err.Error() }
func (e *localError) Unwrap() []error {
	return []error{e.err, &qmpError{Class: "GenericError", Desc: e.err.Error()}}
}

// forget removes what may exist of the host's side of a device without a front end, and its record.
func (vm *VM) forget(ctx context.Context, d device) error {
	if vm.dead() == nil {
		if err := vm.removeBackend(ctx, d); err != nil {
			return err
		}
		if d.Disk != nil && d.Disk.Device != 0 {
			if err := vm.proc.RemoveDevice(d.Disk.Serial); err != nil {
				return err
			}
		}
	}
	delete(vm.state.Devices, d.id())
	return vm.state.save()
}

func (vm *VM) setPhase(d device, p phase) error {
	d.Phase = p
	vm.state.Devices[d.id()] = d
	return vm.state.save()
}

func (vm *VM) remove(ctx context.Context, id string) error {
	end, err := vm.change(ctx)
	if err != nil {
		return err
	}
	defer end()
	d, ok := vm.state.Devices[id]
	if !ok {
		return nil
	}
	if err := vm.removeLocked(ctx, d); err != nil {
		return fmt.Errorf("VM %s: remove %s: %w", vm.spec.ID, id, err)
	}
	return nil
}

func (vm *VM) removeLocked(ctx context.Context, d device) error {
	if err := vm.setPhase(d, removing); err != nil {
		return err
	}
	id := d.id()
	gone := make(chan error, 1)
	vm.mu.Lock()
	vm.gone[id] = gone
	vm.mu.Unlock()
	defer func() {
		vm.mu.Lock()
		if vm.gone[id] == gone {
			delete(vm.gone, id)
		}
		vm.mu.Unlock()
	}()
	err := vm.command(ctx, "device_del", map[string]any{"id": id}, nil)
	switch {
	case absent(err):
	case err != nil && !(isRefusal(err) && strings.Contains(err.Error(), "in the process of unplug")):
		return err
	default:
		if err := vm.awaitGone(ctx, d, gone); err != nil {
			return err
		}
	}
	return vm.forget(ctx, d)
}

// awaitGone waits until the guest has let go of a device. One that has not booted yet does so when it has.
func (vm *VM) awaitGone(ctx context.Context, d device, gone <-chan error) error {
	limit := time.NewTimer(removeWait)
	defer limit.Stop()
	poll := time.NewTicker(removePoll)
	defer poll.Stop()
	for {
		select {
		case err := <-gone:
			return err
		case <-vm.done:
			return vm.dead()
		case <-ctx.Done():
			return fmt.Errorf("the guest has not let go of it: %w", ctx.Err())
		case <-limit.C:
			return fmt.Errorf("the guest has not let go of it within %v: %w", removeWait, context.DeadlineExceeded)
		case <-poll.C:
			there, err := vm.frontends(ctx)
			if err != nil {
				return err
			}
			if !there[d.id()] {
				return nil
			}
			// A guest that was still in its firmware or early boot never saw the request: ask again.
			err = vm.command(ctx, "device_del", map[string]any{"id": d.id()}, nil)
			if err != nil && !isRefusal(err) {
				return err
			}
		}
	}
}

// frontends lists the ids of the devices that QEMU has.
func (vm *VM) frontends(ctx context.Context) (map[string]bool, error) {
	var list []struct {
		Name string `json:"name"`
	}
	if err := vm.command(ctx, "qom-list", map[string]any{"path": "/machine/peripheral"}, &list); err != nil {
		return nil, err
	}
	there := make(map[string]bool, len(list))
	for _, e := range list {
		there[e.Name] = true
	}
	return there, nil
}

// resolve finds out how an interrupted change of a device ended.
func (vm *VM) resolve(ctx context.Context, d device) error {
	there, err := vm.frontends(ctx)
	if err != nil {
		return err
	}
	switch {
	case !there[d.id()]:
		return vm.forget(ctx, d)
	case d.Phase == adding:
		return vm.setPhase(d, plugged)
	}
	return nil // it is still being removed; the next removal waits for it
}

// reconcile resolves all interrupted changes, after a restart of the daemon. The VM is not in use yet.
func (vm *VM) reconcile(ctx context.Context) error {
	for _, d := range vm.state.Devices {
		if d.Phase == plugged {
			continue
		}
		if err := vm.resolve(ctx, d); err != nil {
			return fmt.Errorf("device %s: %w", d.id(), err)
		}
	}
	return nil
}
