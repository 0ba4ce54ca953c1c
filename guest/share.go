package guest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/crivm/crivm/agentproto"
)

// shareWait bounds waiting for a virtio-fs device that was plugged just now.
const shareWait = 10 * time.Second

// shares are the virtio-fs shares in use. A share stays mounted; an entry in it is a mount of its own, which
// goes with the last container that uses it, so that the host can let go of what is behind it.
type shares struct {
	mu    sync.Mutex
	users map[string]int // by path of the entry
}

// prepareShare mounts a share, if it is not yet, and returns the path of an entry in it.
func (v *volumes) prepareShare(ctx context.Context, c *container, s *agentproto.Share) (string, error) {
	if err := errors.Join(checkID("share tag", s.GetTag()), checkID("share path", s.GetPath())); err != nil {
		return "", err
	}
	if v.agent.machine == nil {
		return "", fmt.Errorf("share %s: this agent has no devices: %w", s.GetTag(), errdefs.ErrFailedPrecondition)
	}
	dir := filepath.Join(v.agent.Dir, "volumes", "shares", s.GetTag())
	v.shares.mu.Lock()
	defer v.shares.mu.Unlock()
	if err := v.mountShare(ctx, s.GetTag(), dir); err != nil {
		return "", err
	}
	path := filepath.Join(dir, s.GetPath())
	info, err := os.Lstat(path)
	if err != nil {
		return "", fmt.Errorf("share %s: %w", s.GetTag(), err)
	}
	if !info.IsDir() && !info.Mode().IsRegular() { // the host's root of the share has nothing else
		return "", fmt.Errorf("share %s: %s is a %s: %w", s.GetTag(), s.GetPath(), info.Mode().Type(), errdefs.ErrInvalidArgument)
	}
	v.shares.users[path]++
	c.undo = append(c.undo, func(context.Context) error { return v.shares.release(path) })
	return path, nil
}

func (v *volumes) mountShare(ctx context.Context, tag, dir string) error {
	var root, parent unix.Stat_t
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	if err := errors.Join(unix.Lstat(dir, &root), unix.Lstat(filepath.Dir(dir), &parent)); err != nil {
		return fmt.Errorf("share %s: %w", tag, err)
	}
	if root.Dev != parent.Dev {
		return nil // mounted
	}
	v.agent.machine.modules.Load("fuse", "virtiofs")
	ctx, cancel := context.WithTimeout(ctx, shareWait)
	defer cancel()
	var mountErr error
	err := waitDevice(ctx, "", func() bool {
		mountErr = unix.Mount(tag, dir, "virtiofs", unix.MS_NODEV, "")
		return !errors.Is(mountErr, unix.EINVAL) // no device of that tag
	})
	if err := errors.Join(mountErr, err); err != nil {
		return fmt.Errorf("mount share %s: %w", tag, err)
	}
	return nil
}

// release takes a user off an entry. With the last one the mount of it, if it is one, goes: the kernel made it
// when the path was first walked.
func (s *shares) release(path string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.users[path]--; s.users[path] > 0 {
		return nil
	}
	delete(s.users, path)
	err := unix.Unmount(path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("unmount %s: %w", path, err)
	}
	return nil
}
