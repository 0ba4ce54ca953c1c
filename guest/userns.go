package guest

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"runtime"
	"syscall"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/crivm/crivm/agentproto"
)

// podNamespaces are what the containers of a pod with a user namespace live in: that one, and network, IPC, UTS and PID
// namespaces that belong to it. With the guest's own ones root of a container could neither bind port 80 nor mount
// /sys. They are made once, with the pod, and stay; the descriptors keep those that no process is in.
//
// What is written on volumes are IDs as containers know them. Where the kernel can map IDs of a mount (ext4, EROFS) it
// does; what the agent itself writes to a tmpfs, to its hugetlbfs and to the scratch disk gets the guest's IDs at once
// (owner). A share shows the guest's IDs already: there the host maps them.
type podNamespaces struct {
	uid, gid                 *agentproto.IDMapping
	user, net, ipc, uts, pid *os.File
	first                    *Child // in all of them
}

// makeNamespaces makes a pod's namespaces.
func (a *Agent) makeNamespaces(r *agentproto.UserNamespace) (_ *podNamespaces, retErr error) {
	for _, m := range []*agentproto.IDMapping{r.GetUid(), r.GetGid()} {
		if m.GetContainerId() != 0 || m.GetLength() == 0 || uint64(m.GetGuestId())+uint64(m.GetLength()) > math.MaxUint32 {
			return nil, fmt.Errorf("user namespace: %v is not a mapping: %w", m, errdefs.ErrInvalidArgument)
		}
	}
	mapping := func(m *agentproto.IDMapping) []syscall.SysProcIDMap {
		return []syscall.SysProcIDMap{{ContainerID: int(m.GetContainerId()), HostID: int(m.GetGuestId()), Size: int(m.GetLength())}}
	}
	n := &podNamespaces{uid: r.GetUid(), gid: r.GetGid()}
	var err error
	n.first, err = a.Reaper.Start(Command{
		Path: "/proc/self/exe", Args: []string{PauseArgument}, Dir: "/", Env: []string{"GOGC=off", "GOMAXPROCS=1"},
		Attr: &syscall.SysProcAttr{
			Cloneflags:  unix.CLONE_NEWUSER | unix.CLONE_NEWPID | unix.CLONE_NEWNET | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS,
			UidMappings: mapping(n.uid), GidMappings: mapping(n.gid), GidMappingsEnableSetgroups: true,
			Credential: &syscall.Credential{},
		},
	})
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSPC) {
		return nil, fmt.Errorf("the guest's kernel makes no user namespaces: %w: %w", err, errdefs.ErrNotImplemented)
	}
	if err != nil {
		return nil, fmt.Errorf("user namespace: %w", err)
	}
	defer func() {
		if retErr != nil {
			a.closeNamespaces(n)
		}
	}()
	for name, file := range map[string]**os.File{"user": &n.user, "net": &n.net, "ipc": &n.ipc, "uts": &n.uts, "pid": &n.pid} {
		if *file, err = os.Open(fmt.Sprintf("/proc/%d/ns/%s", n.first.PID, name)); err != nil {
			return nil, fmt.Errorf("user namespace: %w", err)
		}
	}
	return n, n.do(func() error {
		return errors.Join(
			setLoopbackUp(),
			os.WriteFile("/proc/sys/net/ipv6/conf/default/accept_dad", []byte("0"), 0), // as bootFixtures says
			os.WriteFile("/proc/sys/net/ipv6/conf/all/accept_dad", []byte("0"), 0),
		)
	})
}

func (a *Agent) closeNamespaces(n *podNamespaces) {
	a.Reaper.Signal(n.first, unix.SIGKILL)
	for _, f := range []*os.File{n.user, n.net, n.ipc, n.uts, n.pid} {
		if f != nil {
			f.Close()
		}
	}
}

// do calls f on a thread that is in the pod's network, IPC and UTS namespaces. A nil receiver means the guest's own.
func (n *podNamespaces) do(f func() error) error {
	if n == nil {
		return f()
	}
	result := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // and never unlocked unless all is as before: the thread ends with the goroutine
		if unix.Gettid() == unix.Getpid() {
			// The main thread never ends: hold it meanwhile, so that f runs on another.
			defer runtime.UnlockOSThread()
			result <- n.do(f)
			return
		}
		back := true
		enter := func(path string, file *os.File, kind int) func() {
			own, err := os.Open("/proc/thread-self/ns/" + path)
			if err == nil {
				err = unix.Setns(int(file.Fd()), kind)
			}
			if err != nil {
				own.Close()
				back = false
				result <- fmt.Errorf("enter the pod's %s namespace: %w", path, err)
				runtime.Goexit()
			}
			return func() {
				back = unix.Setns(int(own.Fd()), kind) == nil && back
				own.Close()
			}
		}
		leave := []func(){enter("net", n.net, unix.CLONE_NEWNET), enter("ipc", n.ipc, unix.CLONE_NEWIPC), enter("uts", n.uts, unix.CLONE_NEWUTS)}
		err := f()
		for _, l := range leave {
			l()
		}
		if back {
			runtime.UnlockOSThread()
		}
		result <- err
	}()
	return <-result
}

// owner turns IDs of containers into the guest's. What is not mapped belongs to nobody that a container could be.
func (n *podNamespaces) owner(uid, gid int) (int, int) {
	if n == nil {
		return uid, gid
	}
	return mapID(n.uid, uid), mapID(n.gid, gid)
}

// ownFiles gives files of the host's to whom they belong in the guest.
func (n *podNamespaces) ownFiles(files ...*agentproto.File) {
	if n == nil {
		return
	}
	for _, f := range files {
		uid, gid := n.owner(int(f.GetUid()), int(f.GetGid()))
		f.Uid, f.Gid = uint32(uid), uint32(gid)
	}
}

// ownEmptyDir does so with what an empty directory is made of.
func (n *podNamespaces) ownEmptyDir(e *agentproto.EmptyDir) {
	uid, gid := n.owner(int(e.GetUid()), int(e.GetGid()))
	e.Uid, e.Gid = uint32(uid), uint32(gid)
	for _, d := range e.GetSubPath() {
		uid, gid := n.owner(int(d.GetUid()), int(d.GetGid()))
		d.Uid, d.Gid = uint32(uid), uint32(gid)
	}
}

// overflowID is what the kernel shows for IDs that are not mapped.
const overflowID = 65534

func mapID(m *agentproto.IDMapping, id int) int {
	if id < 0 || int64(id) >= int64(m.GetLength()) {
		return overflowID
	}
	return int(m.GetGuestId()) + id
}

// idmap opens the mount of what a descriptor names with its IDs mapped: a mount of its own, still without a place.
func (n *podNamespaces) idmap(at int, path string) (int, error) {
	fd, err := unix.OpenTree(at, path, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_EMPTY_PATH)
	if err != nil {
		return -1, fmt.Errorf("open the tree: %w", err)
	}
	attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_IDMAP, Userns_fd: uint64(n.user.Fd())}
	if err := unix.MountSetattr(fd, "", unix.AT_EMPTY_PATH, &attr); err != nil {
		unix.Close(fd)
		return -1, fmt.Errorf("map the IDs of a mount: %w", err)
	}
	return fd, nil
}

// idmapInPlace replaces a mount by one with mapped IDs.
func (n *podNamespaces) idmapInPlace(path string) error {
	fd, err := n.idmap(unix.AT_FDCWD, path)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unmount(path); err != nil {
		return err
	}
	return attachMount(fd, path)
}

// attachMount gives a mount its place.
func attachMount(fd int, path string) error {
	if err := unix.MoveMount(fd, "", unix.AT_FDCWD, path, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return fmt.Errorf("mount at %s: %w", path, err)
	}
	return nil
}

// join makes a container one of the pod's user namespace.
func (n *podNamespaces) join(c *container, s *specs.Spec, io ChildStdio) error {
	if n == nil {
		return nil
	}
	user := s.Process.User
	for _, id := range append([]uint32{user.GID}, user.AdditionalGids...) {
		if id >= n.gid.GetLength() {
			return fmt.Errorf("group %d is not mapped by the pod's user namespace, which has %d: %w", id, n.gid.GetLength(), errdefs.ErrInvalidArgument)
		}
	}
	if user.UID >= n.uid.GetLength() {
		return fmt.Errorf("user %d is not mapped by the pod's user namespace, which has %d: %w", user.UID, n.uid.GetLength(), errdefs.ErrInvalidArgument)
	}
	for kind, file := range map[specs.LinuxNamespaceType]*os.File{
		specs.UserNamespace: n.user, specs.NetworkNamespace: n.net, specs.IPCNamespace: n.ipc, specs.UTSNamespace: n.uts,
	} {
		s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: kind, Path: namespacePath(file)})
	}
	for i, d := range s.Linux.Devices {
		node, err := n.deviceNode(c, i, d)
		if err != nil {
			return fmt.Errorf("device %s: %w", d.Path, err)
		}
		s.Mounts = append(s.Mounts, specs.Mount{Destination: d.Path, Type: "bind", Source: node, Options: []string{"bind", "rprivate", "rw"}})
	}
	s.Linux.Devices = nil
	return n.own(io, user)
}

// deviceNode makes a device's file in the guest's /dev: in a user namespace nobody can, and the OCI runtime, which would do
// it outside, knows of no owner.
func (n *podNamespaces) deviceNode(c *container, number int, d specs.LinuxDevice) (string, error) {
	path := fmt.Sprintf("/dev/%s-%d", c.id, number)
	if err := unix.Mknod(path, unix.S_IFBLK|0o600, int(unix.Mkdev(uint32(d.Major), uint32(d.Minor)))); err != nil {
		return "", err
	}
	c.undo = append(c.undo, func(context.Context) error { return notExist(os.Remove(path)) })
	uid, gid := n.owner(int(*d.UID), int(*d.GID))
	return path, errors.Join(os.Chown(path, uid, gid), unix.Chmod(path, uint32(d.FileMode.Perm())))
}

// own gives a process its standard streams: it cannot open them by name (/dev/stdout) while they are the guest's root's,
// and the OCI runtime cannot give them to it from within the user namespace.
func (n *podNamespaces) own(io ChildStdio, user specs.User) error {
	if n == nil {
		return nil
	}
	uid, gid := n.owner(int(user.UID), int(user.GID))
	for _, f := range []*os.File{io.Stdin, io.Stdout, io.Stderr} {
		if f == nil {
			continue
		}
		if err := f.Chown(uid, gid); err != nil {
			return fmt.Errorf("standard streams: %w", err)
		}
	}
	return nil
}

// namespacePath is a path of an open namespace for the programs that the agent starts.
func namespacePath(f *os.File) string {
	return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), f.Fd())
}
