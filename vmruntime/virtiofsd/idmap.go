package virtiofsd

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"syscall"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// IDMapping shows owners 0 to Length-1 of a volume as the IDs from First on, and takes those for them. All others are
// nobody's for the guest, who can neither read nor make what is theirs.
type IDMapping struct {
	FirstUID, UIDs uint32
	FirstGID, GIDs uint32
}

// mapIDs maps the IDs of a detached mount and, where their file systems can do it too, of the mounts below it
// (mount_setattr(2), ID-mapped mounts).
func mapIDs(tree int, ids IDMapping) error {
	namespace, err := userNamespace(ids)
	if err != nil {
		return err
	}
	defer namespace.Close()
	attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_IDMAP, Userns_fd: uint64(namespace.Fd())}
	err = unix.MountSetattr(tree, "", unix.AT_EMPTY_PATH|unix.AT_RECURSIVE, &attr)
	if errors.Is(err, unix.EINVAL) {
		err = unix.MountSetattr(tree, "", unix.AT_EMPTY_PATH, &attr)
	}
	if errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("the host's kernel cannot map IDs of this file system, which a pod with a user namespace needs; use another file system or run the pod without (hostUsers: true): %w: %w",
			err, errdefs.ErrNotImplemented)
	}
	return err
}

// userNamespace makes a user namespace with these mappings. It takes a process to be in it, which is stopped before its
// first instruction and ended at once.
func userNamespace(ids IDMapping) (*os.File, error) {
	runtime.LockOSThread() // only the thread that traces a process may wait for it, and the process ends with it
	defer runtime.UnlockOSThread()
	pid, err := syscall.ForkExec("/proc/self/exe", []string{"crivm-idmap"}, &syscall.ProcAttr{Sys: &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWUSER, Ptrace: true, Pdeathsig: unix.SIGKILL,
		UidMappings: []syscall.SysProcIDMap{{HostID: int(ids.FirstUID), Size: int(ids.UIDs)}},
		GidMappings: []syscall.SysProcIDMap{{HostID: int(ids.FirstGID), Size: int(ids.GIDs)}},
	}})
	if err != nil {
		return nil, fmt.Errorf("user namespace: %w", err)
	}
	namespace, err := os.Open(fmt.Sprintf("/proc/%d/ns/user", pid))
	err = errors.Join(err, unix.Kill(pid, unix.SIGKILL))
	for {
		var status unix.WaitStatus
		_, waitErr := unix.Wait4(pid, &status, 0, nil)
		if waitErr == nil && !status.Exited() && !status.Signaled() || errors.Is(waitErr, unix.EINTR) {
			continue // it has stopped, as it was to
		}
		err = errors.Join(err, waitErr)
		break
	}
	if err != nil {
		namespace.Close()
		return nil, fmt.Errorf("user namespace: %w", err)
	}
	return namespace, nil
}
