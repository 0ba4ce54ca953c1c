package server

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// maxCopiedVolume and maxCopiedFiles bound a host directory or file that is copied into a guest; a larger one is
	// shared. Kubernetes allows 1 MiB in a ConfigMap or Secret, and any number of them in a projected volume.
	maxCopiedVolume = 128 << 20
	maxCopiedFiles  = 1 << 18
	// scanBatch is how many names of a directory are in memory at a time.
	scanBatch = 1024
	// dataLink is the symlink by which kubelet's atomic writer changes a volume: all of its files are seen through
	// it, and what it points to does not change any more.
	dataLink = "..data"
	// stampGrain is coarser than the clock that file systems stamp changes with: what changed within it before a
	// scan can change again without another stamp.
	stampGrain = 50 * time.Millisecond
)

var (
	// errTorn is of a scan amid a change.
	errTorn = errors.New("it was changed while it was read")
	// errTooLarge is of what is not to be copied.
	errTooLarge = fmt.Errorf("has more than %d MiB or %d files", maxCopiedVolume>>20, maxCopiedFiles)
)

// hostFile is one entry of a host directory that is scanned.
type hostFile struct {
	name string // in the root of the scan, for reading
	path string // relative to the volume; "" for the volume itself
	stat *syscall.Stat_t
	link string // target of a symlink
}

// visitor sees a directory of the host. Both functions may be nil.
type visitor struct {
	// directory is called with its absolute path before it is read, so that no change gets lost between reading and
	// watching.
	directory func(path string)
	// file is called for each entry, parents before what is in them.
	file func(root *os.Root, f hostFile) error
}

// scanned is what a scan found. Generation names the state: equal ones mean that nothing has changed in between.
type scanned struct {
	generation string
	stamps     string // the generation as far as names, sizes, owners, modes and stamps tell it
	data       string // what dataLink points to; "" without
}

// scanVolume walks a directory that kubelet's atomic writer made, or a single file, as it is: modes, owners,
// symlinks. Of the names that start with "..", which are the writer's own, only dataLink and its target count: the
// others are half-written or on their way out. errTorn when the link moved meanwhile.
func scanVolume(source string, v visitor) (scanned, error) {
	info, err := os.Lstat(source)
	if err != nil {
		return scanned{}, err
	}
	s := scan{visitor: v, source: source, base: "."}
	top := source
	if !info.IsDir() {
		top, s.base = filepath.Dir(source), filepath.Base(source)
		if v.directory != nil {
			v.directory(top)
		}
	}
	if s.root, err = os.OpenRoot(top); err != nil {
		return scanned{}, err
	}
	defer s.root.Close()
	if info.IsDir() {
		s.found.data, _ = s.root.Readlink(dataLink) // none is as good as any
	}
	if err := s.entry(s.base, ""); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			if _, gone := os.Lstat(source); gone == nil {
				err = fmt.Errorf("%w: %w", errTorn, err)
			}
		}
		return scanned{}, err
	}
	if info.IsDir() {
		if now, _ := s.root.Readlink(dataLink); now != s.found.data {
			return scanned{}, errTorn
		}
	}
	s.found.stamps = hex.EncodeToString(s.sum[:16])
	s.found.generation = s.found.stamps
	if time.Since(s.newest) < stampGrain {
		s.found.generation += "-" + rand.Text()
	}
	return s.found, nil
}

type scan struct {
	visitor
	source, base string
	root         *os.Root
	found        scanned
	bytes        int64
	entries      int
	newest       time.Time // change of anything
	sum          [sha256.Size]byte
}

// entry visits what has the name in the root, and what is below it.
func (s *scan) entry(name, rel string) error {
	info, err := s.root.Lstat(name)
	if err != nil {
		return err
	}
	f := hostFile{name: name, path: rel, stat: info.Sys().(*syscall.Stat_t)}
	stamp := fmt.Appendf(nil, "%q %o %d:%d", rel, f.stat.Mode, f.stat.Uid, f.stat.Gid)
	switch {
	case info.IsDir():
	case info.Mode().IsRegular():
		s.bytes += info.Size()
		stamp = fmt.Appendf(stamp, " %d %d %d %d", f.stat.Ino, info.Size(), f.stat.Mtim.Nano(), f.stat.Ctim.Nano())
	case info.Mode().Type() == fs.ModeSymlink:
		if f.link, err = s.root.Readlink(name); err != nil {
			return err
		}
		stamp = fmt.Appendf(stamp, " %q", f.link)
	default:
		return fmt.Errorf("%s is a %s", name, info.Mode().Type())
	}
	if s.entries++; s.entries > maxCopiedFiles || s.bytes > maxCopiedVolume {
		return errTooLarge
	}
	for i, b := range sha256.Sum256(stamp) { // in any order
		s.sum[i] ^= b
	}
	if !info.IsDir() { // a directory's own stamp moves with names that do not count
		if at := time.Unix(f.stat.Ctim.Unix()); at.After(s.newest) {
			s.newest = at
		}
	}
	if s.file != nil {
		if err := s.file(s.root, f); err != nil {
			return err
		}
	}
	if !info.IsDir() {
		return nil
	}
	return s.children(name, rel)
}

func (s *scan) children(name, rel string) error {
	if s.directory != nil {
		s.directory(filepath.Join(s.source, rel))
	}
	dir, err := s.root.OpenFile(name, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	defer dir.Close()
	for {
		names, err := dir.Readdirnames(scanBatch)
		for _, n := range names {
			if rel == "" && strings.HasPrefix(n, "..") && n != dataLink && n != s.found.data {
				continue
			}
			if err := s.entry(path.Join(name, n), path.Join(rel, n)); err != nil {
				return err
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// readFile hands the content of a scanned file on, in pieces of at most the given size, at least one. errTorn when
// it is not the scanned one any more.
func readFile(root *os.Root, f hostFile, piece int, take func(content []byte, first bool) error) error {
	file, err := root.OpenFile(f.name, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	defer file.Close()
	left := f.stat.Size
	for first := true; first || left > 0; first = false {
		b := make([]byte, min(left, int64(piece)))
		if _, err := io.ReadFull(file, b); err != nil {
			return fmt.Errorf("%s: %w", f.name, errors.Join(errTorn, err))
		}
		left -= int64(len(b))
		if left == 0 {
			var now unix.Stat_t
			if err := unix.Fstat(int(file.Fd()), &now); err != nil {
				return err
			}
			if now.Ino != f.stat.Ino || now.Size != f.stat.Size || now.Mtim.Nano() != f.stat.Mtim.Nano() {
				return fmt.Errorf("%s: %w", f.name, errTorn)
			}
		}
		if err := take(b, first); err != nil {
			return err
		}
	}
	return nil
}
