package cloudhypervisor

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"

	"github.com/crivm/crivm/agentproto"
)

const (
	// bootPoll is how often a guest that has not said that it serves is tried all the same.
	bootPoll = 500 * time.Millisecond
	// Between two attempts to reach an agent.
	minBackoff = 5 * time.Millisecond
	maxBackoff = 250 * time.Millisecond
	// attemptTimeout of a connection: one to a guest without vsock driver waits for ever.
	attemptTimeout = 5 * time.Second
	// maxReply is the longest answer to CONNECT: "OK 4294967295\n" has 14 bytes.
	maxReply = 32
)

// awaitReady waits for the agent's first connection, in the background.
func (v *vm) awaitReady(l *net.UnixListener) {
	v.watchers.Go(func() {
		defer os.Remove(readyPath(v.dir))
		defer l.Close()
		stop := make(chan struct{})
		defer close(stop)
		go func() {
			select {
			case <-v.proc.Done():
				l.SetDeadline(time.Unix(1, 0))
			case <-stop:
			}
		}()
		for {
			conn, err := l.AcceptUnix()
			if err != nil {
				return
			}
			err = peerIs(conn, v.proc.PID())
			conn.Close()
			if err == nil {
				close(v.ready)
				return
			}
		}
	})
}

// Dial implements vmruntime.VM: a stream to the agent's vsock port.
func (v *vm) Dial(ctx context.Context) (net.Conn, error) {
	var last error
	backoff := minBackoff
	for {
		select {
		case <-v.ready:
		case <-v.done:
		case <-ctx.Done():
		case <-time.After(bootPoll):
		}
		select {
		case <-v.done:
			return nil, fmt.Errorf("dial agent of VM %s: %w", v.id, v.gone())
		case <-ctx.Done():
			err := ctx.Err()
			if last != nil {
				err = fmt.Errorf("%w; last attempt: %w", err, last)
			}
			return nil, fmt.Errorf("dial agent of VM %s: %w", v.id, err)
		default:
		}
		conn, err := v.dialOnce(ctx)
		if err == nil {
			return conn, nil
		}
		if errors.Is(err, errForeignSocket) {
			v.end("VMM replaced its vsock")
		}
		if last = err; ctx.Err() != nil {
			continue
		}
		select {
		case <-v.done:
		case <-ctx.Done():
		case <-time.After(backoff):
		}
		backoff = min(2*backoff, maxBackoff)
	}
}

func (v *vm) dialOnce(ctx context.Context) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, attemptTimeout)
	defer cancel()
	conn, err := v.dialRun(ctx, vsockPath(v.dir))
	if err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
	err = handshake(conn, agentproto.VsockPort)
	if !stop() { // the deadline has been or is being set
		err = errors.Join(ctx.Err(), err)
	}
	if err != nil {
		conn.Close()
		return nil, err
	}
	return conn, nil
}

// dialRun connects to a socket in run/, and makes sure that it is the VMM's own.
func (v *vm) dialRun(ctx context.Context, path string) (*net.UnixConn, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", path)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", err, errdefs.ErrUnavailable)
	}
	c := conn.(*net.UnixConn)
	if err := peerIs(c, v.proc.PID()); err != nil {
		c.Close()
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return c, nil
}

// handshake asks the VMM for a port of the guest. The answer is read byte by byte, since what follows it
// belongs to the stream already.
func handshake(rw io.ReadWriter, port uint32) error {
	if _, err := io.WriteString(rw, "CONNECT "+strconv.FormatUint(uint64(port), 10)+"\n"); err != nil {
		return fmt.Errorf("vsock connect: %w", err)
	}
	line := make([]byte, 0, maxReply)
	for len(line) < maxReply {
		var b [1]byte
		if _, err := io.ReadFull(rw, b[:]); err != nil {
			if errors.Is(err, io.EOF) {
				err = errors.New("nobody listens in the guest")
			}
			return fmt.Errorf("vsock connect: %w", err)
		}
		if b[0] != '\n' {
			line = append(line, b[0])
			continue
		}
		hostPort, ok := strings.CutPrefix(string(line), "OK ")
		if _, err := strconv.ParseUint(hostPort, 10, 32); !ok || err != nil {
			break
		}
		return nil
	}
	return fmt.Errorf("vsock connect: unexpected answer %q", line)
}
