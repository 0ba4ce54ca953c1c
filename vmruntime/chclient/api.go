package chclient

import (
	"context"
	"fmt"
	"net/http"
	"os"

	"github.com/containerd/errdefs"
)

// Ping asks who the VMM is; the client then knows its version.
func (c *Client) Ping(ctx context.Context) (PingReply, error) {
	var p PingReply
	if err := c.get(ctx, "vmm.ping", &p); err != nil {
		return PingReply{}, err
	}
	text := p.BuildVersion
	if text == "" {
		text = p.Version
	}
	v, err := ParseVersion(text)
	if err != nil {
		return p, fmt.Errorf("cloud-hypervisor vmm.ping: %w", err)
	}
	c.version.Store(&v)
	return p, nil
}

// since refuses what an older VMM would silently ignore.
func (c *Client) since(ctx context.Context, min Version, what string) error {
	v := c.version.Load()
	if v == nil {
		if _, err := c.Ping(ctx); err != nil {
			return err
		}
		v = c.version.Load()
	}
	if v.Less(min) {
		return fmt.Errorf("%s needs cloud-hypervisor %s, this is %s: %w", what, min, v, errdefs.ErrNotImplemented)
	}
	return nil
}

// ShutdownVMM ends the VM without asking the guest, and the VMM process.
func (c *Client) ShutdownVMM(ctx context.Context) error { return c.put(ctx, "vmm.shutdown", nil) }

// Create stores the configuration. Most of it is checked by Boot only.
func (c *Client) Create(ctx context.Context, v VMConfig) error { return c.put(ctx, "vm.create", v) }

// Boot returns when the vCPUs run.
func (c *Client) Boot(ctx context.Context) error { return c.putLong(ctx, "vm.boot", nil) }

// Delete stops the VM without asking the guest and forgets its configuration. No error when there is none.
func (c *Client) Delete(ctx context.Context) error { return c.put(ctx, "vm.delete", nil) }

// Shutdown stops the VM without asking the guest and keeps its configuration.
func (c *Client) Shutdown(ctx context.Context) error { return c.put(ctx, "vm.shutdown", nil) }

// Reboot stops the VM without asking the guest and boots it anew.
func (c *Client) Reboot(ctx context.Context) error { return c.putLong(ctx, "vm.reboot", nil) }

// PowerButton presses the guest's ACPI power button.
func (c *Client) PowerButton(ctx context.Context) error { return c.put(ctx, "vm.power-button", nil) }

// NMI sends a non-maskable interrupt.
func (c *Client) NMI(ctx context.Context) error { return c.put(ctx, "vm.nmi", nil) }

// Pause returns when the vCPUs stand still and I/O is drained.
func (c *Client) Pause(ctx context.Context) error { return c.putLong(ctx, "vm.pause", nil) }

// Resume continues a paused VM.
func (c *Client) Resume(ctx context.Context) error { return c.put(ctx, "vm.resume", nil) }

// Info tells state, configuration and devices; errdefs.ErrNotFound before Create (v53 and later).
func (c *Client) Info(ctx context.Context) (VMInfo, error) {
	var i VMInfo
	return i, c.get(ctx, "vm.info", &i)
}

// Counters of the devices that have some, by device ID and counter; they wrap.
func (c *Client) Counters(ctx context.Context) (map[string]map[string]uint64, error) {
	var m map[string]map[string]uint64
	return m, c.get(ctx, "vm.counters", &m)
}

// Resize changes vCPUs, memory and balloon, in this order and not as one. errdefs.ErrUnavailable while an
// earlier removal of vCPUs is pending.
func (c *Client) Resize(ctx context.Context, r Resize) error { return c.put(ctx, "vm.resize", r) }

// ResizeZone changes the size of a memory zone with virtio-mem.
func (c *Client) ResizeZone(ctx context.Context, r ResizeZone) error {
	return c.put(ctx, "vm.resize-zone", r)
}

// ResizeDisk changes the size of a disk and of its file.
func (c *Client) ResizeDisk(ctx context.Context, r ResizeDisk) error {
	return c.put(ctx, "vm.resize-disk", r)
}

// add plugs a device. The reply is empty when the VM has not been booted yet.
func (c *Client) add(ctx context.Context, action string, in any, files ...*os.File) (PCIDevice, error) {
	var d PCIDevice
	q := call{method: http.MethodPut, action: action, in: in, out: &d, files: files, timeout: callTimeout}
	if action == "vm.add-fs" {
		q.timeout = longTimeout + callTimeout // the VMM itself waits up to a minute for the socket
	}
	return d, c.do(ctx, q)
}

// AddDisk plugs a virtio-blk disk.
func (c *Client) AddDisk(ctx context.Context, d DiskConfig) (PCIDevice, error) {
	return c.add(ctx, "vm.add-disk", d)
}

// AddFS plugs a virtio-fs device. The VMM serves nothing else while it waits, for up to a minute, for a socket
// where nobody listens.
func (c *Client) AddFS(ctx context.Context, f FSConfig) (PCIDevice, error) {
	return c.add(ctx, "vm.add-fs", f)
}

// AddNet plugs a NIC; taps, if any, are the queue pairs of one tap and replace NetConfig.Tap. They may be closed
// afterwards.
func (c *Client) AddNet(ctx context.Context, n NetConfig, taps ...*os.File) (PCIDevice, error) {
	if len(taps) > 0 && n.NumQueues != 2*len(taps) {
		return PCIDevice{}, fmt.Errorf("net %s: %d queues for %d taps, want two each: %w", n.ID, n.NumQueues, len(taps), errdefs.ErrInvalidArgument)
	}
	return c.add(ctx, "vm.add-net", n, taps...)
}

// AddDevice plugs a VFIO device, given by its sysfs path or, from v53 on, by its open cdev.
func (c *Client) AddDevice(ctx context.Context, d DeviceConfig, cdev ...*os.File) (PCIDevice, error) {
	if len(cdev) > 0 {
		if err := c.since(ctx, Version{53, 0}, "a VFIO device by file descriptor"); err != nil {
			return PCIDevice{}, err
		}
	}
	if len(cdev) > 1 || (len(cdev) == 1) == (d.Path != "") {
		return PCIDevice{}, fmt.Errorf("device %s: one path or one file: %w", d.ID, errdefs.ErrInvalidArgument)
	}
	return c.add(ctx, "vm.add-device", d, cdev...)
}

// AddVsock plugs the vsock device; there can be one.
func (c *Client) AddVsock(ctx context.Context, v VsockConfig) (PCIDevice, error) {
	return c.add(ctx, "vm.add-vsock", v)
}

// AddPmem plugs a persistent memory device.
func (c *Client) AddPmem(ctx context.Context, p PmemConfig) (PCIDevice, error) {
	return c.add(ctx, "vm.add-pmem", p)
}

// RemoveDevice asks the guest to let a device go. It has gone when the event vm/device-removed says so or its
// ID is no longer in the device tree, which a hung guest delays for ever.
func (c *Client) RemoveDevice(ctx context.Context, id string) error {
	return c.put(ctx, "vm.remove-device", struct {
		ID string `json:"id"`
	}{id})
}

// Snapshot writes a paused VM to an existing, empty directory.
func (c *Client) Snapshot(ctx context.Context, dir string) error {
	return c.putLong(ctx, "vm.snapshot", struct {
		URL string `json:"destination_url"`
	}{"file://" + dir})
}

// Restore makes a VM from a snapshot in a VMM that has none. files are the taps of r.NetFDs, in that order.
func (c *Client) Restore(ctx context.Context, r RestoreConfig, files ...*os.File) error {
	want := 0
	for _, n := range r.NetFDs {
		want += n.NumFDs
	}
	if want != len(files) {
		return fmt.Errorf("restore: %d files for %d expected: %w", len(files), want, errdefs.ErrInvalidArgument)
	}
	if r.Resume || r.MemoryRestoreMode != "" {
		if err := c.since(ctx, Version{52, 0}, "restore on demand or with resume"); err != nil {
			return err
		}
	}
	return c.do(ctx, call{method: http.MethodPut, action: "vm.restore", in: r, files: files, timeout: longTimeout})
}
