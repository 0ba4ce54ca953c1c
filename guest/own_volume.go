package guest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// ownVolumes is the directory for the VOLUMEs of a container's image, beside its writable layer, with which it goes.
const ownVolumes = "volumes"

// prepareOwn makes a directory for one container, with what its root file system has at the destination. It is no
// part of the overlay: so it stays writable in a root file system that is read-only, and can itself be what another
// overlay is made of, which is why images that run containers have a VOLUME.
func (v *volumes) prepareOwn(ctx context.Context, c *container, root, destination string) (string, error) {
	base := filepath.Join(c.dir, ownVolumes)
	if v.agent.machine != nil {
		scratch, err := v.agent.scratch()
		if err != nil {
			return "", err
		}
		base = filepath.Join(scratch, "containers", c.id, ownVolumes)
	}
	if err := os.MkdirAll(base, 0o700); err != nil {
		return "", err
	}
	others, err := os.ReadDir(base)
	if err != nil {
		return "", err
	}
	dir := filepath.Join(base, strconv.Itoa(len(others)))
	if err := os.Mkdir(dir, 0o755); err != nil {
		return "", err
	}
	uid, gid := v.agent.namespaces.Load().owner(0, 0)
	if err := os.Chown(dir, uid, gid); err != nil {
		return "", err
	}
	from, err := resolveIn(root, destination)
	if errdefs.IsNotFound(err) {
		return dir, nil
	}
	if err != nil {
		return "", err
	}
	if info, err := os.Lstat(from); err != nil || !info.IsDir() {
		return "", errors.Join(fmt.Errorf("the image has a VOLUME there, but no directory: %w", errdefs.ErrInvalidArgument), err)
	}
	if err := copyTree(ctx, from, dir); err != nil {
		return "", fmt.Errorf("copying the image's content: %w", err)
	}
	return dir, nil
}

// copyTree fills a directory with what is in another one, whose owner, mode, times and extended attributes it gets,
// as everything in it does. Hard links stay links among each other. Nobody else may be able to change either.
func copyTree(ctx context.Context, from, to string) error {
	type directory struct {
		path string
		st   *syscall.Stat_t
	}
	var directories []directory
	linked := map[[2]uint64]string{}
	err := filepath.WalkDir(from, func(path string, d fs.DirEntry, err error) error {
		if err = errors.Join(err, ctx.Err()); err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		st := info.Sys().(*syscall.Stat_t)
		target := filepath.Join(to, strings.TrimPrefix(path, from))
		inode := [2]uint64{st.Dev, st.Ino}
		if first, ok := linked[inode]; ok && !d.IsDir() {
			return os.Link(first, target)
		}
		if st.Nlink > 1 && !d.IsDir() {
			linked[inode] = target
		}
		if err := copyNode(path, target, st); err != nil {
			return err
		}
		if d.IsDir() {
			directories = append(directories, directory{target, st})
			return nil
		}
		return copyTimes(target, st)
	})
	if err != nil {
		return err
	}
	for _, d := range directories { // what was made in them has changed their times
		if err := copyTimes(d.path, d.st); err != nil {
			return err
		}
	}
	return nil
}

// copyNode copies one entry of a directory; a directory may be there already.
func copyNode(from, to string, st *syscall.Stat_t) error {
	var err error
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		if err = os.Mkdir(to, 0o700); errors.Is(err, fs.ErrExist) {
			err = nil
		}
	case unix.S_IFREG:
		err = copyFile(from, to)
	case unix.S_IFLNK:
		var target string
		if target, err = os.Readlink(from); err == nil {
			err = os.Symlink(target, to)
		}
	default:
		err = unix.Mknod(to, st.Mode, int(st.Rdev))
	}
	if err == nil {
		err = os.Lchown(to, int(st.Uid), int(st.Gid))
	}
	if err == nil && st.Mode&unix.S_IFMT != unix.S_IFLNK {
		err = unix.Chmod(to, st.Mode&0o7777) // after the change of owner, which takes setuid away
	}
	if err == nil {
		err = copyXattrs(from, to) // likewise capabilities
	}
	if err != nil {
		return fmt.Errorf("%s: %w", from, err)
	}
	return nil
}

func copyFile(from, to string) error {
	in, err := os.OpenFile(from, os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Close())
}

// copyXattrs copies extended attributes, such as file capabilities and ACLs, but for those that the scratch disk's
// file system does not have.
func copyXattrs(from, to string) error {
	names := make([]byte, 64<<10) // XATTR_LIST_MAX
	n, err := unix.Llistxattr(from, names)
	if err != nil || n == 0 {
		if errors.Is(err, unix.ENOTSUP) {
			return nil
		}
		return err
	}
	value := make([]byte, 64<<10) // XATTR_SIZE_MAX
	for name := range strings.SplitSeq(strings.TrimSuffix(string(names[:n]), "\x00"), "\x00") {
		size, err := unix.Lgetxattr(from, name, value)
		if err == nil {
			err = unix.Lsetxattr(to, name, value[:size], 0)
		}
		if err != nil && !errors.Is(err, unix.ENOTSUP) {
			return fmt.Errorf("attribute %s: %w", name, err)
		}
	}
	return nil
}

func copyTimes(path string, st *syscall.Stat_t) error {
	times := []unix.Timespec{{Sec: st.Atim.Sec, Nsec: st.Atim.Nsec}, {Sec: st.Mtim.Sec, Nsec: st.Mtim.Nsec}}
	if err := unix.UtimesNanoAt(unix.AT_FDCWD, path, times, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return fmt.Errorf("times of %s: %w", path, err)
	}
	return nil
}
