package agentproto

import (
	"bytes"
	"context"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"testing"
	"time"
)

const tokenA, tokenB = "0123456789abcdef0123456789abcdef", "ffffffffffffffffffffffffffffffff"

// scanAll feeds p in pieces of the given sizes (the last one repeats) and returns, for each session seen,
// its token and data.
func scanAll(p []byte, sizes ...int) (tokens []string, sessions [][]byte) {
	var s serialScanner
	p = bytes.Clone(p)
	for len(p) > 0 {
		n := len(p)
		if len(sizes) > 0 {
			n = min(n, sizes[0])
			if len(sizes) > 1 {
				sizes = sizes[1:]
			}
		}
		for piece := p[:n]; len(piece) > 0; {
			data, event, token, rest := s.next(piece)
			if len(data) > 0 {
				sessions[len(sessions)-1] = append(sessions[len(sessions)-1], data...)
			}
			if event == serialNew {
				tokens = append(tokens, token)
				sessions = append(sessions, []byte{})
			}
			piece = rest
		}
		p = p[n:]
	}
	return tokens, sessions
}

func TestSerialScanner(t *testing.T) {
	a, b := string(serialOpen(tokenA)), string(serialOpen(tokenB))
	for name, tc := range map[string]struct {
		in     string
		tokens []string
		data   []string
	}{
		"nothing":               {"", nil, nil},
		"noise before":          {"noise" + a + "data", []string{tokenA}, []string{"data"}},
		"escapes":               {a + "x\xf6\x00y\xf6\x01z", []string{tokenA}, []string{"x\xf5y\xf6z"}},
		"next session":          {a + "one" + b + "two", []string{tokenA, tokenB}, []string{"one", "two"}},
		"cut in an escape":      {a + "one\xf6" + b + "\x00two", []string{tokenA, tokenB}, []string{"one", "\x00two"}},
		"cut in an opening":     {a + "one" + b[:20] + a + "two", []string{tokenA, tokenA}, []string{"one", "two"}},
		"cut after a mark":      {a + "one\xf5" + b + "two", []string{tokenA, tokenB}, []string{"one", "two"}},
		"cut opening, no other": {a + "one" + b[:20] + "two", []string{tokenA}, []string{"one"}},
		"wrong escape":          {a + "one\xf6\x02two" + b + "three", []string{tokenA, tokenB}, []string{"one", "three"}},
		"upper-case token":      {"\xf5crivm1" + "ABCDEF" + a, []string{tokenA}, []string{""}},
		"other magic":           {"\xf5crivm2" + tokenA + "x" + b + "y", []string{tokenB}, []string{"y"}},
	} {
		t.Run(name, func(t *testing.T) {
			for _, size := range []int{1 << 20, 1, 2, 3, 7} {
				tokens, data := scanAll([]byte(tc.in), size)
				if len(tokens) != len(tc.tokens) {
					t.Fatalf("pieces of %d: tokens %q", size, tokens)
				}
				for i := range tokens {
					if tokens[i] != tc.tokens[i] || string(data[i]) != tc.data[i] {
						t.Errorf("pieces of %d: session %d is %q with %q", size, i, tokens[i], data[i])
					}
				}
			}
		})
	}
}

// serialGuest serves streams on a port. The first byte of a stream says what it is for.
func serialGuest(t testing.TB, port SerialPort) net.Listener {
	t.Helper()
	l := ServeSerial(port)
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer conn.Close()
				serveSerialStream(conn, t.Errorf)
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		wg.Wait()
	})
	return l
}

// serveSerialStream tells errorf when it gets what no host sent.
func serveSerialStream(conn net.Conn, errorf func(format string, args ...any)) {
	var kind [1]byte
	if _, err := io.ReadFull(conn, kind[:]); err != nil {
		return
	}
	buf := make([]byte, 32<<10)
	switch kind[0] {
	case 'e': // echo
		io.CopyBuffer(conn, conn, buf)
	case 'f': // flood
		for i := 0; ; i += len(buf) {
			fillPattern(buf, i)
			if _, err := conn.Write(buf); err != nil {
				return
			}
		}
	case 's': // sink: nothing but the pattern may arrive, whenever it ends
		want := make([]byte, len(buf))
		for i := 0; ; {
			n, err := conn.Read(buf)
			fillPattern(want[:n], i)
			if !bytes.Equal(buf[:n], want[:n]) {
				errorf("bytes %d..%d of a stream are not what was sent", i, i+n)
				return
			}
			i += n
			if err != nil {
				return
			}
		}
	}
}

// pattern is random, and longer than any buffer, so that a gap in what follows it shows.
var pattern = func() []byte {
	p := make([]byte, 1<<20)
	rand.NewChaCha8([32]byte{7}).Read(p)
	return p
}()

// fillPattern fills p as part of the endless repetition of pattern.
func fillPattern(p []byte, from int) {
	for len(p) > 0 {
		n := copy(p, pattern[from%len(pattern):])
		from += n
		p = p[n:]
	}
}

func dialSerial(t testing.TB, port *fakePort) *SerialMux {
	t.Helper()
	m, err := DialSerial(testContext(t), port.connect(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	return m
}

func openSerialStream(t testing.TB, m *SerialMux, kind byte) net.Conn {
	t.Helper()
	conn, err := m.Dial(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	if _, err := conn.Write([]byte{kind}); err != nil {
		t.Fatal(err)
	}
	return conn
}

// TestSerialReconnect kills the host 100 times in the middle of traffic both ways.
func TestSerialReconnect(t *testing.T) {
	port := newFakePort(t)
	serialGuest(t, port)
	rnd := rand.New(rand.NewPCG(1, 2))
	for round := range 100 {
		m, err := DialSerial(testContext(t), port.connect(t))
		if err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
		stop := serialTraffic(t, m)
		if round%2 == 0 {
			port.hangUp(rnd.IntN(5000)) // cut within what the guest has not read yet
			m.Close()
		} else {
			m.Close() // all that was written still arrives
			port.hangUp(-1)
		}
		stop()
		<-m.Done()
	}
}

// serialTraffic lets bytes flow both ways, checks one echo meanwhile, and returns with the traffic going on. The
// session then has to be ended; stop waits for the rest.
func serialTraffic(t *testing.T, m *SerialMux) (stop func()) {
	t.Helper()
	var wg sync.WaitGroup
	flood, sink := openSerialStream(t, m, 'f'), openSerialStream(t, m, 's')
	flowing := make(chan struct{}, 2)
	wg.Go(func() {
		got, want := make([]byte, 5000), make([]byte, 5000)
		for i := 0; ; i += len(got) {
			if _, err := io.ReadFull(flood, got); err != nil {
				return
			}
			if fillPattern(want, i); !bytes.Equal(got, want) {
				t.Errorf("flood differs at %d", i)
				return
			}
			if i == 0 {
				flowing <- struct{}{}
			}
		}
	})
	wg.Go(func() {
		p := make([]byte, 3001)
		for i := 0; ; i += len(p) {
			fillPattern(p, i)
			if _, err := sink.Write(p); err != nil {
				return
			}
			if i == 0 {
				flowing <- struct{}{}
			}
		}
	})
	<-flowing
	<-flowing
	echo := openSerialStream(t, m, 'e')
	ping, pong := make([]byte, 20000), make([]byte, 20000)
	fillPattern(ping, 99)
	go echo.Write(ping)
	echo.SetReadDeadline(time.Now().Add(testTimeout))
	if _, err := io.ReadFull(echo, pong); err != nil || !bytes.Equal(ping, pong) {
		t.Fatalf("echo: %v", err)
	}
	return wg.Wait
}

// TestSerialStaleSession is about two hosts of which the first died before it read the guest's answer.
func TestSerialStaleSession(t *testing.T) {
	port := newFakePort(t)
	first := port.connect(t)
	first.Write(serialOpen(tokenA)) // nobody serves the port yet
	first.Close()
	port.pumps.Wait()
	serialGuest(t, port)
	m := dialSerial(t, port)
	echo := openSerialStream(t, m, 'e')
	echo.Write([]byte("ping"))
	var b [4]byte
	if _, err := io.ReadFull(echo, b[:]); err != nil || string(b[:]) != "ping" {
		t.Errorf("echo %q: %v", b, err)
	}
}

// TestSerialStuckWriter fills the port while no host reads: the writer of the old session must let go of it.
func TestSerialStuckWriter(t *testing.T) {
	port := newFakePort(t)
	serialGuest(t, port)
	// Where the hang-up meets a writer that waits for the host's leave to send more, the port stays as it is.
	for try := 0; !floodPort(t, port); try++ {
		if try == 20 {
			t.Fatal("the port is never full")
		}
	}
	m := dialSerial(t, port)
	openSerialStream(t, m, 'e')
}

// floodPort has the guest write to a host that goes away meanwhile; false when it has not filled the port within a second.
func floodPort(t *testing.T, port *fakePort) bool {
	t.Helper()
	m := dialSerial(t, port)
	defer m.Close()
	flood := openSerialStream(t, m, 'f')
	if _, err := flood.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	go io.Copy(io.Discard, flood) // keeps the window open
	port.hangUp(-1)
	for deadline := time.Now().Add(time.Second); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		port.mu.Lock()
		full := len(port.toHost) >= fakePortQueue
		port.mu.Unlock()
		if full {
			return true
		}
	}
	return false
}

// slicedPort interrupts all writes in the middle, as a session that ends does to the next one's first.
type slicedPort struct{ *fakePort }

func (p slicedPort) Write(b []byte) (int, error) {
	n, err := p.fakePort.Write(b[:(len(b)+1)/2])
	if err == nil && n < len(b) {
		err = os.ErrDeadlineExceeded
	}
	return n, err
}

func TestSerialInterruptedWrites(t *testing.T) {
	port := newFakePort(t)
	serialGuest(t, slicedPort{port})
	echo := openSerialStream(t, dialSerial(t, port), 'e')
	ping, pong := make([]byte, 5000), make([]byte, 5000)
	fillPattern(ping, 0)
	echo.Write(ping)
	if _, err := io.ReadFull(echo, pong); err != nil || !bytes.Equal(ping, pong) {
		t.Errorf("echo: %v", err)
	}
}

func TestServeSerialUnplugged(t *testing.T) {
	port := newFakePort(t)
	l := ServeSerial(port)
	port.Close()
	if _, err := l.Accept(); err == nil {
		t.Error("no error")
	}
}

// TestAgentOverSerial is the whole wire of a QEMU pod.
func TestAgentOverSerial(t *testing.T) {
	port := newFakePort(t)
	l := ServeSerial(port)
	defer l.Close()
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				if _, err := ReadHeader(conn); err == nil && WriteReply(conn, nil) == nil {
					ServeControl(context.Background(), conn, &fakeAgent{version: Version})
				}
			}()
		}
	}()
	for range 3 {
		m := dialSerial(t, port)
		c := connect(t, m)
		port.hangUp(-1)
		<-c.Done()
		<-m.Done()
	}
}

func BenchmarkSerialToHost(b *testing.B) {
	port := newFakePort(b)
	serialGuest(b, port)
	conn := openSerialStream(b, dialSerial(b, port), 'f')
	buf := make([]byte, 32<<10)
	b.SetBytes(int64(len(buf)))
	for b.Loop() {
		if _, err := io.ReadFull(conn, buf); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkSerialToGuest(b *testing.B) {
	port := newFakePort(b)
	serialGuest(b, port)
	conn := openSerialStream(b, dialSerial(b, port), 's')
	buf := make([]byte, 32<<10)
	b.SetBytes(int64(len(buf)))
	at := 0
	for b.Loop() {
		fillPattern(buf, at)
		at += len(buf)
		if _, err := conn.Write(buf); err != nil {
			b.Fatal(err)
		}
	}
}
