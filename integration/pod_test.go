//go:build integration

package integration

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crivm/crivm/integration/node"
)

// pod is a sandbox that a test has made; it is removed, and leaks are looked for, when the test ends.
type pod struct {
	t      *testing.T
	n      *node.Node
	id     string
	config *cri.PodSandboxConfig

	removed bool
}

var (
	podCount   atomic.Int32
	sharedPods atomic.Int32 // pods of tests on the shared node that have not been removed
	inParallel atomic.Bool  // tests run beside each other
)

// parallel has a test run beside others, after those that do not call it. From then on leaks are looked for only after
// the last one.
func parallel(t *testing.T) {
	t.Parallel()
	inParallel.Store(true)
}

func newConfig(t *testing.T) *cri.PodSandboxConfig {
	t.Helper()
	name := fmt.Sprintf("pod%d", podCount.Add(1))
	return &cri.PodSandboxConfig{
		Metadata: &cri.PodSandboxMetadata{Name: name, Namespace: "test", Uid: "uid-" + name}, Hostname: name, LogDirectory: t.TempDir(),
		Labels: map[string]string{"test": "yes"}, Annotations: map[string]string{"note": "kept as it is"},
		Linux: &cri.LinuxPodSandboxConfig{SecurityContext: &cri.LinuxSandboxSecurityContext{NamespaceOptions: &cri.NamespaceOption{Pid: cri.NamespaceMode_CONTAINER}}},
	}
}

// testContext bounds a test; what it undoes has a context of its own.
func testContext(t *testing.T, limit time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	t.Cleanup(cancel)
	return ctx
}

func runPod(t *testing.T, n *node.Node, change ...func(*cri.PodSandboxConfig)) *pod {
	t.Helper()
	config := newConfig(t)
	for _, c := range change {
		c(config)
	}
	id, err := n.Runtime.RunPodSandbox(testContext(t, 4*time.Minute), config, "")
	if err != nil {
		t.Fatalf("RunPodSandbox: %v\n%s", err, n.LogTail())
	}
	p := newPod(t, n, id, config)
	t.Cleanup(p.remove)
	return p
}

// newPod is a sandbox that was made; who calls this removes it.
func newPod(t *testing.T, n *node.Node, id string, config *cri.PodSandboxConfig) *pod {
	if n == shared {
		sharedPods.Add(1)
	}
	return &pod{t: t, n: n, id: id, config: config}
}

// remove may be called again. After the last pod on the shared node it looks for what is left behind; for a node of a
// test's own that is done when it stops.
func (p *pod) remove() {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	if err := p.n.Runtime.StopPodSandbox(ctx, p.id); err != nil {
		p.t.Errorf("StopPodSandbox: %v", err)
	}
	if err := p.n.Runtime.RemovePodSandbox(ctx, p.id); err != nil {
		p.t.Errorf("RemovePodSandbox: %v", err)
	}
	if p.removed {
		return
	}
	p.removed = true
	if p.n == shared && sharedPods.Add(-1) == 0 && !inParallel.Load() {
		if err := shared.CheckLeaks(ctx); err != nil {
			p.t.Error(err)
		}
	}
	if p.t.Failed() {
		p.t.Logf("log of crivm: %s", p.n.LogTail())
	}
}

// create makes a container that runs a shell script, or what change says.
func (p *pod) create(script string, change ...func(*cri.ContainerConfig)) (string, error) {
	name := fmt.Sprintf("c%d", podCount.Add(1))
	config := &cri.ContainerConfig{
		Metadata: &cri.ContainerMetadata{Name: name}, Image: &cri.ImageSpec{Image: busybox}, Command: []string{"sh", "-c", script}, LogPath: name + ".log",
		Linux: &cri.LinuxContainerConfig{
			Resources:       &cri.LinuxContainerResources{},
			SecurityContext: &cri.LinuxContainerSecurityContext{NamespaceOptions: &cri.NamespaceOption{Pid: cri.NamespaceMode_CONTAINER}},
		},
	}
	for _, c := range change {
		c(config)
	}
	return p.n.Runtime.CreateContainer(testContext(p.t, 2*time.Minute), p.id, config, p.config)
}

// start makes and starts a container.
func (p *pod) start(script string, change ...func(*cri.ContainerConfig)) string {
	p.t.Helper()
	id, err := p.create(script, change...)
	if err != nil {
		p.t.Fatalf("CreateContainer: %v", err)
	}
	if err := p.n.Runtime.StartContainer(testContext(p.t, 2*time.Minute), id); err != nil {
		p.t.Fatalf("StartContainer: %v", err)
	}
	return id
}

// run starts a container and returns its status at the end and its log, without times.
func (p *pod) run(script string, change ...func(*cri.ContainerConfig)) (*cri.ContainerStatus, string) {
	p.t.Helper()
	id := p.start(script, change...)
	status := p.wait(id)
	return status, p.logText(id)
}

// wait waits for a container's end.
func (p *pod) wait(id string) *cri.ContainerStatus {
	p.t.Helper()
	var status *cri.ContainerStatus
	eventually(p.t, 90*time.Second, "container exits", func() error {
		resp, err := p.n.Runtime.ContainerStatus(p.t.Context(), id, false)
		if err != nil {
			return err
		}
		if status = resp.Status; status.State != cri.ContainerState_CONTAINER_EXITED {
			return fmt.Errorf("container is %s", status.State)
		}
		return nil
	})
	return status
}

func (p *pod) logPath(id string) string {
	p.t.Helper()
	resp, err := p.n.Runtime.ContainerStatus(p.t.Context(), id, false)
	if err != nil {
		p.t.Fatal(err)
	}
	if !filepath.IsAbs(resp.Status.LogPath) {
		p.t.Fatalf("log_path %q is not absolute", resp.Status.LogPath)
	}
	return resp.Status.LogPath
}

// logText is what the container printed: entries of the log without their times, streams and tags.
func (p *pod) logText(id string) string {
	p.t.Helper()
	text, err := os.ReadFile(p.logPath(id))
	if err != nil {
		p.t.Fatal(err)
	}
	var out strings.Builder
	for line := range strings.Lines(string(text)) {
		fields := strings.SplitN(line, " ", 4)
		if len(fields) != 4 || fields[1] != "stdout" && fields[1] != "stderr" || fields[2] != "F" && fields[2] != "P" {
			p.t.Fatalf("log entry %q is not in CRI's format", line)
		}
		if _, err := time.Parse(time.RFC3339Nano, fields[0]); err != nil {
			p.t.Fatal(err)
		}
		if fields[2] == "P" {
			fields[3] = strings.TrimSuffix(fields[3], "\n")
		}
		out.WriteString(fields[3])
	}
	return out.String()
}

// exec runs a command and wants it to succeed.
func (p *pod) exec(id string, cmd ...string) string {
	p.t.Helper()
	stdout, stderr, err := p.n.Runtime.ExecSync(testContext(p.t, time.Minute), id, cmd, 45*time.Second)
	if err != nil {
		p.t.Fatalf("exec %q: %v: %s", cmd, err, stderr)
	}
	return string(stdout)
}

func (p *pod) status() *cri.PodSandboxStatus {
	p.t.Helper()
	resp, err := p.n.Runtime.PodSandboxStatus(p.t.Context(), p.id, false)
	if err != nil {
		p.t.Fatal(err)
	}
	return resp.Status
}

// eventually wants a condition to come true in time.
func eventually(t *testing.T, limit time.Duration, what string, check func() error) {
	t.Helper()
	deadline := time.NewTimer(limit)
	defer deadline.Stop()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		err := check()
		if err == nil {
			return
		}
		select {
		case <-deadline.C:
			t.Fatalf("%s: not within %s: %v", what, limit, err)
		case <-tick.C:
		}
	}
}
