package agentproto

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"github.com/hashicorp/yamux"
)

// SerialMux is the host's end of a session over a virtio-serial port: a Dialer that needs nothing but the
// port's one connection. All methods are safe for concurrent use.
type SerialMux struct {
	session *yamux.Session
	streams *muxStreams
	opening atomic.Int32 // streams that Dial is opening
}

// DialSerial opens a session over a fresh connection to the unix socket of the port's chardev, which the mux
// then owns. It waits for a guest that is still booting until ctx ends; ErrUnavailable as soon as the
// connection breaks. On error conn has been closed.
func DialSerial(ctx context.Context, conn net.Conn) (*SerialMux, error) {
	interrupted := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		conn.SetDeadline(time.Unix(1, 0))
		close(interrupted)
	})
	rest, err := openSerial(conn, newSerialToken())
	if !stop() {
		<-interrupted
		err = ctx.Err()
	}
	if err != nil {
		conn.Close()
		return nil, fmt.Errorf("open serial session: %w", err)
	}
	in := io.MultiReader(bytes.NewReader(rest), conn) // yamux has a buffer for headers, and reads large bodies past it
	streams := &muxStreams{}
	session, err := yamux.Client(&hostSerial{Conn: conn, in: in, streams: streams}, muxConfig())
	if err != nil {
		conn.Close()
		return nil, fmt.Errorf("open serial session: %w", err)
	}
	return &SerialMux{session: session, streams: streams}, nil
}

// OpenSerial connects to the unix socket of the port's chardev and opens a session as DialSerial does.
//
// It connects anew when the guest has not answered within a second, then two, four and so on, because QEMU
// (7.2) can forget to deliver the guest's bytes: when the host before went away while the guest was writing
// and had no buffer left to read, QEMU notices it by its failing write, resets the port and only then marks
// it as throttled ("info qtree" says "host on, throttle on"). Nothing but the next disconnect lifts that.
// A guest that is still booting does not mind: what it has not read of a connection goes with it.
func OpenSerial(ctx context.Context, path string) (*SerialMux, error) {
	for patience := time.Second; ; patience *= 2 {
		var d net.Dialer
		conn, err := d.DialContext(ctx, "unix", path)
		if err != nil {
			return nil, fmt.Errorf("connect to serial port: %w", unavailable(err))
		}
		attempt, cancel := context.WithTimeout(ctx, patience)
		m, err := DialSerial(attempt, conn)
		expired := attempt.Err() != nil
		cancel()
		if err == nil || !expired || ctx.Err() != nil {
			return m, err
		}
	}
}

// openSerial sends the opening and discards input up to the answer. It returns what was read beyond.
func openSerial(conn net.Conn, token string) ([]byte, error) {
	opening := serialOpen(token)
	if _, err := conn.Write(opening); err != nil {
		return nil, unavailable(err)
	}
	buf := make([]byte, serialChunk)
	kept := 0 // bytes at the start of buf that may be the answer's beginning
	for {
		n, err := conn.Read(buf[kept:])
		n += kept
		if i := bytes.Index(buf[:n], opening); i >= 0 {
			return bytes.Clone(buf[i+len(opening) : n]), nil
		}
		if err != nil {
			return nil, unavailable(err)
		}
		kept = min(n, len(opening)-1)
		copy(buf, buf[n-kept:n])
	}
}

// Dial opens a stream to the agent. ErrUnavailable when the session has ended, ResourceExhausted when it
// has serialStreams streams already.
func (m *SerialMux) Dial(ctx context.Context) (net.Conn, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	defer m.opening.Add(-1)
	if n := int(m.opening.Add(1)) + m.session.NumStreams(); n > serialStreams {
		return nil, fmt.Errorf("open stream: %d are open: %w", n-1, errdefs.ErrResourceExhausted)
	}
	type result struct {
		stream *yamux.Stream
		err    error
	}
	opened := make(chan result, 1)
	go func() { // waits for at most muxTimeout; yamux knows no contexts
		s, err := m.session.OpenStream()
		opened <- result{s, err}
	}()
	select {
	case r := <-opened:
		if r.err != nil {
			return nil, fmt.Errorf("open stream: %w", unavailable(r.err))
		}
		return m.streams.add(r.stream), nil
	case <-ctx.Done():
		go func() {
			if r := <-opened; r.err == nil {
				r.stream.Close()
			}
		}()
		return nil, fmt.Errorf("open stream: %w", ctx.Err())
	}
}

// Done is closed when the session has ended, by Close or because the connection broke.
func (m *SerialMux) Done() <-chan struct{} { return m.session.CloseChan() }

// Close ends the session, all of its streams, and the connection. The agent notices when the next session
// begins.
func (m *SerialMux) Close() error { return m.session.Close() }

// hostSerial is the host's connection as yamux sees it.
type hostSerial struct {
	net.Conn
	in      io.Reader
	guard   muxGuard
	streams *muxStreams

	join joinWriter // these two are used by yamux' one sender
	out  []byte
}

func (c *hostSerial) Read(p []byte) (int, error) {
	n, err := c.in.Read(p)
	if gerr := c.guard.check(p[:n]); gerr != nil {
		return 0, gerr
	}
	return n, err
}

func (c *hostSerial) Close() error {
	c.streams.end()
	return c.Conn.Close()
}

func (c *hostSerial) Write(p []byte) (int, error) {
	b := c.join.join(p)
	if b == nil {
		return len(p), nil
	}
	c.out = appendEscaped(c.out[:0], b)
	if _, err := c.Conn.Write(c.out); err != nil {
		return 0, err
	}
	return len(p), nil
}

// muxGuard watches the guest's yamux frames and refuses those that no agent sends and that cost the host
// memory or goroutines: streams opened by the guest, pings (yamux answers each in a goroutine of its own),
// and frames beyond any window.
type muxGuard struct {
	header [muxHeader]byte
	got    int    // bytes of header
	body   uint32 // bytes of the current frame's body still to come
}

func (g *muxGuard) check(p []byte) error {
	for len(p) > 0 {
		if g.body > 0 {
			n := min(uint64(g.body), uint64(len(p)))
			g.body -= uint32(n)
			p = p[n:]
			continue
		}
		n := copy(g.header[g.got:], p)
		g.got += n
		p = p[n:]
		if g.got < muxHeader {
			return nil
		}
		g.got = 0
		kind, flags := g.header[1], binary.BigEndian.Uint16(g.header[2:])
		length := binary.BigEndian.Uint32(g.header[8:])
		if g.header[0] != 0 || kind > muxWindow || flags&muxSYN != 0 || length > serialWindow {
			return fmt.Errorf("guest sent mux frame of type %d, flags %#x and %d bytes: %w",
				kind, flags, length, errdefs.ErrDataLoss)
		}
		if kind == muxData {
			g.body = length
		}
	}
	return nil
}
