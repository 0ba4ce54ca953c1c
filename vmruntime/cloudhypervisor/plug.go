package cloudhypervisor

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"

	"github.com/crivm/crivm/vmruntime"
	"github.com/crivm/crivm/vmruntime/chclient"
)

const (
	// removeWait is how long a guest may take to let a device go. The slot stays taken when it does not.
	removeWait = 5 * time.Second
	// removePoll is how often the device tree is looked at meanwhile, should the event be lost.
	removePoll = 250 * time.Millisecond
)

// AddDisk implements vmruntime.VM.
func (v *vm) AddDisk(ctx context.Context, d vmruntime.Disk) error {
	if err := checkDisk(d); err != nil {
		return err
	}
	device := d.Device
	if device != 0 {
		d.Path = filepath.Join(vmruntime.DeviceDir(v.dir), d.Serial) // as AddDevice says
	}
	return v.add(ctx, "disk "+d.Serial, diskID(d.Serial), func(c chclient.VMConfig) (bool, bool) {
		i := slices.IndexFunc(c.Disks, func(have chclient.DiskConfig) bool { return have.ID == diskID(d.Serial) })
		return i >= 0, i >= 0 && c.Disks[i].Path == d.Path && c.Disks[i].ReadOnly == d.ReadOnly
	}, func(segment int) error {
		if device != 0 {
			if _, err := v.proc.AddDevice(d.Serial, device, d.ReadOnly); err != nil {
				return err
			}
		}
		_, err := v.client.AddDisk(ctx, diskConfig(d, segment))
		if err != nil && device != 0 {
			err = errors.Join(err, v.proc.RemoveDevice(d.Serial))
		}
		return err
	})
}

// ResizeDisk implements vmruntime.VM. The VMM takes a size that the block device really has, and no other.
func (v *vm) ResizeDisk(ctx context.Context, serial string, bytes int64) error {
	fail := func(err error) error { return fmt.Errorf("resize disk %s of VM %s: %w", serial, v.id, v.explain(err)) }
	give, err := v.take(ctx)
	if err != nil {
		return fail(err)
	}
	defer give()
	info, err := v.client.Info(ctx)
	if err != nil {
		return fail(err)
	}
	if !hasDevice(info.Config, diskID(serial)) {
		return fail(errdefs.ErrNotFound)
	}
	if err := v.client.ResizeDisk(ctx, chclient.ResizeDisk{ID: diskID(serial), Size: bytes}); err != nil {
		return fail(err)
	}
	return nil
}

// RemoveDisk implements vmruntime.VM.
func (v *vm) RemoveDisk(ctx context.Context, serial string) error {
	if err := v.remove(ctx, "disk "+serial, diskID(serial)); err != nil {
		return err
	}
	err := v.proc.RemoveDevice(serial)
	if errdefs.IsFailedPrecondition(err) { // a VM without block devices
		return nil
	}
	return err
}

// ShowFile implements vmruntime.VM.
func (v *vm) ShowFile(source *os.File, path string) error {
	if err := v.proc.ShowFile(source, path); err != nil {
		return fmt.Errorf("VM %s: %w", v.id, err)
	}
	return nil
}

// AddNIC implements vmruntime.VM. The tap is looked for in the network namespace where the VMM runs.
func (v *vm) AddNIC(ctx context.Context, n vmruntime.NIC) error {
	if err := checkNIC(n); err != nil {
		return err
	}
	return v.add(ctx, "NIC "+n.ID, netID(n.ID), func(c chclient.VMConfig) (bool, bool) {
		i := slices.IndexFunc(c.Net, func(have chclient.NetConfig) bool { return have.ID == netID(n.ID) })
		return i >= 0, i >= 0 && strings.EqualFold(c.Net[i].MAC, n.MAC)
	}, func(segment int) error {
		return v.addNIC(ctx, "/proc/"+strconv.Itoa(v.proc.PID())+"/ns/net", n, segment)
	})
}

// RemoveNIC implements vmruntime.VM.
func (v *vm) RemoveNIC(ctx context.Context, id string) error {
	return v.remove(ctx, "NIC "+id, netID(id))
}

// AddShare implements vmruntime.VM.
func (v *vm) AddShare(ctx context.Context, s vmruntime.Share) error {
	if s.Tag == "" || len(s.Tag) > maxTag {
		return fmt.Errorf("share tag %q, want 1 to %d bytes: %w", s.Tag, maxTag, errdefs.ErrInvalidArgument)
	}
	// The VMM would wait for it for a minute, and serve nothing else.
	if fi, err := os.Stat(s.Socket); err != nil || fi.Mode().Type() != os.ModeSocket {
		return fmt.Errorf("share %s: no socket at %s: %w", s.Tag, s.Socket, errdefs.ErrFailedPrecondition)
	}
	return v.add(ctx, "share "+s.Tag, shareID(s.Tag), func(c chclient.VMConfig) (bool, bool) {
		i := slices.IndexFunc(c.FS, func(have chclient.FSConfig) bool { return have.ID == shareID(s.Tag) })
		return i >= 0, i >= 0 && c.FS[i].Socket == s.Socket
	}, func(segment int) error {
		_, err := v.client.AddFS(ctx, chclient.FSConfig{
			ID: shareID(s.Tag), Tag: s.Tag, Socket: s.Socket, NumQueues: 1, QueueSize: 1024, PCISegment: segment,
		})
		return err
	})
}

// RemoveShare implements vmruntime.VM.
func (v *vm) RemoveShare(ctx context.Context, tag string) error {
	return v.remove(ctx, "share "+tag, shareID(tag))
}

// add plugs a device unless the configuration has it already. find says whether there is one of that ID, and
// whether it is the same.
func (v *vm) add(ctx context.Context, what, id string, find func(chclient.VMConfig) (known, same bool), plug func(segment int) error) error {
	fail := func(err error) error { return fmt.Errorf("add %s to VM %s: %w", what, v.id, v.explain(err)) }
	give, err := v.take(ctx)
	if err != nil {
		return fail(err)
	}
	defer give()
	info, err := v.client.Info(ctx)
	if err != nil {
		return fail(err)
	}
	if known, same := find(info.Config); same {
		return nil
	} else if known {
		return fail(errdefs.ErrAlreadyExists)
	}
	if _, leaving := info.DeviceTree[id]; leaving {
		if err := v.awaitRemoval(ctx, id); err != nil {
			return fail(fmt.Errorf("an earlier one is still there: %w", err))
		}
	}
	if strings.HasPrefix(id, shareID("")) && (info.Config.Memory == nil || !info.Config.Memory.Shared) {
		return fail(fmt.Errorf("the VM has no shared memory: %w", errdefs.ErrFailedPrecondition))
	}
	segment, err := freeSegment(info)
	if err != nil {
		return fail(err)
	}
	if err := plug(segment); err != nil {
		return fail(err)
	}
	return nil
}

// remove asks the guest to let a device go and waits until it has.
func (v *vm) remove(ctx context.Context, what, id string) error {
	fail := func(err error) error { return fmt.Errorf("remove %s from VM %s: %w", what, v.id, v.explain(err)) }
	give, err := v.take(ctx)
	if err != nil {
		return fail(err)
	}
	defer give()
	info, err := v.client.Info(ctx)
	if err != nil {
		return fail(err)
	}
	if hasDevice(info.Config, id) {
		if err := v.client.RemoveDevice(ctx, id); err != nil {
			return fail(err)
		}
	} else if _, leaving := info.DeviceTree[id]; !leaving {
		return nil
	}
	if err := v.awaitRemoval(ctx, id); err != nil {
		return fail(err)
	}
	return nil
}

func hasDevice(c chclient.VMConfig, id string) bool {
	return slices.ContainsFunc(c.Disks, func(d chclient.DiskConfig) bool { return d.ID == id }) ||
		slices.ContainsFunc(c.Net, func(n chclient.NetConfig) bool { return n.ID == id }) ||
		slices.ContainsFunc(c.FS, func(f chclient.FSConfig) bool { return f.ID == id })
}

// awaitRemoval returns when the device tree no longer has the device. A guest that hangs keeps it: then
// errdefs.ErrUnavailable, and a later removal waits again.
func (v *vm) awaitRemoval(ctx context.Context, id string) error {
	ctx, cancel := context.WithTimeout(ctx, removeWait)
	defer cancel()
	for {
		v.mu.Lock()
		changed := v.changed
		v.mu.Unlock()
		info, err := v.client.Info(ctx)
		if err == nil {
			if _, there := info.DeviceTree[id]; !there {
				return nil
			}
		} else if ctx.Err() == nil {
			return err
		}
		select {
		case <-changed:
		case <-time.After(removePoll):
		case <-v.done:
			return v.gone()
		case <-ctx.Done():
			return fmt.Errorf("the guest has not let it go: %w: %w", ctx.Err(), errdefs.ErrUnavailable)
		}
	}
}

// freeSegment is the first PCI segment with a free slot. Devices that are being removed still have theirs.
func freeSegment(info chclient.VMInfo) (int, error) {
	segments := 1
	if p := info.Config.Platform; p != nil && p.NumPCISegments > 1 {
		segments = min(p.NumPCISegments, maxSegments)
	}
	used := make([]map[string]bool, segments)
	for _, node := range info.DeviceTree {
		// "0000:00:05.0": segment, bus, slot, function.
		segment, rest, ok := strings.Cut(node.PCIBDF, ":")
		n, err := strconv.ParseUint(segment, 16, 16)
		if !ok || err != nil || int(n) >= segments || strings.HasPrefix(rest, "00:00.") {
			continue
		}
		if used[n] == nil {
			used[n] = map[string]bool{}
		}
		used[n][rest] = true
	}
	for i, u := range used {
		if len(u) < slots {
			return i, nil
		}
	}
	return 0, fmt.Errorf("all %d PCI slots are taken: %w", segments*slots, errdefs.ErrResourceExhausted)
}
