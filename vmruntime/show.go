package vmruntime

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// ShowFile makes a regular file of the host appear at a path that the process can reach, in the process's mount
// namespace only: nothing of it is on the host but an empty file at the path, and the mount goes with the process.
// Whether the process may open it is up to the file's mode. Idempotent for the same file; AlreadyExists when another is shown there.
func (p *Process) ShowFile(source *os.File, path string) error {
	fail := func(err error) error { return fmt.Errorf("show %s at %s: %w", source.Name(), path, err) }
	var want unix.Stat_t
	if err := unix.Fstat(int(source.Fd()), &want); err != nil {
		return fail(err)
	}
	if want.Mode&unix.S_IFMT != unix.S_IFREG {
		return fail(fmt.Errorf("not a regular file: %w", errdefs.ErrInvalidArgument))
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDONLY|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return fail(err)
	}
	f.Close()
	tree, err := unix.OpenTree(int(source.Fd()), "", unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_EMPTY_PATH)
	if err != nil {
		return fail(fmt.Errorf("clone mount: %w", err))
	}
	defer unix.Close(tree)
	attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NOEXEC, Propagation: unix.MS_PRIVATE}
	if err := unix.MountSetattr(tree, "", unix.AT_EMPTY_PATH, &attr); err != nil {
		return fail(fmt.Errorf("mount attributes: %w", err))
	}
	err = p.InMountNamespace(func() error {
		var there, dir unix.Statx_t
		err := errors.Join(
			unix.Statx(unix.AT_FDCWD, path, unix.AT_SYMLINK_NOFOLLOW, unix.STATX_MNT_ID|unix.STATX_INO, &there),
			unix.Statx(unix.AT_FDCWD, filepath.Dir(path), unix.AT_SYMLINK_NOFOLLOW, unix.STATX_MNT_ID, &dir),
		)
		switch {
		case err != nil:
			return err
		case there.Mnt_id == dir.Mnt_id:
			return unix.MoveMount(tree, "", unix.AT_FDCWD, path, unix.MOVE_MOUNT_F_EMPTY_PATH)
		case there.Ino == want.Ino && unix.Mkdev(there.Dev_major, there.Dev_minor) == want.Dev:
			return nil
		}
		return fmt.Errorf("another file is there: %w", errdefs.ErrAlreadyExists)
	})
	if err != nil {
		return fail(err)
	}
	return nil
}
