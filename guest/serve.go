package guest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"runtime/debug"
	"strconv"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"github.com/crivm/crivm/agentproto"
)

// dialTimeout bounds a connection attempt to the pod's loopback.
const dialTimeout = 10 * time.Second

// Serve answers all streams of a listener until ctx ends (nil) or the listener fails. Several control
// streams at once are fine: a host that was restarted may connect before its old connection is known
// to be dead. It returns when all streams have been closed, which the end of ctx does.
func Serve(ctx context.Context, l net.Listener, a *Agent) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	var streams sync.WaitGroup
	defer streams.Wait()
	defer cancel()
	for {
		conn, err := l.Accept()
		if ctx.Err() != nil {
			if err == nil {
				conn.Close()
			}
			return nil
		}
		if err != nil {
			return fmt.Errorf("accept stream: %w", err)
		}
		streams.Go(func() {
			defer conn.Close()
			defer func() {
				if p := recover(); p != nil {
					slog.Error("stream panicked", "panic", p, "stack", string(debug.Stack()))
				}
			}()
			a.serveStream(ctx, conn)
		})
	}
}

// serveStream reads what a stream is for and does it.
func (a *Agent) serveStream(ctx context.Context, conn net.Conn) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	h, err := agentproto.ReadHeader(conn)
	if err != nil {
		agentproto.WriteReply(conn, err)
		return
	}
	switch k := h.GetKind().(type) {
	case *agentproto.StreamHeader_Control:
		if agentproto.WriteReply(conn, nil) == nil {
			err = agentproto.ServeControl(ctx, conn, a)
		}
	case *agentproto.StreamHeader_Output:
		err = a.serveOutput(ctx, conn, k.Output)
	case *agentproto.StreamHeader_Input:
		err = a.serveInput(ctx, conn, k.Input)
	case *agentproto.StreamHeader_Dial:
		err = serveDial(ctx, a.namespaces.Load(), conn, k.Dial.GetPort())
	default:
		err = agentproto.WriteReply(conn, fmt.Errorf("kind of stream: %w", errdefs.ErrNotImplemented))
	}
	if err != nil && ctx.Err() == nil {
		slog.Debug("stream ended", "error", err)
	}
}

// serveOutput sends a process's output from the asked offset on, and frees what the host acknowledges.
func (a *Agent) serveOutput(ctx context.Context, conn net.Conn, h *agentproto.Output) error {
	out, err := a.findOutput(h)
	if err != nil {
		return agentproto.WriteReply(conn, err)
	}
	ctx, release := out.takeOver(ctx)
	defer release()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	if err := agentproto.WriteReply(conn, nil); err != nil {
		return err
	}
	w := agentproto.NewOutputWriter(conn)
	acks := make(chan error, 1)
	go func() {
		defer release() // the host went away: stop sending
		for {
			offset, err := w.ReadAck()
			if err == nil {
				err = out.ack(offset)
			}
			if err != nil {
				acks <- err
				return
			}
		}
	}()
	defer func() {
		conn.Close()
		<-acks
	}()
	for at := h.GetOffset(); ; {
		n, err := out.send(ctx, at, w.WriteData)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		at += uint64(n)
	}
	if err := w.WriteEnd(); err != nil {
		return err
	}
	<-ctx.Done() // the host closes when it has acknowledged everything
	return nil
}

func (a *Agent) findOutput(h *agentproto.Output) (*output, error) {
	_, p, err := a.process(h.GetContainerId(), h.GetExecId())
	if err != nil {
		return nil, err
	}
	out, err := p.io.output(h.GetStderr())
	if err != nil {
		return nil, err
	}
	return out, out.check(h.GetOffset())
}

// serveInput passes a stream's bytes to a process's stdin.
func (a *Agent) serveInput(ctx context.Context, conn net.Conn, h *agentproto.Input) error {
	_, p, err := a.process(h.GetContainerId(), h.GetExecId())
	if err == nil && p.io.stdin == nil {
		err = fmt.Errorf("process has no stdin: %w", errdefs.ErrFailedPrecondition)
	}
	if err != nil {
		return agentproto.WriteReply(conn, err)
	}
	if err := agentproto.WriteReply(conn, nil); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() { // the process's end ends its input
		select {
		case <-p.ended:
			cancel()
			conn.Close()
		case <-ctx.Done():
		}
	}()
	in := agentproto.NewFramedConn(conn)
	buf := make([]byte, 16<<10)
	for {
		n, err := in.Read(buf)
		if n > 0 {
			if err := p.io.stdin.write(ctx, buf[:n]); err != nil {
				return err
			}
		}
		if errors.Is(err, io.EOF) {
			p.io.stdin.end()
			return in.CloseWrite()
		}
		if err != nil {
			return err
		}
	}
}

// serveDial connects a stream with a TCP port on the pod's loopback.
func serveDial(ctx context.Context, namespaces *podNamespaces, conn net.Conn, port uint32) error {
	var target *net.TCPConn
	err := namespaces.do(func() (err error) {
		target, err = dialLoopback(ctx, port)
		return err
	})
	if err != nil {
		return agentproto.WriteReply(conn, err)
	}
	defer target.Close()
	if err := agentproto.WriteReply(conn, nil); err != nil {
		return err
	}
	stream := agentproto.NewFramedConn(conn)
	sent := make(chan error, 1)
	go func() {
		_, err := io.Copy(target, stream)
		if err == nil {
			err = target.CloseWrite()
		}
		if err != nil {
			target.Close() // nobody is left to answer
		}
		sent <- err
	}()
	_, err = io.Copy(stream, target)
	if err == nil {
		err = stream.CloseWrite()
	}
	if err != nil {
		conn.Close()
	}
	return errors.Join(err, <-sent)
}

func dialLoopback(ctx context.Context, port uint32) (*net.TCPConn, error) {
	if port == 0 || port > 65535 {
		return nil, fmt.Errorf("port %d: %w", port, errdefs.ErrInvalidArgument)
	}
	d := net.Dialer{Timeout: dialTimeout}
	var failed []error
	for _, host := range []string{"127.0.0.1", "::1"} {
		conn, err := d.DialContext(ctx, "tcp", net.JoinHostPort(host, strconv.Itoa(int(port))))
		if err == nil {
			return conn.(*net.TCPConn), nil
		}
		failed = append(failed, err)
	}
	return nil, fmt.Errorf("%w: %w", errors.Join(failed...), errdefs.ErrUnavailable)
}
