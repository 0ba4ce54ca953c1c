package server

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/remotecommand"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// loopback makes it usable in the tests' own namespace.
func loopback(t *testing.T) {
	t.Helper()
	lo, err := netlink.LinkByName("lo")
	if err == nil {
		err = netlink.LinkSetUp(lo)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// overV5 streams as crictl does with --transport=websocket.
func overV5(t *testing.T, url string, o remotecommand.StreamOptions) error {
	t.Helper()
	executor, err := remotecommand.NewWebSocketExecutor(&rest.Config{}, http.MethodGet, url)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	return executor.StreamWithContext(ctx, o)
}

// Over WebSocket, too, the end of a client's input is the end of the process's, and what it prints afterwards arrives.
func TestWebSocketV5(t *testing.T) {
	r := newRig(t) // skips without root
	loopback(t)
	defer http.DefaultClient.CloseIdleConnections()
	pod := r.runPod("a")
	id := r.run(pod, "c", "exec sleep 1000")
	exec := func(stdin bool, script string) string {
		resp, err := r.Exec(t.Context(), &cri.ExecRequest{ContainerId: id, Cmd: []string{"sh", "-c", script}, Stdin: stdin, Stdout: true, Stderr: true})
		if err != nil {
			t.Fatal(err)
		}
		return resp.GetUrl()
	}
	input := make([]byte, 1<<20)
	rand.Read(input)
	var out, errOut bytes.Buffer
	err := overV5(t, exec(true, "cat; echo problem >&2; echo after; exit 5"), remotecommand.StreamOptions{Stdin: bytes.NewReader(input), Stdout: &out, Stderr: &errOut})
	var exit interface{ ExitStatus() int }
	if !errors.As(err, &exit) || exit.ExitStatus() != 5 {
		t.Errorf("error is %v, want exit code 5", err)
	}
	if out.String() != string(input)+"after\n" || errOut.String() != "problem\n" {
		t.Errorf("%d bytes in, %d out, and %q", len(input), out.Len(), errOut.String())
	}
	out.Reset()
	url := exec(false, "echo hello")
	if err := overV5(t, url, remotecommand.StreamOptions{Stdout: &out, Stderr: io.Discard}); err != nil || out.String() != "hello\n" {
		t.Errorf("without input: %v, %q", err, out.String())
	}
	for _, used := range []string{url, url[:strings.LastIndexByte(url, '/')+1] + "nothing"} {
		resp, err := http.Get(used)
		if err != nil {
			t.Fatal(err)
		}
		resp.Body.Close()
		if resp.StatusCode != http.StatusNotFound {
			t.Errorf("%s answers %s", used, resp.Status)
		}
		if err := overV5(t, used, remotecommand.StreamOptions{Stdout: io.Discard, Stderr: io.Discard}); err == nil {
			t.Errorf("%s is good again", used)
		}
	}
	missing, err := r.Exec(t.Context(), &cri.ExecRequest{ContainerId: id, Cmd: []string{"/no/such"}, Stdout: true})
	if err != nil {
		t.Fatal(err)
	}
	if err := overV5(t, missing.GetUrl(), remotecommand.StreamOptions{Stdout: io.Discard}); err == nil || !strings.Contains(err.Error(), "/no/such") {
		t.Errorf("a missing command: %v", err)
	}

	// Attached to the process itself, whose input ends with the first client's.
	req := r.createRequest(pod, "stdin", "cat; echo end")
	req.Config.Stdin, req.Config.StdinOnce = true, true
	created, err := r.CreateContainer(t.Context(), req)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.StartContainer(t.Context(), &cri.StartContainerRequest{ContainerId: created.GetContainerId()}); err != nil {
		t.Fatal(err)
	}
	attached, err := r.Attach(t.Context(), &cri.AttachRequest{ContainerId: created.GetContainerId(), Stdin: true, Stdout: true, Stderr: true})
	if err != nil {
		t.Fatal(err)
	}
	out.Reset()
	if err := overV5(t, attached.GetUrl(), remotecommand.StreamOptions{Stdin: strings.NewReader("one\n"), Stdout: &out, Stderr: io.Discard}); err != nil || out.String() != "one\nend\n" {
		t.Errorf("attach: %v, %q", err, out.String())
	}
}
