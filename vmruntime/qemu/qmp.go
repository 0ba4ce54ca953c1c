package qemu

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

const (
	// qmpLine bounds one message. QEMU may be in a guest's hands; what we ask for never comes near.
	qmpLine = 4 << 20
	// qmpWrite bounds the sending of one command to a QEMU that does not read.
	qmpWrite = 10 * time.Second
)

// qmp is a client of one QEMU's monitor (QMP: one JSON object a line). Safe for concurrent use; QEMU
// itself answers commands one by one.
type qmp struct {
	conn    *net.UnixConn
	onEvent func(event) // called by the reader, must not block
	closed  chan struct{}

	writing sync.Mutex

	mu      sync.Mutex
	nextID  uint64
	pending map[uint64]chan reply
	err     error // why closed
}

type reply struct {
	result json.RawMessage
	err    error
}

// event is something QEMU tells unasked, such as SHUTDOWN or DEVICE_DELETED.
type event struct {
	Name string          `json:"event"`
	Data json.RawMessage `json:"data"`
}

// qmpError is QEMU's refusal of a command.
type qmpError struct {
	Class string `json:"class"`
	Desc  string `json:"desc"`
}

func (e *qmpError) Error() string { return "QEMU: " + e.Desc }

// Is maps the one class that is more than "it failed".
func (e *qmpError) Is(target error) bool {
	return e.Class == "DeviceNotFound" && target == errdefs.ErrNotFound
}

// dialQMP connects, waits for QEMU's greeting until ctx ends, and leaves the negotiation phase.
func dialQMP(ctx context.Context, path string, onEvent func(event)) (*qmp, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", path)
	if err != nil {
		return nil, fmt.Errorf("QMP: %w: %w", errdefs.ErrUnavailable, err)
	}
	q := &qmp{
		conn: conn.(*net.UnixConn), onEvent: onEvent,
		closed: make(chan struct{}), pending: map[uint64]chan reply{},
	}
	greeted := make(chan struct{})
	go q.read(greeted)
	select {
	case <-greeted:
	case <-q.closed:
		return nil, fmt.Errorf("QMP: %w", q.err)
	case <-ctx.Done():
		q.Close()
		return nil, fmt.Errorf("QMP: no greeting: %w", ctx.Err())
	}
	if err := q.execute(ctx, "qmp_capabilities", nil, nil); err != nil {
		q.Close()
		return nil, err
	}
	return q, nil
}

// message is anything QEMU sends.
type message struct {
	event
	QMP    json.RawMessage `json:"QMP"`
	ID     *uint64         `json:"id"`
	Return json.RawMessage `json:"return"`
	Error  *qmpError       `json:"error"`
}

func (q *qmp) read(greeted chan struct{}) {
	sc := bufio.NewScanner(q.conn)
	sc.Buffer(make([]byte, 0, 4096), qmpLine)
	for sc.Scan() {
		var m message
		if err := json.Unmarshal(sc.Bytes(), &m); err != nil {
			q.fail(fmt.Errorf("not QMP: %w", err))
			return
		}
		switch {
		case m.QMP != nil:
			if greeted != nil {
				close(greeted)
				greeted = nil
			}
		case m.Name != "":
			q.onEvent(m.event)
		case m.ID != nil:
			q.mu.Lock()
			ch := q.pending[*m.ID]
			delete(q.pending, *m.ID)
			q.mu.Unlock()
			if ch == nil {
				break // given up by its caller
			}
			r := reply{result: m.Return}
			if m.Error != nil {
				r.err = m.Error
			}
			ch <- r
		}
	}
	err := sc.Err()
	if err == nil {
		err = io.EOF
	}
	q.fail(err)
}

func (q *qmp) fail(err error) {
	q.conn.Close()
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.err != nil {
		return
	}
	q.err = fmt.Errorf("%w: connection ended: %w", errdefs.ErrUnavailable, err)
	for id, ch := range q.pending {
		ch <- reply{err: q.err}
		delete(q.pending, id)
	}
	close(q.closed)
}

// Close ends the connection; QEMU runs on.
func (q *qmp) Close() { q.fail(net.ErrClosed) }

// execute runs a command with its arguments and decodes what it returns into result, unless that is nil.
// Files are sent along for a getfd. When ctx ends first QEMU may still carry the command out.
func (q *qmp) execute(ctx context.Context, command string, args, result any, files ...*os.File) error {
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("%s: %w", command, err)
	}
	ch := make(chan reply, 1)
	q.mu.Lock()
	if q.err != nil {
		q.mu.Unlock()
		return fmt.Errorf("%s: %w", command, q.err)
	}
	q.nextID++
	id := q.nextID
	q.pending[id] = ch
	q.mu.Unlock()

	b, err := json.Marshal(struct {
		Execute   string `json:"execute"`
		Arguments any    `json:"arguments,omitempty"`
		ID        uint64 `json:"id"`
	}{command, args, id})
	if err != nil {
		return fmt.Errorf("%s: %w", command, err)
	}
	if err := q.send(append(b, '\n'), files); err != nil {
		q.fail(err)
	}
	var r reply
	select {
	case r = <-ch:
	case <-ctx.Done():
		q.mu.Lock()
		delete(q.pending, id)
		q.mu.Unlock()
		return fmt.Errorf("%s: %w", command, ctx.Err())
	}
	if r.err != nil {
		return fmt.Errorf("%s: %w", command, r.err)
	}
	if result == nil {
		return nil
	}
	if err := json.Unmarshal(r.result, result); err != nil {
		return fmt.Errorf("%s: %w", command, err)
	}
	return nil
}

func (q *qmp) send(b []byte, files []*os.File) error {
	q.writing.Lock()
	defer q.writing.Unlock()
	if err := q.conn.SetWriteDeadline(time.Now().Add(qmpWrite)); err != nil {
		return err
	}
	if len(files) > 0 {
		fds := make([]int, len(files))
		for i, f := range files {
			fds[i] = int(f.Fd())
		}
		n, _, err := q.conn.WriteMsgUnix(b, unix.UnixRights(fds...), nil)
		if err != nil {
			return err
		}
		b = b[n:]
	}
	_, err := q.conn.Write(b)
	return err
}

// isRefusal reports whether QEMU itself refused, as opposed to a lost connection or a context's end.
func isRefusal(err error) bool {
	var e *qmpError
	return errors.As(err, &e)
}
