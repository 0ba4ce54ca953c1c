package virtiofsd

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Access says what a guest may do with a volume, and what of the host's later mounts it sees.
type Access struct {
	ReadOnly bool
	// Recursive makes ReadOnly hold for mounts below the volume too; they are as on the host otherwise.
	Recursive bool
	// Follow makes mounts that the host makes below the volume later on appear in it (and vanish), where the
	// host's mount is a shared one.
	Follow bool
	// IDs, unless it is the zero value, is what the guest sees of owners.
	IDs IDMapping
}

// Add attaches what source, a descriptor (O_PATH serves) of a directory or regular file in the daemon's mount
// namespace, refers to as an entry of the share, with the mounts below it. Idempotent for the same name.
func (s *Server) Add(name string, source *os.File, access Access) error {
	fail := func(err error) error { return fmt.Errorf("volume %s of the share: %w", name, err) }
	if filepath.Base(name) != name || name == "." || name == ".." {
		return fail(errdefs.ErrInvalidArgument)
	}
	info, err := source.Stat()
	if err != nil {
		return fail(err)
	}
	if !info.IsDir() && !info.Mode().IsRegular() {
		return fail(fmt.Errorf("%s: %w", info.Mode().Type(), errdefs.ErrInvalidArgument))
	}
	tree, err := clone(source, info.IsDir(), access)
	if err != nil {
		return fail(err)
	}
	defer unix.Close(tree)
	err = s.proc.InMountNamespace(func() error {
		mounted, err := s.mounted(name)
		if mounted || err != nil {
			return err
		}
		if err := makeEntry(filepath.Join(s.stage(), name), info.IsDir()); err != nil {
			return err
		}
		if err := unix.MoveMount(tree, "", unix.AT_FDCWD, filepath.Join(s.root(), name), unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
			return fmt.Errorf("attach: %w", err)
		}
		return nil
	})
	if err != nil {
		return fail(err)
	}
	return nil
}

// clone makes a detached mount. It can neither pass on mounts to the host nor open device nodes.
func clone(source *os.File, dir bool, access Access) (int, error) {
	flags := uint(unix.OPEN_TREE_CLONE | unix.OPEN_TREE_CLOEXEC | unix.AT_EMPTY_PATH)
	if dir {
		flags |= unix.AT_RECURSIVE
	}
	tree, err := unix.OpenTree(int(source.Fd()), "", flags)
	if err != nil {
		return 0, fmt.Errorf("clone mount: %w", err)
	}
	all := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_NODEV, Propagation: unix.MS_PRIVATE}
	if access.Follow {
		all.Propagation = unix.MS_SLAVE
	}
	if access.ReadOnly && access.Recursive {
		all.Attr_set |= unix.MOUNT_ATTR_RDONLY
	}
	err = unix.MountSetattr(tree, "", unix.AT_EMPTY_PATH|unix.AT_RECURSIVE, &all)
	if err == nil && access.ReadOnly {
		err = unix.MountSetattr(tree, "", unix.AT_EMPTY_PATH, &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY})
	}
	if err == nil && access.IDs != (IDMapping{}) {
		err = mapIDs(tree, access.IDs)
	}
	if err != nil {
		unix.Close(tree)
		return 0, fmt.Errorf("mount attributes: %w", err)
	}
	return tree, nil
}

// makeEntry makes what a volume is attached on; one that an interrupted call left serves as well.
func makeEntry(path string, dir bool) error {
	var err error
	if dir {
		err = os.Mkdir(path, 0o755)
	} else {
		err = os.WriteFile(path, nil, 0o644)
	}
	if errors.Is(err, os.ErrExist) {
		return nil
	}
	return err
}

// mounted tells whether an entry has its volume. Runs in the server's mount namespace.
func (s *Server) mounted(name string) (bool, error) {
	var root, entry unix.Statx_t
	err := unix.Statx(unix.AT_FDCWD, s.root(), unix.AT_SYMLINK_NOFOLLOW, unix.STATX_MNT_ID, &root)
	if err == nil {
		err = unix.Statx(unix.AT_FDCWD, filepath.Join(s.root(), name), unix.AT_SYMLINK_NOFOLLOW|unix.AT_NO_AUTOMOUNT, unix.STATX_MNT_ID, &entry)
	}
	if errors.Is(err, unix.ENOENT) {
		return false, nil
	}
	return entry.Mnt_id != root.Mnt_id, err
}

// Remove takes a volume out of the share, whoever still uses it. Idempotent.
func (s *Server) Remove(name string) error {
	err := s.proc.InMountNamespace(func() error {
		mounted, err := s.mounted(name)
		if err != nil {
			return err
		}
		if mounted {
			if err := unix.Unmount(filepath.Join(s.root(), name), unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
				return err
			}
		}
		if err := os.Remove(filepath.Join(s.stage(), name)); !errors.Is(err, os.ErrNotExist) {
			return err
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("remove volume %s from the share: %w", name, err)
	}
	return nil
}
