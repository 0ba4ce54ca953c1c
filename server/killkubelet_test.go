package server

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crivm/crivm/server/store"
	"github.com/crivm/crivm/vmruntime"
	"github.com/crivm/crivm/vmruntime/vmtest"
)

// killNode is a node whose daemon dies at the points of a plan, and a kubelet that goes on with the next one.
type killNode struct {
	t      *testing.T
	plan   killPlan
	points []string // of the daemons in turn; later ones have none

	daemon *exec.Cmd
	gone   chan struct{} // closed when the daemon has ended
	output *os.File
	starts int          // of daemons
	mounts []*cri.Mount // of every container
	deaths int
	conn   *grpc.ClientConn
	cri    cri.RuntimeServiceClient
}

func newKillNode(t *testing.T, vmm string, points ...string) *killNode {
	t.Helper()
	dir, err := os.MkdirTemp("", "ck") // short: unix sockets
	if err != nil {
		t.Fatal(err)
	}
	n := &killNode{t: t, points: points, plan: killPlan{Dir: dir, VMM: vmm}}
	if err := os.WriteFile(filepath.Join(dir, "file"), make([]byte, 4096), 0o644); err != nil {
		t.Fatal(err)
	}
	if n.output, err = os.Create(filepath.Join(dir, "output")); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		n.kill()
		if t.Failed() {
			text, _ := os.ReadFile(n.output.Name())
			t.Logf("the daemons said at last:\n%s", text[max(0, len(text)-4000):])
		}
		n.output.Close()
		endBelow(filepath.Join(dir, "r"))
		unmountBelow(dir)
		os.RemoveAll(dir)
	})
	return n
}

// endBelow ends the VMMs and file servers of a test that failed.
func endBelow(dir string) {
	traces, _ := vmruntime.Traces(dir)
	for _, t := range traces {
		if t.PID != 0 {
			syscall.Kill(t.PID, syscall.SIGKILL)
		}
	}
}

// killVMM is the fake VMM; the program of all tests of a parallel group.
func killVMM(t *testing.T) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("starting a VMM needs root: it gets a mount namespace of its own")
	}
	return vmtest.Binary(t)
}

// start begins the next daemon and waits until it serves. One that dies before is followed by the next.
func (n *killNode) start() {
	n.t.Helper()
	for {
		plan := n.plan
		if n.starts < len(n.points) {
			plan.Point = n.points[n.starts]
		}
		if plan.Trace != "" {
			plan.Trace = fmt.Sprintf("%s.%d", plan.Trace, n.starts)
		}
		n.starts++
		os.Remove(plan.socket())
		text, err := json.Marshal(plan)
		if err != nil {
			n.t.Fatal(err)
		}
		fmt.Fprintf(n.output, "--- daemon %d, to die at %q\n", n.starts, plan.Point)
		n.daemon = exec.Command("/proc/self/exe", string(text))
		n.daemon.Args[0] = killDaemonName
		n.daemon.Stdout, n.daemon.Stderr = n.output, n.output
		n.daemon.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
		if err := n.daemon.Start(); err != nil {
			n.t.Fatal(err)
		}
		gone, daemon := make(chan struct{}), n.daemon
		n.gone = gone
		go func() {
			daemon.Wait()
			close(gone)
		}()
		if n.serves() {
			break
		}
		n.died()
	}
	if n.conn != nil {
		n.conn.Close()
	}
	var err error
	if n.conn, err = grpc.NewClient("unix://"+n.plan.socket(), grpc.WithTransportCredentials(insecure.NewCredentials())); err != nil {
		n.t.Fatal(err)
	}
	n.cri = cri.NewRuntimeServiceClient(n.conn)
}

// serves waits for the daemon's socket; false when the daemon ended before.
func (n *killNode) serves() bool {
	n.t.Helper()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	limit := time.NewTimer(time.Minute)
	defer limit.Stop()
	for {
		select {
		case <-n.gone:
			return false
		case <-limit.C:
			n.t.Fatal("daemon does not serve within a minute")
		case <-tick.C:
			if _, err := os.Stat(n.plan.socket()); err == nil {
				return true
			}
		}
	}
}

// died counts the end of a daemon, which must have been by SIGKILL.
func (n *killNode) died() {
	n.t.Helper()
	n.deaths++
	if status := n.daemon.ProcessState.Sys().(syscall.WaitStatus); status.Signal() != syscall.SIGKILL {
		n.t.Fatalf("daemon %d ended by itself: %s", n.starts, n.daemon.ProcessState)
	}
}

// kill ends the daemon, if there is one.
func (n *killNode) kill() {
	if n.conn != nil {
		n.conn.Close()
		n.conn = nil
	}
	if n.daemon != nil {
		n.daemon.Process.Kill()
		<-n.gone
	}
}

// try makes a call as kubelet does: when the daemon dies amid it, another one is started and again is true.
func (n *killNode) try(call func(context.Context) error) (again bool, _ error) {
	n.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	err := call(ctx)
	if err == nil {
		return false, nil
	}
	select { // a broken connection is the daemon's death, which may not have been noticed yet
	case <-n.gone:
		n.died()
		n.start()
		return true, nil
	case <-time.After(map[bool]time.Duration{true: 5 * time.Second}[strings.Contains(err.Error(), "Unavailable")]):
		return false, err
	}
}

// must makes a call until it has been answered, and fails the test when the answer is an error.
func (n *killNode) must(what string, call func(context.Context) error) {
	n.t.Helper()
	for {
		again, err := n.try(call)
		if err != nil {
			n.t.Fatalf("%s: %v", what, err)
		}
		if !again {
			return
		}
	}
}

func (n *killNode) podConfig() *cri.PodSandboxConfig {
	return &cri.PodSandboxConfig{Metadata: &cri.PodSandboxMetadata{Name: "pod", Namespace: "ns", Uid: "u"}, LogDirectory: filepath.Join(n.plan.Dir, "logs"), Hostname: "pod"}
}

// listedPods are the sandboxes that kubelet sees.
func (n *killNode) listedPods() (pods []*cri.PodSandbox) {
	n.t.Helper()
	n.must("ListPodSandbox", func(ctx context.Context) error {
		resp, err := n.cri.ListPodSandbox(ctx, &cri.ListPodSandboxRequest{})
		pods = resp.GetItems()
		return err
	})
	return pods
}

// runPod is RunPodSandbox until there is a READY one, with a look at what is there before each try.
func (n *killNode) runPod() (id string) {
	n.t.Helper()
	for {
		if pods := n.listedPods(); len(pods) > 0 {
			if pods[0].GetState() != cri.PodSandboxState_SANDBOX_READY || len(pods) > 1 {
				n.t.Fatalf("after RunPodSandbox there are %v", pods)
			}
			return pods[0].GetId()
		}
		_, err := n.try(func(ctx context.Context) error {
			resp, err := n.cri.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: n.podConfig()})
			id = resp.GetPodSandboxId()
			return err
		})
		if err != nil {
			n.t.Fatalf("RunPodSandbox: %v", err)
		}
	}
}

func (n *killNode) logPath(name string) string {
	return filepath.Join(n.plan.Dir, "logs", name+".log")
}

// starts is the file to which a container adds a line when it begins.
func (n *killNode) startsPath(name string) string {
	return filepath.Join(n.plan.Dir, "logs", name+".starts")
}

func (n *killNode) create(pod, name, script string, mounts ...*cri.Mount) (id string) {
	n.t.Helper()
	config := &cri.ContainerConfig{
		Metadata: &cri.ContainerMetadata{Name: name}, Image: &cri.ImageSpec{Image: "image"}, LogPath: name + ".log", Mounts: slices.Concat(n.mounts, mounts),
		Command: []string{"sh", "-c", "echo started >> " + n.startsPath(name) + "; " + script},
	}
	for {
		n.must("ListContainers", func(ctx context.Context) error {
			resp, err := n.cri.ListContainers(ctx, &cri.ListContainersRequest{})
			for _, c := range resp.GetContainers() {
				if c.GetMetadata().GetName() == name {
					id = c.GetId()
				}
			}
			return err
		})
		if id != "" {
			return id
		}
		again, err := n.try(func(ctx context.Context) error {
			resp, err := n.cri.CreateContainer(ctx, &cri.CreateContainerRequest{PodSandboxId: pod, Config: config})
			id = resp.GetContainerId()
			return err
		})
		if err != nil {
			n.t.Fatalf("CreateContainer %s: %v", name, err)
		}
		if !again {
			return id
		}
	}
}

func (n *killNode) status(id string) (status *cri.ContainerStatus) {
	n.t.Helper()
	n.must("ContainerStatus", func(ctx context.Context) error {
		resp, err := n.cri.ContainerStatus(ctx, &cri.ContainerStatusRequest{ContainerId: id})
		status = resp.GetStatus()
		return err
	})
	return status
}

func (n *killNode) startContainer(id string) {
	n.t.Helper()
	for n.status(id).GetState() == cri.ContainerState_CONTAINER_CREATED {
		_, err := n.try(func(ctx context.Context) error {
			_, err := n.cri.StartContainer(ctx, &cri.StartContainerRequest{ContainerId: id})
			return err
		})
		if err != nil {
			n.t.Fatalf("StartContainer: %v", err)
		}
	}
}

// exit waits for the end of a container.
func (n *killNode) exit(id string) *cri.ContainerStatus {
	n.t.Helper()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for limit := time.Now().Add(time.Minute); time.Now().Before(limit); <-tick.C {
		if s := n.status(id); s.GetState() == cri.ContainerState_CONTAINER_EXITED {
			return s
		}
	}
	n.t.Fatalf("container does not exit: %v", n.status(id))
	return nil
}

func (n *killNode) stopContainer(id string) {
	n.t.Helper()
	n.must("StopContainer", func(ctx context.Context) error {
		_, err := n.cri.StopContainer(ctx, &cri.StopContainerRequest{ContainerId: id, Timeout: 30})
		return err
	})
}

func (n *killNode) removeContainer(id string) {
	n.t.Helper()
	n.must("RemoveContainer", func(ctx context.Context) error {
		_, err := n.cri.RemoveContainer(ctx, &cri.RemoveContainerRequest{ContainerId: id})
		return err
	})
}

func (n *killNode) stopPod(id string) {
	n.t.Helper()
	n.must("StopPodSandbox", func(ctx context.Context) error {
		_, err := n.cri.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: id})
		return err
	})
}

func (n *killNode) removePod(id string) {
	n.t.Helper()
	n.must("RemovePodSandbox", func(ctx context.Context) error {
		_, err := n.cri.RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{PodSandboxId: id})
		return err
	})
}

// stays fails when a sandbox that was READY is not any more.
func (n *killNode) stays(pod string) {
	n.t.Helper()
	if pods := n.listedPods(); len(pods) != 1 || pods[0].GetId() != pod || pods[0].GetState() != cri.PodSandboxState_SANDBOX_READY {
		n.t.Fatalf("sandbox %s has become %v", pod, pods)
	}
}

// begun waits until a container has begun.
func (n *killNode) begun(name string) {
	n.t.Helper()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for limit := time.Now().Add(time.Minute); time.Now().Before(limit); <-tick.C {
		if text, _ := os.ReadFile(n.startsPath(name)); len(text) > 0 {
			return
		}
	}
	n.t.Fatalf("container %s does not begin", name)
}

// once fails when a container did not begin exactly once.
func (n *killNode) once(name string) {
	n.t.Helper()
	if text, err := os.ReadFile(n.startsPath(name)); string(text) != "started\n" {
		n.t.Errorf("container %s began so often: %q (%v)", name, text, err)
	}
}

// logged fails when the logs of a container, in this order, do not hold exactly the lines of a stream.
func (n *killNode) logged(stream string, want string, paths ...string) {
	n.t.Helper()
	var got strings.Builder
	for _, path := range paths {
		text, err := os.ReadFile(path)
		if err != nil {
			n.t.Error(err)
		}
		for line := range strings.Lines(string(text)) {
			parts := strings.SplitN(line, " ", 4)
			if len(parts) != 4 {
				n.t.Errorf("line of %s is %q", path, line)
			} else if parts[1] == stream {
				got.WriteString(parts[3])
			}
		}
	}
	if got.String() != want {
		n.t.Errorf("%s of %v is %s, want %s", stream, paths, shorten(got.String()), shorten(want))
	}
}

func shorten(text string) string {
	if len(text) > 400 {
		return fmt.Sprintf("%d bytes %q...%q", len(text), text[:200], text[len(text)-200:])
	}
	return fmt.Sprintf("%q", text)
}

// clean stops the daemon and fails when anything of the pod is left, but its logs.
func (n *killNode) clean() {
	n.t.Helper()
	n.kill()
	for _, dir := range []string{"s/pods", "s/positions", "s/shares", "r/vm", "cni/pods", "cni/results", "n"} {
		if left, err := os.ReadDir(filepath.Join(n.plan.Dir, dir)); len(left) > 0 {
			n.t.Errorf("left in %s: %v (%v)", dir, left, err)
		}
	}
	if left := processesBelow(n.plan.Dir); len(left) > 0 {
		n.t.Errorf("processes left: %q", left)
	}
	unmountOwn := filepath.Join(n.plan.Dir, "n")
	for _, m := range mountsBelow(n.plan.Dir) {
		if !strings.Contains(m, " "+unmountOwn+" ") { // made once, to share namespaces
			n.t.Errorf("mount left: %s", m)
		}
	}
	for _, pattern := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/*"} {
		left, _ := filepath.Glob(pattern + n.plan.cgroup() + "*")
		for _, dir := range left {
			// A daemon that dies between making a parent and marking it as its own leaves it empty: known and harmless.
			if _, err := unix.Getxattr(dir, "trusted.crivm", nil); err == nil || unix.Rmdir(dir) != nil {
				n.t.Errorf("cgroup left: %s", dir)
			}
		}
	}
	records, err := store.Open(filepath.Join(n.plan.Dir, "s/crivm.db"))
	if err != nil {
		n.t.Fatal(err)
	}
	defer records.Close()
	if s, c := records.Sandboxes(), records.Containers(""); len(s)+len(c) > 0 {
		n.t.Errorf("records left: %v, %v", s, c)
	}
}
