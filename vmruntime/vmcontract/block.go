package vmcontract

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/crivm/crivm/vmruntime"
)

// LoopDevice is a block device on a sparse file of its own; both go with the test, the device even when the test
// process is killed, as it is detached by the last close.
func LoopDevice(t *testing.T, size int64) (device *os.File, grow func(size int64)) {
	t.Helper()
	file, err := os.OpenFile(filepath.Join(t.TempDir(), "disk"), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	if err := file.Truncate(size); err != nil {
		t.Fatal(err)
	}
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		t.Skipf("this machine has no loop devices: %v", err)
	}
	defer control.Close()
	for range 20 { // others may take the device that was free
		n, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			t.Fatalf("free loop device: %v", err)
		}
		if device, err = os.OpenFile(fmt.Sprintf("/dev/loop%d", n), os.O_RDWR, 0); err != nil {
			t.Fatal(err)
		}
		config := unix.LoopConfig{Fd: uint32(file.Fd())}
		config.Info.Flags = unix.LO_FLAGS_AUTOCLEAR
		if err = unix.IoctlLoopConfigure(int(device.Fd()), &config); err == nil {
			t.Cleanup(func() { device.Close() })
			name := file.Name()
			return device, func(size int64) {
				t.Helper()
				if err := errors.Join(os.Truncate(name, size), unix.IoctlSetInt(int(device.Fd()), unix.LOOP_SET_CAPACITY, 0)); err != nil {
					t.Fatalf("growing the loop device: %v", err)
				}
			}
		}
		device.Close()
		if !errors.Is(err, unix.EBUSY) {
			t.Fatalf("loop device: %v", err)
		}
	}
	t.Fatalf("no loop device is free for long enough: %v", err)
	return nil, nil
}

func number(t *testing.T, f *os.File) uint64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		t.Fatal(err)
	}
	return st.Rdev
}

// checkBlockDevice plugs a block device of root's, which the VMM's user may not open, and resizes it.
func (s *suite) checkBlockDevice(t *testing.T, vm vmruntime.VM, removable bool) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	device, grow := LoopDevice(t, 16<<20)
	for _, d := range []vmruntime.Disk{{Serial: "block", Device: number(t, device)}, {Serial: "block-ro", Device: number(t, device), ReadOnly: true}} {
		for range 2 {
			if err := vm.AddDisk(ctx, d); err != nil {
				t.Fatalf("%+v: %v", d, err)
			}
		}
		other := d
		other.ReadOnly = !d.ReadOnly
		if err := vm.AddDisk(ctx, other); !errdefs.IsAlreadyExists(err) {
			t.Errorf("serial in use: %v", err)
		}
	}
	grow(32 << 20)
	for _, serial := range []string{"block", "block-ro"} {
		for range 2 {
			if err := vm.ResizeDisk(ctx, serial, 32<<20); err != nil && !(serial == "block-ro" && errdefs.IsNotImplemented(err)) {
				t.Error(err)
			}
		}
		if err := vm.ResizeDisk(ctx, serial, 64<<20); err == nil {
			t.Error("a size that the device does not have is taken")
		}
	}
	if err := vm.ResizeDisk(ctx, "none", 32<<20); !errdefs.IsNotFound(err) {
		t.Errorf("resizing a disk that is not there: %v", err)
	}
	if err := vm.AddDisk(ctx, vmruntime.Disk{Serial: "gone", Device: unix.Mkdev(240, 1)}); err == nil {
		t.Error("a device that does not exist was added")
	}
	if !removable {
		return
	}
	for _, serial := range []string{"block", "block-ro", "block"} {
		if err := vm.RemoveDisk(ctx, serial); err != nil {
			t.Error(err)
		}
	}
}
