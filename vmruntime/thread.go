package vmruntime

import (
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// onThread runs f on a thread that nothing else has used or will use: f may change what belongs to a
// thread (namespaces, cgroup, no_new_privs). The thread ends with f.
func onThread(f func() error) error {
	result := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the runtime then ends the thread with the goroutine
		if unix.Gettid() == unix.Getpid() {
			// The main thread stands for the whole process in /proc/self and never ends: leave it as it
			// is, and hold it meanwhile so that f runs on another.
			defer runtime.UnlockOSThread()
			result <- onThread(f)
			return
		}
		result <- f()
	}()
	return <-result
}

// enterNetns moves the calling thread into the network namespace; "" leaves it.
func enterNetns(path string) error {
	if path == "" {
		return nil
	}
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("network namespace %s: %w", path, err)
	}
	defer unix.Close(fd)
	if err := unix.Setns(fd, unix.CLONE_NEWNET); err != nil {
		return fmt.Errorf("enter network namespace %s: %w", path, err)
	}
	return nil
}

// OpenTap opens an existing tap of a network namespace ("" for the daemon's), for a VMM that then needs
// neither the namespace nor CAP_NET_ADMIN. Frames carry a virtio-net header. Errors name the tap; a tap
// that another process has open is EBUSY.
func OpenTap(netnsPath, name string) (*os.File, error) {
	req, err := unix.NewIfreq(name)
	if err != nil {
		return nil, fmt.Errorf("tap %q: %w", name, err)
	}
	var fd int
	err = onThread(func() error {
		if err := enterNetns(netnsPath); err != nil {
			return err
		}
		// A tap that is missing would be made by TUNSETIFF, without addresses or filters: a silent hole.
		if err := existsHere(name); err != nil {
			return err
		}
		if fd, err = unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0); err != nil {
			return fmt.Errorf("/dev/net/tun: %w", err)
		}
		req.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
		if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, req); err != nil {
			unix.Close(fd)
			return fmt.Errorf("TUNSETIFF: %w", err)
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("tap %s: %w", name, err)
	}
	return os.NewFile(uintptr(fd), "tap "+name), nil
}

// existsHere fails unless the calling thread's network namespace has a link of that name.
func existsHere(name string) error {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	req, err := unix.NewIfreq(name)
	if err != nil {
		return err
	}
	return unix.IoctlIfreq(fd, unix.SIOCGIFINDEX, req)
}
