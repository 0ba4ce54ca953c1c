package agentproto

import (
	"io"
	"net"
	"sync"
	"time"

	"github.com/hashicorp/yamux"
)

// muxStreams are the streams of one session. When the session ends, yamux wakes everybody who waits for a
// stream before it marks the streams as closed, one by one, and until then they all spin: 250 readers on two
// processors were seen to spin for half a minute. So the streams are interrupted by their deadlines first.
type muxStreams struct {
	mu    sync.Mutex
	open  map[*muxStream]struct{}
	ended bool
}

// add makes a muxStream of s.
func (m *muxStreams) add(s *yamux.Stream) *muxStream {
	stream := &muxStream{Stream: s, of: m}
	m.mu.Lock()
	if m.open == nil {
		m.open = map[*muxStream]struct{}{}
	}
	m.open[stream] = struct{}{}
	ended := m.ended
	m.mu.Unlock()
	if ended {
		stream.end(io.ErrUnexpectedEOF)
	}
	return stream
}

// end interrupts all reads and writes of all streams, present and future. yamux calls it, through the Close
// of the session's connection, right after it has woken everybody.
func (m *muxStreams) end() {
	m.mu.Lock()
	m.ended = true
	var open []*muxStream
	for stream := range m.open {
		open = append(open, stream)
	}
	m.mu.Unlock()
	for _, stream := range open {
		stream.end(io.ErrUnexpectedEOF)
	}
}

func (m *muxStreams) remove(s *muxStream) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.open, s)
}

// muxStream is a yamux stream whose Close also ends pending reads and writes, as net.Conn demands, and does
// not wait for the other end. A session that ends is not an orderly io.EOF for its streams but
// io.ErrUnexpectedEOF.
type muxStream struct {
	*yamux.Stream
	of *muxStreams

	mu    sync.Mutex
	ended error // what reads and writes return instead of yamux' errors, nil while the stream is in use
}

// end interrupts pending reads and writes, which then fail with err. Data that has been received can still
// be read.
func (s *muxStream) end(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended == nil {
		s.ended = err
	}
	s.Stream.SetDeadline(time.Unix(1, 0))
}

func (s *muxStream) failure(err error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err != nil && s.ended != nil {
		return s.ended
	}
	return err
}

// Read fails with net.ErrClosed after Close and with io.ErrUnexpectedEOF after the session's end.
func (s *muxStream) Read(p []byte) (int, error) {
	n, err := s.Stream.Read(p)
	return n, s.failure(err)
}

// Write sends p in frames of at most serialChunk bytes, so that streams share the port fairly and no buffer
// below grows beyond that.
func (s *muxStream) Write(p []byte) (int, error) {
	sent := 0
	for sent < len(p) {
		n, err := s.Stream.Write(p[sent:min(len(p), sent+serialChunk)])
		sent += n
		if err != nil {
			return sent, s.failure(err)
		}
	}
	return sent, nil
}

// SetDeadline fails when the stream has ended; as do the other two: the deadline is then what interrupts.
func (s *muxStream) SetDeadline(t time.Time) error { return s.setDeadline(s.Stream.SetDeadline, t) }

// SetReadDeadline is SetDeadline for reads.
func (s *muxStream) SetReadDeadline(t time.Time) error {
	return s.setDeadline(s.Stream.SetReadDeadline, t)
}

// SetWriteDeadline is SetDeadline for writes.
func (s *muxStream) SetWriteDeadline(t time.Time) error {
	return s.setDeadline(s.Stream.SetWriteDeadline, t)
}

func (s *muxStream) setDeadline(set func(time.Time) error, t time.Time) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended != nil {
		return s.ended
	}
	return set(t)
}

// Close sends what was written before, then the end, in the background for at most muxTimeout. Idempotent.
func (s *muxStream) Close() error {
	s.of.remove(s)
	s.mu.Lock()
	again := s.ended == net.ErrClosed
	s.ended = net.ErrClosed
	s.Stream.SetDeadline(time.Unix(1, 0))
	s.mu.Unlock()
	if !again {
		go s.Stream.Close()
	}
	return nil
}
