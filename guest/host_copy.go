package guest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/crivm/crivm/agentproto"
)

// hostCopies are the guest's copies of directories and files of the host, each kept as the host says by
// uploads. A copy is made by its first upload and goes when the host drops it.
//
//	<Dir>/volumes/copies                    tmpfs, so that content is nowhere but in memory
//	<Dir>/volumes/copies/<volume>/content   what containers mount: a directory or a file
//	<Dir>/volumes/copies/<volume>/stage     an upload that is not complete
type hostCopies struct {
	agent *Agent

	mu       sync.Mutex
	byVolume map[string]*hostCopy
	mounted  bool // the tmpfs

	rehearsal  sync.Once
	collecting atomic.Bool // a look at the garbage is to come
}

type hostCopy struct {
	mu         sync.Mutex // held while a part is taken
	dir        string
	upload     uint64 // the last that began
	part       uint32 // the one that it needs next
	broken     bool   // nothing more is taken of that upload
	generation string // of what was applied last; "" before the first
	dropped    bool
	users      map[string]int // mounts by container
}

const (
	copyContent = "content"
	copyStage   = "stage"
	// dataLink is the symlink by which kubelet's volumes change: all files are seen through it.
	dataLink = "..data"
)

// PutVolume implements agentproto.AgentService.
func (a *Agent) PutVolume(_ context.Context, r *agentproto.PutVolumeRequest) (*agentproto.PutVolumeResponse, error) {
	if err := checkID("volume", r.GetVolume()); err != nil {
		return nil, err
	}
	a.namespaces.Load().ownFiles(r.GetEntries()...)
	c, err := a.volumes.copies.make(r.GetVolume())
	if err != nil {
		return nil, fmt.Errorf("volume %s: %w", r.GetVolume(), err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.put(r); err != nil {
		return nil, fmt.Errorf("volume %s: %w", r.GetVolume(), err)
	}
	if r.GetGeneration() != "" {
		a.volumes.copies.getReady()
	}
	return &agentproto.PutVolumeResponse{}, nil
}

// DropVolume implements agentproto.AgentService.
func (a *Agent) DropVolume(_ context.Context, r *agentproto.DropVolumeRequest) (*agentproto.DropVolumeResponse, error) {
	if err := checkID("volume", r.GetVolume()); err != nil {
		return nil, err
	}
	if err := a.volumes.copies.drop(r.GetVolume()); err != nil {
		return nil, fmt.Errorf("volume %s: %w", r.GetVolume(), err)
	}
	return &agentproto.DropVolumeResponse{}, nil
}

// make finds a copy or begins one.
func (h *hostCopies) make(volume string) (*hostCopy, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if c := h.byVolume[volume]; c != nil {
		return c, nil
	}
	base := filepath.Join(h.agent.Dir, "volumes", "copies")
	if err := os.MkdirAll(base, 0o711); err != nil {
		return nil, err
	}
	if h.agent.machine != nil && !h.mounted {
		// Half of the guest's memory, as any tmpfs; files are bounded by the host alone.
		if err := unix.Mount("tmpfs", base, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=0711,nr_inodes=0"); err != nil {
			return nil, fmt.Errorf("mount tmpfs: %w", err)
		}
		h.mounted = true
	}
	c := &hostCopy{dir: filepath.Join(base, volume), users: map[string]int{}}
	if err := errors.Join(os.RemoveAll(c.dir), os.Mkdir(c.dir, 0o711)); err != nil {
		return nil, err
	}
	h.byVolume[volume] = c
	return c, nil
}

func (h *hostCopies) drop(volume string) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	c := h.byVolume[volume]
	if c == nil {
		return nil
	}
	c.mu.Lock() // no upload takes h.mu
	defer c.mu.Unlock()
	if len(c.users) > 0 {
		return fmt.Errorf("%d containers use it: %w", len(c.users), errdefs.ErrFailedPrecondition)
	}
	c.dropped = true
	delete(h.byVolume, volume)
	return os.RemoveAll(c.dir)
}

// use notes a mount of a copy and returns its path.
func (h *hostCopies) use(c *container, volume string) (string, error) {
	if err := checkID("volume", volume); err != nil {
		return "", err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	v := h.byVolume[volume]
	if v == nil {
		return "", fmt.Errorf("copy %s: %w", volume, errdefs.ErrNotFound)
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.generation == "" {
		return "", fmt.Errorf("copy %s is not complete: %w", volume, errdefs.ErrNotFound)
	}
	v.users[c.id]++
	c.undo = append(c.undo, func(context.Context) error {
		v.mu.Lock()
		defer v.mu.Unlock()
		if v.users[c.id]--; v.users[c.id] == 0 {
			delete(v.users, c.id)
		}
		return nil
	})
	return filepath.Join(v.dir, copyContent), nil
}

// list tells what there is, for a host that restarted.
func (h *hostCopies) list() []*agentproto.VolumeInfo {
	h.mu.Lock()
	defer h.mu.Unlock()
	infos := []*agentproto.VolumeInfo{}
	for volume, c := range h.byVolume {
		c.mu.Lock()
		infos = append(infos, &agentproto.VolumeInfo{Volume: volume, Generation: c.generation, Upload: c.upload})
		c.mu.Unlock()
	}
	slices.SortFunc(infos, func(a, b *agentproto.VolumeInfo) int { return strings.Compare(a.Volume, b.Volume) })
	return infos
}

// put takes one part of an upload. c.mu is held.
func (c *hostCopy) put(r *agentproto.PutVolumeRequest) error {
	switch {
	case c.dropped:
		return fmt.Errorf("it was dropped: %w", errdefs.ErrAborted)
	case r.GetUpload() < c.upload, r.GetUpload() == c.upload && r.GetPart() == 0:
		return fmt.Errorf("upload %d is not later than %d: %w", r.GetUpload(), c.upload, errdefs.ErrAborted)
	case r.GetUpload() > c.upload && r.GetPart() > 0, r.GetUpload() == c.upload && (c.broken || r.GetPart() != c.part):
		return fmt.Errorf("part %d of upload %d out of order: %w", r.GetPart(), r.GetUpload(), errdefs.ErrAborted)
	}
	root, err := os.OpenRoot(c.dir)
	if err != nil {
		return err
	}
	defer root.Close()
	c.upload, c.part = r.GetUpload(), r.GetPart()+1
	c.broken = true // until this part is done
	if r.GetPart() == 0 {
		if err := root.RemoveAll(copyStage); err != nil {
			return err
		}
	}
	stage := stager{root: root}
	defer stage.close()
	for _, f := range r.GetEntries() {
		if err := stage.add(f); err != nil {
			return errors.Join(fmt.Errorf("file %q: %w", f.GetPath(), noSpace(err)), root.RemoveAll(copyStage))
		}
	}
	if r.GetGeneration() == "" {
		c.broken = false
		return nil
	}
	if err := apply(root); err != nil {
		return errors.Join(noSpace(err), root.RemoveAll(copyStage))
	}
	c.generation = r.GetGeneration()
	return nil
}

// noSpace gives the error of a full tmpfs a class and a reason.
func noSpace(err error) error {
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.ENOMEM) {
		return fmt.Errorf("the guest has too little memory for the pod's ConfigMaps, Secrets and projected volumes (half of it at most): %w: %w", err, errdefs.ErrResourceExhausted)
	}
	return err
}

// stager writes the entries of an upload. What is staged nobody sees. Entries of one directory follow each other, so it is
// kept open: how fast a change reaches containers is how few system calls come before it.
type stager struct {
	root   *os.Root // of the copy
	parent *os.Root // the directory of the last entry, or root
	path   string   // of parent below root; "." is root
}

func (s *stager) close() {
	if s.parent != nil && s.parent != s.root {
		s.parent.Close()
	}
}

// open makes the parent the directory with a path below the root.
func (s *stager) open(path string) error {
	if s.parent != nil && s.path == path {
		return nil
	}
	parent := s.root
	if path != "." {
		var err error
		if parent, err = s.root.OpenRoot(path); err != nil {
			return err
		}
	}
	s.close()
	s.parent, s.path = parent, path
	return nil
}

func (s *stager) add(f *agentproto.File) error {
	if f.GetPath() != "" && !filepath.IsLocal(f.GetPath()) || f.GetPath() == "." {
		return fmt.Errorf("leads out of its volume: %w", errdefs.ErrInvalidArgument)
	}
	path := filepath.Join(copyStage, f.GetPath())
	if err := s.open(filepath.Dir(path)); err != nil {
		return err
	}
	name := filepath.Base(path)
	if !f.GetAppend() {
		return writeFile(s.parent, name, f)
	}
	file, err := s.parent.OpenFile(name, os.O_WRONLY|os.O_APPEND|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	_, err = file.Write(f.GetContent())
	if err := errors.Join(err, file.Close()); err != nil {
		return err
	}
	return setTime(s.parent, name, f)
}

// apply makes the content what is staged.
func apply(root *os.Root) error {
	staged, err := root.Lstat(copyStage)
	if err != nil {
		return fmt.Errorf("an upload without entries: %w", errdefs.ErrInvalidArgument)
	}
	have, err := root.Lstat(copyContent)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return root.Rename(copyStage, copyContent)
	case err != nil:
		return err
	case have.IsDir() != staged.IsDir():
		return fmt.Errorf("was a %s and is a %s now: %w", kind(have), kind(staged), errdefs.ErrFailedPrecondition)
	case staged.IsDir():
		err = mergeTop(root)
	default:
		err = rewrite(root, copyStage, copyContent)
	}
	return errors.Join(err, root.RemoveAll(copyStage))
}

func kind(info os.FileInfo) string {
	if info.IsDir() {
		return "directory"
	}
	return "file"
}
