package server

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path"

	"golang.org/x/sys/unix"

	"github.com/crivm/crivm/agentproto"
	"github.com/crivm/crivm/server/store"
)

const (
	// terminationPath is kubelet's annotation that says at which path in the container it mounts the file that it
	// reads when the container has ended.
	terminationPath = "io.kubernetes.container.terminationMessagePath"
	// maxTerminationLog bounds what a guest can make the host write, in bytes. kubelet reads the last 4,096.
	maxTerminationLog = 16 << 10
)

// addTerminationLog adds the n-th mount as that of a file of the guest, if it is kubelet's termination log: a
// regular file, writable, at the path that the annotation names, and the last mount there. (A pod that mounts a
// file of its own at that path gets both, and kubelet's is the last.) The container writes to the guest's file; the
// host's gets its content before the container is EXITED.
func (v *guestVolumes) addTerminationLog(rec store.Container, n int, mount *agentproto.Mount, source *os.File, host string) bool {
	config := rec.Config
	named := config.GetAnnotations()[terminationPath]
	if named == "" || path.Clean(named) != mount.GetDestination() || mount.GetReadonly() {
		return false
	}
	for _, later := range config.GetMounts()[n+1:] {
		if path.Clean(later.GetContainerPath()) == mount.GetDestination() {
			return false
		}
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(source.Fd()), &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFREG || st.Size > maxTerminationLog {
		return false
	}
	content, err := readBounded(host, maxTerminationLog) // kubelet's is empty
	if err != nil {
		return false
	}
	v.terminationLog = host
	mount.Source = &agentproto.Mount_TerminationLog{TerminationLog: &agentproto.TerminationLog{
		File: &agentproto.File{Mode: st.Mode, Uid: st.Uid, Gid: st.Gid, Content: content},
	}}
	v.mounts = append(v.mounts, mount)
	return true
}

// writeTerminationLog puts what a guest left into the host's file, in place: kubelet has made it and reads it by
// its path. A file that was removed, or replaced by something else, is left alone. Doing it again does no harm.
func writeTerminationLog(host string, content []byte) error {
	if len(content) > maxTerminationLog {
		content = content[len(content)-maxTerminationLog:]
	}
	how := unix.OpenHow{Flags: unix.O_RDWR | unix.O_CLOEXEC | unix.O_NONBLOCK | unix.O_NOCTTY, Resolve: unix.RESOLVE_NO_SYMLINKS}
	fd, err := unix.Openat2(unix.AT_FDCWD, host, &how)
	if errors.Is(err, os.ErrNotExist) {
		return nil // with its pod
	}
	if err != nil {
		return fmt.Errorf("termination log %s: %w", host, err)
	}
	f := os.NewFile(uintptr(fd), host)
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return fmt.Errorf("termination log: %w", err)
	}
	if !info.Mode().IsRegular() {
		return fmt.Errorf("termination log %s has become a %s", host, info.Mode().Type())
	}
	if info.Size() == int64(len(content)) {
		if now, err := io.ReadAll(io.LimitReader(f, maxTerminationLog)); err == nil && string(now) == string(content) {
			return nil
		}
	}
	if _, err := f.WriteAt(content, 0); err != nil {
		return fmt.Errorf("termination log: %w", err)
	}
	if err := f.Truncate(int64(len(content))); err != nil {
		return fmt.Errorf("termination log: %w", err)
	}
	return nil
}
