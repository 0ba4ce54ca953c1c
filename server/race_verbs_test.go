package server

import (
	"context"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sync/errgroup"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crivm/crivm/server/store"
	"github.com/crivm/crivm/vmruntime"
)

// cutting is a driver whose streams break just after the next request of a kind was sent to the agent: of the kinds in
// calls, one after the other, as many as are armed.
type cutting struct {
	Driver
	calls []string
	cuts  atomic.Int32
	armed atomic.Int32
}

// next tells whether this call is the one that is to be cut.
func (d *cutting) next(call string) bool {
	done := d.cuts.Load()
	return done < d.armed.Load() && d.calls[done] == call && d.cuts.CompareAndSwap(done, done+1)
}

func (d *cutting) Start(ctx context.Context, s vmruntime.Spec) (vmruntime.VM, error) {
	vm, err := d.Driver.Start(ctx, s)
	if err != nil {
		return nil, err
	}
	return cuttingVM{vm, d}, nil
}

type cuttingVM struct {
	vmruntime.VM
	d *cutting
}

func (v cuttingVM) Dial(ctx context.Context) (net.Conn, error) {
	conn, err := v.VM.Dial(ctx)
	if err != nil {
		return nil, err
	}
	return &cuttingConn{Conn: conn, d: v.d}, nil
}

type cuttingConn struct {
	net.Conn
	d    *cutting
	sent atomic.Bool // the request after which no answer is read
	once sync.Once
}

func (c *cuttingConn) Write(p []byte) (int, error) {
	found := agentCall.FindSubmatch(p)
	if found != nil && c.d.next(string(found[1])) {
		c.sent.Store(true)
	}
	return c.Conn.Write(p)
}

func (c *cuttingConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if c.sent.Load() { // the answer, or what else comes
		c.once.Do(func() { c.Conn.Close() })
		return 0, errors.New("cut by a test")
	}
	return n, err
}

func (r *rig) cut(calls ...string) *cutting {
	handler := r.opts.Handlers[""]
	d := &cutting{Driver: handler.Driver, calls: calls}
	handler.Driver = d
	r.opts.Handlers[""] = handler
	r.restart()
	return d
}

// TestStartWhoseConnectionBreaks: the agent started the container and its answer was lost. The container is then EXITED
// with StartError, and its process must not run; the sandbox is well.
func TestStartWhoseConnectionBreaks(t *testing.T) {
	r := newRig(t)
	driver := r.cut("StartContainer")
	pod := r.runPod("a")
	mark := filepath.Join(r.dir, "runs") // on its command line
	id := r.create(pod, "c", "trap '' TERM; while :; do sleep 1; done; : "+mark)
	driver.armed.Store(1)
	if _, err := r.StartContainer(t.Context(), &cri.StartContainerRequest{ContainerId: id}); !errdefs.IsUnavailable(err) {
		t.Errorf("start: %v", err)
	}
	if driver.cuts.Load() == 0 {
		t.Fatal("nothing was cut")
	}
	if s := r.exit(id); s.GetExitCode() != 128 || s.GetReason() != reasonStartError {
		t.Errorf("container is %v", s)
	}
	eventually(t, "the process is dead", func() error {
		if found := processesBelow(mark); len(found) > 0 {
			return fmt.Errorf("%q", found)
		}
		return nil
	})
	if s := r.exit(r.run(pod, "d", "exit 4")); s.GetExitCode() != 4 {
		t.Errorf("the next container is %v", s)
	}
}

// TestCreateWhoseConnectionBreaks: a container that the agent made and crivm does not know of is undone, and its name is
// free; also when the connection breaks again amid that, then with the next call for that name.
func TestCreateWhoseConnectionBreaks(t *testing.T) {
	r := newRig(t)
	driver := r.cut("CreateContainer", "CreateContainer", "DeleteContainer")
	pod := r.runPod("a")
	for left, cuts := range []int32{1, 3} { // containers that are left half made; breaks until then
		driver.armed.Store(cuts)
		name := fmt.Sprint("c", left)
		if _, err := r.CreateContainer(t.Context(), r.createRequest(pod, name, "exit 4")); !errdefs.IsUnavailable(err) {
			t.Errorf("create: %v", err)
		}
		if got := driver.cuts.Load(); got != cuts {
			t.Fatalf("%d calls were cut", got)
		}
		if got := r.store.Containers(""); len(got) != left {
			t.Errorf("left are %v", got)
		}
		id := r.run(pod, name, "exit 4")
		if s := r.exit(id); s.GetExitCode() != 4 {
			t.Errorf("the next container is %v", s)
		}
		r.remove(id)
	}
}

// TestCreateWhileStopped: a sandbox that is stopped while a container is being made in it ends without that container,
// whatever the creation waits for: the disk of its image, or the agent.
func TestCreateWhileStopped(t *testing.T) {
	for _, remove := range []bool{false, true} {
		t.Run(fmt.Sprint("remove ", remove), func(t *testing.T) {
			r := newRig(t)
			held := heldImages{r.img, make(chan struct{}, 4), make(chan struct{})}
			r.images = held
			pod := r.runPod("a")
			result := make(chan error, 1)
			go func() {
				_, err := r.CreateContainer(t.Context(), r.createRequest(pod, "c", "exec sleep 1000"))
				result <- err
			}()
			<-held.asked
			if _, err := r.StopPodSandbox(t.Context(), &cri.StopPodSandboxRequest{PodSandboxId: pod}); err != nil {
				t.Error(err)
			}
			if remove {
				if _, err := r.RemovePodSandbox(t.Context(), &cri.RemovePodSandboxRequest{PodSandboxId: pod}); err != nil {
					t.Error(err)
				}
			}
			close(held.hold)
			if err := <-result; err == nil {
				t.Error("a container was made in a stopped sandbox")
			}
			if left := r.store.Containers(""); len(left) > 0 {
				t.Errorf("left are %v", left)
			}
		})
	}
}

// pairVerbs are what kubelet may do at any time to one pod with one container.
var pairVerbs = map[string]func(ctx context.Context, r *rig, pod, id string) error{
	"RunPodSandbox": func(ctx context.Context, r *rig, pod, id string) error {
		_, err := r.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: r.podConfig("a")})
		return err
	},
	"CreateContainer": func(ctx context.Context, r *rig, pod, id string) error {
		_, err := r.CreateContainer(ctx, r.createRequest(pod, "second", "exec sleep 1000"))
		return err
	},
	"StartContainer": func(ctx context.Context, r *rig, pod, id string) error {
		_, err := r.StartContainer(ctx, &cri.StartContainerRequest{ContainerId: id})
		return err
	},
	"StopContainer": func(ctx context.Context, r *rig, pod, id string) error {
		_, err := r.StopContainer(ctx, &cri.StopContainerRequest{ContainerId: id})
		return err
	},
	"RemoveContainer": func(ctx context.Context, r *rig, pod, id string) error {
		_, err := r.RemoveContainer(ctx, &cri.RemoveContainerRequest{ContainerId: id})
		return err
	},
	"ExecSync": func(ctx context.Context, r *rig, pod, id string) error {
		_, err := r.ExecSync(ctx, &cri.ExecSyncRequest{ContainerId: id, Cmd: []string{"true"}, Timeout: 10})
		return err
	},
	"UpdateContainerResources": func(ctx context.Context, r *rig, pod, id string) error {
		_, err := r.UpdateContainerResources(ctx, &cri.UpdateContainerResourcesRequest{ContainerId: id, Linux: &cri.LinuxContainerResources{CpuShares: 100}})
		return err
	},
	"ReopenContainerLog": func(ctx context.Context, r *rig, pod, id string) error {
		_, err := r.ReopenContainerLog(ctx, &cri.ReopenContainerLogRequest{ContainerId: id})
		return err
	},
	"ContainerStats": func(ctx context.Context, r *rig, pod, id string) error {
		_, err := r.ContainerStats(ctx, &cri.ContainerStatsRequest{ContainerId: id})
		return err
	},
	"StopPodSandbox": func(ctx context.Context, r *rig, pod, id string) error {
		_, err := r.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: pod})
		return err
	},
	"RemovePodSandbox": func(ctx context.Context, r *rig, pod, id string) error {
		_, err := r.RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{PodSandboxId: pod})
		return err
	},
}

// mustSucceed are those that CRI wants to succeed whatever else goes on.
var mustSucceed = map[string]bool{"StopPodSandbox": true, "RemovePodSandbox": true, "RemoveContainer": true}

// TestPairsOfVerbs races every verb with every other and itself on one pod, also with the first one cancelled amid it:
// both come back, with an error of a known class if any, and what is left is consistent and can be removed.
func TestPairsOfVerbs(t *testing.T) {
	r := newRig(t)
	names := make([]string, 0, len(pairVerbs))
	for name := range pairVerbs {
		names = append(names, name)
	}
	var group errgroup.Group
	group.SetLimit(4)
	pairs := 0
	for i, a := range names {
		for _, b := range names[i:] {
			pairs++
			if (testing.Short() || raceDetector) && pairs%3 != 0 {
				continue
			}
			name, cancelled := strconv.Itoa(pairs), pairs%2 == 0
			group.Go(func() error { return racePair(t, r, a, b, name, cancelled) })
		}
	}
	if err := group.Wait(); err != nil {
		t.Fatal(err)
	}
	t.Logf("%d pairs", pairs)
}

func racePair(t *testing.T, r *rig, a, b, name string, cancelled bool) error {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	resp, err := r.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: r.podConfig(name)})
	if err != nil {
		return err
	}
	pod := resp.GetPodSandboxId()
	c, err := r.CreateContainer(ctx, r.createRequest(pod, "first"+name, "exec sleep 1000"))
	if err != nil {
		return err
	}
	id := c.GetContainerId()
	if a != "StartContainer" && b != "StartContainer" {
		if _, err := r.StartContainer(ctx, &cri.StartContainerRequest{ContainerId: id}); err != nil {
			return err
		}
	}
	var both errgroup.Group
	for _, verb := range []string{a, b} {
		call := ctx
		if cancelled && verb == a {
			var stop context.CancelFunc
			call, stop = context.WithTimeout(ctx, 5*time.Millisecond)
			defer stop()
		}
		both.Go(func() error {
			var err error
			if verb == "RunPodSandbox" { // of the pod's own name
				_, err = r.RunPodSandbox(call, &cri.RunPodSandboxRequest{Config: r.podConfig(name)})
			} else {
				err = pairVerbs[verb](call, r, pod, id)
			}
			if ctx.Err() != nil {
				return fmt.Errorf("%s beside %s and %s does not end", verb, a, b)
			}
			if err != nil && call.Err() == nil && mustSucceed[verb] {
				return fmt.Errorf("%s in the race of %s and %s: %w", verb, a, b, err)
			}
			for _, known := range []func(error) bool{errdefs.IsNotFound, errdefs.IsFailedPrecondition, errdefs.IsAlreadyExists, errdefs.IsUnavailable, errdefs.IsAborted} {
				if err == nil || known(err) || errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled) {
					return nil
				}
			}
			return fmt.Errorf("%s in the race of %s and %s has an error without a class: %w", verb, a, b, err)
		})
	}
	if err := both.Wait(); err != nil {
		return err
	}
	for _, rec := range r.store.Sandboxes() { // RunPodSandbox may have made a second one
		if rec.Name != sandboxName(r.podConfig(name).GetMetadata()) {
			continue
		}
		if rec.State != store.SandboxReady && rec.State != store.SandboxNotReady {
			return fmt.Errorf("%s and %s left a sandbox that is %s", a, b, rec.State)
		}
		for _, c := range r.store.Containers(rec.ID) {
			if c.State == store.ContainerCreating || rec.State == store.SandboxNotReady && c.State != store.ContainerExited {
				return fmt.Errorf("%s and %s left a container that is %s in a sandbox that is %s", a, b, c.State, rec.State)
			}
		}
		if _, err := r.RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{PodSandboxId: rec.ID}); err != nil {
			return fmt.Errorf("after %s and %s: %w", a, b, err)
		}
	}
	for _, c := range r.store.Containers("") {
		if strings.HasPrefix(c.Name, "first"+name+"_") {
			return fmt.Errorf("%s and %s left container %s", a, b, c.Name)
		}
	}
	return nil
}
