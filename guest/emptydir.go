package guest

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/crivm/crivm/agentproto"
)

// emptyDirs are the pod's empty directories. Each is made, or mounted, once and stays until the pod ends.
type emptyDirs struct {
	mu sync.Mutex
}

// emptyContent is the directory of an empty directory's disk that containers see: beside it are lost+found and
// what a first start that was cut short has left.
const emptyContent = "content"

// prepareEmpty makes an empty directory available and returns the path of what a container mounts of it.
func (v *volumes) prepareEmpty(ctx context.Context, c *container, e *agentproto.EmptyDir) (string, error) {
	if err := checkID("volume", e.GetVolume()); err != nil {
		return "", err
	}
	v.empty.mu.Lock()
	defer v.empty.mu.Unlock()
	namespaces := v.agent.namespaces.Load()
	idmapped := namespaces != nil && e.GetSerial() != "" && !e.GetMemory()
	if namespaces != nil && !idmapped { // for the life of this guest: what is made gets its IDs
		namespaces.ownEmptyDir(e)
	}
	var root string
	var err error
	switch {
	case v.agent.machine == nil || e.GetMemory():
		root, err = v.memoryEmpty(e)
	case e.GetSerial() != "":
		root, err = v.diskEmpty(ctx, e)
	default:
		if root, err = v.agent.scratch(); err == nil {
			root, err = makeEmpty(filepath.Join(root, "volumes"), e.GetVolume(), e)
		}
	}
	if err != nil || len(e.GetSubPath()) == 0 && !idmapped {
		return root, err
	}
	if !idmapped {
		namespaces = nil
	}
	return v.mountPart(c, root, e.GetSubPath(), namespaces)
}

// memoryEmpty is a tmpfs, whose pages count as the memory of the containers that write them.
func (v *volumes) memoryEmpty(e *agentproto.EmptyDir) (string, error) {
	base := filepath.Join(v.agent.Dir, "volumes", "memory")
	path := filepath.Join(base, e.GetVolume())
	if v.agent.machine == nil {
		return makeEmpty(base, e.GetVolume(), e)
	}
	if err := os.MkdirAll(path, 0o755); err != nil {
		return "", err
	}
	if mounted(path) {
		return path, nil
	}
	options := []string{
		fmt.Sprintf("mode=%o", emptyMode(e)), "uid=" + strconv.Itoa(int(e.GetUid())), "gid=" + strconv.Itoa(int(e.GetGid())),
	}
	if e.GetSizeBytes() > 0 {
		options = append(options, "size="+strconv.FormatInt(e.GetSizeBytes(), 10))
	}
	if err := unix.Mount("tmpfs", path, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, strings.Join(options, ",")); err != nil {
		return "", fmt.Errorf("mount tmpfs: %w", err)
	}
	return path, nil
}

// diskEmpty mounts the disk of an empty directory. An earlier guest of the pod may have used it; whatever state it left
// the file system in, it is this kernel that reads it, and nobody formats it anew.
func (v *volumes) diskEmpty(ctx context.Context, e *agentproto.EmptyDir) (string, error) {
	if err := checkID("disk serial", e.GetSerial()); err != nil {
		return "", err
	}
	disk := v.emptyDisk(e.GetSerial())
	if err := os.MkdirAll(disk, 0o700); err != nil {
		return "", err
	}
	v.letGoOfFailed(disk)
	if !mounted(disk) {
		v.agent.machine.modules.Load("virtio_blk", "ext4")
		device, err := findDisk(ctx, e.GetSerial())
		if err != nil {
			return "", err
		}
		// The host's file is sparse: inode tables are zeros already.
		err = unix.Mount(device, disk, "ext4", unix.MS_RELATIME, "noinit_itable,errors=remount-ro")
		if errors.Is(err, unix.EIO) {
			return "", fmt.Errorf("its disk cannot be read or written, maybe as the host's disk is full (mount: %w): %w", err, errdefs.ErrUnavailable)
		}
		if err != nil {
			return "", fmt.Errorf("its disk is damaged and is left as it is (mount: %w): %w", err, errdefs.ErrDataLoss)
		}
		v.agent.trims.add(disk, device)
	}
	return makeEmpty(disk, emptyContent, e)
}

// letGoOfFailed unmounts a disk that ext4 has made read-only, which it does when its journal could not be written: the
// host's disk was full. Mounted anew it is as consistent as after a loss of power, and writable. While a container
// runs with it, it stays as it is.
func (v *volumes) letGoOfFailed(disk string) {
	if !mounted(disk) {
		return
	}
	// Its flags do not tell (Linux 6.1.113 and later); its refusing to make a file does.
	fd, err := unix.Open(disk, unix.O_TMPFILE|unix.O_WRONLY|unix.O_CLOEXEC, 0o600)
	if err == nil {
		unix.Close(fd)
	}
	if !errors.Is(err, unix.EROFS) {
		return
	}
	v.unmountEndedParts()
	again := v.agent.trims.remove(disk, 0)
	if err := unmount(disk); err != nil {
		again()
		slog.Warn("an emptyDir stays read-only until the containers that use it have ended", "disk", filepath.Base(disk), "error", err)
	}
}

// unmountEndedParts unmounts the sub paths of containers that have ended and are not deleted yet: nothing starts in them
// any more.
func (v *volumes) unmountEndedParts() {
	v.agent.mu.Lock()
	defer v.agent.mu.Unlock()
	for id, c := range v.agent.containers {
		c.mu.Lock()
		ended := c.state == agentproto.State_STATE_EXITED
		c.mu.Unlock()
		if !ended {
			continue
		}
		parts, _ := filepath.Glob(filepath.Join(v.partsDir(), id+"-*"))
		for _, part := range parts {
			if err := unmount(part); err != nil {
				slog.Warn("sub path of a container that has ended", "container", id, "error", err)
			}
		}
	}
}

func (v *volumes) partsDir() string { return filepath.Join(v.agent.Dir, "volumes", "parts") }

func (v *volumes) emptyDisk(serial string) string {
	return filepath.Join(v.agent.Dir, "volumes", "disks", serial)
}

// makeEmpty makes a directory with the attributes of an empty directory, at once: one that is there keeps its own,
// which containers may have changed.
func makeEmpty(base, name string, e *agentproto.EmptyDir) (string, error) {
	path := filepath.Join(base, name)
	if info, err := os.Lstat(path); err == nil && info.IsDir() {
		return path, nil
	}
	if err := os.MkdirAll(base, 0o755); err != nil {
		return "", err
	}
	fresh := path + ".new"
	if err := os.RemoveAll(fresh); err != nil {
		return "", err
	}
	err := os.Mkdir(fresh, 0o700)
	if err == nil {
		err = os.Chown(fresh, int(e.GetUid()), int(e.GetGid()))
	}
	if err == nil {
		err = unix.Chmod(fresh, emptyMode(e))
	}
	if err == nil {
		err = os.Rename(fresh, path)
	}
	return path, err
}

func emptyMode(e *agentproto.EmptyDir) uint32 {
	if mode := e.GetMode() & 0o7777; mode != 0 {
		return mode
	}
	return 0o777
}

// mountPart mounts a sub path by itself. Containers that run may swap its elements for symbolic links meanwhile,
// so the path is walked once, within the volume, and nobody walks it again. With namespaces its IDs are mapped.
func (v *volumes) mountPart(c *container, root string, elements []*agentproto.SubDir, namespaces *podNamespaces) (string, error) {
	fd, err := openPart(root, elements)
	if err != nil {
		return "", err
	}
	defer unix.Close(fd)
	if v.agent.machine == nil {
		return os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd))
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return "", fmt.Errorf("sub path: %w", err)
	}
	part, err := v.partPath(c, st.Mode&unix.S_IFMT == unix.S_IFDIR)
	if err != nil {
		return "", err
	}
	if namespaces != nil {
		mount, err := namespaces.idmap(fd, "")
		if err != nil {
			return "", err
		}
		defer unix.Close(mount)
		if err := attachMount(mount, part); err != nil {
			return "", err
		}
	} else if err := unix.Mount(fmt.Sprintf("/proc/self/fd/%d", fd), part, "", unix.MS_BIND, ""); err != nil {
		return "", fmt.Errorf("sub path: mount: %w", err)
	}
	c.undo = append(c.undo, func(context.Context) error { return unmount(part) })
	return part, nil
}

// partPath makes the place for a mount of a container's own, a directory or a file.
func (v *volumes) partPath(c *container, directory bool) (string, error) {
	base := v.partsDir()
	if err := os.MkdirAll(base, 0o700); err != nil {
		return "", err
	}
	part := filepath.Join(base, c.id+"-"+strconv.FormatUint(v.parts.Add(1), 10))
	var err error
	if directory {
		err = os.Mkdir(part, 0o700)
	} else {
		err = os.WriteFile(part, nil, 0o600)
	}
	if err != nil {
		return "", err
	}
	c.undo = append(c.undo, func(context.Context) error { return notExist(os.Remove(part)) })
	return part, nil
}

// openPart opens a sub path, O_PATH, making what is missing of it. A symbolic link leads nowhere but within the
// volume. What is there already may be a directory or a regular file.
func openPart(root string, elements []*agentproto.SubDir) (_ int, retErr error) {
	top, err := unix.Open(root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("sub path: %w", err)
	}
	if len(elements) == 0 {
		return top, nil
	}
	defer unix.Close(top)
	how := unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS}
	at, walked := top, "."
	defer func() {
		if retErr != nil && at != top {
			unix.Close(at)
		}
	}()
	for _, e := range elements {
		if name := e.GetName(); name == "" || name == "." || name == ".." || strings.ContainsAny(name, "/\x00") {
			return -1, fmt.Errorf("sub path element %q: %w", name, errdefs.ErrInvalidArgument)
		}
		walked += "/" + e.GetName()
		next, err := unix.Openat2(top, walked, &how)
		if errors.Is(err, unix.ENOENT) {
			if err = makePart(at, e); err == nil {
				next, err = unix.Openat2(top, walked, &how)
			}
		}
		if err != nil {
			return -1, fmt.Errorf("sub path %q: %w", walked, err)
		}
		if at != top {
			unix.Close(at)
		}
		at = next
	}
	var st unix.Stat_t
	if err := unix.Fstat(at, &st); err != nil {
		return -1, fmt.Errorf("sub path: %w", err)
	}
	if kind := st.Mode & unix.S_IFMT; kind != unix.S_IFDIR && kind != unix.S_IFREG {
		return -1, fmt.Errorf("sub path %q is neither a directory nor a regular file: %w", walked, errdefs.ErrFailedPrecondition)
	}
	return at, nil
}

func makePart(parent int, e *agentproto.SubDir) error {
	if err := unix.Mkdirat(parent, e.GetName(), 0o700); err != nil {
		return err
	}
	fd, err := unix.Openat(parent, e.GetName(), unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return errors.Join(unix.Fchown(fd, int(e.GetUid()), int(e.GetGid())), unix.Fchmod(fd, e.GetMode()&0o7777))
}

// detachEmpty writes everything of an empty directory's disk out and unmounts it, unless it is in use. false when the
// disk is no empty directory's.
func (v *volumes) detachEmpty(serial string) (bool, error) {
	if checkID("disk serial", serial) != nil {
		return false, nil
	}
	v.empty.mu.Lock()
	defer v.empty.mu.Unlock()
	disk := v.emptyDisk(serial)
	if !mounted(disk) {
		return false, nil
	}
	dir, err := os.Open(disk)
	if err != nil {
		return true, err
	}
	err = unix.Syncfs(int(dir.Fd()))
	dir.Close()
	if err != nil {
		return true, fmt.Errorf("disk %s: sync: %w", serial, err)
	}
	again := v.agent.trims.remove(disk, trimAtEnd)
	if err := unmount(disk); errors.Is(err, unix.EBUSY) {
		again()
		return true, fmt.Errorf("disk %s is in use: %w", serial, errdefs.ErrFailedPrecondition)
	} else if err != nil {
		again()
		return true, err
	}
	return true, nil
}
