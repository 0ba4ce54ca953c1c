package guest

import (
	"context"
	"fmt"
	"net"
	"os"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// consoleTimeout bounds the wait for a terminal that the OCI runtime says it has sent.
const consoleTimeout = 5 * time.Second

// consoleSocket is where the OCI runtime sends the master of the terminal that it made in the container.
type consoleSocket struct {
	l *net.UnixListener
}

func listenConsole(path string) (*consoleSocket, error) {
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("console socket: %w", err)
	}
	return &consoleSocket{l: l}, nil
}

func (s *consoleSocket) close() { s.l.Close() }

// receive takes the master; the runtime has connected and sent already.
func (s *consoleSocket) receive(ctx context.Context) (*os.File, error) {
	deadline := time.Now().Add(consoleTimeout)
	if d, ok := ctx.Deadline(); ok && d.Before(deadline) {
		deadline = d
	}
	s.l.SetDeadline(deadline)
	conn, err := s.l.AcceptUnix()
	if err != nil {
		return nil, fmt.Errorf("terminal from OCI runtime: %w", err)
	}
	defer conn.Close()
	conn.SetReadDeadline(deadline)
	name, oob := make([]byte, 4096), make([]byte, unix.CmsgSpace(4*4))
	_, n, _, _, err := conn.ReadMsgUnix(name, oob)
	if err != nil {
		return nil, fmt.Errorf("terminal from OCI runtime: %w", err)
	}
	messages, err := unix.ParseSocketControlMessage(oob[:n])
	if err != nil {
		return nil, fmt.Errorf("terminal from OCI runtime: %w", err)
	}
	fds := []int{}
	for i := range messages {
		got, err := unix.ParseUnixRights(&messages[i])
		if err == nil {
			fds = append(fds, got...)
		}
	}
	if len(fds) != 1 {
		for _, fd := range fds {
			unix.Close(fd)
		}
		return nil, fmt.Errorf("OCI runtime sent %d terminals: %w", len(fds), errdefs.ErrUnknown)
	}
	unix.CloseOnExec(fds[0])
	if err := unix.SetNonblock(fds[0], true); err != nil {
		unix.Close(fds[0])
		return nil, err
	}
	return os.NewFile(uintptr(fds[0]), "terminal"), nil
}
