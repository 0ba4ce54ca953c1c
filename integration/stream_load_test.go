//go:build integration

package integration

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"k8s.io/client-go/tools/remotecommand"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// The end of a client's input is the end of the process's stdin, and nothing more: what it prints afterwards
// arrives, over both protocols that can say so.
func TestStdinHalfClose(t *testing.T) {
	const size = 4 << 20
	p := runPod(t, shared)
	c := p.start("sleep 1000")
	input := make([]byte, size)
	rand.Read(input)
	for _, protocol := range []string{"SPDY", "WebSocket v5"} {
		resp, err := shared.Runtime.Exec(t.Context(), &cri.ExecRequest{ContainerId: c, Cmd: []string{"sh", "-c", "sha256sum; sleep 1; echo after"}, Stdin: true, Stdout: true, Stderr: true})
		if err != nil {
			t.Fatal(err)
		}
		var out, errOut bytes.Buffer
		err = executors(t, resp.Url)[protocol].StreamWithContext(testContext(t, 2*time.Minute), remotecommand.StreamOptions{Stdin: bytes.NewReader(input), Stdout: &out, Stderr: &errOut})
		if want := fmt.Sprintf("%x  -\nafter\n", sha256.Sum256(input)); err != nil || out.String() != want || errOut.Len() > 0 {
			t.Errorf("%s: stdin of %d bytes: %v, %q, %q; want %q", protocol, size, err, out.String(), errOut.String(), want)
		}
	}
}

// Several clients see the same output, whole and in order, whichever protocol they speak; one that leaves does
// not disturb the others.
func TestAttachSeveralClients(t *testing.T) {
	const lines = 2000
	p := runPod(t, shared)
	c := p.start(fmt.Sprintf("while read word; do [ $word = go ] && break; echo $word; done; i=0; while [ $i -lt %d ]; do echo line $i; i=$((i+1)); done", lines),
		func(c *cri.ContainerConfig) { c.Stdin = true })
	ctx := testContext(t, 3*time.Minute)
	attach := func(ctx context.Context, protocol string, stdin io.Reader, stdout io.Writer) <-chan error {
		t.Helper()
		resp, err := shared.Runtime.Attach(ctx, &cri.AttachRequest{ContainerId: c, Stdin: stdin != nil, Stdout: true, Stderr: true})
		if err != nil {
			t.Fatal(err)
		}
		executor, done := executors(t, resp.Url)[protocol], make(chan error, 1)
		go func() {
			done <- executor.StreamWithContext(ctx, remotecommand.StreamOptions{Stdin: stdin, Stdout: stdout, Stderr: io.Discard})
		}()
		return done
	}
	input, typed := io.Pipe()
	defer typed.Close()
	outputs := make([]*syncBuffer, 4)
	ends := make([]<-chan error, len(outputs))
	for i, protocol := range []string{"SPDY", "WebSocket v4", "SPDY", "WebSocket v5"} {
		outputs[i] = &syncBuffer{}
		var stdin io.Reader
		if i == 0 {
			stdin = input
		}
		ends[i] = attach(ctx, protocol, stdin, outputs[i])
	}
	leaverCtx, leave := context.WithCancel(ctx)
	defer leave()
	leaver := &syncBuffer{}
	left := attach(leaverCtx, "SPDY", nil, leaver)
	eventually(t, time.Minute, "all clients are attached", func() error {
		fmt.Fprintln(typed, "hello")
		for i, out := range append(outputs, leaver) {
			if !strings.Contains(out.String(), "hello\n") {
				return fmt.Errorf("client %d has seen %q", i, out.String())
			}
		}
		return nil
	})
	leave()
	select {
	case <-left:
	case <-time.After(30 * time.Second):
		t.Error("the client that leaves does not end")
	}
	fmt.Fprintln(typed, "go")
	var want strings.Builder
	for i := range lines {
		fmt.Fprintf(&want, "line %d\n", i)
	}
	for i, end := range ends {
		select {
		case err := <-end:
			if err != nil {
				t.Errorf("client %d: %v", i, err)
			}
		case <-ctx.Done():
			t.Fatalf("client %d does not end", i)
		}
		if got := strings.ReplaceAll(outputs[i].String(), "hello\n", ""); got != want.String() {
			t.Errorf("client %d has %d bytes of lines, want %d", i, len(got), want.Len())
		}
	}
	if log := strings.ReplaceAll(p.logText(c), "hello\n", ""); log != want.String() {
		t.Errorf("the log has %d bytes of lines, want %d", len(log), want.Len())
	}
}

// A port-forward carries much in both directions at once, unchanged, and the end of each direction by itself.
func TestPortForwardLoad(t *testing.T) {
	const size = 100 << 20
	p := runPod(t, shared)
	c := p.start("exec /usr/sbin/nginx echo 127.0.0.1:7000", func(c *cri.ContainerConfig) { c.Image.Image = standin })
	eventually(t, 20*time.Second, "the server listens", func() error {
		if out := p.exec(c, "netstat", "-ltn"); !strings.Contains(out, "127.0.0.1:7000") {
			return fmt.Errorf("listening are %s", out)
		}
		return nil
	})
	conn, err := net.Dial("tcp", forwardPort(t, p, 7000))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(8 * time.Minute))
	start := time.Now()
	sent := make(chan [sha256.Size]byte, 1)
	go func() {
		hash := sha256.New()
		if _, err := io.CopyN(io.MultiWriter(hash, conn), rand.Reader, size); err != nil {
			t.Errorf("sending: %v", err)
		}
		if err := conn.(*net.TCPConn).CloseWrite(); err != nil {
			t.Errorf("sending: %v", err)
		}
		sent <- [sha256.Size]byte(hash.Sum(nil))
	}()
	hash := sha256.New()
	n, err := io.Copy(hash, conn) // to the end that the server makes when it has seen ours
	took := time.Since(start)
	if err != nil || n != size {
		t.Fatalf("%d of %d bytes came back: %v", n, size, err)
	}
	if <-sent != [sha256.Size]byte(hash.Sum(nil)) {
		t.Error("bytes have changed on their way")
	}
	t.Logf("%d MiB in each direction at once in %s: %.1f MiB/s each", size>>20, took.Round(time.Millisecond), float64(size>>20)/took.Seconds())
}
