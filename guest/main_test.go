package guest

import (
	"context"
	"encoding/json"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"go.uber.org/goleak"

	"github.com/crivm/crivm/agentproto"
)

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m, goleak.IgnoreTopFunction("os/signal.signal_recv"))
}

// testTimeout bounds every wait of a test.
const testTimeout = 60 * time.Second

type unixDialer string

func (d unixDialer) Dial(ctx context.Context) (net.Conn, error) {
	var nd net.Dialer
	return nd.DialContext(ctx, "unix", string(d))
}

// testContext ends before the test's own deadline would.
func testContext(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), testTimeout) // t's ends before clean-up
	t.Cleanup(cancel)
	return ctx
}

// newTestAgent serves an agent with plain processes on a unix socket.
func newTestAgent(t *testing.T) (*Agent, unixDialer) {
	t.Helper()
	reaper, err := NewReaper(false)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(reaper.Close)
	return serveTestAgent(t, Options{Runtime: NewProcessRuntime(reaper), Reaper: reaper, Version: "test"})
}

// serveTestAgent serves an agent of o in a directory of its own.
func serveTestAgent(t *testing.T, o Options) (*Agent, unixDialer) {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "crivm-guest") // short: unix sockets
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	o.Dir = filepath.Join(dir, "agent")
	a, err := NewAgent(o)
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", filepath.Join(dir, "socket"))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- Serve(ctx, l, a) }()
	t.Cleanup(func() {
		closing, done := context.WithTimeout(context.Background(), testTimeout)
		defer done()
		if err := a.Close(closing); err != nil {
			t.Errorf("close agent: %v", err)
		}
		cancel()
		if err := <-served; err != nil {
			t.Errorf("serve: %v", err)
		}
	})
	return a, unixDialer(filepath.Join(dir, "socket"))
}

// connect opens a client of the agent.
func connect(t *testing.T, d agentproto.Dialer) *agentproto.Client {
	t.Helper()
	c, err := agentproto.Connect(testContext(t), d)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// ociSpec is the least spec that runs args.
func ociSpec(t *testing.T, args ...string) []byte {
	t.Helper()
	b, err := json.Marshal(specs.Spec{
		Version: "1.0.2",
		Process: &specs.Process{Args: args, Env: []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin"}, Cwd: "/"},
	})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// create makes a container that runs args.
func create(t *testing.T, c *agentproto.Client, id string, stdio *agentproto.Stdio, args ...string) {
	t.Helper()
	_, err := c.CreateContainer(testContext(t), &agentproto.CreateContainerRequest{
		ContainerId: id, OciSpec: ociSpec(t, args...), Stdio: stdio,
	})
	if err != nil {
		t.Fatalf("create %s: %v", id, err)
	}
}

// start starts a container.
func start(t *testing.T, c *agentproto.Client, id string) {
	t.Helper()
	if _, err := c.StartContainer(testContext(t), &agentproto.StartContainerRequest{ContainerId: id}); err != nil {
		t.Fatalf("start %s: %v", id, err)
	}
}

// run creates and starts a container.
func run(t *testing.T, c *agentproto.Client, id string, stdio *agentproto.Stdio, args ...string) {
	t.Helper()
	create(t, c, id, stdio, args...)
	start(t, c, id)
}

// wait returns the exit of a container or exec.
func wait(t *testing.T, c *agentproto.Client, id, execID string) *agentproto.Exit {
	t.Helper()
	resp, err := c.Wait(testContext(t), &agentproto.WaitRequest{ContainerId: id, ExecId: execID})
	if err != nil {
		t.Fatalf("wait for %s/%s: %v", id, execID, err)
	}
	return resp.GetExit()
}

// openOutput opens an output stream.
func openOutput(t *testing.T, c *agentproto.Client, o *agentproto.Output) *agentproto.OutputReader {
	t.Helper()
	r, err := c.Output(testContext(t), o)
	if err != nil {
		t.Fatalf("output of %s: %v", o.GetContainerId(), err)
	}
	t.Cleanup(func() { r.Close() })
	r.SetReadDeadline(time.Now().Add(testTimeout))
	return r
}
