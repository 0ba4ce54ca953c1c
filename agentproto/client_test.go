package agentproto

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
)

func TestConnect(t *testing.T) {
	c := connect(t, serveAgent(t, &fakeAgent{version: Version}, nil))
	if got := c.Info().GetKernel(); got != "6.1.0" {
		t.Errorf("kernel %q", got)
	}
	select {
	case <-c.Done():
		t.Error("done while open")
	default:
	}
	c.Close()
	<-c.Done()
	if _, err := c.Hello(testContext(t), &HelloRequest{}); !errdefs.IsUnavailable(err) {
		t.Errorf("call after Close: %v", err)
	}
}

func TestConnectVersionMismatch(t *testing.T) {
	guests := map[string]*testGuest{
		"hello": serveAgent(t, &fakeAgent{version: 7}, nil),
		"header": serveGuest(t, func(conn net.Conn) {
			if _, err := ReadHeader(conn); err != nil {
				t.Error(err)
			}
			conn.Write([]byte("CVM\x07\x00\x00\x00\x00"))
		}),
	}
	for name, g := range guests {
		t.Run(name, func(t *testing.T) {
			_, err := Connect(testContext(t), g)
			if !errdefs.IsFailedPrecondition(err) {
				t.Fatalf("error %v", err)
			}
			for _, want := range []string{"version 7", fmt.Sprintf("version %d", Version)} {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("%q is not in %q", want, err)
				}
			}
		})
	}
}

func TestCallErrors(t *testing.T) {
	agent := &fakeAgent{version: Version}
	c := connect(t, serveAgent(t, agent, nil))
	classes := []error{
		errdefs.ErrInvalidArgument, errdefs.ErrNotFound, errdefs.ErrAlreadyExists, errdefs.ErrPermissionDenied,
		errdefs.ErrResourceExhausted, errdefs.ErrFailedPrecondition, errdefs.ErrAborted, errdefs.ErrOutOfRange,
		errdefs.ErrNotImplemented, errdefs.ErrInternal, errdefs.ErrUnavailable, errdefs.ErrDataLoss,
		errdefs.ErrUnauthenticated, errdefs.ErrUnknown, context.DeadlineExceeded, context.Canceled,
	}
	for _, class := range classes {
		agent.signal = func(context.Context, *SignalRequest) error {
			return fmt.Errorf("container c1: %w", class)
		}
		_, err := c.Signal(testContext(t), &SignalRequest{})
		if !errors.Is(err, class) || !strings.Contains(err.Error(), "container c1") {
			t.Errorf("class %v arrived as %v", class, err)
		}
	}

	t.Run("details are dropped, text is bounded", func(t *testing.T) {
		agent.signal = func(context.Context, *SignalRequest) error {
			return errors.Join(fmt.Errorf("%s: %w", strings.Repeat("é", maxMessage), errdefs.ErrNotFound), errdefs.ErrAborted)
		}
		_, err := c.Signal(testContext(t), &SignalRequest{})
		if !errdefs.IsNotFound(err) || errdefs.IsAborted(err) {
			t.Errorf("class of %.80v", err)
		}
		if n := len(err.Error()); n > maxMessage+100 {
			t.Errorf("text of %d bytes", n)
		}
	})
	t.Run("panic", func(t *testing.T) {
		agent.signal = func(context.Context, *SignalRequest) error { panic("oops") }
		if _, err := c.Signal(testContext(t), &SignalRequest{}); !errdefs.IsInternal(err) || !strings.Contains(err.Error(), "oops") {
			t.Errorf("error %v", err)
		}
		if _, err := c.Ping(testContext(t), &PingRequest{}); !errdefs.IsInternal(err) {
			t.Errorf("nil service: %v", err)
		}
	})
	t.Run("reply too large", func(t *testing.T) {
		agent.stats = &StatsResponse{}
		for range 100 {
			agent.stats.Containers = append(agent.stats.Containers, &ContainerStats{ContainerId: strings.Repeat("x", 2000)})
		}
		if _, err := c.Stats(testContext(t), &StatsRequest{}); !errdefs.IsResourceExhausted(err) {
			t.Errorf("error %v", err)
		}
		agent.stats.Containers = agent.stats.Containers[:50]
		if r, err := c.Stats(testContext(t), &StatsRequest{}); err != nil || len(r.Containers) != 50 {
			t.Errorf("error %v", err)
		}
	})
	t.Run("request too large", func(t *testing.T) {
		r := &StatsRequest{ContainerIds: []string{strings.Repeat("x", 5<<20)}}
		if _, err := c.Stats(testContext(t), r); !errdefs.IsResourceExhausted(err) {
			t.Errorf("error %v", err)
		}
		if _, err := c.Stats(testContext(t), &StatsRequest{}); err != nil {
			t.Errorf("next call: %v", err)
		}
	})
	t.Run("context ended before", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := c.Stats(ctx, &StatsRequest{}); !errors.Is(err, context.Canceled) {
			t.Errorf("error %v", err)
		}
	})
}

func TestDeadlineReachesAgent(t *testing.T) {
	agent := &fakeAgent{version: Version, waiting: make(chan struct{}), waited: make(chan error, 1)}
	c := connect(t, serveAgent(t, agent, nil))
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := c.Wait(ctx, &WaitRequest{}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("error %v", err)
	}
	if err := <-agent.waited; !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("the agent's context ended with %v", err)
	}
}

func TestBrokenControlStream(t *testing.T) {
	agent := &fakeAgent{version: Version, waiting: make(chan struct{}), waited: make(chan error, 1)}
	conns := make(chan net.Conn, 1)
	g := serveAgent(t, agent, nil)
	c := connect(t, dialFunc(func(ctx context.Context) (net.Conn, error) {
		conn, err := g.Dial(ctx)
		conns <- conn
		return conn, err
	}))
	failed := make(chan error)
	go func() {
		_, err := c.Wait(context.Background(), &WaitRequest{})
		failed <- err
	}()
	<-agent.waiting
	(<-conns).Close()
	if err := <-failed; !errdefs.IsUnavailable(err) {
		t.Errorf("pending call: %v", err)
	}
	if err := <-agent.waited; !errors.Is(err, context.Canceled) {
		t.Errorf("the agent's context ended with %v", err)
	}
}

// TestDoneBeforeFailure: a caller that connects again when its call has failed is not given the broken client once more.
func TestDoneBeforeFailure(t *testing.T) {
	agent := &fakeAgent{version: Version, waiting: make(chan struct{}), waited: make(chan error, 1)}
	var conn net.Conn
	g := serveAgent(t, agent, nil)
	c := connect(t, dialFunc(func(ctx context.Context) (_ net.Conn, err error) {
		conn, err = g.Dial(ctx)
		return closingSlowly{conn}, err
	}))
	go func() {
		<-agent.waiting
		conn.Close()
	}()
	if _, err := c.Wait(context.Background(), &WaitRequest{}); !errdefs.IsUnavailable(err) {
		t.Errorf("pending call: %v", err)
	}
	select {
	case <-c.Done():
	default:
		t.Error("the call failed before Done was closed")
	}
}

// closingSlowly makes the time long between the moments in which ttrpc lets its callers go and calls its OnClose.
type closingSlowly struct{ net.Conn }

func (c closingSlowly) Close() error {
	time.Sleep(20 * time.Millisecond)
	return c.Conn.Close()
}

type dialFunc func(ctx context.Context) (net.Conn, error)

func (f dialFunc) Dial(ctx context.Context) (net.Conn, error) { return f(ctx) }

func TestServeControlEndsWithContext(t *testing.T) {
	host, guest := net.Pipe()
	defer host.Close()
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error)
	go func() { ended <- ServeControl(ctx, guest, &fakeAgent{}) }()
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

// TestHostileReplies answers Hello with bytes of the guest's choice.
func TestHostileReplies(t *testing.T) {
	header := func(size, stream uint32, kind byte) []byte {
		b := binary.BigEndian.AppendUint32(nil, size)
		return append(binary.BigEndian.AppendUint32(b, stream), kind, 0)
	}
	for name, tc := range map[string]struct {
		reply []byte
		check func(error) bool
	}{
		"too large":        {header(maxReply+1, 1, replyType), errdefs.IsUnavailable},
		"huge":             {header(1<<32-1, 1, replyType), errdefs.IsUnavailable},
		"request":          {header(0, 1, 1), errdefs.IsUnavailable},
		"data":             {header(0, 1, 3), errdefs.IsUnavailable},
		"closed":           {nil, errdefs.IsUnavailable},
		"cut header":       {header(8, 1, replyType)[:5], errdefs.IsUnavailable},
		"cut body":         {append(header(8, 1, replyType), 1, 2), errdefs.IsUnavailable},
		"garbage":          {append(header(4, 1, replyType), 0xff, 0xff, 0xff, 0xff), func(err error) bool { return err != nil }},
		"garbage message":  {append(header(4, 1, replyType), 0x12, 2, 0xff, 0xff), func(err error) bool { return err != nil }},
		"of another call":  {append(header(0, 77, replyType), header(1<<20, 1, replyType)...), errdefs.IsUnavailable},
		"empty":            {header(0, 1, replyType), errdefs.IsFailedPrecondition}, // version 0
		"unknown code":     {append(header(5, 1, replyType), 0x0a, 3, 0x08, 0xe7, 0x07), errdefs.IsUnknown},
		"negative code":    {append(header(13, 1, replyType), 0x0a, 11, 0x08, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01), func(err error) bool { return err != nil }},
		"details unparsed": {append(header(8, 1, replyType), 0x0a, 6, 0x08, 5, 0x1a, 2, 0x0a, 0), errdefs.IsNotFound},
	} {
		t.Run(name, func(t *testing.T) {
			g := serveGuest(t, func(conn net.Conn) {
				if _, err := ReadHeader(conn); err != nil {
					t.Error(err)
				}
				WriteReply(conn, nil)
				io.ReadFull(conn, make([]byte, replyHeader))
				conn.Write(tc.reply)
				if !strings.HasPrefix(name, "c") { // "closed", "cut"
					io.Copy(io.Discard, conn) // until the host has enough
				}
			})
			c, err := Connect(testContext(t), g)
			if !tc.check(err) {
				t.Errorf("error %v", err)
			}
			if err == nil {
				c.Close()
			}
		})
	}
}

// TestSilentGuest is about a guest that accepts streams and never says anything.
func TestSilentGuest(t *testing.T) {
	g := serveGuest(t, func(conn net.Conn) { io.Copy(io.Discard, conn) })
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := Connect(ctx, g); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("error %v", err)
	}
}
