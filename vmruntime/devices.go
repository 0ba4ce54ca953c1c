package vmruntime

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// A VMM runs as a user who may open no block device of the host. Those that are plugged into its VM have nodes of
// their own, which it may open, on a small tmpfs that is mounted in its mount namespace alone: the host's nodes
// keep their owners, a state directory mounted nodev does not matter, and whatever dies, the kernel takes
// the nodes away with the namespace.

// deviceDir is where that tmpfs is mounted, below the VM's directory.
const deviceDir = "dev"

// DeviceDir is the directory in which the VMM with this directory finds the block devices that it may open.
func DeviceDir(dir string) string { return filepath.Join(dir, deviceDir) }

// MountDevices is for LaunchSpec.Mounts.
func MountDevices(dir string) error {
	path := DeviceDir(dir)
	if err := os.Mkdir(path, 0o711); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	if err := unix.Mount("crivm-dev", path, "tmpfs", unix.MS_NOSUID|unix.MS_NOEXEC, "mode=0711,size=64k,nr_inodes=1024"); err != nil {
		return fmt.Errorf("mount %s: %w", path, err)
	}
	return nil
}

// AddDevice makes a node for a block device of the host, which the user of the process may open and nobody else, and
// tells its path in the mount namespace of the process. One that is there already is replaced.
// FailedPrecondition when the process was started without MountDevices.
func (p *Process) AddDevice(name string, device uint64, readOnly bool) (string, error) {
	uid, err := p.user()
	if err != nil {
		return "", err
	}
	mode := uint32(unix.S_IFBLK | 0o600)
	if readOnly {
		mode = unix.S_IFBLK | 0o400
	}
	err = p.inDeviceDir(func(dir int) error {
		if err := unix.Unlinkat(dir, name, 0); err != nil && !errors.Is(err, unix.ENOENT) {
			return err
		}
		if err := unix.Mknodat(dir, name, mode, int(device)); err != nil {
			return err
		}
		return unix.Fchownat(dir, name, uid, uid, unix.AT_SYMLINK_NOFOLLOW)
	})
	if err != nil {
		return "", fmt.Errorf("node of device %d:%d: %w", unix.Major(device), unix.Minor(device), err)
	}
	return filepath.Join(DeviceDir(p.dir), name), nil
}

// user is the uid that the process runs as.
func (p *Process) user() (int, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.pid))
	if err != nil {
		return 0, fmt.Errorf("user of process %d: %w", p.pid, err)
	}
	for line := range strings.Lines(string(b)) {
		if fields := strings.Fields(line); len(fields) > 2 && fields[0] == "Uid:" { // real, effective
			return strconv.Atoi(fields[2])
		}
	}
	return 0, fmt.Errorf("user of process %d is not known: %w", p.pid, errdefs.ErrUnavailable)
}

// RemoveDevice removes a node; the process no longer has it open. Idempotent.
func (p *Process) RemoveDevice(name string) error {
	err := p.inDeviceDir(func(dir int) error { return unix.Unlinkat(dir, name, 0) })
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("node %s: %w", name, err)
	}
	return nil
}

// inDeviceDir opens the process's directory of devices. The process may own the directory above it, yet cannot move
// or cover a mount point of its own namespace.
func (p *Process) inDeviceDir(f func(dir int) error) error {
	return p.InMountNamespace(func() error {
		dir, err := unix.Open(DeviceDir(p.dir), unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if err != nil && !errors.Is(err, unix.ENOENT) {
			return err
		}
		var st, parent unix.Stat_t
		if err == nil {
			defer unix.Close(dir)
			err = errors.Join(unix.Fstat(dir, &st), unix.Stat(p.dir, &parent))
		}
		if err != nil || st.Dev == parent.Dev {
			return fmt.Errorf("the VMM has no directory for devices, as it was started by an earlier version of crivm: %w", errdefs.ErrFailedPrecondition)
		}
		return f(dir)
	})
}
