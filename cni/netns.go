package cni

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// netlinkTimeout bounds each wait for the kernel's answer; the kernel answers within milliseconds.
const netlinkTimeout = 10 * time.Second

// threadNetns names the network namespace of the calling thread; /proc/self/ns/net is the main thread's.
const threadNetns = "/proc/thread-self/ns/net"

// onOwnThread runs fn on an OS thread that fn may move to another network namespace, and brings the
// thread back afterwards. A thread that cannot be brought back is given up: the goroutine ends while
// locked to it, and Go's runtime then ends the thread rather than running other goroutines on it.
func onOwnThread(fn func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			// The main thread stands for the process in /proc/self and never ends, so it cannot be given up:
			// hold it meanwhile, so that fn runs on another.
			defer runtime.UnlockOSThread()
			done <- onOwnThread(fn)
			return
		}
		home, err := os.Open(threadNetns)
		if err != nil {
			runtime.UnlockOSThread()
			done <- err
			return
		}
		defer home.Close()
		err = fn()
		if back := unix.Setns(int(home.Fd()), unix.CLONE_NEWNET); back != nil {
			slog.Error("thread given up: cannot return to its network namespace", "error", back)
			done <- errors.Join(err, fmt.Errorf("return to the host's network namespace: %w", back))
			return
		}
		runtime.UnlockOSThread()
		done <- err
	}()
	return <-done
}

// inNamespace runs fn in the network namespace at path, with a netlink handle for it. Everything fn opens
// (sockets, /dev/net/tun, /proc/sys/net) belongs to that namespace; it must not start goroutines.
func inNamespace(path string, fn func(h *netlink.Handle) error) error {
	ns, err := os.Open(path)
	if err != nil {
		return err
	}
	defer ns.Close()
	return onOwnThread(func() error {
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter: %w", err)
		}
		h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return fmt.Errorf("netlink: %w", err)
		}
		defer h.Close()
		if err := h.SetSocketTimeout(netlinkTimeout); err != nil {
			return fmt.Errorf("netlink: %w", err)
		}
		return fn(h)
	})
}

// createNamespace makes a network namespace and binds it to the file path, as `ip netns add` does. Does
// nothing when there is one already.
func createNamespace(path string) error {
	if isNamespace(path) {
		return nil
	}
	// A file without a namespace on it is what a reboot or a crash leaves; it is used again.
	f, err := os.OpenFile(path, os.O_RDONLY|os.O_CREATE, 0o444)
	if err != nil {
		return err
	}
	f.Close()
	err = onOwnThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("unshare: %w", err)
		}
		if err := unix.Mount(threadNetns, path, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("bind: %w", err)
		}
		return nil
	})
	if err != nil {
		return errors.Join(err, removeNamespace(path))
	}
	return nil
}

// removeNamespace undoes createNamespace. The namespace itself ends with its last process. Does nothing
// when there is none.
func removeNamespace(path string) error {
	err := unix.Unmount(path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
	if err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) { // EINVAL: no mount point
		return fmt.Errorf("unmount %s: %w", path, err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// isNamespace tells whether a namespace is bound to path.
func isNamespace(path string) bool {
	var st unix.Statfs_t
	return unix.Statfs(path, &st) == nil && st.Type == unix.NSFS_MAGIC
}

// shareNetnsDir sees to it that namespaces bound below NetnsDir later appear in other mount namespaces
// too, and vanish there when unmounted here; otherwise such a copy would keep a dead pod's network alive.
// Where the directory lies on a shared mount, as under systemd, nothing is to be done; else it becomes a
// shared mount of its own, which stays, as with `ip netns`.
func (n *Network) shareNetnsDir() error {
	n.sharedDir.Lock()
	defer n.sharedDir.Unlock()
	dir := n.config.NetnsDir
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("directory of network namespaces: %w", err)
	}
	real, err := filepath.EvalSymlinks(dir)
	if err != nil {
		return fmt.Errorf("directory of network namespaces: %w", err)
	}
	at, shared, err := mountOf(real)
	if err != nil {
		return fmt.Errorf("mount of %s: %w", dir, err)
	}
	if shared {
		return nil
	}
	if at != real {
		if err := unix.Mount(real, real, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
			return fmt.Errorf("bind %s: %w", dir, err)
		}
	}
	if err := unix.Mount("", real, "", unix.MS_SHARED|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("make %s a shared mount: %w", dir, err)
	}
	return nil
}

// mountOf finds the mount that path (without symbolic links) lies on, and whether it is shared. The format
// is proc_pid_mountinfo(5): field 5 is the mount point, optional fields end with "-".
func mountOf(path string) (at string, shared bool, err error) {
	f, err := os.Open("/proc/thread-self/mountinfo")
	if err != nil {
		return "", false, err
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		if len(fields) < 7 {
			continue
		}
		point := unescapeMountinfo.Replace(fields[4])
		if point != "/" && path != point && !strings.HasPrefix(path, point+"/") {
			continue
		}
		if len(point) < len(at) {
			continue // a later line of the same length is mounted on top
		}
		at, shared = point, false
		for _, option := range fields[6:] {
			if option == "-" {
				break
			}
			if strings.HasPrefix(option, "shared:") {
				shared = true
			}
		}
	}
	if err := lines.Err(); err != nil {
		return "", false, err
	}
	if at == "" {
		return "", false, fmt.Errorf("no mount holds %s", path)
	}
	return at, shared, nil
}

var unescapeMountinfo = strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)
