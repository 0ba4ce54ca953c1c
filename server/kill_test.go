package server

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// killStories are what kubelet does with a pod. In each the daemon is killed at every point that it passes.
var killStories = []killStory{{name: "life", play: lifeStory}, {name: "forced", play: forcedStory}, {name: "rollback", play: rollbackStory, failAdd: true}}

type killStory struct {
	name    string
	play    func(*killNode)
	failAdd bool // CNI ADD fails
	pool    int  // size of the warm pool
}

// node is one for this story, with a daemon that serves.
func (s killStory) node(t *testing.T, vmm string, points ...string) *killNode {
	t.Helper()
	n := newKillNode(t, vmm, points...)
	n.plan.FailAdd, n.plan.Pool = s.failAdd, s.pool
	n.plan.Trace = filepath.Join(t.TempDir(), "trace")
	n.start()
	return n
}

const jobScript = `i=0; while [ $i -lt 100 ]; do i=$((i+1)); echo out $i; echo err $i >&2; done; printf unfinished; exit 3`

func jobOutput(stream string) string {
	var b strings.Builder
	for i := range 100 {
		fmt.Fprintf(&b, "%s %d\n", stream, i+1)
	}
	return b.String()
}

// lifeStory is a pod with a container that is stopped, one that ends by itself, one that is never started, and one
// that runs until the pod is stopped; the log of the first is rotated.
func lifeStory(n *killNode) {
	pod := n.runPod()
	steady := n.create(pod, "steady", `trap 'echo bye; exit 7' TERM; echo >`+n.startsPath("steady.trap")+`; echo hello; while :; do sleep 0.01; done`)
	n.startContainer(steady)
	job := n.create(pod, "job", jobScript)
	n.startContainer(job)
	if s := n.exit(job); s.GetExitCode() != 3 || s.GetReason() != reasonError {
		n.t.Errorf("job is %v", s)
	}
	n.once("job")
	n.logged("stdout", jobOutput("out")+"unfinished\n", n.logPath("job"))
	n.logged("stderr", jobOutput("err"), n.logPath("job"))
	n.removeContainer(job)

	if err := os.Rename(n.logPath("steady"), n.logPath("steady")+".1"); err != nil {
		n.t.Error(err)
	}
	n.must("ReopenContainerLog", func(ctx context.Context) error {
		_, err := n.cri.ReopenContainerLog(ctx, &cri.ReopenContainerLogRequest{ContainerId: steady})
		return err
	})
	idle := n.create(pod, "idle", "exit 0")
	if s := n.status(steady); s.GetState() != cri.ContainerState_CONTAINER_RUNNING {
		n.t.Errorf("steady is %v", s)
	}
	n.begun("steady.trap")
	n.stopContainer(steady)
	if s := n.exit(steady); s.GetExitCode() != 7 {
		n.t.Errorf("steady is %v", s)
	}
	n.once("steady")
	n.logged("stdout", "hello\nbye\n", n.logPath("steady")+".1", n.logPath("steady"))

	last := n.create(pod, "last", "echo once; exec sleep 1000")
	n.startContainer(last)
	n.begun("last")
	n.stays(pod)
	n.stopPod(pod)
	if s := n.exit(last); s.GetExitCode() != 137 {
		n.t.Errorf("last is %v", s)
	}
	n.once("last")
	if s := n.exit(steady); s.GetExitCode() != 7 {
		n.t.Errorf("steady has become %v", s)
	}
	if s := n.exit(idle); s.GetExitCode() == 0 {
		n.t.Errorf("idle is %v", s)
	}
	n.removeContainer(steady)
	n.removeContainer(last)
	n.removePod(pod)
}

// forcedStory removes things that run.
func forcedStory(n *killNode) {
	pod := n.runPod()
	empty := filepath.Join(n.plan.Dir, "kubelet/pods/u/volumes/kubernetes.io~empty-dir/e")
	if err := os.MkdirAll(empty, 0o777); err != nil {
		n.t.Fatal(err)
	}
	volume := &cri.Mount{ContainerPath: "/v", HostPath: empty}
	config := filepath.Join(n.plan.Dir, "kubelet/pods/u/volumes/kubernetes.io~configmap/c")
	if err := errors.Join(os.MkdirAll(config, 0o755), os.WriteFile(filepath.Join(config, "key"), []byte("value\n"), 0o644)); err != nil {
		n.t.Fatal(err)
	}
	copied := &cri.Mount{ContainerPath: "/c", HostPath: config, Readonly: true}
	a, b := n.create(pod, "a", "exec sleep 1000", volume, copied), n.create(pod, "b", "exec sleep 1000", volume, copied)
	n.startContainer(a)
	n.startContainer(b)
	for _, name := range []string{"a", "b"} {
		n.begun(name)
		n.once(name)
	}
	n.removeContainer(a)
	n.stays(pod)
	n.removePod(pod)
	if left, err := os.ReadDir(empty); err != nil || len(left) != 1 || left[0].Name() != emptyDirImage {
		n.t.Errorf("in the emptyDir is %v (%v)", left, err)
	}
}

// rollbackStory is a RunPodSandbox that fails.
func rollbackStory(n *killNode) {
	for again := true; again; {
		var err error
		again, err = n.try(func(ctx context.Context) error {
			_, err := n.cri.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: n.podConfig()})
			return err
		})
		if !again && err == nil {
			n.t.Error("RunPodSandbox succeeds")
		}
	}
	if pods := n.listedPods(); len(pods) > 0 {
		n.t.Errorf("left are %v", pods)
	}
}

// killRestarts are deaths after which the next daemon is killed at each point of its restoring: a sandbox half made,
// one that runs with a container half made, one being stopped and one half removed.
var killRestarts = []struct {
	story killStory
	first string
}{
	{killStories[0], "after Driver.Start#1"},
	{killStories[0], "after sending agent CreateContainer#2"},
	{killStories[0], "before VM.Kill#1"},
	{killStories[1], "sandbox record STOPPING#1"},
	{killStories[1], "after Network.Del#1"},
}

// killMatrix counts the points at which the daemon was to be killed, and was.
type killMatrix struct {
	vmm      string
	hit, all atomic.Int64
}

// run plays a story, as a parallel test of its own, whose daemons die at these points.
func (m *killMatrix) run(t *testing.T, story killStory, deaths int, points ...string) {
	// With the race detector, or in a hurry, every eighth point.
	if m.all.Add(1); (testing.Short() || raceDetector) && m.all.Load()%8 != 0 {
		return
	}
	t.Run(story.name+"/"+strings.ReplaceAll(strings.Join(points, ","), " ", "_"), func(t *testing.T) {
		t.Parallel()
		n := story.node(t, m.vmm, points...)
		story.play(n)
		n.clean()
		if n.deaths == deaths {
			m.hit.Add(1)
		}
	})
}

// wants fails when the daemon was killed at fewer points than there should be.
func (m *killMatrix) wants(t *testing.T, least int64) {
	t.Helper()
	if m.hit.Load() < least && !testing.Short() && !raceDetector {
		t.Errorf("the daemon was killed at %d points only", m.hit.Load())
	}
	t.Logf("the daemon was killed at %d of %d points", m.hit.Load(), m.all.Load())
}

// TestKillMatrix kills the daemon at each point of each story, starts another one, has kubelet go on, and looks for
// what is lost, doubled or left.
func TestKillMatrix(t *testing.T) {
	t.Parallel()
	m := killMatrix{vmm: killVMM(t)}
	t.Run("points", func(t *testing.T) {
		for _, story := range killStories {
			for _, point := range tracePoints(t, m.vmm, story) {
				m.run(t, story, 1, point)
			}
		}
		for _, restart := range killRestarts {
			for _, point := range tracePoints(t, m.vmm, restart.story, restart.first) {
				m.run(t, restart.story, 2, restart.first, point)
			}
		}
	})
	m.wants(t, 200)
}

// tracePoints plays a story, as a test of its own, and returns the points that were passed: by the only daemon, or by
// the one after that which died first, until it served.
func tracePoints(t *testing.T, vmm string, story killStory, first ...string) []string {
	t.Helper()
	n := story.node(t, vmm, first...)
	story.play(n)
	n.clean()
	text, err := os.ReadFile(fmt.Sprintf("%s.%d", n.plan.Trace, len(first)))
	if err != nil {
		t.Fatal(err)
	}
	if len(first) > 0 {
		restoring, _, found := strings.Cut(string(text), "restored#1\n")
		if !found {
			t.Fatal("the second daemon did not restore")
		}
		text = []byte(restoring)
	}
	return strings.Split(strings.TrimSpace(string(text)), "\n")
}
