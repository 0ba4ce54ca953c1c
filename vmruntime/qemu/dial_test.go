package qemu

import (
	"context"
	"errors"
	"io"
	"net"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/crivm/crivm/agentproto"
)

// guestEnd is the guest's end of a unix socket that stands for the virtio-serial port.
type guestEnd struct{ net.Conn }

// Read fails at the end. A real port returns io.EOF while no host is connected and goes on later.
func (g guestEnd) Read(p []byte) (int, error) {
	n, err := g.Conn.Read(p)
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return n, err
}

// guestPort serves one connection after another as an agent would, echoing each stream.
func guestPort(t *testing.T, l net.Listener, conns chan<- net.Conn) {
	t.Helper()
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			conns <- c
			streams := agentproto.ServeSerial(guestEnd{c})
			wg.Go(func() {
				defer streams.Close()
				for {
					s, err := streams.Accept()
					if err != nil {
						return
					}
					wg.Go(func() {
						defer s.Close()
						buf := make([]byte, 100)
						n, _ := s.Read(buf)
						_, _ = s.Write(buf[:n])
					})
				}
			})
		}
	})
	t.Cleanup(func() { l.Close(); wg.Wait() })
}

func echo(t *testing.T, mux *agentproto.SerialMux) {
	t.Helper()
	c, err := mux.Dial(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Write([]byte("hello")); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 5)
	if _, err := c.Read(buf); err != nil || string(buf) != "hello" {
		t.Errorf("echo %q, %v", buf, err)
	}
}

func TestAgentLink(t *testing.T) {
	path := filepath.Join(t.TempDir(), "agent.sock")
	var link agentLink
	link.init(path)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := link.session(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("nobody listens: %v", err)
	}
	// Many callers wait for one boot; each gets the same session.
	results := make(chan *agentproto.SerialMux, 5)
	for range cap(results) {
		go func() {
			mux, err := link.session(t.Context())
			if err != nil {
				t.Error(err)
			}
			results <- mux
		}()
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	conns := make(chan net.Conn, 10)
	guestPort(t, l, conns)
	mux := <-results
	for range cap(results) - 1 {
		if other := <-results; other != mux {
			t.Error("another session")
		}
	}
	if mux == nil {
		t.Fatal("no session")
	}
	echo(t, mux)

	// The connection breaks: the next call makes a new one.
	(<-conns).Close()
	<-mux.Done()
	again, err := link.session(t.Context())
	if err != nil || again == mux {
		t.Fatalf("after the break: %v, same session %v", err, again == mux)
	}
	echo(t, again)

	link.close()
	<-again.Done()
	if _, err := link.session(t.Context()); !errdefs.IsUnavailable(err) {
		t.Errorf("session of a dead VM: %v", err)
	}
}

// A dead VM ends a wait for its boot.
func TestAgentLinkEnds(t *testing.T) {
	path := filepath.Join(t.TempDir(), "agent.sock")
	l, err := net.Listen("unix", path) // accepts, and never answers
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	var link agentLink
	link.init(path)
	result := make(chan error, 1)
	go func() {
		_, err := link.session(context.Background())
		result <- err
	}()
	c, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	link.close()
	select {
	case err := <-result:
		if !errdefs.IsUnavailable(err) {
			t.Errorf("got %v", err)
		}
	case <-time.After(5 * time.Second):
		t.Error("still waits")
	}
}

// TestFreshAgentLink lets a guest boot for longer than the patience that a connection after others has.
func TestFreshAgentLink(t *testing.T) {
	path := filepath.Join(t.TempDir(), "agent.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	var link agentLink
	link.init(path)
	link.fresh = true
	defer link.close()
	type result struct {
		mux *agentproto.SerialMux
		err error
	}
	done := make(chan result, 1)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	go func() {
		mux, err := link.session(ctx)
		done <- result{mux, err}
	}()
	booting, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	l.(*net.UnixListener).SetDeadline(time.Now().Add(1500 * time.Millisecond))
	if again, err := l.Accept(); err == nil {
		again.Close()
		t.Error("a guest that boots for 1.5 s is connected to a second time")
	}
	streams := agentproto.ServeSerial(guestEnd{booting})
	defer streams.Close()
	go func() {
		for {
			s, err := streams.Accept()
			if err != nil {
				return
			}
			io.CopyN(s, s, 5)
			s.Close()
		}
	}()
	r := <-done
	if r.err != nil {
		t.Fatal(r.err)
	}
	echo(t, r.mux)
	l.Close()
}
