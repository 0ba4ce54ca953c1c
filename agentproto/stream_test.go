package agentproto

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
)

func TestReadHeader(t *testing.T) {
	var good bytes.Buffer
	want := &StreamHeader{Kind: &StreamHeader_Output{Output: &Output{ContainerId: "c1", Stderr: true, Offset: 9}}}
	if err := writePreamble(&good, want); err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		sent  string
		check func(error) bool
	}{
		"not ours":      {"SSH-2.0-x", errdefs.IsInvalidArgument},
		"other version": {"CVM\x09\x00\x00\x00\x00", errdefs.IsFailedPrecondition},
		"too large":     {"CVM\x01\x00\x01\x00\x01", errdefs.IsInvalidArgument},
		"huge":          {"CVM\x01\xff\xff\xff\xff", errdefs.IsInvalidArgument},
		"no kind":       {"CVM\x01\x00\x00\x00\x00", errdefs.IsInvalidArgument},
		"later kind":    {"CVM\x01\x00\x00\x00\x03\x7a\x01\x00", errdefs.IsInvalidArgument},
		"garbage":       {"CVM\x01\x00\x00\x00\x02\xff\xff", errdefs.IsInvalidArgument},
		"nothing":       {"", errdefs.IsUnavailable},
		"cut":           {good.String()[:good.Len()-1], errdefs.IsUnavailable},
		"good":          {good.String() + "payload", func(err error) bool { return err == nil }},
	} {
		t.Run(name, func(t *testing.T) {
			host, guest := net.Pipe()
			go func() {
				io.WriteString(host, tc.sent)
				host.Close()
			}()
			defer guest.Close()
			h, err := ReadHeader(guest)
			if !tc.check(err) {
				t.Fatalf("error %v", err)
			}
			if err != nil {
				return
			}
			if o := h.GetOutput(); o.GetContainerId() != "c1" || !o.GetStderr() || o.GetOffset() != 9 {
				t.Errorf("got %v", h)
			}
			if rest, _ := io.ReadAll(guest); string(rest) != "payload" {
				t.Errorf("left %q", rest)
			}
		})
	}
}

func TestReply(t *testing.T) {
	long := strings.Repeat("x", 2*maxMessage)
	for name, tc := range map[string]struct {
		err   error
		check func(error) bool
	}{
		"ok":        {nil, func(err error) bool { return err == nil }},
		"not found": {errdefs.ErrNotFound, errdefs.IsNotFound},
		"plain":     {errors.New("hm"), errdefs.IsUnknown},
		"long":      {errdefs.ErrOutOfRange.WithMessage(long), func(err error) bool { return errdefs.IsOutOfRange(err) && len(err.Error()) < maxMessage+100 }},
		"deadline":  {context.DeadlineExceeded, func(err error) bool { return errors.Is(err, context.DeadlineExceeded) }},
	} {
		t.Run(name, func(t *testing.T) {
			g := serveAgent(t, nil, func(_ *StreamHeader, conn net.Conn) { WriteReply(conn, tc.err) })
			conn, err := openStream(testContext(t), g, &StreamHeader{Kind: &StreamHeader_Dial{Dial: &DialPort{}}})
			if !tc.check(err) {
				t.Errorf("error %v", err)
			}
			if (conn == nil) == (err == nil) {
				t.Errorf("connection %v with error %v", conn, err)
			}
			if conn != nil {
				conn.Close()
			}
		})
	}
}

func TestOpenStreamCancelled(t *testing.T) {
	arrived := make(chan struct{})
	g := serveAgent(t, nil, func(_ *StreamHeader, conn net.Conn) {
		close(arrived)
		io.Copy(io.Discard, conn)
	})
	ctx, cancel := context.WithCancel(testContext(t))
	go func() {
		<-arrived
		cancel()
	}()
	if _, err := openStream(ctx, g, &StreamHeader{Kind: &StreamHeader_Dial{Dial: &DialPort{}}}); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}
}

// TestStreamOutlivesContext is about contexts of requests, which end when the stream has been opened.
func TestStreamOutlivesContext(t *testing.T) {
	c := connect(t, serveAgent(t, &fakeAgent{version: Version}, func(_ *StreamHeader, conn net.Conn) {
		WriteReply(conn, nil)
		fc := NewFramedConn(conn)
		io.Copy(fc, fc)
		fc.CloseWrite()
	}))
	ctx, cancel := context.WithCancel(testContext(t))
	conn, err := c.DialPort(ctx, 80)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	cancel()
	for range 100 { // time enough for a wrong implementation to interrupt
		if _, err := conn.Write([]byte("ping")); err != nil {
			t.Fatal(err)
		}
		var b [4]byte
		if _, err := io.ReadFull(conn, b[:]); err != nil || string(b[:]) != "ping" {
			t.Fatalf("got %q, %v", b, err)
		}
	}
	conn.CloseWrite()
	if b, err := io.ReadAll(conn); err != nil || len(b) != 0 {
		t.Errorf("at the end %q, %v", b, err)
	}
}

func TestFramedConnHalfClose(t *testing.T) {
	payload := make([]byte, 3*writeChunk+17)
	rand.NewChaCha8([32]byte{}).Read(payload)
	c := connect(t, serveAgent(t, &fakeAgent{version: Version}, func(h *StreamHeader, conn net.Conn) {
		if h.GetDial().GetPort() != 8080 {
			WriteReply(conn, errdefs.ErrInvalidArgument)
			return
		}
		WriteReply(conn, nil)
		fc := NewFramedConn(conn)
		got, err := io.ReadAll(fc) // until the host's END; our direction is open still
		if err != nil {
			t.Error(err)
		}
		fc.Write(got)
		fc.CloseWrite()
		if n, err := fc.Read(make([]byte, 1)); n != 0 || err != io.EOF {
			t.Errorf("read after END: %d, %v", n, err)
		}
	}))
	conn, err := c.DialPort(testContext(t), 8080)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if n, err := conn.Write(payload); n != len(payload) || err != nil {
		t.Fatalf("wrote %d: %v", n, err)
	}
	if err := errors.Join(conn.CloseWrite(), conn.CloseWrite()); err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Write(payload); !errors.Is(err, net.ErrClosed) {
		t.Errorf("write after CloseWrite: %v", err)
	}
	if got, err := io.ReadAll(conn); err != nil || !bytes.Equal(got, payload) {
		t.Errorf("got %d bytes of %d: %v", len(got), len(payload), err)
	}
	if _, err := c.DialPort(testContext(t), 1); !errdefs.IsInvalidArgument(err) {
		t.Errorf("refused port: %v", err)
	}
}

func TestFrames(t *testing.T) {
	for name, tc := range map[string]struct {
		sent string
		want string
		err  error
	}{
		"data and end":       {"\x01\x00\x00\x00\x02ab\x01\x00\x00\x00\x01c\x02\x00\x00\x00\x00", "abc", nil},
		"nothing":            {"", "", io.ErrUnexpectedEOF},
		"no end":             {"\x01\x00\x00\x00\x02ab", "ab", io.ErrUnexpectedEOF},
		"cut header":         {"\x01\x00\x00", "", io.ErrUnexpectedEOF},
		"cut payload":        {"\x01\x00\x00\x00\x05ab", "ab", io.ErrUnexpectedEOF},
		"empty data":         {"\x01\x00\x00\x00\x00", "", errdefs.ErrDataLoss},
		"end with payload":   {"\x02\x00\x00\x00\x01x", "", errdefs.ErrDataLoss},
		"too large":          {"\x01\x00\x10\x00\x01", "", errdefs.ErrDataLoss},
		"huge":               {"\x01\xff\xff\xff\xff", "", errdefs.ErrDataLoss},
		"unknown type":       {"\x09\x00\x00\x00\x00", "", errdefs.ErrDataLoss},
		"ack to a reader":    {"\x03\x00\x00\x00\x08\x00\x00\x00\x00\x00\x00\x00\x00", "", errdefs.ErrDataLoss},
		"data after the end": {"\x02\x00\x00\x00\x00\x01\x00\x00\x00\x01x", "", nil},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFrameReader(strings.NewReader(tc.sent))
			got, err := io.ReadAll(readerFunc(f.readData))
			if string(got) != tc.want || !errors.Is(err, tc.err) {
				t.Errorf("got %q, %v", got, err)
			}
			if _, again := f.readData(make([]byte, 1)); err != nil && again != err || again == nil {
				t.Errorf("second read: %v", again)
			}
		})
	}
}

type readerFunc func([]byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

// TestFrameIsOneWrite: a frame in two writes would be two packets on vsock and two on the serial port.
func TestFrameIsOneWrite(t *testing.T) {
	var writes []int
	w := writerFunc(func(p []byte) (int, error) {
		writes = append(writes, len(p))
		return len(p), nil
	})
	if n, err := writeData(w, make([]byte, writeChunk+5)); n != writeChunk+5 || err != nil {
		t.Fatal(n, err)
	}
	if len(writes) != 2 || writes[0] != frameHeader+writeChunk || writes[1] != frameHeader+5 {
		t.Errorf("writes of %v bytes", writes)
	}
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

func TestReadDeadlineIsNotSticky(t *testing.T) {
	var frame bytes.Buffer
	writeData(&frame, []byte("xy"))
	for _, early := range []int{0, 3, frameHeader, frameHeader + 1} { // bytes of the frame that come before the deadline
		t.Run(strconv.Itoa(early), func(t *testing.T) {
			a, b := net.Pipe()
			defer a.Close()
			fc := NewFramedConn(b)
			defer fc.Close()
			go func() {
				if early > 0 {
					a.Write(frame.Bytes()[:early]) // returns when they were read
				}
				fc.SetReadDeadline(time.Now())
			}()
			var got []byte
			read := func() error {
				buf := make([]byte, 2)
				n, err := fc.Read(buf)
				got = append(got, buf[:n]...)
				return err
			}
			var err error
			for err == nil {
				err = read()
			}
			if ne := net.Error(nil); !errors.As(err, &ne) || !ne.Timeout() {
				t.Fatalf("error %v", err)
			}
			fc.SetReadDeadline(time.Now().Add(testTimeout))
			go a.Write(frame.Bytes()[early:])
			for len(got) < 2 {
				if err := read(); err != nil {
					t.Fatal(err)
				}
			}
			if string(got) != "xy" {
				t.Errorf("read %q", got)
			}
		})
	}
}
