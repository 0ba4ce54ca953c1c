package vmtest

import (
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/crivm/crivm/agentproto"
)

// vsock is the host's side of the hybrid vsock.
type vsock struct {
	path string
	l    *net.UnixListener

	mu    sync.Mutex
	conns map[net.Conn]bool
	ended bool
}

// handshakeTimeout and the limits below are the real one's.
const (
	handshakeTimeout = 2 * time.Second
	maxHandshake     = 32
	maxVsockConns    = 1023
)

func listenVsock(path string) (*vsock, error) {
	// No stale socket is removed.
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, worded("Error creating vsock device: %v", err)
	}
	return &vsock{path: path, l: l, conns: map[net.Conn]bool{}}, nil
}

func (v *vsock) readyPath() string { return v.path + "_" + strconv.Itoa(agentproto.ReadyPort) }

// attach serves connections to the guest.
func (v *vsock) attach(g *guestProcess) {
	go func() {
		for port := 1 << 30; ; port++ {
			conn, err := v.l.Accept()
			if err != nil {
				return
			}
			if !v.add(conn) {
				conn.Close()
				continue
			}
			go func() {
				defer v.drop(conn)
				v.connect(conn.(*net.UnixConn), g, port)
			}()
		}
	}()
}

func (v *vsock) add(conn net.Conn) bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.ended || len(v.conns) == maxVsockConns {
		return false
	}
	v.conns[conn] = true
	return true
}

func (v *vsock) drop(conn net.Conn) {
	v.mu.Lock()
	delete(v.conns, conn)
	v.mu.Unlock()
	conn.Close()
}

func (v *vsock) close() {
	v.l.Close() // removes the socket
	v.mu.Lock()
	defer v.mu.Unlock()
	v.ended = true
	for conn := range v.conns {
		conn.Close()
	}
}

// connect answers "CONNECT <port>\n"; what is malformed or for nobody is closed without a word.
func (v *vsock) connect(conn *net.UnixConn, g *guestProcess, hostPort int) {
	conn.SetDeadline(time.Now().Add(handshakeTimeout))
	line := make([]byte, 0, maxHandshake)
	for len(line) == 0 || line[len(line)-1] != '\n' {
		var b [1]byte
		if len(line) == maxHandshake {
			return
		}
		if _, err := io.ReadFull(conn, b[:]); err != nil {
			return
		}
		line = append(line, b[0])
	}
	conn.SetDeadline(time.Time{})
	verb, port, _ := strings.Cut(strings.TrimSuffix(string(line), "\n"), " ")
	n, err := strconv.ParseUint(port, 10, 32)
	if !strings.EqualFold(verb, "connect") || err != nil {
		return
	}
	f := loadFaults()
	if f.NoHello {
		<-g.gone // a guest without driver answers nothing
		return
	}
	select {
	case <-g.ready:
	default:
		if f.BootDelay > 0 {
			select { // no driver yet
			case <-g.ready:
			case <-g.gone:
				return
			}
		}
	}
	if n != agentproto.VsockPort {
		return
	}
	inner, err := net.Dial("unix", g.socket)
	if err != nil {
		return
	}
	defer inner.Close()
	reply := fmt.Sprintf("OK %d\n", hostPort)
	if f.VsockReply != "" {
		reply = f.VsockReply
	}
	if _, err := io.WriteString(conn, reply); err != nil {
		return
	}
	var both sync.WaitGroup
	both.Go(func() { forward(inner.(*net.UnixConn), conn) })
	both.Go(func() { forward(conn, inner.(*net.UnixConn)) })
	both.Wait()
}

// forward copies one direction and hands its end on; an error breaks both.
func forward(to, from *net.UnixConn) {
	if _, err := io.Copy(to, from); err != nil {
		to.Close()
		from.Close()
		return
	}
	to.CloseWrite()
}

// serialPort is the guest's serial port in socket mode: output waits for a client, 1 MiB of it.
type serialPort struct {
	path string
	l    *net.UnixListener

	mu      sync.Mutex
	pending []byte
	client  net.Conn
}

const maxPending = 1 << 20

func listenSerial(path string) (*serialPort, error) {
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, err
	}
	p := &serialPort{path: path, l: l}
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			p.mu.Lock()
			if p.client != nil {
				p.client.Close()
			}
			p.client = conn
			p.flushLocked()
			p.mu.Unlock()
		}
	}()
	return p, nil
}

// input returns what a guest writes its console to.
func (p *serialPort) input() (*os.File, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	go func() {
		defer r.Close()
		buf := make([]byte, 4096)
		for {
			n, err := r.Read(buf)
			if err != nil {
				return
			}
			p.mu.Lock()
			p.pending = append(p.pending, buf[:n]...)
			if over := len(p.pending) - maxPending; over > 0 {
				p.pending = p.pending[over:]
			}
			p.flushLocked()
			p.mu.Unlock()
		}
	}()
	return w, nil
}

func (p *serialPort) flushLocked() {
	if p.client == nil {
		return
	}
	p.client.SetWriteDeadline(time.Now().Add(10 * time.Millisecond)) // a slow client does not stall the guest
	n, err := p.client.Write(p.pending)
	p.pending = p.pending[n:]
	if err != nil && !os.IsTimeout(err) {
		p.client = nil
	}
}

func (p *serialPort) close() {
	p.l.Close()
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.client != nil {
		p.client.Close()
	}
}
