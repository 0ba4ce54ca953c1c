package server

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/crivm/crivm/server/store"
	"github.com/crivm/crivm/vmruntime"
)

const (
	// emptyDirImage is the disk of an empty directory, in its directory on the host.
	emptyDirImage = ".crivm-disk"
	// newImage is appended to the name of a disk that is being made.
	newImage = ".new"
)

// emptyDirFormat is how an empty directory's disk is formatted. A journal, as what is on it may outlive its VM, and a
// small one, as kubelet counts it. Inode tables need no zeroing: they are holes of the file. It never grows.
var emptyDirFormat = []string{"-J", "size=4", "-O", "^resize_inode", "-E", "lazy_itable_init=1,lazy_journal_init=1,nodiscard,assume_storage_prezeroed=1"}

func emptyDisk(serial, path string) vmruntime.Disk { return vmruntime.Disk{Serial: serial, Path: path} }

// emptyDirDisk opens the disk of an empty directory and gives it to the sandbox's VMM; it makes one where there is none.
// The host writes an empty file system into it then, and never reads what is in it.
func (s *Server) emptyDirDisk(ctx context.Context, rec store.Sandbox, dir string) (_ *os.File, retErr error) {
	parent, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: dir, Err: err}
	}
	defer unix.Close(parent)
	image, err := openImage(parent, dir)
	if errors.Is(err, unix.ENOENT) {
		if err = s.makeImage(ctx, parent, dir, s.opts.Handlers[rec.Handler].EmptyDirBytes); err == nil {
			image, err = openImage(parent, dir)
		}
	}
	if err != nil {
		return nil, err
	}
	defer func() {
		if retErr != nil {
			image.Close()
		}
	}()
	return image, image.Chown(rec.UID, rec.UID)
}

// openImage opens the disk in an open directory. Where an emptyDir was shared once, a guest may have put anything under
// that name: whatever is no plain file of one name is not touched.
func openImage(parent int, dir string) (*os.File, error) {
	name := filepath.Join(dir, emptyDirImage)
	fd, err := unix.Openat(parent, emptyDirImage, unix.O_RDWR|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: name, Err: err}
	}
	image := os.NewFile(uintptr(fd), name)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		image.Close()
		return nil, &fs.PathError{Op: "stat", Path: name, Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG || st.Nlink != 1 || st.Mode&0o7000 != 0 {
		image.Close()
		return nil, fmt.Errorf("%s is not a disk that crivm made: %w", name, errdefs.ErrFailedPrecondition)
	}
	return image, nil
}

// makeImage makes the disk: nobody ever sees one that is half made.
func (s *Server) makeImage(ctx context.Context, parent int, dir string, size int64) error {
	fail := func(err error) error { return fmt.Errorf("making the disk of %s: %w", dir, err) }
	template, err := s.diskTemplate(ctx, "emptydir", size, emptyDirFormat...)
	if err != nil {
		return fail(err)
	}
	const fresh = emptyDirImage + newImage
	if err := unix.Unlinkat(parent, fresh, 0); err != nil && !errors.Is(err, unix.ENOENT) { // of a daemon that was killed
		return fail(err)
	}
	fd, err := unix.Openat(parent, fresh, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return fail(err)
	}
	out := os.NewFile(uintptr(fd), filepath.Join(dir, fresh))
	err = fillSparse(out, template)
	if err = errors.Join(err, out.Close()); err == nil {
		err = unix.Renameat(parent, fresh, parent, emptyDirImage)
	}
	if err != nil {
		return fail(errors.Join(err, unix.Unlinkat(parent, fresh, 0)))
	}
	return nil
}
