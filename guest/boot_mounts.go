package guest

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// fixture is one thing that has to be there before the agent works.
type fixture interface {
	Create() error
	String() string
}

// directory is a directory.
type directory struct {
	Path string
	Mode os.FileMode
}

// Create makes the directory and its parents.
func (d directory) Create() error  { return os.MkdirAll(d.Path, d.Mode) }
func (d directory) String() string { return fmt.Sprintf("directory %s", d.Path) }

// fileSystem is a file system on a directory, which is made.
type fileSystem struct {
	Type, Target, Options string
	Flags                 uintptr
}

// Create mounts; a mount of the same type that is there already will do.
func (m fileSystem) Create() error {
	if err := os.MkdirAll(m.Target, 0o755); err != nil {
		return err
	}
	err := unix.Mount(m.Type, m.Target, m.Type, m.Flags, m.Options)
	if errors.Is(err, unix.EBUSY) {
		return nil
	}
	return err
}
func (m fileSystem) String() string { return fmt.Sprintf("mount of %s at %s", m.Type, m.Target) }

// device is a character device.
type device struct {
	Path         string
	Mode         uint32
	Major, Minor uint32
}

// Create makes the device's file.
func (d device) Create() error {
	err := unix.Mknod(d.Path, unix.S_IFCHR|d.Mode, int(unix.Mkdev(d.Major, d.Minor)))
	if errors.Is(err, fs.ErrExist) {
		return nil
	}
	return err
}
func (d device) String() string { return fmt.Sprintf("device %s", d.Path) }

// symlink is a symbolic link.
type symlink struct{ Path, Target string }

// Create makes the link.
func (s symlink) Create() error {
	if err := os.Symlink(s.Target, s.Path); !errors.Is(err, fs.ErrExist) {
		return err
	}
	return nil
}
func (s symlink) String() string { return fmt.Sprintf("link %s", s.Path) }

// setting is a line written to a file of the kernel.
type setting struct{ Path, Value string }

// Create writes the value.
func (s setting) Create() error  { return os.WriteFile(s.Path, []byte(s.Value), 0) }
func (s setting) String() string { return fmt.Sprintf("setting %s", s.Path) }

const (
	cgroupRoot = "/sys/fs/cgroup"
	secure     = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
)

// initramfsFixtures are made below everything else: programs that the kernel starts by itself see only the
// initramfs, and cannot run without a null device.
var initramfsFixtures = []fixture{
	directory{Path: "/dev", Mode: 0o755},
	device{Path: "/dev/null", Mode: 0o666, Major: 1, Minor: 3},
}

// bootFixtures are made in this order. What fails is logged and left: each is missed only by what uses it.
var bootFixtures = []fixture{
	fileSystem{Type: "proc", Target: "/proc", Flags: secure},
	fileSystem{Type: "sysfs", Target: "/sys", Flags: secure},
	fileSystem{Type: "devtmpfs", Target: "/dev", Flags: unix.MS_NOSUID | unix.MS_NOEXEC, Options: "mode=0755"},
	fileSystem{Type: "devpts", Target: "/dev/pts", Flags: unix.MS_NOSUID | unix.MS_NOEXEC, Options: "newinstance,ptmxmode=0666,mode=0620,gid=5"},
	fileSystem{Type: "tmpfs", Target: "/run", Flags: unix.MS_NOSUID | unix.MS_NODEV, Options: "mode=0755"},
	fileSystem{Type: "tmpfs", Target: "/tmp", Flags: unix.MS_NOSUID | unix.MS_NODEV, Options: "mode=1777"},
	fileSystem{Type: "mqueue", Target: "/dev/mqueue", Flags: secure},
	fileSystem{Type: "cgroup2", Target: cgroupRoot, Flags: secure, Options: "nsdelegate"},
	symlink{Path: "/dev/fd", Target: "/proc/self/fd"},
	directory{Path: "/etc", Mode: 0o755},
	directory{Path: agentDir, Mode: 0o711},
	directory{Path: emptyDir, Mode: 0o555},
	// A kernel that cannot go on reboots at once, which the VMM reports; nothing may hang.
	setting{Path: "/proc/sys/kernel/panic", Value: "-1"},
	setting{Path: "/proc/sys/kernel/panic_on_oops", Value: "1"},
	// Pids are not used again soon after their process is gone.
	setting{Path: "/proc/sys/kernel/pid_max", Value: "4194304"},
	// What the kernel asks for by itself (iptables in a container, a file system) is loaded by Modprobe.
	setting{Path: "/proc/sys/kernel/modprobe", Value: "/sbin/crivm-agent"},
	// Addresses of a pod are its own: no second of waiting for somebody who has them too.
	setting{Path: "/proc/sys/net/ipv6/conf/default/accept_dad", Value: "0"},
	setting{Path: "/proc/sys/net/ipv6/conf/all/accept_dad", Value: "0"},
	// The kernel kills anything before its only way to the host.
	setting{Path: "/proc/self/oom_score_adj", Value: "-1000"},
}

// createFixtures makes all of them.
func createFixtures(fixtures []fixture) {
	for _, f := range fixtures {
		if err := f.Create(); err != nil {
			slog.Warn("boot", "step", f.String(), "error", err)
		}
	}
}

// leaveRootfs makes "/" a bind mount of the initramfs. The initramfs itself can be neither moved nor
// pivoted away from; an ordinary mount on top of it can, so that the OCI runtime may use pivot_root(2).
func leaveRootfs() error {
	const newRoot = "/newroot"
	if err := os.MkdirAll(newRoot, 0o755); err != nil {
		return err
	}
	if err := unix.Mount("/", newRoot, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("bind the initramfs: %w", err)
	}
	if err := unix.Chdir(newRoot); err != nil {
		return err
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("move the new root: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return fmt.Errorf("enter the new root: %w", err)
	}
	if err := unix.Chdir("/"); err != nil {
		return err
	}
	return notExist(os.Remove(newRoot))
}

// enableControllers lets containers' cgroups use every controller that the kernel has.
func enableControllers(root string) error {
	parent := filepath.Join(root, cgroupParent)
	if err := os.MkdirAll(parent, 0o755); err != nil {
		return err
	}
	b, err := os.ReadFile(filepath.Join(root, "cgroup.controllers"))
	if err != nil {
		return err
	}
	controllers := strings.Fields(string(b))
	for _, dir := range []string{root, parent} {
		file := filepath.Join(dir, "cgroup.subtree_control")
		if os.WriteFile(file, []byte("+"+strings.Join(controllers, " +")), 0) == nil {
			continue
		}
		for _, c := range controllers { // one that cannot be had must not cost the others
			if err := os.WriteFile(file, []byte("+"+c), 0); err != nil {
				slog.Warn("cgroup controller", "controller", c, "error", err)
			}
		}
	}
	return nil
}
