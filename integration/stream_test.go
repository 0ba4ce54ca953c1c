//go:build integration

package integration

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/portforward"
	"k8s.io/client-go/tools/remotecommand"
	"k8s.io/client-go/transport/spdy"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// protocols are what clients speak.
var protocols = []string{"SPDY", "WebSocket v4", "WebSocket v5"}

func executors(t *testing.T, target string) map[string]remotecommand.Executor {
	t.Helper()
	u, err := url.Parse(target)
	if err != nil {
		t.Fatal(err)
	}
	found := map[string]remotecommand.Executor{}
	if found["SPDY"], err = remotecommand.NewSPDYExecutor(&rest.Config{}, "POST", u); err != nil {
		t.Fatal(err)
	}
	for name, protocol := range map[string]string{"WebSocket v4": "v4.channel.k8s.io", "WebSocket v5": "v5.channel.k8s.io"} {
		if found[name], err = remotecommand.NewWebSocketExecutorForProtocols(&rest.Config{}, "GET", target, protocol); err != nil {
			t.Fatal(err)
		}
	}
	return found
}

func TestExecStreams(t *testing.T) {
	p := runPod(t, shared)
	c := p.start("sleep 1000")
	for _, protocol := range protocols {
		t.Run(protocol, func(t *testing.T) {
			resp, err := shared.Runtime.Exec(t.Context(), &cri.ExecRequest{
				ContainerId: c, Cmd: []string{"sh", "-c", "read line; echo $line; echo problem >&2; exit 5"}, Stdin: true, Stdout: true, Stderr: true,
			})
			if err != nil {
				t.Fatal(err)
			}
			var stdout, stderr bytes.Buffer
			err = executors(t, resp.Url)[protocol].StreamWithContext(testContext(t, time.Minute), remotecommand.StreamOptions{
				Stdin: strings.NewReader("from stdin\n"), Stdout: &stdout, Stderr: &stderr,
			})
			if exit, ok := err.(interface{ ExitStatus() int }); !ok || exit.ExitStatus() != 5 {
				t.Errorf("error is %v, want exit code 5", err)
			}
			if stdout.String() != "from stdin\n" || stderr.String() != "problem\n" {
				t.Errorf("stdout is %q, stderr %q", stdout.String(), stderr.String())
			}
		})
	}
}

// sizes gives a terminal's sizes to a client: the first at once, others when they are sent.
type sizes chan remotecommand.TerminalSize

func (s sizes) Next() *remotecommand.TerminalSize {
	size, ok := <-s
	if !ok {
		return nil
	}
	return &size
}

// syncBuffer can be read while it is written.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

func TestExecTTYAndResize(t *testing.T) {
	p := runPod(t, shared)
	c := p.start("sleep 1000")
	for _, protocol := range []string{"SPDY", "WebSocket v5"} {
		t.Run(protocol, func(t *testing.T) { execTTYAndResize(t, c, protocol) })
	}
}

func execTTYAndResize(t *testing.T, c, protocol string) {
	t.Helper()
	resp, err := shared.Runtime.Exec(t.Context(), &cri.ExecRequest{ContainerId: c, Cmd: []string{"sh"}, Stdin: true, Stdout: true, Tty: true})
	if err != nil {
		t.Fatal(err)
	}
	input, typed := io.Pipe()
	size := make(sizes, 2)
	size <- remotecommand.TerminalSize{Width: 80, Height: 24}
	out := &syncBuffer{}
	done := make(chan error, 1)
	go func() {
		done <- executors(t, resp.Url)[protocol].StreamWithContext(testContext(t, time.Minute), remotecommand.StreamOptions{Stdin: input, Stdout: out, Tty: true, TerminalSizeQueue: size})
	}()
	ask := func(want string) {
		t.Helper()
		eventually(t, 30*time.Second, "terminal is "+want, func() error {
			fmt.Fprintf(typed, "stty size; tty\n")
			if !strings.Contains(out.String(), want) {
				return fmt.Errorf("terminal says %q", out.String())
			}
			return nil
		})
	}
	ask("24 80")
	ask("/dev/pts/")
	size <- remotecommand.TerminalSize{Width: 132, Height: 50}
	ask("50 132")
	fmt.Fprintf(typed, "exit 0\n")
	select {
	case err := <-done:
		if err != nil {
			t.Errorf("shell on a terminal: %v", err)
		}
	case <-time.After(30 * time.Second):
		t.Error("shell on a terminal does not end")
	}
	typed.Close()
	close(size)
}

func TestExecSync(t *testing.T) {
	p := runPod(t, shared)
	c := p.start("sleep 1000")
	stdout, stderr, err := shared.Runtime.ExecSync(t.Context(), c, []string{"sh", "-c", "echo out; echo err >&2; exit 4"}, time.Minute)
	if err == nil || !strings.Contains(err.Error(), "exited with 4") || string(stdout) != "out\n" || string(stderr) != "err\n" {
		t.Errorf("exit 4: %v, %q, %q", err, stdout, stderr)
	}
	start := time.Now()
	_, _, err = shared.Runtime.ExecSync(t.Context(), c, []string{"sleep", "777"}, 2*time.Second)
	if err == nil || !strings.Contains(err.Error(), "DeadlineExceeded") && !strings.Contains(err.Error(), "timed out") {
		t.Errorf("timeout of 2 s: %v after %s", err, time.Since(start))
	}
	eventually(t, 20*time.Second, "the process of a timed out exec is gone", func() error {
		if ps := p.exec(c, "ps"); strings.Contains(ps, "sleep 777") {
			return fmt.Errorf("still there: %s", ps)
		}
		return nil
	})
	if _, _, err := shared.Runtime.ExecSync(t.Context(), c, []string{"no-such-command"}, time.Minute); err == nil || !strings.Contains(err.Error(), "no-such-command") {
		t.Errorf("a missing command: %v", err)
	}
	if _, _, err := shared.Runtime.ExecSync(t.Context(), "0123456789", []string{"true"}, time.Minute); err == nil {
		t.Error("exec in a container that does not exist succeeds")
	}
}

func TestAttach(t *testing.T) {
	p := runPod(t, shared)
	c := p.start("while read line; do echo got $line; done; echo end", func(c *cri.ContainerConfig) { c.Stdin, c.StdinOnce = true, true })
	resp, err := shared.Runtime.Attach(t.Context(), &cri.AttachRequest{ContainerId: c, Stdin: true, Stdout: true, Stderr: true})
	if err != nil {
		t.Fatal(err)
	}
	var out, errOut bytes.Buffer
	err = executors(t, resp.Url)["SPDY"].StreamWithContext(testContext(t, time.Minute), remotecommand.StreamOptions{
		Stdin: strings.NewReader("one\ntwo\n"), Stdout: &out, Stderr: &errOut,
	})
	if err != nil || out.String() != "got one\ngot two\nend\n" {
		t.Errorf("attach: %v, %q, %q", err, out.String(), errOut.String())
	}
	if s := p.wait(c); s.ExitCode != 0 {
		t.Errorf("exit code is %d", s.ExitCode)
	}
	if log := p.logText(c); log != "got one\ngot two\nend\n" {
		t.Errorf("log is %q", log)
	}
}

func TestPortForward(t *testing.T) {
	p := runPod(t, shared)
	c := p.start("exec /usr/sbin/nginx echo 127.0.0.1:7000", func(c *cri.ContainerConfig) { c.Image.Image = standin })
	eventually(t, 20*time.Second, "the server listens", func() error {
		if out := p.exec(c, "netstat", "-ltn"); !strings.Contains(out, "127.0.0.1:7000") {
			return fmt.Errorf("listening are %s", out)
		}
		return nil
	})
	addr := forwardPort(t, p, 7000)
	for range 2 {
		echo(t, addr, 1<<20)
	}
	echoOverWebSocket(t, p, 7000, 1<<20)
}

// echoOverWebSocket does what echo does over the other protocol: one connection for each port, in which messages begin
// with the number of a channel, 0 for data and 1 for what went wrong; the port is said first on both.
func echoOverWebSocket(t *testing.T, p *pod, port uint16, size int) {
	t.Helper()
	resp, err := shared.Runtime.PortForward(t.Context(), &cri.PortForwardRequest{PodSandboxId: p.id, Port: []int32{int32(port)}})
	if err != nil {
		t.Fatal(err)
	}
	// The streaming library of CRI takes each frame for a message of its own, so none may be in several.
	dialer := websocket.Dialer{Subprotocols: []string{"v4.channel.k8s.io"}, WriteBufferSize: 64 << 10}
	conn, _, err := dialer.DialContext(testContext(t, time.Minute), strings.Replace(resp.Url, "http", "ws", 1), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetReadDeadline(time.Now().Add(time.Minute))
	sent := make([]byte, size)
	rand.Read(sent)
	done := make(chan error, 1)
	go func() {
		for part := range slices.Chunk(sent, 32<<10) {
			if err := conn.WriteMessage(websocket.BinaryMessage, append([]byte{0}, part...)); err != nil {
				done <- err
				return
			}
		}
		done <- nil
	}()
	var got [2][]byte
	for len(got[0]) < 2+size {
		_, message, err := conn.ReadMessage()
		if err != nil || len(message) == 0 || message[0] > 1 {
			t.Fatalf("message %.20q after %d bytes: %v", message, len(got[0]), err)
		}
		got[message[0]] = append(got[message[0]], message[1:]...)
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
	said := binary.LittleEndian.AppendUint16(nil, port)
	if !bytes.Equal(got[0], append(slices.Clone(said), sent...)) || !bytes.Equal(got[1], said) {
		t.Errorf("%d bytes back are not what was sent; errors: %q", len(got[0]), got[1])
	}
}

// forwardPort forwards a port of this machine's loopback, whose address is returned, to one of the pod's, until
// the test ends.
func forwardPort(t *testing.T, p *pod, port int32) string {
	t.Helper()
	resp, err := shared.Runtime.PortForward(t.Context(), &cri.PortForwardRequest{PodSandboxId: p.id, Port: []int32{port}})
	if err != nil {
		t.Fatal(err)
	}
	u, err := url.Parse(resp.Url)
	if err != nil {
		t.Fatal(err)
	}
	transport, upgrader, err := spdy.RoundTripperFor(&rest.Config{})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ready := make(chan struct{})
	var messages syncBuffer
	forwarder, err := portforward.New(spdy.NewDialer(upgrader, &http.Client{Transport: transport}, "POST", u), []string{fmt.Sprintf("0:%d", port)}, ctx.Done(), ready, &messages, &messages)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- forwarder.ForwardPorts() }()
	t.Cleanup(func() { cancel(); <-done })
	select {
	case <-ready:
	case err := <-done:
		done <- nil
		t.Fatalf("port-forward: %v %s", err, messages.String())
	case <-time.After(30 * time.Second):
		t.Fatal("port-forward is not ready")
	}
	ports, err := forwarder.GetPorts()
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("127.0.0.1:%d", ports[0].Local)
}

// echo sends random bytes and wants them back, the end of the stream included.
func echo(t *testing.T, addr string, size int) {
	t.Helper()
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(time.Minute))
	sent := make([]byte, size)
	rand.Read(sent)
	go conn.Write(sent)
	got := make([]byte, size)
	if _, err := io.ReadFull(conn, got); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(sent, got) {
		t.Error("bytes have changed on their way")
	}
}
