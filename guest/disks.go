package guest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/crivm/crivm/agentproto"
)

const (
	// deviceTimeout bounds the wait for a device that the host has plugged. Under software emulation a
	// PCI hot-plug takes up to a few seconds.
	deviceTimeout = 20 * time.Second
	// deviceRetry is how often is looked again if no event comes.
	deviceRetry = 250 * time.Millisecond
)

// waitDevice calls found until it tells true: at once, at each event of the kernel about devices of a subsystem ("" is any;
// a disk that is plugged makes a dozen others), and every deviceRetry in case that events were missed.
func waitDevice(ctx context.Context, subsystem string, found func() bool) error {
	if found() {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, deviceTimeout)
	defer cancel()
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_KOBJECT_UEVENT)
	if err == nil {
		defer unix.Close(fd)
		err = unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: 1})
	}
	if err != nil {
		slog.Warn("no device events, polling instead", "error", err)
		fd = -1
	}
	buf := make([]byte, 8<<10)
	for !found() { // again, as it may have come before the socket was bound
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err := awaitEvent(fd, subsystem, buf, deviceRetry); err != nil {
			return err
		}
	}
	return nil
}

// awaitEvent waits for an event of a subsystem, for so long at most.
func awaitEvent(fd int, subsystem string, buf []byte, most time.Duration) error {
	mark := []byte("\x00SUBSYSTEM=" + subsystem)
	if subsystem != "" {
		mark = append(mark, 0)
	}
	for limit := time.Now().Add(most); ; {
		left := time.Until(limit)
		if left <= 0 {
			return nil
		}
		poll := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		if _, err := unix.Poll(poll, int(left.Milliseconds())+1); err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("poll device events: %w", err)
		}
		for heard := false; fd >= 0; {
			n, _, err := unix.Recvfrom(fd, buf, 0)
			if err == nil || errors.Is(err, unix.ENOBUFS) { // some are lost
				heard = heard || err != nil || bytes.Contains(buf[:n], mark)
				continue
			}
			if heard {
				return nil
			}
			break
		}
	}
}

// findDisk waits for the disk with a serial and returns its device file.
func findDisk(ctx context.Context, serial string) (string, error) {
	if serial == "" {
		return "", fmt.Errorf("disk without a serial: %w", errdefs.ErrInvalidArgument)
	}
	device := ""
	err := waitDevice(ctx, "block", func() bool {
		names, _ := filepath.Glob("/sys/class/block/*/serial")
		for _, name := range names {
			b, err := os.ReadFile(name)
			if err == nil && strings.TrimRight(string(b), "\x00\n") == serial {
				device = "/dev/" + filepath.Base(filepath.Dir(name))
				_, err = os.Stat(device)
				return err == nil
			}
		}
		return false
	})
	if err != nil {
		return "", fmt.Errorf("disk %q did not appear: %w: %w", serial, err, errdefs.ErrNotFound)
	}
	return device, nil
}

// images are the read-only image disks in use, each mounted once.
type images struct {
	dir string

	mu     sync.Mutex
	mounts map[string]*imageMount
}

type imageMount struct {
	mu    sync.Mutex // held while it is being mounted or unmounted
	users int        // guarded by images.mu
	path  string     // "" while not mounted
}

// acquire mounts an image disk, if no other container has done so. namespaces are the pod's, for all its containers.
func (im *images) acquire(ctx context.Context, serial string, modules *moduleLoader, namespaces *podNamespaces) (string, error) {
	if err := checkID("disk serial", serial); err != nil {
		return "", err
	}
	im.mu.Lock()
	m := im.mounts[serial]
	if m == nil {
		m = &imageMount{}
		im.mounts[serial] = m
	}
	m.users++
	im.mu.Unlock()
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.path != "" {
		return m.path, nil
	}
	path, err := im.mount(ctx, serial, modules, namespaces)
	if err != nil {
		im.drop(serial, m)
		return "", err
	}
	m.path = path
	return path, nil
}

func (im *images) mount(ctx context.Context, serial string, modules *moduleLoader, namespaces *podNamespaces) (string, error) {
	modules.Load("virtio_blk", "erofs")
	device, err := findDisk(ctx, serial)
	if err != nil {
		return "", err
	}
	path := filepath.Join(im.dir, serial)
	if err := os.MkdirAll(path, 0o711); err != nil {
		return "", err
	}
	if err := unix.Mount(device, path, "erofs", unix.MS_RDONLY|unix.MS_NODEV|unix.MS_NOATIME, ""); err != nil {
		return "", fmt.Errorf("mount image disk %s (%s): %w", serial, device, err)
	}
	if namespaces != nil {
		if err := namespaces.idmapInPlace(path); err != nil {
			return "", errors.Join(fmt.Errorf("image disk %s: %w", serial, err), unmount(path))
		}
	}
	return path, nil
}

// release gives a mount back; the last user's return unmounts it.
func (im *images) release(serial string) error {
	im.mu.Lock()
	m := im.mounts[serial]
	im.mu.Unlock()
	if m == nil {
		return nil
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	im.mu.Lock()
	last := m.users == 1
	if !last {
		m.users--
	}
	im.mu.Unlock()
	if !last {
		return nil
	}
	if err := unmount(m.path); err != nil {
		return err
	}
	m.path = ""
	im.drop(serial, m)
	return notExist(os.Remove(filepath.Join(im.dir, serial)))
}

// drop takes one user off; the entry goes with the last.
func (im *images) drop(serial string, m *imageMount) {
	im.mu.Lock()
	defer im.mu.Unlock()
	if m.users--; m.users == 0 {
		delete(im.mounts, serial)
	}
}

// used tells whether a container uses a disk.
func (im *images) used(serial string) bool {
	im.mu.Lock()
	defer im.mu.Unlock()
	return im.mounts[serial] != nil
}

// unmount unmounts a path; nil when nothing is mounted there.
func unmount(path string) error {
	err := unix.Unmount(path, unix.UMOUNT_NOFOLLOW)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("unmount %s: %w", path, err)
	}
	return nil
}

// DetachDisk implements agentproto.AgentService. That of an empty directory is unmounted here. Image disks are unmounted with their last container, so
// there is nothing left to do but to say no while there is one.
func (a *Agent) DetachDisk(_ context.Context, r *agentproto.DetachDiskRequest) (*agentproto.DetachDiskResponse, error) {
	if found, err := a.volumes.detachEmpty(r.GetSerial()); found {
		return &agentproto.DetachDiskResponse{}, err
	}
	a.sandboxMu.Lock()
	defer a.sandboxMu.Unlock()
	if a.machine != nil && a.machine.blocks.used(r.GetSerial()) {
		return nil, fmt.Errorf("device %s is in use: %w", r.GetSerial(), errdefs.ErrFailedPrecondition)
	}
	scratch := a.sandbox != nil && a.sandbox.scratchSerial == r.GetSerial() && r.GetSerial() != ""
	if scratch || a.machine != nil && a.machine.images.used(r.GetSerial()) {
		return nil, fmt.Errorf("disk %s is in use: %w", r.GetSerial(), errdefs.ErrFailedPrecondition)
	}
	return &agentproto.DetachDiskResponse{}, nil
}
