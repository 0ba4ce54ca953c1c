package guest

import (
	"context"
	"fmt"
	"io"
	"os"
	"sync"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/crivm/crivm/agentproto"
)

// Sizes of output buffers. A process that writes more than that without the host acknowledging it blocks
// in write(2); nothing is ever dropped.
const (
	containerOutputBytes = 1 << 20
	execOutputBytes      = 256 << 10
	outputChunkBytes     = 4 << 10                // smallest allocation of a buffer
	outputReadBytes      = agentproto.OutputFrame // one read, and the largest allocation: what one frame carries
	outputWasteBytes     = 2 * outputReadBytes    // room in buffers that holds no output
)

// output keeps what a process wrote to stdout or stderr until the host has acknowledged it. Positions are
// byte offsets since the process began. Memory is only held for bytes that are not acknowledged:
//
//	acked <= what any stream may ask for <= end; end - acked <= limit
type output struct {
	limit int

	mu      sync.Mutex
	chunks  []*outputChunk // bytes [acked, end) after skip bytes of chunks[0]
	skip    int
	acked   uint64
	end     uint64
	eof     bool          // no more will be written
	closed  bool          // forgotten: nobody will read
	dropped bool          // nothing more is taken
	change  chan struct{} // closed at the next change; nil while nobody waits
	source  *os.File
	reader  context.CancelFunc // ends the stream that reads now
	turn    int                // counts streams, so that only the newest clears reader
}

// outputChunk is a piece of an output. Bytes that are published are not changed before they are acknowledged and nobody
// sends them any more; then a buffer of full size is read into again, for garbage is dear: the heap is so small that each
// megabyte or two of output would bring a collection of it.
type outputChunk struct {
	b       []byte
	senders int
}

// readBuffers are shared by all outputs: an idle one holds none.
var readBuffers = sync.Pool{New: func() any { return new([outputReadBytes]byte) }}

func newOutput(limit int) *output {
	return &output{limit: limit}
}

// follow reads f, a non-blocking pipe or terminal, until its end, and closes it.
func (o *output) follow(f *os.File) {
	o.mu.Lock()
	o.source = f
	closed := o.closed
	o.mu.Unlock()
	if closed {
		f.Close()
		return
	}
	go func() {
		defer f.Close()
		defer o.finish()
		for {
			room := o.room()
			if room == 0 {
				return
			}
			if err := o.readOnce(f, room); err != nil {
				return // EOF, or EIO of a terminal that nobody has open any more
			}
		}
	}()
}

// readOnce waits until f is readable and appends at most room bytes of it.
func (o *output) readOnce(f *os.File, room int) error {
	conn, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var readErr error
	err = conn.Read(func(fd uintptr) bool {
		buf := readBuffers.Get().(*[outputReadBytes]byte)
		taken := false
		defer func() {
			if !taken {
				readBuffers.Put(buf)
			}
		}()
		var n int
		for {
			n, readErr = unix.Read(int(fd), buf[:min(room, len(buf))])
			if readErr != unix.EINTR {
				break
			}
		}
		if readErr == unix.EAGAIN {
			return false
		}
		if readErr == nil && n == 0 {
			readErr = io.EOF
		}
		if readErr == nil {
			taken = o.append(buf, n)
		}
		return true
	})
	if err != nil {
		return err
	}
	return readErr
}

// room waits until something can be written and tells how much; 0 when the output was closed.
func (o *output) room() int {
	o.mu.Lock()
	defer o.mu.Unlock()
	for !o.closed && int(o.end-o.acked) >= o.limit {
		o.waitLocked(context.Background())
	}
	if o.closed {
		return 0
	}
	return o.limit - int(o.end-o.acked)
}

// append puts the first n bytes of buf at the end of the buffer. It tells whether it has kept buf rather than copied from it.
func (o *output) append(buf *[outputReadBytes]byte, n int) bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.dropped {
		return false
	}
	defer o.changedLocked()
	waste := int(o.acked) - int(o.end)
	for _, c := range o.chunks {
		waste += cap(c.b)
	}
	o.end += uint64(n)
	if n >= outputReadBytes/2 && waste+outputReadBytes-n <= outputWasteBytes {
		o.chunks = append(o.chunks, &outputChunk{b: buf[:n]})
		return true
	}
	b := buf[:n]
	if last := len(o.chunks) - 1; last >= 0 {
		c := o.chunks[last]
		fits := min(len(b), cap(c.b)-len(c.b))
		c.b = append(c.b, b[:fits]...)
		b = b[fits:]
	}
	if len(b) > 0 {
		// The longer the host lags, the more it is sent at once.
		size := min(max(int(o.end-o.acked), outputChunkBytes), outputReadBytes)
		c := &outputChunk{}
		if size == outputReadBytes {
			c.b = readBuffers.Get().(*[outputReadBytes]byte)[:0]
		} else {
			c.b = make([]byte, 0, max(len(b), size))
		}
		c.b = append(c.b, b...)
		o.chunks = append(o.chunks, c)
	}
	return false
}

// finish marks the end of the output.
func (o *output) finish() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.eof = true
	o.changedLocked()
}

// discard makes an output that nobody has read yet empty and ends it.
func (o *output) discard() {
	o.mu.Lock()
	source := o.source
	o.source = nil
	o.dropped = true
	o.chunks, o.skip, o.end, o.eof = nil, 0, o.acked, true
	o.changedLocked()
	o.mu.Unlock()
	if source != nil {
		source.Close()
	}
}

// send waits for bytes at offset from and has some of them written, how many it returns; io.EOF when all was sent that will
// ever come.
func (o *output) send(ctx context.Context, from uint64, write func([]byte) error) (int, error) {
	c, b, err := o.next(ctx, from)
	if err != nil {
		return 0, err
	}
	err = write(b)
	o.mu.Lock()
	defer o.mu.Unlock()
	c.senders--
	return len(b), err
}

// next waits for bytes at offset from and returns some of them, and their chunk with one more sender.
func (o *output) next(ctx context.Context, from uint64) (*outputChunk, []byte, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for {
		if o.closed {
			return nil, nil, fmt.Errorf("output was deleted: %w", errdefs.ErrNotFound)
		}
		if err := ctx.Err(); err != nil {
			return nil, nil, err
		}
		if err := o.checkLocked(from); err != nil {
			return nil, nil, err
		}
		if from < o.end {
			c, b := o.atLocked(from)
			c.senders++
			return c, b, nil
		}
		if o.eof {
			return nil, nil, io.EOF
		}
		o.waitLocked(ctx)
	}
}

// check tells whether a stream may begin at an offset.
func (o *output) check(from uint64) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.checkLocked(from)
}

func (o *output) checkLocked(from uint64) error {
	if from < o.acked || from > o.end {
		return fmt.Errorf("offset %d is not in [%d, %d]: %w", from, o.acked, o.end, errdefs.ErrOutOfRange)
	}
	return nil
}

// atLocked returns the contiguous bytes at from, which is in [acked, end).
func (o *output) atLocked(from uint64) (*outputChunk, []byte) {
	at := o.skip + int(from-o.acked)
	i := 0
	for ; at >= len(o.chunks[i].b); i++ {
		at -= len(o.chunks[i].b)
	}
	c := o.chunks[i]
	return c, c.b[at:len(c.b):len(c.b)]
}

// ack frees everything below offset. An old acknowledgement is no error.
func (o *output) ack(offset uint64) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if offset <= o.acked {
		return nil
	}
	if offset > o.end {
		return fmt.Errorf("acknowledged offset %d is beyond %d: %w", offset, o.end, errdefs.ErrOutOfRange)
	}
	o.skip += int(offset - o.acked)
	o.acked = offset
	for len(o.chunks) > 0 && o.skip >= len(o.chunks[0].b) {
		c := o.chunks[0]
		o.skip -= len(c.b)
		o.chunks[0] = nil
		o.chunks = o.chunks[1:]
		if c.senders == 0 && cap(c.b) == outputReadBytes {
			readBuffers.Put((*[outputReadBytes]byte)(c.b[:outputReadBytes]))
		}
	}
	if len(o.chunks) == 0 {
		o.chunks = nil
	}
	o.changedLocked()
	return nil
}

// takeOver makes the caller the only stream of this output: an earlier one is cancelled. The returned
// function gives it up.
func (o *output) takeOver(ctx context.Context) (context.Context, func()) {
	ctx, cancel := context.WithCancel(ctx)
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.reader != nil {
		o.reader()
	}
	o.reader = cancel
	o.turn++
	turn := o.turn
	return ctx, func() {
		cancel()
		o.mu.Lock()
		defer o.mu.Unlock()
		if o.turn == turn {
			o.reader = nil
		}
	}
}

// close forgets the output: its stream ends, its memory is freed, a process still writing gets SIGPIPE.
func (o *output) close() {
	o.mu.Lock()
	o.closed = true
	o.chunks = nil
	source, reader := o.source, o.reader
	o.changedLocked()
	o.mu.Unlock()
	if source != nil {
		source.Close() // waits for a read under way, which may want the lock
	}
	if reader != nil {
		reader()
	}
}

// drained tells whether all was written and acknowledged.
func (o *output) drained() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.closed || o.eof && o.acked == o.end
}

// waitLocked releases the lock until the next change or the end of ctx.
func (o *output) waitLocked(ctx context.Context) {
	if o.change == nil {
		o.change = make(chan struct{})
	}
	change := o.change
	o.mu.Unlock()
	select {
	case <-change:
	case <-ctx.Done():
	}
	o.mu.Lock()
}

func (o *output) changedLocked() {
	if o.change != nil {
		close(o.change)
		o.change = nil
	}
}
