package guest

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/crivm/crivm/agentproto"
)

// A container with all capabilities can have written anything into its copy: every path below is walked
// inside of an os.Root, nothing but regular files is opened, and nothing that is opened can block.

// merger makes one directory what another one is, and uses that up. What is equal is not touched, so
// that containers get the events of what has changed and of nothing else. Each name changes in one rename. First
// come directories, then dataLink, in one swap as on the host, then all other names; what is no more goes last.
type merger struct {
	root     *os.Root // of the copy; has both
	from, to *os.Root // open, so that few system calls come before containers see the swap
	// The same below root.
	fromPath, toPath string
}

func mergeTop(root *os.Root) error {
	top := merger{root: root, from: root, to: root}
	return top.below(copyStage, copyContent)
}

// below merges a directory in from and one in to.
func (m *merger) below(fromName, toName string) error {
	from, err := m.from.OpenRoot(fromName)
	if err != nil {
		return err
	}
	defer from.Close()
	to, err := m.to.OpenRoot(toName)
	if err != nil {
		return err
	}
	defer to.Close()
	sub := merger{root: m.root, from: from, to: to, fromPath: filepath.Join(m.fromPath, fromName), toPath: filepath.Join(m.toPath, toName)}
	return sub.merge()
}

func (m *merger) merge() error {
	wanted, err := readNames(m.from)
	if err != nil {
		return err
	}
	slices.SortStableFunc(wanted, func(a, b os.DirEntry) int { return rank(a) - rank(b) })
	keep := make(map[string]bool, len(wanted))
	for _, e := range wanted {
		keep[e.Name()] = true
		if err := m.entry(e.Name()); err != nil {
			return fmt.Errorf("%s: %w", e.Name(), err)
		}
	}
	if err := m.drop(keep); err != nil {
		return err
	}
	want, errA := m.from.Lstat(".")
	is, errB := m.to.Lstat(".")
	if err := errors.Join(errA, errB); err != nil {
		return err
	}
	return copyOwner(m.to, ".", want, is)
}

const (
	// dropBatch is how many names of a directory are in memory at a time: a container with all capabilities can have made a
	// million in its copy.
	dropBatch = 256
	// maxDropped bounds a race with a container that makes names while others are removed. The next upload goes on.
	maxDropped = 1 << 20
)

// drop removes what is in to and not to be kept, directories last.
func (m *merger) drop(keep map[string]bool) error {
	for n, last := 0, false; ; last = true {
		dir, err := m.to.OpenFile(".", os.O_RDONLY|unix.O_DIRECTORY|unix.O_NONBLOCK, 0)
		if err != nil {
			return err
		}
		for err == nil {
			var names []string
			names, err = dir.Readdirnames(dropBatch)
			for _, name := range names {
				if keep[name] {
					continue
				}
				if info, err := m.to.Lstat(name); !last && err == nil && info.IsDir() {
					continue
				}
				if n++; n > maxDropped {
					return errors.Join(fmt.Errorf("more than %d names: %w", maxDropped, errdefs.ErrAborted), dir.Close())
				}
				if err := m.to.RemoveAll(name); err != nil {
					return errors.Join(err, dir.Close())
				}
			}
		}
		if err := errors.Join(notEOF(err), dir.Close()); err != nil || last {
			return err
		}
	}
}

func notEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

func rank(e os.DirEntry) int {
	switch {
	case e.IsDir():
		return 0
	case e.Name() == dataLink:
		return 1
	}
	return 2
}

func readNames(dir *os.Root) ([]os.DirEntry, error) {
	d, err := dir.OpenFile(".", os.O_RDONLY|unix.O_DIRECTORY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	return d.ReadDir(-1)
}

// entry makes one name what it is in from.
func (m *merger) entry(name string) error {
	want, err := m.from.Lstat(name)
	if err != nil {
		return err
	}
	have, err := m.to.Lstat(name)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return m.rename(name)
	case err != nil:
		return err
	case want.IsDir() && have.IsDir():
		return m.below(name, name)
	case want.IsDir() || have.IsDir():
		if err := m.to.RemoveAll(name); err != nil {
			return err
		}
		return m.rename(name)
	}
	same, err := sameContent(m.from, name, m.to, name, want, have)
	if err != nil {
		return err
	}
	if !same {
		return m.rename(name)
	}
	return copyOwner(m.to, name, want, have)
}

func (m *merger) rename(name string) error {
	return m.root.Rename(filepath.Join(m.fromPath, name), filepath.Join(m.toPath, name))
}

// sameContent compares two things of which neither is a directory.
func sameContent(fromRoot *os.Root, from string, toRoot *os.Root, to string, want, have os.FileInfo) (bool, error) {
	switch {
	case want.Mode().Type() != have.Mode().Type():
		return false, nil
	case want.Mode().Type() == os.ModeSymlink:
		a, errA := fromRoot.Readlink(from)
		b, errB := toRoot.Readlink(to)
		return a == b, errors.Join(errA, errB)
	case want.Size() != have.Size():
		return false, nil
	}
	a, err := openRegular(fromRoot, from, os.O_RDONLY)
	if err != nil {
		return false, err
	}
	defer a.Close()
	b, err := openRegular(toRoot, to, os.O_RDONLY)
	if err != nil {
		return false, nil // whatever it has become, it is not that
	}
	defer b.Close()
	x, y := make([]byte, 32<<10), make([]byte, 32<<10)
	for {
		n, errA := io.ReadFull(a, x)
		m, errB := io.ReadFull(b, y)
		switch {
		case !bytes.Equal(x[:n], y[:m]):
			return false, nil
		case errA == nil && errB == nil:
		case errors.Is(errA, io.EOF) || errors.Is(errA, io.ErrUnexpectedEOF):
			return true, nil
		default:
			return false, errors.Join(errA, errB)
		}
	}
}

// openRegular opens a regular file and nothing else.
func openRegular(root *os.Root, path string, flags int) (*os.File, error) {
	f, err := root.OpenFile(path, flags|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("%s is a %s", path, info.Mode().Type())
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// rewrite makes a file what another one is, in place: containers mount this very file, and see the same when
// kubelet rewrites it on a node.
func rewrite(root *os.Root, from, to string) error {
	want, errA := root.Lstat(from)
	have, errB := root.Lstat(to)
	if err := errors.Join(errA, errB); err != nil {
		return err
	}
	same, err := sameContent(root, from, root, to, want, have)
	if err != nil || same {
		return errors.Join(err, copyOwner(root, to, want, have))
	}
	in, err := openRegular(root, from, os.O_RDONLY)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := openRegular(root, to, os.O_WRONLY)
	if err != nil {
		return err
	}
	n, err := io.Copy(out, in)
	if err == nil {
		err = out.Truncate(n)
	}
	if err := errors.Join(err, out.Close()); err != nil {
		return err
	}
	return copyOwner(root, to, want, have)
}

// copyOwner gives an entry the owner and mode of another one of its type, if they differ.
func copyOwner(root *os.Root, to string, want, have os.FileInfo) error {
	w, h := want.Sys().(*syscall.Stat_t), have.Sys().(*syscall.Stat_t)
	if w.Uid != h.Uid || w.Gid != h.Gid {
		if err := root.Lchown(to, int(w.Uid), int(w.Gid)); err != nil {
			return err
		}
		var err error
		if have, err = root.Lstat(to); err != nil { // a change of owner can take set-uid bits away
			return err
		}
	}
	if want.Mode() != have.Mode() && want.Mode().Type() != os.ModeSymlink {
		return root.Chmod(to, want.Mode())
	}
	return nil
}

// setTime gives a regular file the host's time of its last change.
func setTime(root *os.Root, path string, f *agentproto.File) error {
	if f.GetMtimeNanos() == 0 {
		return nil
	}
	at := time.Unix(0, f.GetMtimeNanos())
	return root.Chtimes(path, at, at)
}
