package agentproto

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"

	"github.com/containerd/errdefs"
)

// After the reply, stdio and port streams consist of frames:
//
//	type, 1 byte | length of the payload, 4 bytes big-endian | payload
//
// The end of a direction is a frame and not a half-close of the connection, because half-close loses bytes
// over Cloud Hypervisor's vsock, and because a connection that ends without that frame is then known to
// have broken.
const (
	frameData = 1 // payload: 1..maxFrame bytes
	frameEnd  = 2 // no payload; the sender sends no more data
	frameAck  = 3 // payload: offset, 8 bytes big-endian; only on output streams, from the host

	frameHeader = 5
	maxFrame    = 1 << 20
	// writeChunk is how much data one frame carries at most when this package writes it. Small enough to
	// be copied behind its header (one write, one packet), large enough for throughput. With its header and the
	// multiplexer's it is just one write of serialChunk, which the guest's driver passes on in halves.
	writeChunk = serialChunk - muxHeader - frameHeader
	// readBuffer is kept per stream for as long as it is open; larger reads go past it.
	readBuffer = 4 << 10
)

// chunkPool holds buffers for one outgoing frame, so that idle streams own none.
var chunkPool = sync.Pool{New: func() any { b := make([]byte, frameHeader+writeChunk); return &b }}

// writeFrame sends one frame with one Write. The payload is at most writeChunk bytes.
func writeFrame(w io.Writer, kind byte, payload []byte) error {
	bp := chunkPool.Get().(*[]byte)
	defer chunkPool.Put(bp)
	b := (*bp)[:frameHeader+len(payload)]
	b[0] = kind
	binary.BigEndian.PutUint32(b[1:], uint32(len(payload)))
	copy(b[frameHeader:], payload)
	_, err := w.Write(b)
	return err
}

// writeData sends p as data frames and returns how many of its bytes were sent in whole frames.
func writeData(w io.Writer, p []byte) (int, error) {
	sent := 0
	for sent < len(p) {
		n := min(len(p)-sent, writeChunk)
		if err := writeFrame(w, frameData, p[sent:sent+n]); err != nil {
			return sent, err
		}
		sent += n
	}
	return sent, nil
}

// frameReader takes frames apart. It holds no payload: data goes straight to the reader's buffer.
type frameReader struct {
	r    *bufio.Reader
	left int   // bytes of the current data frame still to be read
	err  error // sticky
}

func newFrameReader(r io.Reader) *frameReader {
	return &frameReader{r: bufio.NewReaderSize(r, readBuffer)}
}

// next reads the header of the next frame, which must be of type want or END, and returns its payload's
// length. io.EOF for an END frame; io.ErrUnexpectedEOF when the connection ends without one.
func (f *frameReader) next(want byte) (int, error) {
	h, err := f.r.Peek(frameHeader) // a deadline that passes leaves half a header where it is
	if err != nil {
		return 0, noEOF(err)
	}
	kind, n := h[0], binary.BigEndian.Uint32(h[1:])
	f.r.Discard(frameHeader)
	switch {
	case kind == frameEnd && n == 0:
		return 0, io.EOF
	case kind == want && want == frameData && n >= 1 && n <= maxFrame:
	case kind == want && want == frameAck && n == 8:
	default:
		return 0, fmt.Errorf("unexpected frame of type %d and %d bytes: %w", kind, n, errdefs.ErrDataLoss)
	}
	return int(n), nil
}

// readData reads data; io.EOF after the END frame, again and again.
func (f *frameReader) readData(p []byte) (int, error) {
	if len(p) == 0 {
		return 0, f.err
	}
	if err := f.wait(); err != nil {
		return 0, err
	}
	n, err := f.r.Read(p[:min(len(p), f.left)])
	f.left -= n
	if err != nil && n == 0 {
		f.err = noEOF(err)
		return 0, f.unstick()
	}
	return n, nil
}

// wait waits for data, or for what readData returns instead.
func (f *frameReader) wait() error {
	if f.err == nil && f.left == 0 {
		if f.left, f.err = f.next(frameData); f.err != nil {
			return f.unstick()
		}
	}
	return f.err
}

// readAck reads one acknowledgement; io.ErrUnexpectedEOF when the host went away.
func (f *frameReader) readAck() (uint64, error) {
	if f.err != nil {
		return 0, f.err
	}
	n, err := f.next(frameAck)
	if err == nil {
		var b [8]byte
		if _, err = io.ReadFull(f.r, b[:n]); err == nil {
			return binary.BigEndian.Uint64(b[:]), nil
		}
		err = noEOF(err)
	}
	f.err = err
	return 0, err
}

// unstick returns the error and forgets it when it is a passed deadline, so that the connection can be read on with a
// new one.
func (f *frameReader) unstick() error {
	err := f.err
	var ne net.Error
	if errors.As(err, &ne) && ne.Timeout() {
		f.err = nil
	}
	return err
}

func noEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// FramedConn is a connection whose two directions end in-band, each with an END frame. It is a net.Conn.
// One reader and one writer may use it at the same time.
type FramedConn struct {
	net.Conn
	in *frameReader

	mu    sync.Mutex // serialises writes
	ended bool       // END was sent
}

// NewFramedConn frames a stream whose reply has been written (in the guest) or read (on the host).
func NewFramedConn(conn net.Conn) *FramedConn {
	return &FramedConn{Conn: conn, in: newFrameReader(conn)}
}

// Read returns io.EOF after the peer's END, io.ErrUnexpectedEOF when the connection ended without.
func (c *FramedConn) Read(p []byte) (int, error) { return c.in.readData(p) }

// Write sends p. After an error the connection is of no further use: a frame may have been cut.
func (c *FramedConn) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ended {
		return 0, net.ErrClosed
	}
	return writeData(c.Conn, p)
}

// CloseWrite tells the peer that no more data comes; reading goes on. Idempotent.
func (c *FramedConn) CloseWrite() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ended {
		return nil
	}
	c.ended = true
	return writeFrame(c.Conn, frameEnd, nil)
}
