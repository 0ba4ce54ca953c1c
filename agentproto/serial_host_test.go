package agentproto

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/hashicorp/yamux"
)

// TestSerialStreamClose: the other end never answers the closing of the stream.
func TestSerialStreamClose(t *testing.T) {
	a, b := net.Pipe()
	client, err := yamux.Client(a, muxConfig())
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	server, err := yamux.Server(b, muxConfig())
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	stream, err := client.OpenStream()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := server.AcceptStream(); err != nil {
		t.Fatal(err)
	}
	conn := new(muxStreams).add(stream)
	failed := make(chan error, 2)
	go func() {
		_, err := conn.Read(make([]byte, 1))
		failed <- err
	}()
	go func() {
		_, err := conn.Write(make([]byte, 2*serialWindow))
		failed <- err
	}()
	conn.Close()
	for range 2 {
		select {
		case err := <-failed:
			if !errors.Is(err, net.ErrClosed) {
				t.Errorf("pending read or write: %v", err)
			}
		case <-time.After(testTimeout):
			t.Fatal("a read or a write goes on after Close")
		}
	}
	if _, err := conn.Write([]byte("x")); !errors.Is(err, net.ErrClosed) {
		t.Errorf("write after Close: %v", err)
	}
	if err := conn.SetDeadline(time.Time{}); !errors.Is(err, net.ErrClosed) {
		t.Errorf("deadline after Close: %v", err)
	}
}

func TestSerialStreamLimit(t *testing.T) {
	port := newFakePort(t)
	serialGuest(t, port)
	m := dialSerial(t, port)
	var last net.Conn
	for range serialStreams {
		last = openSerialStream(t, m, 'e')
	}
	if _, err := m.Dial(testContext(t)); !errdefs.IsResourceExhausted(err) {
		t.Errorf("one more: %v", err)
	}
	last.Close() // the guest closes its end, too
	for ctx := testContext(t); m.session.NumStreams() == serialStreams; time.Sleep(time.Millisecond) {
		if ctx.Err() != nil {
			t.Fatal("the stream does not end")
		}
	}
	openSerialStream(t, m, 'e')
}

// TestSerialSessionEnd: a session with many waiting readers ends at once, and none of them sees an orderly end.
func TestSerialSessionEnd(t *testing.T) {
	port := newFakePort(t)
	serialGuest(t, port)
	m := dialSerial(t, port)
	failed := make(chan error, serialStreams)
	for range serialStreams {
		conn := openSerialStream(t, m, 'e')
		go func() {
			_, err := conn.Read(make([]byte, 1))
			failed <- err
		}()
	}
	begin := time.Now()
	m.Close()
	for range serialStreams {
		if err := <-failed; err != io.ErrUnexpectedEOF {
			t.Errorf("a waiting read got %v", err)
		}
	}
	if took := time.Since(begin); took > 5*time.Second {
		t.Errorf("took %v", took)
	}
}

func TestDialSerialFails(t *testing.T) {
	t.Run("no guest", func(t *testing.T) {
		port := newFakePort(t)
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
		defer cancel()
		if _, err := DialSerial(ctx, port.connect(t)); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("error %v", err)
		}
	})
	t.Run("VMM gone", func(t *testing.T) {
		host, qemu := net.Pipe()
		go func() {
			io.ReadFull(qemu, make([]byte, serialOpening))
			qemu.Write(serialOpen(tokenA)) // not the host's token
			qemu.Close()
		}()
		if _, err := DialSerial(testContext(t), host); !errdefs.IsUnavailable(err) {
			t.Errorf("error %v", err)
		}
	})
	t.Run("answer in pieces", func(t *testing.T) {
		host, qemu := net.Pipe()
		go func() {
			opening := make([]byte, serialOpening)
			io.ReadFull(qemu, opening)
			qemu.Write(bytes.Repeat(opening[:20], 5000))
			for _, b := range opening {
				qemu.Write([]byte{b})
			}
			qemu.Write([]byte("rest"))
		}()
		if _, err := openSerial(host, tokenA); err != nil {
			t.Error(err)
		}
		var b [4]byte
		if _, err := io.ReadFull(host, b[:]); err != nil || string(b[:]) != "rest" {
			t.Errorf("left %q: %v", b, err)
		}
	})
	t.Run("session over", func(t *testing.T) {
		port := newFakePort(t)
		serialGuest(t, port)
		m := dialSerial(t, port)
		port.hangUp(-1)
		<-m.Done()
		if _, err := m.Dial(testContext(t)); !errdefs.IsUnavailable(err) {
			t.Errorf("error %v", err)
		}
	})
}

// TestOpenSerialAgain is about a QEMU that swallows what the guest answers to the first connection.
func TestOpenSerialAgain(t *testing.T) {
	first := make(chan struct{}, 1)
	first <- struct{}{}
	answered := make(chan struct{})
	g := serveGuest(t, func(conn net.Conn) {
		opening := make([]byte, serialOpening)
		if _, err := io.ReadFull(conn, opening); err != nil {
			t.Error(err)
		}
		select {
		case <-first:
		default:
			conn.Write(opening)
			close(answered)
		}
		io.Copy(io.Discard, conn)
	})
	m, err := OpenSerial(testContext(t), g.l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	<-answered
	m.Close()

	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	silent := serveGuest(t, func(conn net.Conn) { io.Copy(io.Discard, conn) })
	if _, err := OpenSerial(ctx, silent.l.Addr().String()); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a guest that never answers: %v", err)
	}
	broken := serveGuest(t, func(net.Conn) {})
	if _, err := OpenSerial(testContext(t), broken.l.Addr().String()); !errdefs.IsUnavailable(err) {
		t.Errorf("a VMM that hangs up: %v", err)
	}
	if _, err := OpenSerial(testContext(t), t.TempDir()+"/none"); !errdefs.IsUnavailable(err) {
		t.Errorf("no socket: %v", err)
	}
}

func muxFrame(kind byte, flags uint16, length uint32, body string) string {
	b := []byte{0, kind}
	b = binary.BigEndian.AppendUint16(b, flags)
	b = binary.BigEndian.AppendUint32(b, 1)
	return string(binary.BigEndian.AppendUint32(b, length)) + body
}

func TestMuxGuard(t *testing.T) {
	const ack = 2
	for name, tc := range map[string]struct {
		in string
		ok bool
	}{
		"data":              {muxFrame(muxData, 0, 3, "\x09\x09\x09") + muxFrame(muxData, 0, 1, "x"), true},
		"window":            {muxFrame(muxWindow, ack, serialWindow, "") + muxFrame(muxWindow, 0, 0, ""), true},
		"stream of guest's": {muxFrame(muxWindow, muxSYN, 0, ""), false},
		"data opens stream": {muxFrame(muxData, muxSYN, 0, ""), false},
		"ping":              {muxFrame(2, muxSYN, 0, ""), false},
		"go away":           {muxFrame(3, 0, 0, ""), false},
		"large":             {muxFrame(muxData, 0, serialWindow+1, ""), false},
		"version":           {"\x01" + muxFrame(muxData, 0, 0, "")[1:], false},
		"second frame":      {muxFrame(muxData, 0, 2, "ab") + muxFrame(2, muxSYN, 0, ""), false},
	} {
		t.Run(name, func(t *testing.T) {
			for _, size := range []int{1 << 20, 1, 5, 13} {
				var g muxGuard
				var err error
				for p := []byte(tc.in); len(p) > 0 && err == nil; p = p[min(size, len(p)):] {
					err = g.check(p[:min(size, len(p))])
				}
				if (err == nil) != tc.ok {
					t.Errorf("pieces of %d: %v", size, err)
				}
			}
		})
	}
}

// TestSerialHostileGuest: a guest that pings ends its own session and nothing else.
func TestSerialHostileGuest(t *testing.T) {
	host, qemu, err := unixPair()
	if err != nil {
		t.Fatal(err)
	}
	defer qemu.Close()
	go func() {
		opening := make([]byte, serialOpening)
		io.ReadFull(qemu, opening)
		qemu.Write(append(opening, muxFrame(2, muxSYN, 1, "")...))
	}()
	m, err := DialSerial(testContext(t), host)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	select {
	case <-m.Done():
	case <-time.After(testTimeout):
		t.Error("the session goes on")
	}
}
