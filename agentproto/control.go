package agentproto

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"runtime/debug"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/log"
	"github.com/containerd/ttrpc"
	"github.com/sirupsen/logrus"
	"google.golang.org/protobuf/proto"
)

// ttrpc logs through a global of its own, on standard error and without a bound: a line for each answer to a
// call that was given up, and for each stray message that a guest cares to send. All that matters of it
// reaches the callers as errors.
func init() {
	quiet := logrus.New()
	quiet.SetOutput(io.Discard)
	quiet.SetLevel(logrus.PanicLevel)
	log.L = logrus.NewEntry(quiet)
}

// ServeControl answers the control calls of one stream, whose reply has been written, until the host closes
// it or ctx ends; nil in both cases. It closes conn. Calls run concurrently; their contexts end with the
// stream, and a call that is still running then may return after ServeControl did. Errors of svc reach the
// host with their errdefs class; a panic becomes errdefs.ErrInternal.
func ServeControl(ctx context.Context, conn net.Conn, svc AgentService) error {
	srv, err := ttrpc.NewServer(ttrpc.WithUnaryServerInterceptor(grpcErrors))
	if err != nil {
		conn.Close()
		return fmt.Errorf("control server: %w", err)
	}
	RegisterAgentService(srv, svc)
	l := &oneConn{conn: conn, closed: make(chan struct{})}
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	if err := srv.Serve(ctx, l); !errors.Is(err, net.ErrClosed) {
		conn.Close()
		return fmt.Errorf("control server: %w", err)
	}
	return nil
}

// grpcErrors carries errdefs classes and stops panics at the call that caused them.
func grpcErrors(ctx context.Context, unmarshal ttrpc.Unmarshaler, info *ttrpc.UnaryServerInfo, method ttrpc.Method) (resp any, err error) {
	defer func() {
		if p := recover(); p != nil {
			slog.ErrorContext(ctx, "agent call panicked", "method", info.FullMethod, "panic", p, "stack", string(debug.Stack()))
			resp, err = nil, errgrpc.ToGRPC(fmt.Errorf("panic in %s: %v: %w", info.FullMethod, p, errdefs.ErrInternal))
		}
	}()
	resp, err = method(ctx, unmarshal)
	if m, ok := resp.(proto.Message); ok && err == nil {
		if n := proto.Size(m); n > maxReply/2 { // leaves room for ttrpc's envelope
			err = fmt.Errorf("reply to %s of %d bytes exceeds %d: %w", info.FullMethod, n, maxReply/2, errdefs.ErrResourceExhausted)
		}
	}
	if err != nil {
		return nil, errgrpc.ToGRPC(err)
	}
	return resp, nil
}

// oneConn is a listener that has one connection to give and ends when that one has been closed.
type oneConn struct {
	conn   net.Conn
	given  bool // by Accept, which only Serve calls
	once   sync.Once
	closed chan struct{}
}

func (l *oneConn) Accept() (net.Conn, error) {
	if !l.given {
		l.given = true
		return servedConn{l.conn, l}, nil
	}
	<-l.closed
	return nil, net.ErrClosed
}

func (l *oneConn) Close() error   { return nil }
func (l *oneConn) Addr() net.Addr { return l.conn.LocalAddr() }

// servedConn tells its listener when the ttrpc server is done with it. Every read error is io.EOF to that
// server, which ends the connection only on some errors and waits for ever after others.
type servedConn struct {
	net.Conn
	l *oneConn
}

func (c servedConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if err != nil {
		err = io.EOF
	}
	return n, err
}

func (c servedConn) Close() error {
	err := c.Conn.Close()
	c.l.once.Do(func() { close(c.l.closed) })
	return err
}
