package guest

import (
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"strconv"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/crivm/crivm/agentproto"
)

// A stream that breaks is resumed at any offset that was not acknowledged, and nothing else.
func TestOutputReplay(t *testing.T) {
	_, d := newTestAgent(t)
	c := connect(t, d)
	run(t, c, "a", nil, "sh", "-c", "printf 0123456789")
	wait(t, c, "a", "")
	first := openOutput(t, c, &agentproto.Output{ContainerId: "a"})
	buf := make([]byte, 10)
	if _, err := io.ReadFull(first, buf); err != nil {
		t.Fatal(err)
	}
	if err := first.Ack(4); err != nil {
		t.Fatal(err)
	}
	for offset, want := range map[uint64]string{4: "456789", 7: "789", 10: ""} {
		var got []byte
		eventually(t, func() bool { // the acknowledgement is on its way
			r, err := c.Output(testContext(t), &agentproto.Output{ContainerId: "a", Offset: offset})
			if err != nil {
				return false
			}
			defer r.Close()
			got, err = io.ReadAll(r)
			return err == nil
		})
		if string(got) != want {
			t.Errorf("from %d: %q", offset, got)
		}
	}
	for _, offset := range []uint64{0, 3, 11} {
		eventually(t, func() bool {
			r, err := c.Output(testContext(t), &agentproto.Output{ContainerId: "a", Offset: offset})
			if err == nil {
				r.Close()
			}
			return errdefs.IsOutOfRange(err)
		})
	}
}

// A newer stream of the same output ends the older one.
func TestOutputTakeOver(t *testing.T) {
	_, d := newTestAgent(t)
	c := connect(t, d)
	run(t, c, "a", &agentproto.Stdio{Stdin: true}, "cat")
	old := openOutput(t, c, &agentproto.Output{ContainerId: "a"})
	openOutput(t, c, &agentproto.Output{ContainerId: "a"})
	if _, err := old.Read(make([]byte, 1)); err == nil || errors.Is(err, io.EOF) {
		t.Errorf("replaced stream: %v", err)
	}
	other := connect(t, d) // a restarted host, while the old connection is still there
	if _, err := other.Ping(testContext(t), &agentproto.PingRequest{}); err != nil {
		t.Error(err)
	}
	if _, err := c.Ping(testContext(t), &agentproto.PingRequest{}); err != nil {
		t.Error(err)
	}
}

// A writer waits for the host's acknowledgements and loses nothing.
func TestOutputBackPressure(t *testing.T) {
	a, d := newTestAgent(t)
	c := connect(t, d)
	const size = 3 * containerOutputBytes
	run(t, c, "a", nil, "sh", "-c", "head -c "+strconv.Itoa(size)+" /dev/zero | tr '\\0' x; echo done >&2")
	_, p, err := a.process("a", "")
	if err != nil {
		t.Fatal(err)
	}
	buffered := func() int {
		p.io.stdout.mu.Lock()
		defer p.io.stdout.mu.Unlock()
		held := 0
		for _, c := range p.io.stdout.chunks {
			held += cap(c.b)
		}
		if held > containerOutputBytes+outputWasteBytes+outputReadBytes {
			t.Errorf("buffer holds %d bytes", held)
		}
		return int(p.io.stdout.end - p.io.stdout.acked)
	}
	eventually(t, func() bool { return buffered() == containerOutputBytes })
	if p.hasEnded() {
		t.Error("writer was not held back")
	}
	r := openOutput(t, c, &agentproto.Output{ContainerId: "a"})
	buf, read := make([]byte, 32<<10), 0
	for {
		n, err := r.Read(buf)
		read += n
		if bytes.Count(buf[:n], []byte("x")) != n {
			t.Fatal("wrong byte")
		}
		if n > 0 && read < size { // the last bytes stay unacknowledged
			if err := r.Ack(r.Offset()); err != nil {
				t.Fatal(err)
			}
		}
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		buffered()
	}
	if read != size {
		t.Errorf("read %d of %d bytes", read, size)
	}
	wait(t, c, "a", "")
	if p.io.stdout.drained() {
		t.Error("drained before the last acknowledgement")
	}
	if err := r.Ack(size); err != nil {
		t.Fatal(err)
	}
	eventually(t, p.io.stdout.drained)
}

// What is being sent stays as it is, even when it is acknowledged meanwhile and new output comes: by then buffers are used again.
func TestOutputKeptWhileSent(t *testing.T) {
	o := newOutput(containerOutputBytes)
	fill := func(c byte) {
		buf := readBuffers.Get().(*[outputReadBytes]byte)
		copy(buf[:], bytes.Repeat([]byte{c}, len(buf)))
		if !o.append(buf, len(buf)) {
			t.Fatal("a full buffer was copied")
		}
	}
	fill('a')
	n, err := o.send(testContext(t), 0, func(b []byte) error {
		if err := o.ack(outputReadBytes); err != nil {
			return err
		}
		for range 4 {
			fill('b')
		}
		if n := bytes.Count(b, []byte("a")); n != outputReadBytes {
			t.Errorf("%d of %d bytes are what they were", n, outputReadBytes)
		}
		return nil
	})
	if n != outputReadBytes || err != nil {
		t.Errorf("sent %d bytes: %v", n, err)
	}
}

func TestStdin(t *testing.T) {
	_, d := newTestAgent(t)
	c := connect(t, d)
	run(t, c, "a", &agentproto.Stdio{Stdin: true}, "sh", "-c", "cat; echo END")
	for _, text := range []string{"one ", "two "} { // a stream that just ends leaves stdin open
		in, err := c.Input(testContext(t), &agentproto.Input{ContainerId: "a"})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := in.Write([]byte(text)); err != nil {
			t.Fatal(err)
		}
		out := openOutput(t, c, &agentproto.Output{ContainerId: "a"})
		eventually(t, func() bool { // until the agent has passed it on
			b := make([]byte, 64)
			n, _ := out.Read(b)
			return bytes.HasSuffix(b[:n], []byte(text))
		})
		out.Close()
		in.Close()
	}
	in, err := c.Input(testContext(t), &agentproto.Input{ContainerId: "a"})
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	if err := in.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(openOutput(t, c, &agentproto.Output{ContainerId: "a"}))
	if err != nil || string(got) != "one two END\n" {
		t.Errorf("output: %q, %v", got, err)
	}
	run(t, c, "none", nil, "sh", "-c", "cat; sleep 1000")
	if _, err := c.Input(testContext(t), &agentproto.Input{ContainerId: "none"}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("input of a process without stdin: %v", err)
	}
}

// Input of a process that ends is told so, even when it never read.
func TestStdinOfDeadProcess(t *testing.T) {
	_, d := newTestAgent(t)
	c := connect(t, d)
	run(t, c, "a", &agentproto.Stdio{Stdin: true}, "sleep", "1000")
	in, err := c.Input(testContext(t), &agentproto.Input{ContainerId: "a"})
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	in.SetDeadline(time.Now().Add(testTimeout))
	wrote := make(chan error, 1)
	go func() {
		var err error
		for err == nil {
			_, err = in.Write(make([]byte, 64<<10))
		}
		wrote <- err
	}()
	if _, err := c.Signal(testContext(t), &agentproto.SignalRequest{ContainerId: "a", Signal: 9}); err != nil {
		t.Fatal(err)
	}
	var ne net.Error
	if err := <-wrote; errors.As(err, &ne) && ne.Timeout() {
		t.Errorf("write to a dead process: %v", err)
	}
}

func TestTerminal(t *testing.T) {
	_, d := newTestAgent(t)
	c := connect(t, d)
	tty := &agentproto.Stdio{Tty: true, Stdin: true, Rows: 24, Columns: 80}
	run(t, c, "a", tty, "sh", "-c", "stty size; read line; stty size; echo got $line; test -t 0 && test -t 1 && test -t 2 && exit 9")
	out := openOutput(t, c, &agentproto.Output{ContainerId: "a"})
	expectLine(t, out, "24 80")
	if _, err := c.ResizeTTY(testContext(t), &agentproto.ResizeTTYRequest{ContainerId: "a", Rows: 50, Columns: 132}); err != nil {
		t.Fatal(err)
	}
	in, err := c.Input(testContext(t), &agentproto.Input{ContainerId: "a"})
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	if _, err := in.Write([]byte("hello\r")); err != nil {
		t.Fatal(err)
	}
	expectLine(t, out, "hello") // the terminal's echo
	expectLine(t, out, "50 132")
	expectLine(t, out, "got hello")
	if rest, err := io.ReadAll(out); err != nil || len(rest) > 0 {
		t.Errorf("rest: %q, %v", rest, err)
	}
	if exit := wait(t, c, "a", ""); exit.GetCode() != 9 {
		t.Errorf("exit: %v", exit)
	}
	if _, err := c.Output(testContext(t), &agentproto.Output{ContainerId: "a", Stderr: true}); !errdefs.IsNotFound(err) {
		t.Errorf("stderr of a terminal: %v", err)
	}
	if _, err := c.ResizeTTY(testContext(t), &agentproto.ResizeTTYRequest{ContainerId: "a", Rows: 1 << 20}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("resize to nonsense: %v", err)
	}
	run(t, c, "pipe", nil, "true")
	if _, err := c.ResizeTTY(testContext(t), &agentproto.ResizeTTYRequest{ContainerId: "pipe"}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("resize without a terminal: %v", err)
	}
}

func TestDialPort(t *testing.T) {
	_, d := newTestAgent(t)
	c := connect(t, d)
	for _, addr := range []string{"127.0.0.1", "::1"} {
		reserved := closedPort(t) // of both addresses: nobody else on this machine answers there
		l, err := net.Listen("tcp", net.JoinHostPort(addr, strconv.Itoa(reserved(addr))))
		if err != nil {
			t.Logf("not tested on %s: %v", addr, err)
			continue
		}
		defer l.Close()
		go func() { // answers with what it got, once the client has finished
			conn, err := l.Accept()
			if err != nil {
				return
			}
			defer conn.Close()
			b, _ := io.ReadAll(conn)
			conn.Write(append([]byte("got "), b...))
		}()
		conn, err := c.DialPort(testContext(t), uint32(l.Addr().(*net.TCPAddr).Port))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if _, err := conn.Write([]byte("ping")); err != nil {
			t.Fatal(err)
		}
		if err := conn.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		if b, err := io.ReadAll(conn); err != nil || string(b) != "got ping" {
			t.Errorf("%s: %q, %v", addr, b, err)
		}
	}
	if _, err := c.DialPort(testContext(t), uint32(closedPort(t)(""))); !errdefs.IsUnavailable(err) {
		t.Errorf("port nobody listens on: %v", err)
	}
	for _, port := range []uint32{0, 65536} {
		if _, err := c.DialPort(testContext(t), port); !errdefs.IsInvalidArgument(err) {
			t.Errorf("port %d: %v", port, err)
		}
	}
}

// closedPort keeps a port of both loopback addresses: a socket that is bound and does not listen refuses connections, and
// nobody else gets the port. What is returned tells the port, and gives it up on one address first.
func closedPort(t *testing.T) func(giveUp string) int {
	t.Helper()
	bind := func(family int, addr unix.Sockaddr) (int, error) {
		fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err == nil {
			err = unix.Bind(fd, addr)
		}
		return fd, err
	}
	for range 100 {
		four, err := bind(unix.AF_INET, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}})
		if err != nil {
			t.Fatal(err)
		}
		name, err := unix.Getsockname(four)
		if err != nil {
			t.Fatal(err)
		}
		port := name.(*unix.SockaddrInet4).Port
		six, err := bind(unix.AF_INET6, &unix.SockaddrInet6{Port: port, Addr: [16]byte{15: 1}})
		if errors.Is(err, unix.EADDRINUSE) {
			unix.Close(four)
			unix.Close(six)
			continue
		}
		sockets := map[string]int{"127.0.0.1": four}
		if err == nil { // else there is no IPv6 here
			sockets["::1"] = six
		}
		t.Cleanup(func() {
			for _, fd := range sockets {
				unix.Close(fd)
			}
		})
		return func(giveUp string) int {
			if fd, ok := sockets[giveUp]; ok {
				unix.Close(fd)
				delete(sockets, giveUp)
			}
			return port
		}
	}
	t.Fatal("no port that is free on both addresses")
	return nil
}

// BenchmarkOutput passes a process's output through buffer, frames and a unix socket.
func BenchmarkOutput(b *testing.B) {
	reaper, err := NewReaper(false)
	if err != nil {
		b.Fatal(err)
	}
	defer reaper.Close()
	o := newOutput(containerOutputBytes)
	ours, theirs, err := outputPipe("bench")
	if err != nil {
		b.Fatal(err)
	}
	const chunk = 1 << 20
	b.SetBytes(chunk)
	b.ReportAllocs()
	o.follow(ours)
	child, err := reaper.Start(Command{Path: "/usr/bin/head", Args: []string{"-c", strconv.Itoa(b.N * chunk), "/dev/zero"}, Files: []*os.File{nil, theirs}})
	theirs.Close()
	if err != nil {
		b.Fatal(err)
	}
	at := uint64(0)
	for {
		n, err := o.send(b.Context(), at, func([]byte) error { return nil })
		if err != nil {
			break
		}
		at += uint64(n)
		if err := o.ack(at); err != nil {
			b.Fatal(err)
		}
	}
	<-child.Done()
	if at != uint64(b.N*chunk) {
		b.Fatalf("%d bytes", at)
	}
}
