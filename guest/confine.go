package guest

import (
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// maxSymlinkRetries bounds openat2's "changed while I looked" (EAGAIN).
const maxSymlinkRetries = 32

// openIn opens path as a process would whose root directory is root: symbolic links, also absolute ones,
// and ".." never lead out of it.
func openIn(root, path string, flags int, mode uint32) (int, error) {
	dir, err := unix.Open(root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("open %s: %w", root, err)
	}
	defer unix.Close(dir)
	how := unix.OpenHow{
		Flags: uint64(flags) | unix.O_CLOEXEC, Mode: uint64(mode),
		Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS,
	}
	for range maxSymlinkRetries {
		fd, err := unix.Openat2(dir, path, &how)
		if err == nil {
			return fd, nil
		}
		if !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EINTR) {
			return -1, &os.PathError{Op: "open", Path: path, Err: err}
		}
	}
	return -1, &os.PathError{Op: "open", Path: path, Err: unix.EAGAIN}
}

// readIn reads a regular file of at most limit bytes inside root.
func readIn(root, path string, limit int64) ([]byte, error) {
	fd, err := openIn(root, path, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), path)
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() || st.Size() > limit {
		return nil, fmt.Errorf("%s is not a regular file of at most %d bytes: %w", path, limit, errdefs.ErrInvalidArgument)
	}
	return io.ReadAll(io.LimitReader(f, limit))
}
