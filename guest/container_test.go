package guest

import (
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/crivm/crivm/agentproto"
)

func TestLifecycle(t *testing.T) {
	_, d := newTestAgent(t)
	c := connect(t, d)
	create(t, c, "a", nil, "sh", "-c", "echo out; echo err >&2; exit 3")

	list, err := c.ListContainers(testContext(t), &agentproto.ListContainersRequest{})
	if err != nil || len(list.GetContainers()) != 1 || list.GetContainers()[0].GetState() != agentproto.State_STATE_CREATED {
		t.Fatalf("list after create: %v, %v", list, err)
	}
	_, err = c.CreateContainer(testContext(t), &agentproto.CreateContainerRequest{ContainerId: "a", OciSpec: ociSpec(t, "true")})
	if !errdefs.IsAlreadyExists(err) {
		t.Errorf("second create: %v", err)
	}
	_, err = c.Exec(testContext(t), &agentproto.ExecRequest{ContainerId: "a", ExecId: "e", Args: []string{"true"}})
	if !errdefs.IsFailedPrecondition(err) {
		t.Errorf("exec before start: %v", err)
	}
	start(t, c, "a")
	for name, want := range map[bool]string{false: "out\n", true: "err\n"} {
		got, err := io.ReadAll(openOutput(t, c, &agentproto.Output{ContainerId: "a", Stderr: name}))
		if err != nil || string(got) != want {
			t.Errorf("output %v: %q, %v", name, got, err)
		}
	}
	if exit := wait(t, c, "a", ""); exit.GetCode() != 3 || exit.GetSignal() != 0 || exit.GetUnixNanos() == 0 {
		t.Errorf("exit: %v", exit)
	}
	if exit := wait(t, c, "a", ""); exit.GetCode() != 3 {
		t.Errorf("exit, asked again: %v", exit)
	}
	_, err = c.StartContainer(testContext(t), &agentproto.StartContainerRequest{ContainerId: "a"})
	if !errdefs.IsFailedPrecondition(err) {
		t.Errorf("second start: %v", err)
	}
	_, err = c.Exec(testContext(t), &agentproto.ExecRequest{ContainerId: "a", ExecId: "e", Args: []string{"true"}})
	if !errdefs.IsFailedPrecondition(err) {
		t.Errorf("exec after exit: %v", err)
	}
	if _, err := c.Signal(testContext(t), &agentproto.SignalRequest{ContainerId: "a", Signal: 9}); err != nil {
		t.Errorf("signal after exit: %v", err)
	}
	for range 2 {
		if _, err := c.DeleteContainer(testContext(t), &agentproto.DeleteContainerRequest{ContainerId: "a"}); err != nil {
			t.Errorf("delete: %v", err)
		}
	}
	if _, err := c.Wait(testContext(t), &agentproto.WaitRequest{ContainerId: "a"}); !errdefs.IsNotFound(err) {
		t.Errorf("wait after delete: %v", err)
	}
}

func TestExits(t *testing.T) {
	_, d := newTestAgent(t)
	c := connect(t, d)
	for _, tc := range []struct {
		script       string
		code, signal int32
	}{
		{"exit 0", 0, 0},
		{"exit 255", 255, 0},
		{"kill -TERM $$", 143, 15},
		{"kill -KILL $$", 137, 9},
	} {
		id := strings.NewReplacer(" ", "", "-", "", "$", "").Replace(tc.script)
		run(t, c, id, nil, "sh", "-c", tc.script)
		if exit := wait(t, c, id, ""); exit.GetCode() != tc.code || exit.GetSignal() != tc.signal {
			t.Errorf("%s: %v", tc.script, exit)
		}
	}
}

func TestCommandErrors(t *testing.T) {
	_, d := newTestAgent(t)
	c := connect(t, d)
	script := t.TempDir() + "/data"
	if err := os.WriteFile(script, []byte("x"), 0o644); err != nil {
		t.Fatal(err)
	}
	run(t, c, "main", nil, "sleep", "1000")
	for i, tc := range []struct {
		command string
		is      func(error) bool
		text    string
	}{
		{"no-such-command", errdefs.IsNotFound, `exec: "no-such-command": executable file not found in $PATH`},
		{"/no/such/file", errdefs.IsNotFound, "no such file or directory"},
		{script, errdefs.IsPermissionDenied, "permission denied"},
		{"/tmp", errdefs.IsPermissionDenied, "permission denied"},
	} {
		id := fmt.Sprint("c", i)
		create(t, c, id, nil, tc.command)
		_, err := c.StartContainer(testContext(t), &agentproto.StartContainerRequest{ContainerId: id})
		if !tc.is(err) || !strings.Contains(err.Error(), tc.text) {
			t.Errorf("start %s: %v", tc.command, err)
		}
		if exit := wait(t, c, id, ""); exit.GetCode() != exitNotStarted {
			t.Errorf("exit of %s: %v", tc.command, exit)
		}
		if b, err := io.ReadAll(openOutput(t, c, &agentproto.Output{ContainerId: id})); err != nil || len(b) > 0 {
			t.Errorf("output of %s: %q, %v", tc.command, b, err)
		}
		_, err = c.Exec(testContext(t), &agentproto.ExecRequest{ContainerId: "main", ExecId: id, Args: []string{tc.command}})
		if !tc.is(err) || !strings.Contains(err.Error(), tc.text) {
			t.Errorf("exec %s: %v", tc.command, err)
		}
		if _, err := c.Wait(testContext(t), &agentproto.WaitRequest{ContainerId: "main", ExecId: id}); !errdefs.IsNotFound(err) {
			t.Errorf("wait for an exec that could not be: %v", err)
		}
	}
}

func TestBadRequests(t *testing.T) {
	_, d := newTestAgent(t)
	c := connect(t, d)
	ok := ociSpec(t, "true")
	for name, r := range map[string]*agentproto.CreateContainerRequest{
		"no id":            {OciSpec: ok},
		"id with slash":    {ContainerId: "a/b", OciSpec: ok},
		"id with dots":     {ContainerId: "..", OciSpec: ok},
		"spec is not JSON": {ContainerId: "a", OciSpec: []byte("{")},
		"no command":       {ContainerId: "a", OciSpec: []byte(`{"process":{"args":[]}}`)},
		"hooks":            {ContainerId: "a", OciSpec: []byte(`{"process":{"args":["x"]},"hooks":{"poststop":[{"path":"/bin/true"}]}}`)},
		"relative cwd":     {ContainerId: "a", OciSpec: []byte(`{"process":{"args":["x"],"cwd":"x"}}`)},
		"negative uid":     {ContainerId: "a", OciSpec: ok, User: &agentproto.User{HasUid: true, Uid: -1}},
		"unknown user":     {ContainerId: "a", OciSpec: ok, User: &agentproto.User{Name: "nobody-of-that-name"}},
		"volume escapes": {ContainerId: "a", OciSpec: ok, Mounts: []*agentproto.Mount{{Destination: "/x", Source: &agentproto.Mount_Files{
			Files: &agentproto.Files{Volume: "../x"}}}}},
		"no source": {ContainerId: "a", OciSpec: ok, Mounts: []*agentproto.Mount{{Destination: "/x"}}},
	} {
		if _, err := c.CreateContainer(testContext(t), r); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
	list, err := c.ListContainers(testContext(t), &agentproto.ListContainersRequest{})
	if err != nil || len(list.GetContainers()) > 0 {
		t.Errorf("left after failures: %v, %v", list, err)
	}
	for name, err := range map[string]error{
		"start": func() error {
			_, err := c.StartContainer(testContext(t), &agentproto.StartContainerRequest{ContainerId: "x"})
			return err
		}(),
		"exec": func() error { _, err := c.Exec(testContext(t), &agentproto.ExecRequest{ContainerId: "x"}); return err }(),
		"signal": func() error {
			_, err := c.Signal(testContext(t), &agentproto.SignalRequest{ContainerId: "x"})
			return err
		}(),
		"resize": func() error {
			_, err := c.ResizeTTY(testContext(t), &agentproto.ResizeTTYRequest{ContainerId: "x"})
			return err
		}(),
		"output": func() error { _, err := c.Output(testContext(t), &agentproto.Output{ContainerId: "x"}); return err }(),
		"input":  func() error { _, err := c.Input(testContext(t), &agentproto.Input{ContainerId: "x"}); return err }(),
	} {
		if !errdefs.IsNotFound(err) {
			t.Errorf("%s of an unknown container: %v", name, err)
		}
	}
}

func TestCreateRollsBack(t *testing.T) {
	a, d := newTestAgent(t)
	c := connect(t, d)
	_, err := c.CreateContainer(testContext(t), &agentproto.CreateContainerRequest{
		ContainerId: "a", OciSpec: ociSpec(t, "true"),
		Mounts: []*agentproto.Mount{
			{Destination: "/f", Source: &agentproto.Mount_Files{Files: &agentproto.Files{Volume: "v", Entries: []*agentproto.File{{Path: "x", Mode: 0o100644}}}}},
			{Destination: "relative"},
		},
	})
	if !errdefs.IsInvalidArgument(err) {
		t.Fatal(err)
	}
	for _, dir := range []string{"containers", "volumes/files"} {
		entries, err := os.ReadDir(a.Dir + "/" + dir)
		if err != nil || len(entries) > 0 {
			t.Errorf("left in %s: %v, %v", dir, entries, err)
		}
	}
}

func TestSignals(t *testing.T) {
	_, d := newTestAgent(t)
	c := connect(t, d)
	run(t, c, "a", nil, "sh", "-c", "trap 'exit 7' USR1; echo ready; while :; do sleep 0.05; done")
	expectLine(t, openOutput(t, c, &agentproto.Output{ContainerId: "a"}), "ready")
	if _, err := c.Signal(testContext(t), &agentproto.SignalRequest{ContainerId: "a", Signal: 10}); err != nil {
		t.Fatal(err)
	}
	if exit := wait(t, c, "a", ""); exit.GetCode() != 7 {
		t.Errorf("exit: %v", exit)
	}
	create(t, c, "never", nil, "true")
	if _, err := c.Signal(testContext(t), &agentproto.SignalRequest{ContainerId: "never", Signal: 9, All: true}); err != nil {
		t.Fatal(err)
	}
	if exit := wait(t, c, "never", ""); exit.GetCode() != 137 {
		t.Errorf("exit of one that was killed before it started: %v", exit)
	}
	if _, err := c.Signal(testContext(t), &agentproto.SignalRequest{ContainerId: "a", Signal: 999}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("signal 999: %v", err)
	}
}

// The end of the container's process ends what it has started.
func TestExitKillsTheRest(t *testing.T) {
	_, d := newTestAgent(t)
	c := connect(t, d)
	run(t, c, "a", nil, "sh", "-c", "sleep 1000 & exit 0")
	if _, err := io.ReadAll(openOutput(t, c, &agentproto.Output{ContainerId: "a"})); err != nil {
		t.Errorf("output does not end: %v", err)
	}
}

func TestManyWaiters(t *testing.T) {
	_, d := newTestAgent(t)
	c := connect(t, d)
	run(t, c, "a", &agentproto.Stdio{Stdin: true}, "cat")
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			resp, err := c.Wait(testContext(t), &agentproto.WaitRequest{ContainerId: "a"})
			if err != nil || resp.GetExit().GetCode() != 137 {
				t.Errorf("wait: %v, %v", resp, err)
			}
		})
	}
	if _, err := c.Signal(testContext(t), &agentproto.SignalRequest{ContainerId: "a", Signal: 9}); err != nil {
		t.Fatal(err)
	}
	wg.Wait()
}

// Deleting a container answers those who wait for it.
func TestDeleteRunning(t *testing.T) {
	_, d := newTestAgent(t)
	c := connect(t, d)
	run(t, c, "a", nil, "sh", "-c", "trap '' TERM; sleep 1000")
	if _, err := c.Exec(testContext(t), &agentproto.ExecRequest{ContainerId: "a", ExecId: "e", Args: []string{"sleep", "1000"}}); err != nil {
		t.Fatal(err)
	}
	waited := make(chan error, 1)
	go func() {
		_, err := c.Wait(testContext(t), &agentproto.WaitRequest{ContainerId: "a", ExecId: "e"})
		waited <- err
	}()
	if _, err := c.DeleteContainer(testContext(t), &agentproto.DeleteContainerRequest{ContainerId: "a"}); err != nil {
		t.Fatal(err)
	}
	if err := <-waited; err != nil && !errdefs.IsNotFound(err) {
		t.Errorf("wait for an exec of a deleted container: %v", err)
	}
}

func TestExec(t *testing.T) {
	_, d := newTestAgent(t)
	c := connect(t, d)
	run(t, c, "a", nil, "sleep", "1000")
	exec := func(id string, stdio *agentproto.Stdio, args ...string) {
		t.Helper()
		if _, err := c.Exec(testContext(t), &agentproto.ExecRequest{ContainerId: "a", ExecId: id, Args: args, Stdio: stdio}); err != nil {
			t.Fatal(err)
		}
	}
	exec("one", &agentproto.Stdio{Stdin: true}, "sh", "-c", "cat; exit 5")
	_, err := c.Exec(testContext(t), &agentproto.ExecRequest{ContainerId: "a", ExecId: "one", Args: []string{"true"}})
	if !errdefs.IsAlreadyExists(err) {
		t.Errorf("same id again: %v", err)
	}
	in, err := c.Input(testContext(t), &agentproto.Input{ContainerId: "a", ExecId: "one"})
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	if _, err := in.Write([]byte("hello")); err != nil {
		t.Fatal(err)
	}
	if err := in.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(openOutput(t, c, &agentproto.Output{ContainerId: "a", ExecId: "one"}))
	if err != nil || string(got) != "hello" {
		t.Errorf("output: %q, %v", got, err)
	}
	if exit := wait(t, c, "a", "one"); exit.GetCode() != 5 {
		t.Errorf("exit: %v", exit)
	}
	exec("two", nil, "sh", "-c", "sleep 1000 & echo $!; sleep 1000")
	out := openOutput(t, c, &agentproto.Output{ContainerId: "a", ExecId: "two"})
	pid := readLine(t, out)
	for range 2 {
		if _, err := c.DeleteExec(testContext(t), &agentproto.DeleteExecRequest{ContainerId: "a", ExecId: "two"}); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, func() bool { return dead(pid) })
}

func TestPing(t *testing.T) {
	_, d := newTestAgent(t)
	c := connect(t, d)
	resp, err := c.Ping(testContext(t), &agentproto.PingRequest{})
	if err != nil || time.Since(time.Unix(0, resp.GetUnixNanos())).Abs() > testTimeout {
		t.Errorf("ping: %v, %v", resp, err)
	}
	if c.Info().GetKernel() == "" || c.Info().GetBootId() == "" || c.Info().GetBootNanos() <= 0 || c.Info().GetAgentVersion() != "test" {
		t.Errorf("hello: %v", c.Info())
	}
}

// dead tells whether a process is gone or a zombie.
func dead(pid string) bool {
	b, err := os.ReadFile("/proc/" + pid + "/stat")
	return err != nil || strings.Contains(string(b), ") Z ")
}

// eventually waits for something that other processes do.
func eventually(t *testing.T, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(testTimeout); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("did not happen")
		}
	}
}

// readLine reads up to a newline, byte by byte.
func readLine(t *testing.T, r io.Reader) string {
	t.Helper()
	line := []byte{}
	for b := make([]byte, 1); ; {
		if _, err := io.ReadFull(r, b); err != nil {
			t.Fatalf("after %q: %v", line, err)
		}
		if b[0] == '\n' {
			return strings.TrimSuffix(string(line), "\r")
		}
		line = append(line, b[0])
	}
}

func expectLine(t *testing.T, r io.Reader, want string) {
	t.Helper()
	if got := readLine(t, r); got != want {
		t.Fatalf("line %q, want %q", got, want)
	}
}
