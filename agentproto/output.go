package agentproto

import (
	"encoding/binary"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
)

// OutputReader is the host's end of one process's stdout or stderr. The agent keeps every byte until it is
// acknowledged, so the order is: Read, put the bytes where they are safe, Ack. A stream that breaks is
// opened again with the offset up to which the bytes are safe; nothing is lost or doubled.
type OutputReader struct {
	conn net.Conn
	in   *frameReader

	offset atomic.Uint64
	acking sync.Mutex // held while an acknowledgement is written
}

// AskOutput is Client.Output on a connection to the agent's own end. A refusal has no class: to make them would need more
// of an agent's memory than all else of this.
func AskOutput(conn net.Conn, o *Output) (*OutputReader, error) {
	var r StreamReply
	if err := ask(conn, &StreamHeader{Kind: &StreamHeader_Output{Output: o}}, &r); err != nil {
		return nil, fmt.Errorf("output of container %s: %w", o.GetContainerId(), err)
	}
	if r.Code != 0 {
		return nil, fmt.Errorf("output of container %s: %s", o.GetContainerId(), r.Message)
	}
	return newOutputReader(conn, o.GetOffset()), nil
}

func newOutputReader(conn net.Conn, offset uint64) *OutputReader {
	r := &OutputReader{conn: conn, in: newFrameReader(conn)}
	r.offset.Store(offset)
	return r
}

// Read returns the bytes at Offset. io.EOF only when the process's output has really ended;
// io.ErrUnexpectedEOF or another error when the stream broke.
func (r *OutputReader) Read(p []byte) (int, error) {
	n, err := r.in.readData(p)
	r.offset.Add(uint64(n))
	return n, err
}

// Wait waits until there is something to Read, so that nobody needs a buffer for an output that is silent. It returns what Read
// would when nothing comes.
func (r *OutputReader) Wait() error { return r.in.wait() }

// Partial tells the reading goroutine that what it read last is not the end of what the agent sent at once. The rest is on its
// way, so an acknowledgement can wait for it: each costs the guest about as much as some kilobytes of output do.
func (r *OutputReader) Partial() bool { return r.in.left > 0 }

// Offset is the position of the next byte to be read, counted from the start of the process's output.
func (r *OutputReader) Offset() uint64 { return r.offset.Load() }

// Ack lets the agent forget all bytes before offset. InvalidArgument for bytes that were not read yet.
// It may be called while another goroutine reads.
func (r *OutputReader) Ack(offset uint64) error {
	if read := r.offset.Load(); offset > read {
		return fmt.Errorf("acknowledge offset %d of %d read: %w", offset, read, errdefs.ErrInvalidArgument)
	}
	r.acking.Lock()
	defer r.acking.Unlock()
	var b [8]byte
	binary.BigEndian.PutUint64(b[:], offset)
	if err := r.conn.SetWriteDeadline(time.Now().Add(writeTimeout)); err != nil {
		return fmt.Errorf("acknowledge offset %d: %w", offset, unavailable(err))
	}
	if err := writeFrame(r.conn, frameAck, b[:]); err != nil {
		return fmt.Errorf("acknowledge offset %d: %w", offset, unavailable(err))
	}
	return nil
}

// SetReadDeadline bounds pending and future reads.
func (r *OutputReader) SetReadDeadline(t time.Time) error { return r.conn.SetReadDeadline(t) }

// Close ends the stream. The agent keeps what was not acknowledged for the next one.
func (r *OutputReader) Close() error { return r.conn.Close() }

// OutputFrame is how many bytes of output are sent at once, at most.
const OutputFrame = writeChunk

// OutputWriter is the agent's end of an output stream. One goroutine writes while another reads
// acknowledgements.
type OutputWriter struct {
	conn net.Conn
	in   *frameReader
}

// NewOutputWriter frames an output stream whose reply has been written.
func NewOutputWriter(conn net.Conn) *OutputWriter {
	return &OutputWriter{conn: conn, in: newFrameReader(conn)}
}

// WriteData sends output. After an error the stream is of no further use.
func (w *OutputWriter) WriteData(p []byte) error {
	if _, err := writeData(w.conn, p); err != nil {
		return fmt.Errorf("write output: %w", err)
	}
	return nil
}

// WriteEnd tells the host that the output has ended. The connection should then stay open until ReadAck
// fails: the host closes it when it has everything.
func (w *OutputWriter) WriteEnd() error {
	if err := writeFrame(w.conn, frameEnd, nil); err != nil {
		return fmt.Errorf("write end of output: %w", err)
	}
	return nil
}

// ReadAck waits for the next acknowledged offset. Offsets may repeat; the caller checks that they do not
// exceed what it sent. io.ErrUnexpectedEOF when the host closed the stream.
func (w *OutputWriter) ReadAck() (uint64, error) { return w.in.readAck() }

// Close closes the connection.
func (w *OutputWriter) Close() error { return w.conn.Close() }
