package agentproto

import (
	"io"
	"net"
	"os"
	"sync"
	"testing"
	"time"
)

// fakePort behaves as a virtio-serial port of QEMU with a unix socket as its chardev: the guest's end stays,
// hosts come and go; the guest reads EOF while none is there; what it wrote for one host is delivered to the
// next; what one host sent is followed without a gap by what the next sends.
type fakePort struct {
	mu       sync.Mutex
	changed  *sync.Cond
	toGuest  []byte
	toHost   []byte
	host     net.Conn // QEMU's end of the connection
	deadline time.Time
	closed   bool
	pumps    sync.WaitGroup
}

// fakePortQueue is how many bytes wait in each direction at most.
const fakePortQueue = 32 << 10

func newFakePort(t testing.TB) *fakePort {
	p := &fakePort{}
	p.changed = sync.NewCond(&p.mu)
	t.Cleanup(func() {
		p.Close()
		p.hangUp(-1)
	})
	return p
}

// connect is a host's connect(2). There must be no other host.
func (p *fakePort) connect(t testing.TB) net.Conn {
	t.Helper()
	host, qemu, err := unixPair()
	if err != nil {
		t.Fatal(err)
	}
	p.mu.Lock()
	p.host = qemu
	p.changed.Broadcast()
	p.mu.Unlock()
	p.pumps.Go(func() { p.pumpToGuest(qemu) })
	p.pumps.Go(func() { p.pumpToHost(qemu) })
	return host
}

// hangUp ends the connection from QEMU's side and loses all but the first keep bytes that the guest has not
// read yet (-1: none), as if the host had been killed in the middle of a write.
func (p *fakePort) hangUp(keep int) {
	p.mu.Lock()
	if p.host != nil {
		p.host.Close()
		p.host = nil
	}
	p.changed.Broadcast()
	p.mu.Unlock()
	p.pumps.Wait()
	p.mu.Lock()
	if keep >= 0 {
		p.toGuest = p.toGuest[:min(keep, len(p.toGuest))]
	}
	p.mu.Unlock()
}

func (p *fakePort) pumpToGuest(qemu net.Conn) {
	buf := make([]byte, 4096) // as large as a buffer of the guest's driver
	for {
		n, err := qemu.Read(buf)
		p.mu.Lock()
		for len(p.toGuest) >= fakePortQueue && p.host == qemu && !p.closed {
			p.changed.Wait()
		}
		p.toGuest = append(p.toGuest, buf[:n]...)
		if err != nil && p.host == qemu { // the host went away
			p.host = nil
			qemu.Close()
		}
		p.changed.Broadcast()
		p.mu.Unlock()
		if err != nil {
			return
		}
	}
}

func (p *fakePort) pumpToHost(qemu net.Conn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for {
		for len(p.toHost) == 0 && p.host == qemu {
			p.changed.Wait()
		}
		if p.host != qemu {
			return
		}
		b := append([]byte(nil), p.toHost[:min(len(p.toHost), 32<<10)]...)
		p.mu.Unlock()
		n, err := qemu.Write(b)
		p.mu.Lock()
		p.toHost = p.toHost[n:] // the rest waits for the next host
		p.changed.Broadcast()
		if err != nil {
			return
		}
	}
}

func (p *fakePort) Read(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for len(p.toGuest) == 0 {
		if p.closed {
			return 0, os.ErrClosed
		}
		if p.host == nil {
			return 0, io.EOF
		}
		p.changed.Wait()
	}
	n := copy(b, p.toGuest)
	p.toGuest = p.toGuest[n:]
	p.changed.Broadcast()
	return n, nil
}

func (p *fakePort) Write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	written := 0
	for len(b) > 0 {
		switch {
		case p.closed:
			return written, os.ErrClosed
		case !p.deadline.IsZero() && !time.Now().Before(p.deadline):
			return written, os.ErrDeadlineExceeded
		case len(p.toHost) >= fakePortQueue:
			p.changed.Wait()
		default:
			n := min(len(b), fakePortQueue-len(p.toHost))
			p.toHost = append(p.toHost, b[:n]...)
			b = b[n:]
			written += n
			p.changed.Broadcast()
		}
	}
	return written, nil
}

// SetWriteDeadline works for no deadline and for one that has passed.
func (p *fakePort) SetWriteDeadline(t time.Time) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.deadline = t
	p.changed.Broadcast()
	return nil
}

func (p *fakePort) Close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = true
	p.changed.Broadcast()
	return nil
}

// unixPair is socketpair(2).
func unixPair() (net.Conn, net.Conn, error) {
	dir, err := os.MkdirTemp("", "pair")
	if err != nil {
		return nil, nil, err
	}
	defer os.RemoveAll(dir)
	l, err := net.Listen("unix", dir+"/s")
	if err != nil {
		return nil, nil, err
	}
	defer l.Close()
	a, err := net.Dial("unix", dir+"/s")
	if err != nil {
		return nil, nil, err
	}
	b, err := l.Accept()
	if err != nil {
		a.Close()
		return nil, nil, err
	}
	return a, b, nil
}
