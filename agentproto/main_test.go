package agentproto

import (
	"context"
	"net"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// testTimeout ends tests that hang.
const testTimeout = 20 * time.Second

func testContext(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), testTimeout)
	t.Cleanup(cancel)
	return ctx
}

// fakeAgent answers the calls that tests make; others panic, which is a test in itself.
type fakeAgent struct {
	AgentService
	version uint32
	signal  func(ctx context.Context, r *SignalRequest) error
	stats   *StatsResponse
	waiting chan struct{} // closed when Wait was called
	waited  chan error    // gets the error with which Wait's context ended
}

func (a *fakeAgent) Hello(context.Context, *HelloRequest) (*HelloResponse, error) {
	return &HelloResponse{Version: a.version, Kernel: "6.1.0"}, nil
}

func (a *fakeAgent) Signal(ctx context.Context, r *SignalRequest) (*SignalResponse, error) {
	return &SignalResponse{}, a.signal(ctx, r)
}

func (a *fakeAgent) Stats(context.Context, *StatsRequest) (*StatsResponse, error) {
	return a.stats, nil
}

func (a *fakeAgent) Wait(ctx context.Context, _ *WaitRequest) (*WaitResponse, error) {
	close(a.waiting)
	<-ctx.Done()
	a.waited <- ctx.Err()
	return nil, ctx.Err()
}

// testGuest is an agent's accept loop on a unix socket, and the Dialer that leads to it.
type testGuest struct {
	l  net.Listener
	wg sync.WaitGroup
}

// serveGuest calls handle for each connection, in a goroutine, and closes the connection after it.
func serveGuest(t testing.TB, handle func(conn net.Conn)) *testGuest {
	t.Helper()
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	g := &testGuest{l: l}
	g.wg.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			g.wg.Go(func() {
				defer conn.Close()
				handle(conn)
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		g.wg.Wait()
	})
	return g
}

func (g *testGuest) Dial(ctx context.Context) (net.Conn, error) {
	var d net.Dialer
	return d.DialContext(ctx, "unix", g.l.Addr().String())
}

// serveAgent is the least that an agent does with a connection: control calls for svc, and stream for all else.
func serveAgent(t testing.TB, svc AgentService, stream func(h *StreamHeader, conn net.Conn)) *testGuest {
	return serveGuest(t, func(conn net.Conn) {
		h, err := ReadHeader(conn)
		if err != nil {
			WriteReply(conn, err)
			return
		}
		if h.GetControl() == nil {
			stream(h, conn)
			return
		}
		if err := WriteReply(conn, nil); err != nil {
			t.Errorf("reply: %v", err)
			return
		}
		if err := ServeControl(context.Background(), conn, svc); err != nil {
			t.Errorf("serve control: %v", err)
		}
	})
}

func connect(t testing.TB, d Dialer) *Client {
	t.Helper()
	c, err := Connect(testContext(t), d)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}
