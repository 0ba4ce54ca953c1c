package guest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/crivm/crivm/agentproto"
)

// volumes are the volumes of the pod that live in the guest. Copies of the host's files go with the last
// container that mounts them; empty directories live as long as the pod.
//
//	<Dir>/volumes/files/<volume>   host-written content
//	<Dir>/volumes/copies/<volume>  the same, kept up to date (host_copy.go)
//	<Dir>/volumes/memory/<volume>  tmpfs of an empty directory
//	<scratch>/volumes/<volume>     an empty directory on the scratch disk
//	<Dir>/volumes/disks/<serial>   disk of an empty directory
//	<Dir>/volumes/parts/<id>-<n>   sub path of an empty directory that a container mounts
//	<Dir>/volumes/shares/<tag>     virtio-fs share, one entry per volume of the host
//	<scratch>/containers/<id>/volumes/<n>  a VOLUME of a container's image
type volumes struct {
	agent *Agent

	mu    sync.Mutex
	files map[string]map[string]bool // volume → containers that mount it

	parts  atomic.Uint64 // mounts of containers' own made so far; names the next
	shares shares
	empty  emptyDirs
	copies hostCopies
}

// fileContent is the entry of a volume's directory that holds its content, so that a volume can be a file.
const fileContent = "content"

func newVolumes(a *Agent) *volumes {
	return &volumes{agent: a, files: map[string]map[string]bool{}, shares: shares{users: map[string]int{}}, copies: hostCopies{agent: a, byVolume: map[string]*hostCopy{}}}
}

// volumeMounts prepares a container's volumes and says how they are mounted.
func (a *Agent) volumeMounts(ctx context.Context, c *container, root string, ms []*agentproto.Mount) ([]specs.Mount, error) {
	mounts := []specs.Mount{}
	for _, m := range ms {
		if !filepath.IsAbs(m.GetDestination()) {
			return nil, fmt.Errorf("mount destination %q is not absolute: %w", m.GetDestination(), errdefs.ErrInvalidArgument)
		}
		source, err := a.volumes.prepare(ctx, c, root, m)
		if err != nil {
			return nil, fmt.Errorf("volume at %s: %w", m.GetDestination(), err)
		}
		options := []string{"rbind", "rprivate", "rw"}
		if m.GetReadonly() {
			options[2] = "ro"
		}
		if m.GetShm() != nil {
			options = append(options, "nosuid", "nodev", "noexec")
		}
		for _, o := range m.GetOptions() {
			if o != "noexec" && o != "nodev" && o != "nosuid" {
				return nil, fmt.Errorf("volume at %s: mount option %q: %w", m.GetDestination(), o, errdefs.ErrInvalidArgument)
			}
			options = append(options, o)
		}
		mounts = append(mounts, specs.Mount{Destination: m.GetDestination(), Type: "bind", Source: source, Options: options})
	}
	return mounts, nil
}

// prepare makes sure that a volume is there and returns its path.
func (v *volumes) prepare(ctx context.Context, c *container, root string, m *agentproto.Mount) (string, error) {
	switch s := m.GetSource().(type) {
	case *agentproto.Mount_Files:
		return v.prepareFiles(c, s.Files)
	case *agentproto.Mount_EmptyDir:
		return v.prepareEmpty(ctx, c, s.EmptyDir)
	case *agentproto.Mount_Shm:
		if v.agent.machine == nil {
			return "/dev/shm", nil
		}
		return shmPath, nil
	case *agentproto.Mount_Share:
		return v.prepareShare(ctx, c, s.Share)
	case *agentproto.Mount_Image:
		return v.prepareImage(ctx, c, s.Image)
	case *agentproto.Mount_Own:
		return v.prepareOwn(ctx, c, root, m.GetDestination())
	case *agentproto.Mount_HostCopy:
		return v.copies.use(c, s.HostCopy.GetVolume())
	case *agentproto.Mount_TerminationLog:
		return v.prepareTerminationLog(c, s.TerminationLog.GetFile())
	case *agentproto.Mount_Hugepages:
		return v.prepareHugepages(s.Hugepages)
	}
	return "", fmt.Errorf("unknown source of a mount: %w", errdefs.ErrInvalidArgument)
}

// prepareFiles writes the content of a volume, if no other container has it yet.
func (v *volumes) prepareFiles(c *container, f *agentproto.Files) (string, error) {
	if err := checkID("volume", f.GetVolume()); err != nil {
		return "", err
	}
	dir := filepath.Join(v.agent.Dir, "volumes", "files", f.GetVolume())
	v.mu.Lock()
	defer v.mu.Unlock()
	users := v.files[f.GetVolume()]
	if users == nil {
		v.agent.namespaces.Load().ownFiles(f.GetEntries()...)
		if err := writeFiles(dir, f.GetEntries()); err != nil {
			return "", errors.Join(err, os.RemoveAll(dir))
		}
		users = map[string]bool{}
		v.files[f.GetVolume()] = users
	}
	if !users[c.id] {
		users[c.id] = true
		c.undo = append(c.undo, func(context.Context) error { return v.releaseFiles(c.id, f.GetVolume(), dir) })
	}
	return filepath.Join(dir, fileContent), nil
}

// releaseFiles takes a container off a volume; the copy goes with the last.
func (v *volumes) releaseFiles(id, volume, dir string) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	users := v.files[volume]
	if len(users) == 1 && users[id] {
		if err := os.RemoveAll(dir); err != nil {
			return err
		}
	}
	delete(users, id)
	if len(users) == 0 {
		delete(v.files, volume)
	}
	return nil
}

// writeFiles makes a volume: a directory, or one file when there is exactly one entry with path "".
func writeFiles(dir string, entries []*agentproto.File) error {
	if err := os.RemoveAll(dir); err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	if len(entries) == 1 && entries[0].GetPath() == "" && entries[0].GetMode()&unix.S_IFMT == unix.S_IFREG {
		root, err := os.OpenRoot(dir)
		if err != nil {
			return err
		}
		defer root.Close()
		return writeFile(root, fileContent, entries[0])
	}
	if err := os.Mkdir(filepath.Join(dir, fileContent), 0o755); err != nil {
		return err
	}
	root, err := os.OpenRoot(filepath.Join(dir, fileContent))
	if err != nil {
		return err
	}
	defer root.Close()
	for _, f := range entries {
		path := f.GetPath()
		if path == "" {
			path = "."
		}
		if !filepath.IsLocal(path) {
			return fmt.Errorf("file %q leads out of its volume: %w", path, errdefs.ErrInvalidArgument)
		}
		if err := root.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return fmt.Errorf("file %q: %w", path, err)
		}
		if err := writeFile(root, path, f); err != nil {
			return fmt.Errorf("file %q: %w", path, err)
		}
	}
	return nil
}

// writeFile makes one entry of a volume. root lets no path lead out of it.
func writeFile(root *os.Root, path string, f *agentproto.File) error {
	mode := f.GetMode()
	switch mode & unix.S_IFMT {
	case unix.S_IFDIR:
		if err := root.MkdirAll(path, 0o755); err != nil {
			return err
		}
	case unix.S_IFREG:
		file, err := root.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		if err != nil {
			return err
		}
		if _, err = file.Write(f.GetContent()); err == nil {
			err = file.Chown(int(f.GetUid()), int(f.GetGid()))
		}
		if err == nil {
			err = file.Chmod(fileMode(mode))
		}
		if err := errors.Join(err, file.Close()); err != nil {
			return err
		}
		return setTime(root, path, f)
	case unix.S_IFLNK:
		if err := root.Symlink(f.GetLinkTarget(), path); err != nil {
			return err
		}
		return root.Lchown(path, int(f.GetUid()), int(f.GetGid()))
	default:
		return fmt.Errorf("type of mode %#o: %w", mode, errdefs.ErrInvalidArgument)
	}
	if err := root.Lchown(path, int(f.GetUid()), int(f.GetGid())); err != nil {
		return err
	}
	return root.Chmod(path, fileMode(mode))
}

// fileMode translates permission bits of st_mode.
func fileMode(mode uint32) os.FileMode {
	m := os.FileMode(mode & 0o777)
	for bit, flag := range map[uint32]os.FileMode{
		unix.S_ISUID: os.ModeSetuid, unix.S_ISGID: os.ModeSetgid, unix.S_ISVTX: os.ModeSticky,
	} {
		if mode&bit != 0 {
			m |= flag
		}
	}
	return m
}
