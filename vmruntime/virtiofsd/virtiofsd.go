// Package virtiofsd runs the file server through which one VM sees directories and files of the host: one
// virtiofsd process per VM, behind one virtio-fs device, whatever the number of volumes.
//
// What the guest sees as the root of the share is a small read-only tmpfs with one entry per volume, on which
// a clone of the host's mount is attached. tmpfs and clones exist in the process's own mount namespace alone:
// however the process or the daemon ends, the kernel takes them away, and nothing in the daemon's own
// namespace can leak or be deleted through a leftover mount. Read-only is a property of these mounts, so no
// guest can write, whatever it does to its own kernel.
//
//	<Spec.Dir>/socket  what the VMM connects to
//	<Spec.Dir>/root    process record and log; in the server's namespace: the root of the share
//	<Spec.Dir>/stage   empty; in the server's namespace: the same tmpfs, writable, to make entries
//
// Spec.Dir belongs to root, unlike the VM's own directory, which a VMM that was taken over can write to.
//
// Content is never cached in the guest (cache=none): what the host writes is there at the next read.
package virtiofsd

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/crivm/crivm/vmruntime"
)

// Spec describes the file server of one VM.
type Spec struct {
	// Dir is for this server alone, below directories that the VMM can pass through. It is made; at most 90
	// bytes long, for the socket.
	Dir string
	// Client is the uid of the VMM, which alone may connect.
	Client int
	// Process says where the server is accounted; its UID and GID are not used: files of all owners are
	// served, so it runs as root with the few capabilities that takes, confined to the share.
	Process vmruntime.ProcessSpec
}

// Server is a running file server. All methods are safe for concurrent use.
type Server struct {
	dir  string
	proc *vmruntime.Process
}

const (
	stageFlags = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	// stageOptions bound what a guest that could write there, which it cannot, would take.
	stageOptions = "mode=0755,size=1m,nr_inodes=8192"
)

// Start starts a file server with an empty share; it serves the first that connects to Socket.
// On error nothing is left.
func Start(ctx context.Context, program Program, spec Spec) (_ *Server, retErr error) {
	s := &Server{dir: spec.Dir}
	defer func() {
		if retErr != nil {
			retErr = errors.Join(fmt.Errorf("virtiofsd: %w", retErr), Sweep(context.WithoutCancel(ctx), spec.Dir))
		}
	}()
	for _, dir := range []string{s.dir, s.root(), s.stage()} {
		if err := os.MkdirAll(dir, 0o711); err != nil {
			return nil, err
		}
	}
	listener, err := listen(s.Socket(), spec.Client)
	if err != nil {
		return nil, err
	}
	defer listener.Close()
	process := spec.Process
	process.UID, process.GID = 0, 0
	s.proc, err = vmruntime.Launch(ctx, vmruntime.LaunchSpec{
		Dir: s.root(), Path: program.Path, Args: program.args(s.root()), ExtraFiles: []*os.File{listener}, Process: process, Mounts: s.mountStage,
	})
	if err != nil {
		return nil, err
	}
	return s, nil
}

// listen makes the socket; the server gets it as a descriptor, so that only the right uid can connect from the
// first moment on.
func listen(path string, uid int) (*os.File, error) {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, err
	}
	l.SetUnlinkOnClose(false)
	defer l.Close()
	if err := errors.Join(os.Chmod(path, 0o600), os.Chown(path, uid, uid)); err != nil {
		return nil, err
	}
	return l.File()
}

// mountStage runs in the server's new mount namespace.
func (s *Server) mountStage() error {
	if err := unix.Mount("tmpfs", s.stage(), "tmpfs", stageFlags, stageOptions); err != nil {
		return fmt.Errorf("mount stage: %w", err)
	}
	if err := unix.Mount(s.stage(), s.root(), "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("bind stage: %w", err)
	}
	if err := unix.Mount("", s.root(), "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY|stageFlags, ""); err != nil {
		return fmt.Errorf("make the root of the share read-only: %w", err)
	}
	return nil
}

// Adopt finds the server that an earlier daemon started with this directory. errdefs.ErrNotFound when it does
// not run.
func Adopt(dir string) (*Server, error) {
	s := &Server{dir: dir}
	var err error
	if s.proc, err = vmruntime.Adopt(s.root()); err != nil {
		return nil, fmt.Errorf("virtiofsd: %w", err)
	}
	return s, nil
}

// Sweep ends whatever runs with this directory and removes it. Idempotent.
func Sweep(ctx context.Context, dir string) error {
	if _, err := os.Lstat(dir); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	s := &Server{dir: dir}
	if err := vmruntime.SweepDir(ctx, s.root()); err != nil {
		return fmt.Errorf("virtiofsd: %w", err)
	}
	return os.RemoveAll(dir)
}

// Kill ends the server and removes its directory. Idempotent. A VM that still uses it hangs.
func (s *Server) Kill(ctx context.Context) error {
	if err := s.proc.Kill(ctx); err != nil {
		return fmt.Errorf("virtiofsd: %w", err)
	}
	return os.RemoveAll(s.dir)
}

// Socket is what the VMM connects to.
func (s *Server) Socket() string { return filepath.Join(s.dir, "socket") }

// PID of the server, for accounting.
func (s *Server) PID() int { return s.proc.PID() }

// Done is closed when the server has ended.
func (s *Server) Done() <-chan struct{} { return s.proc.Done() }

// Exit says after Done, in a few words, how the server ended.
func (s *Server) Exit() string {
	switch code, signal := s.proc.ExitStatus(); {
	case signal != 0:
		return fmt.Sprintf("killed by signal %d", signal)
	case code >= 0:
		return fmt.Sprintf("exit status %d", code)
	}
	return "ended"
}

func (s *Server) root() string  { return filepath.Join(s.dir, "root") }
func (s *Server) stage() string { return filepath.Join(s.dir, "stage") }
