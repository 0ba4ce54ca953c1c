package chclient

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"
)

// Event is what the VMM writes to its event monitor.
type Event struct {
	Timestamp  Timestamp         `json:"timestamp"`
	Source     string            `json:"source"`
	Event      string            `json:"event"`
	Properties map[string]string `json:"properties"`
}

// Timestamp is monotonic time since the VMM's start.
type Timestamp struct {
	Secs  int64 `json:"secs"`
	Nanos int64 `json:"nanos"`
}

// Duration since the VMM's start.
func (t Timestamp) Duration() time.Duration {
	return time.Duration(t.Secs)*time.Second + time.Duration(t.Nanos)
}

// Name is "source/event", such as "vm/booted".
func (e Event) Name() string { return e.Source + "/" + e.Event }

// maxEvent bounds one event; real ones have about 200 bytes.
const maxEvent = 16 << 10

// errEventTooLong ends a stream that is no event stream.
var errEventTooLong = errors.New("event is longer than 16 KiB")

// EventDecoder reads an event monitor's stream: JSON objects, each printed over several lines.
type EventDecoder struct {
	lines  *bufio.Reader
	resync bool
	opened bool // the line that ended the last event opened the next
	buf    []byte
}

// NewEventDecoder reads from the start of a stream. With resync the stream may begin amid an event, which is
// then skipped: that of an earlier reader that was killed while reading.
func NewEventDecoder(r io.Reader, resync bool) *EventDecoder {
	return &EventDecoder{lines: bufio.NewReaderSize(r, 4096), resync: resync}
}

// Next returns the next event; io.EOF at the end of the stream, even amid an event. Any other error is final.
//
// Objects are taken apart at the lines that hold just "{" and "}", the only ones that start with a brace: so
// memory stays bounded, and a reader can begin anywhere. The newlines between two events are written on their
// own and are lost when the pipe is full just then, hence "}{".
func (d *EventDecoder) Next() (Event, error) {
	inside := d.opened
	if d.opened {
		d.buf, d.opened = append(d.buf[:0], "{\n"...), false
	}
	for {
		line, err := d.lines.ReadSlice('\n')
		if err != nil && len(line) == 0 {
			return Event{}, err
		}
		if errors.Is(err, bufio.ErrBufferFull) && !d.resync {
			return Event{}, fmt.Errorf("event monitor: %w", errEventTooLong)
		}
		if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, bufio.ErrBufferFull) {
			return Event{}, err
		}
		text := string(trimEOL(line))
		switch {
		case !inside && text == "{":
			inside, d.resync = true, false
			d.buf = append(d.buf[:0], line...)
			continue
		case !inside && (text == "" || d.resync):
			continue
		case !inside:
			return Event{}, fmt.Errorf("event monitor: %q where an event should start", printable(text))
		}
		if len(d.buf)+len(line) > maxEvent {
			return Event{}, fmt.Errorf("event monitor: %w", errEventTooLong)
		}
		switch text {
		case "}":
		case "}{":
			line, d.opened = line[:1], true
		default:
			d.buf = append(d.buf, line...)
			continue
		}
		d.buf = append(d.buf, line...)
		var e Event
		if err := json.Unmarshal(d.buf, &e); err != nil {
			return Event{}, fmt.Errorf("event monitor: %w", err)
		}
		return e, nil
	}
}

func trimEOL(line []byte) []byte {
	for len(line) > 0 && (line[len(line)-1] == '\n' || line[len(line)-1] == '\r') {
		line = line[:len(line)-1]
	}
	return line
}
