package agentproto

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Client is the host's connection to one agent: the control calls of AgentService, whose errors are of the
// classes of package errdefs, and the opening of streams. It does not reconnect: when Done is closed, make
// a new one. All methods are safe for concurrent use.
//
// A deadline of a call's context is carried over to the agent; a cancellation is not, it only ends the wait
// for the answer. A call fails with errdefs.ErrUnavailable when the control stream is broken or breaks,
// and then may or may not have been carried out; Done is closed before the caller is told.
type Client struct {
	AgentService
	dialer Dialer
	rpc    *ttrpc.Client
	info   *HelloResponse
	done   chan struct{}
}

// Connect opens a control stream and says hello. FailedPrecondition when the agent is of another Version;
// ErrUnavailable when the connection breaks meanwhile. It takes a minute at most, less if ctx says so.
func Connect(ctx context.Context, d Dialer) (*Client, error) {
	conn, err := openStream(ctx, d, &StreamHeader{Kind: &StreamHeader_Control{Control: &Control{}}})
	if err != nil {
		return nil, err
	}
	c := &Client{dialer: d, done: make(chan struct{})}
	c.rpc = ttrpc.NewClient(&controlConn{Conn: conn},
		ttrpc.WithOnClose(func() { close(c.done) }),
		ttrpc.WithUnaryClientInterceptor(c.nativeErrors))
	c.AgentService = NewAgentClient(c.rpc)

	ctx, cancel := context.WithTimeout(ctx, openTimeout)
	defer cancel()
	c.info, err = c.Hello(ctx, &HelloRequest{Version: Version})
	if err == nil && c.info.Version != Version {
		err = versionMismatch(c.info.Version)
	}
	if err != nil {
		c.Close()
		return nil, fmt.Errorf("hello to agent: %w", err)
	}
	return c, nil
}

// Info is what the agent said in Hello.
func (c *Client) Info() *HelloResponse { return c.info }

// Done is closed when the control stream is broken or was closed.
func (c *Client) Done() <-chan struct{} { return c.done }

// Close closes the control stream; streams that were opened through the client stay open.
func (c *Client) Close() error {
	err := c.rpc.Close()
	<-c.done
	return err
}

// Output opens the stdout or stderr of a process from o.Offset on.
func (c *Client) Output(ctx context.Context, o *Output) (*OutputReader, error) {
	conn, err := openStream(ctx, c.dialer, &StreamHeader{Kind: &StreamHeader_Output{Output: o}})
	if err != nil {
		return nil, fmt.Errorf("output of container %s: %w", o.GetContainerId(), err)
	}
	return newOutputReader(conn, o.GetOffset()), nil
}

// Input opens the stdin (or terminal) of a process. CloseWrite closes the process's stdin; a stream that
// is just closed leaves it open for the next.
func (c *Client) Input(ctx context.Context, in *Input) (*FramedConn, error) {
	conn, err := openStream(ctx, c.dialer, &StreamHeader{Kind: &StreamHeader_Input{Input: in}})
	if err != nil {
		return nil, fmt.Errorf("input of container %s: %w", in.GetContainerId(), err)
	}
	return NewFramedConn(conn), nil
}

// DialPort connects to a TCP port on the pod's loopback.
func (c *Client) DialPort(ctx context.Context, port uint32) (*FramedConn, error) {
	conn, err := openStream(ctx, c.dialer, &StreamHeader{Kind: &StreamHeader_Dial{Dial: &DialPort{Port: port}}})
	if err != nil {
		return nil, fmt.Errorf("port %d: %w", port, err)
	}
	return NewFramedConn(conn), nil
}

// nativeErrors turns whatever a call fails with into an errdefs class.
func (c *Client) nativeErrors(ctx context.Context, req *ttrpc.Request, resp *ttrpc.Response, _ *ttrpc.UnaryClientInfo, invoke ttrpc.Invoker) error {
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("agent call %s: %w", req.Method, err)
	}
	if err := invoke(ctx, req, resp); err != nil {
		if st, ok := status.FromError(err); ok {
			err = nativeError(st.Code(), st.Message())
		} else if !errors.Is(err, context.Canceled) && !errors.Is(err, context.DeadlineExceeded) {
			c.Close() // it is broken; ttrpc tells its callers before it calls its OnClose
			err = unavailable(err)
		}
		return fmt.Errorf("agent call %s: %w", req.Method, err)
	}
	if st := resp.Status; st != nil && st.Code != int32(codes.OK) {
		return nativeError(codes.Code(st.Code), st.Message)
	}
	return nil
}

// controlConn keeps a guest from hurting the host through the control stream.
type controlConn struct {
	net.Conn
	guard controlGuard
}

// Write is bounded in time: ttrpc has no bound, holds a lock meanwhile that all calls need, and a guest that
// stopped reading would hold them for ever. A failed write closes the connection, as a message may have
// been cut.
func (c *controlConn) Write(p []byte) (int, error) {
	err := c.SetWriteDeadline(time.Now().Add(writeTimeout))
	if err != nil {
		c.Close()
		return 0, err
	}
	n, err := c.Conn.Write(p)
	if err != nil {
		c.Close()
	}
	return n, err
}

// Read fails, and ttrpc then closes the connection, when the guest sends what is no reply.
func (c *controlConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if refused := c.guard.check(p[:n]); refused != nil {
		return 0, refused
	}
	return n, err
}

// A ttrpc message starts with its length (4 bytes, big-endian), stream (4), type and flags (1 each).
const (
	replyHeader = 10
	replyType   = 2
	// maxReply bounds the agent's answers, in bytes. Their decoded form can be fifty times as large.
	maxReply = 256 << 10
)

// controlGuard watches the agent's ttrpc messages: all must be replies of at most maxReply bytes.
type controlGuard struct {
	header [replyHeader]byte
	got    int // bytes of header
	body   int // bytes of the current message still to come
}

func (g *controlGuard) check(p []byte) error {
	for len(p) > 0 {
		if g.body > 0 {
			n := min(g.body, len(p))
			g.body -= n
			p = p[n:]
			continue
		}
		n := copy(g.header[g.got:], p)
		g.got += n
		p = p[n:]
		if g.got < replyHeader {
			return nil
		}
		g.got = 0
		size, kind := binary.BigEndian.Uint32(g.header[:]), g.header[8]
		if kind != replyType || size > maxReply {
			return fmt.Errorf("agent sent control message of type %d and %d bytes: %w", kind, size, errdefs.ErrDataLoss)
		}
		g.body = int(size)
	}
	return nil
}
