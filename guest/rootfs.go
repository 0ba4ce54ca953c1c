package guest

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// prepareRoot makes the container's root file system and returns its path: an overlay of the image disk
// and a directory on the scratch disk that no other container sees. It is writable even when the
// container's is not to be, so that mount points can be made; the OCI runtime makes it read-only.
func (a *Agent) prepareRoot(ctx context.Context, c *container, serial string) (string, error) {
	root := filepath.Join(c.dir, "rootfs")
	if a.machine == nil {
		if a.PlainRoot != "" {
			return a.PlainRoot, nil
		}
		return root, os.Mkdir(root, 0o755)
	}
	<-a.machine.prepared
	scratch, err := a.scratch()
	if err != nil {
		return "", err
	}
	lower, err := a.machine.images.acquire(ctx, serial, a.machine.modules, a.namespaces.Load())
	if err != nil {
		return "", err
	}
	c.undo = append(c.undo, func(context.Context) error { return a.machine.images.release(serial) })

	layer := filepath.Join(scratch, "containers", c.id)
	upper, work := filepath.Join(layer, "upper"), filepath.Join(layer, "work")
	c.undo = append(c.undo, func(context.Context) error {
		defer a.trims.soon()
		return os.RemoveAll(layer)
	})
	for _, d := range []string{root, upper, work} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return "", err
		}
	}
	if err := copyAttributes(lower, upper); err != nil {
		return "", err
	}
	a.machine.modules.Load("overlay")
	// "volatile": nothing of it is used after this guest, so nothing is synced for its sake.
	options := fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s,volatile", lower, upper, work)
	err = unix.Mount("overlay", root, "overlay", 0, options)
	if errors.Is(err, unix.EIO) {
		// A write to the scratch disk has failed (the host's disk was full), and Linux mounts no volatile overlay while
		// nobody has been told. Syncing is being told.
		clearWriteError(upper)
		err = unix.Mount("overlay", root, "overlay", 0, options)
	}
	if err != nil {
		return "", fmt.Errorf("mount overlay: %w", err)
	}
	c.undo = append(c.undo, func(context.Context) error { return unmount(root) })
	c.mu.Lock()
	c.layer = &layerSize{dirs: []string{upper, filepath.Join(layer, ownVolumes)}}
	c.mu.Unlock()
	return root, nil
}

// clearWriteError takes note of failed writes to the file system of dir.
func clearWriteError(dir string) {
	f, err := os.Open(dir)
	if err != nil {
		return
	}
	defer f.Close()
	unix.Syncfs(int(f.Fd())) // its error is the one that is taken note of
}

// copyAttributes gives an overlay's top directory what the image's has; the overlay shows the upper one's.
func copyAttributes(from, to string) error {
	var st unix.Stat_t
	if err := unix.Stat(from, &st); err != nil {
		return fmt.Errorf("stat %s: %w", from, err)
	}
	if err := unix.Chown(to, int(st.Uid), int(st.Gid)); err != nil {
		return fmt.Errorf("chown %s: %w", to, err)
	}
	if err := unix.Chmod(to, st.Mode&0o7777); err != nil {
		return fmt.Errorf("chmod %s: %w", to, err)
	}
	return nil
}

const (
	// layerAge is how old a measured size of a writable layer may be.
	layerAge = 10 * time.Second
	// maxLayerFiles and maxLayerDepth bound one measurement; each level has a directory open.
	maxLayerFiles, maxLayerDepth = 1 << 20, 256
	layerBatch                   = 256
)

// layerSize is the size of a writable layer. Walking it is dear, so it is done in the background, at most
// every layerAge, when somebody asks.
type layerSize struct {
	dirs []string // those that are there

	mu            sync.Mutex
	bytes, inodes uint64
	measured      time.Time
	walking       bool
}

// get returns the last measured size. The first call waits for one.
func (l *layerSize) get() (bytes, inodes uint64) {
	l.mu.Lock()
	first := l.measured.IsZero()
	stale := time.Since(l.measured) > layerAge && !l.walking
	if stale {
		l.walking = true
	}
	l.mu.Unlock()
	switch {
	case stale && first:
		l.walk()
	case stale:
		go l.walk()
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.bytes, l.inodes
}

func (l *layerSize) walk() {
	var count fileCount
	for _, dir := range l.dirs {
		count.add(dir, 0)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.bytes, l.inodes, l.measured, l.walking = count.bytes, count.inodes, time.Now(), false
}

// fileCount counts what files take. Of a directory no more than layerBatch names are in memory at a time: a container may
// have a million in one, and an agent that reads all of them takes the memory that the guest does not have.
type fileCount struct{ bytes, inodes uint64 }

// add counts a directory and what is below it; false when there was enough. What vanishes meanwhile, or was never made,
// does not count.
func (c *fileCount) add(dir string, depth int) (goOn bool) {
	f, err := os.OpenFile(dir, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return true
	}
	defer f.Close()
	if info, err := f.Stat(); err == nil && !c.one(info) {
		return false
	}
	for {
		entries, err := f.ReadDir(layerBatch)
		for _, d := range entries {
			if d.IsDir() {
				if depth < maxLayerDepth && !c.add(filepath.Join(dir, d.Name()), depth+1) {
					return false
				}
			} else if info, err := d.Info(); err == nil && !c.one(info) {
				return false
			}
		}
		if err != nil { // its end, mostly
			return true
		}
	}
}

func (c *fileCount) one(info fs.FileInfo) (goOn bool) {
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		c.bytes += uint64(st.Blocks) * 512
	}
	c.inodes++
	return c.inodes < maxLayerFiles
}

// scratch is the directory for writable data of the pod's containers. It waits until its disk is mounted.
func (a *Agent) scratch() (string, error) {
	a.sandboxMu.Lock()
	sb := a.sandbox
	a.sandboxMu.Unlock()
	if sb == nil {
		return "", fmt.Errorf("sandbox is not set up: %w", errdefs.ErrFailedPrecondition)
	}
	<-sb.scratchDone // within deviceTimeout
	return sb.scratch, sb.scratchErr
}
