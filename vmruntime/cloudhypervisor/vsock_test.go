package cloudhypervisor

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"github.com/containerd/errdefs"

	"github.com/crivm/crivm/vmruntime/vmtest"
)

// duplex is a peer that has said all it will say.
type duplex struct {
	io.Reader
	io.Writer
}

func TestHandshake(t *testing.T) {
	for _, tc := range []struct {
		answer, rest string
		ok           bool
	}{
		{"OK 1073741824\n", "", true},
		{"OK 1\npayload", "payload", true},
		{"OK 4294967295\n\n", "\n", true},
		{"", "", false},
		{"OK 1", "", false},
		{"OK \n", "", false},
		{"OK -1\n", "", false},
		{"OK 4294967296\n", "", false},
		{"ok 1\n", "", false},
		{"HTTP/1.1 400\n", "", false},
		{strings.Repeat("x", 100), "", false},
		{"OK " + strings.Repeat("0", 40) + "\n", "", false},
	} {
		for _, r := range []io.Reader{strings.NewReader(tc.answer), iotest.OneByteReader(strings.NewReader(tc.answer))} {
			var sent bytes.Buffer
			err := handshake(duplex{r, &sent}, 1024)
			if (err == nil) != tc.ok || sent.String() != "CONNECT 1024\n" {
				t.Errorf("%q: %v, sent %q", tc.answer, err, &sent)
			}
			if rest, _ := io.ReadAll(r); tc.ok && string(rest) != tc.rest {
				t.Errorf("%q: %q is left, want %q", tc.answer, rest, tc.rest)
			}
		}
	}
	if err := handshake(duplex{strings.NewReader(""), failingWriter{}}, 1); err == nil {
		t.Error("a failed write was ignored")
	}
}

type failingWriter struct{}

func (failingWriter) Write([]byte) (int, error) { return 0, errors.New("broken") }

func FuzzHandshake(f *testing.F) {
	f.Add([]byte("OK 1\npayload"))
	f.Add([]byte("OK 99999999999\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		r := bytes.NewReader(b)
		err := handshake(duplex{r, io.Discard}, 1024)
		read := len(b) - r.Len()
		if read > maxReply {
			t.Errorf("read %d bytes", read)
		}
		if err == nil && (!bytes.HasPrefix(b, []byte("OK ")) || b[read-1] != '\n') {
			t.Errorf("accepted %q", b[:read])
		}
	})
}

func TestDialWaitsForTheGuest(t *testing.T) {
	f := newFixture(t)
	vmtest.Inject(t, f.spec.Dir, vmtest.Faults{BootDelay: 400})
	v := f.start()
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := v.Dial(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("dial without patience: %v", err)
	}
	dial(t, f, v)
}

func TestDialWithoutReadyEvent(t *testing.T) {
	f := newFixture(t)
	vmtest.Inject(t, f.spec.Dir, vmtest.Faults{NoReady: true})
	v := f.start()
	dial(t, f, v)
}

func TestDialGuestThatNeverServes(t *testing.T) {
	f := newFixture(t)
	vmtest.Inject(t, f.spec.Dir, vmtest.Faults{NoHello: true})
	v := f.start()
	got := make(chan error, 1)
	go func() {
		_, err := v.Dial(f.ctx())
		got <- err
	}()
	ctx, cancel := context.WithTimeout(t.Context(), 700*time.Millisecond)
	defer cancel()
	if _, err := v.Dial(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("dial: %v", err)
	}
	// A VM that dies ends the wait at once.
	if err := v.Kill(f.ctx()); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-got:
		if !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "killed") {
			t.Errorf("dial of a VM that died: %v", err)
		}
	case <-time.After(time.Second):
		t.Fatal("dial outlives its VM")
	}
}

func TestDialVMMThatAnswersNonsense(t *testing.T) {
	f := newFixture(t)
	vmtest.Inject(t, f.spec.Dir, vmtest.Faults{VsockReply: "NO\n"})
	v := f.start()
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if _, err := v.Dial(ctx); err == nil || !strings.Contains(err.Error(), "unexpected answer") {
		t.Errorf("dial: %v", err)
	}
}

// A VMM that its guest has taken over might lead the daemon to the agent of another pod.
func TestDialRefusesAnothersSocket(t *testing.T) {
	f := newFixture(t)
	v := f.start()
	dial(t, f, v)
	other := filepath.Join(t.TempDir(), "other")
	l, err := net.Listen("unix", other)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if err := os.Rename(vsockPath(f.spec.Dir), vsockPath(f.spec.Dir)+".away"); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(other, vsockPath(f.spec.Dir)); err != nil {
		t.Fatal(err)
	}
	if _, err := v.Dial(f.ctx()); !errdefs.IsUnavailable(err) {
		t.Errorf("dial: %v", err)
	}
	if e := f.died(v); e.Reason != "VMM replaced its vsock" {
		t.Errorf("exit %+v", e)
	}
}

// Only the VMM itself says that the guest serves.
func TestReadyFromAnotherProcess(t *testing.T) {
	f := newFixture(t)
	vmtest.Inject(t, f.spec.Dir, vmtest.Faults{NoHello: true})
	v := f.start()
	for range 3 {
		conn, err := net.Dial("unix", readyPath(f.spec.Dir))
		if err != nil {
			t.Fatal(err)
		}
		io.Copy(io.Discard, conn) // until it has been looked at
		conn.Close()
	}
	select {
	case <-v.ready:
		t.Error("another process made the guest ready")
	default:
	}
}
