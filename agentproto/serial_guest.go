package agentproto

import (
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/yamux"
)

const (
	// serialAway is the pause between two looks at the port while no host is connected. read(2) then
	// returns 0 at once and poll(2) reports POLLHUP all the time, so there is nothing to wait on but
	// SIGIO, which a program cannot tell from the SIGIO of other files. The pause is paid once per
	// start of the daemon, and while the daemon is away costs 50 system calls a second.
	serialAway = 20 * time.Millisecond
	// serialStall is how long a session may leave received bytes untaken before it is given up, so that
	// it cannot keep the port from being scanned.
	serialStall = 10 * time.Second
)

// SerialPort is a byte stream that outlives its peers, such as the *os.File that os.OpenFile makes of a
// virtio-serial port with O_RDWR|O_NONBLOCK. Read returns io.EOF while no host is connected. Write may
// block; SetWriteDeadline must interrupt it.
type SerialPort interface {
	io.ReadWriteCloser
	SetWriteDeadline(t time.Time) error
}

// ServeSerial reads the port from now on and offers the streams of each session that a host opens on it, one
// session after another: a new one ends the one before, and with it all its streams. Closing the listener
// closes the port. Accept fails only when the port is closed or unplugged.
func ServeSerial(port SerialPort) net.Listener {
	l := &serialListener{port: port, streams: make(chan net.Conn), done: make(chan struct{})}
	go l.read()
	return l
}

type serialListener struct {
	port    SerialPort
	streams chan net.Conn
	writing sync.Mutex // held by the session that writes to the port

	once sync.Once
	err  error         // why done is closed
	done chan struct{} // closed by close
}

// Accept returns the next stream of the current session.
func (l *serialListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.streams:
		return c, nil
	case <-l.done:
		return nil, l.err
	}
}

// Close ends the current session and closes the port.
func (l *serialListener) Close() error {
	l.close(net.ErrClosed)
	return nil
}

func (l *serialListener) close(err error) {
	l.once.Do(func() {
		l.err = err
		close(l.done)
		l.port.Close()
	})
}

// Addr names the port.
func (l *serialListener) Addr() net.Addr { return serialAddr{} }

type serialAddr struct{}

func (serialAddr) Network() string { return TransportSerial }
func (serialAddr) String() string  { return SerialPortName }

// read is the port's only reader. It never waits for a session longer than serialStall.
func (l *serialListener) read() {
	var (
		scan    serialScanner
		session *guestSerial
		buf     = make([]byte, serialChunk)
	)
	end := func() {
		if session != nil {
			session.Close()
			session = nil
		}
	}
	defer end()
	for {
		n, err := l.port.Read(buf)
		for p := buf[:n]; len(p) > 0; {
			data, event, token, rest := scan.next(p)
			if len(data) > 0 && session != nil {
				session.deliver(data)
			}
			switch event {
			case serialOver:
				end()
			case serialNew:
				end()
				session = newGuestSerial(l)
				go session.serve(token)
			}
			p = rest
		}
		switch {
		case n > 0 || err == nil:
		case errors.Is(err, io.EOF):
			select {
			case <-l.done:
				return
			case <-time.After(serialAway):
			}
		default:
			l.close(err)
			return
		}
	}
}

// guestSerial is one session's view of the port: what yamux reads from and writes to.
type guestSerial struct {
	l    *serialListener
	in   *io.PipeReader
	feed *io.PipeWriter
	over atomic.Bool   // Close was called
	gone chan struct{} // closed by Close
	once sync.Once
	join joinWriter

	streams muxStreams
}

func newGuestSerial(l *serialListener) *guestSerial {
	s := &guestSerial{l: l, gone: make(chan struct{})}
	s.in, s.feed = io.Pipe()
	return s
}

// serve answers the host's opening and hands the session's streams to the listener until the session ends.
func (s *guestSerial) serve(token string) {
	defer s.Close()
	if err := s.write(serialOpen(token)); err != nil {
		return
	}
	mux, err := yamux.Server(s, muxConfig())
	if err != nil {
		slog.Error("serial session not started", "error", err)
		return
	}
	defer mux.Close()
	for {
		stream, err := mux.AcceptStream()
		if err != nil {
			return
		}
		select {
		case s.l.streams <- s.streams.add(stream):
		case <-s.gone:
			return
		case <-s.l.done:
			return
		}
	}
}

// deliver gives received bytes to the session; they are taken when it returns.
func (s *guestSerial) deliver(p []byte) {
	stall := time.AfterFunc(serialStall, func() { s.Close() })
	defer stall.Stop()
	s.feed.Write(p) // fails only when the session is over
}

// Read is for yamux.
func (s *guestSerial) Read(p []byte) (int, error) { return s.in.Read(p) }

// Write is for yamux.
func (s *guestSerial) Write(p []byte) (int, error) {
	b := s.join.join(p)
	if b == nil {
		return len(p), nil
	}
	if err := s.write(b); err != nil {
		return 0, err
	}
	return len(p), nil
}

// write sends p to the port, as soon as the session before has left it, and gives up when this one is over.
// A deadline that has passed means either that, or that it was set for another session.
func (s *guestSerial) write(p []byte) error {
	s.l.writing.Lock()
	defer s.l.writing.Unlock()
	for len(p) > 0 {
		if err := s.l.port.SetWriteDeadline(time.Time{}); err != nil {
			return err
		}
		if s.over.Load() { // after the deadline is cleared: Close sets it after over
			return net.ErrClosed
		}
		n, err := s.l.port.Write(p)
		p = p[n:]
		if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			return err
		}
	}
	return nil
}

// Close ends the session. It does not wait: a write that is stuck in the port is interrupted.
func (s *guestSerial) Close() error {
	s.once.Do(func() {
		s.over.Store(true)
		s.l.port.SetWriteDeadline(time.Unix(1, 0))
		s.in.CloseWithError(io.EOF)
		s.feed.CloseWithError(io.EOF)
		close(s.gone)
		s.streams.end()
	})
	return nil
}
