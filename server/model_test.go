package server

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sync/errgroup"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
	"pgregory.net/rapid"
)

// model is what kubelet may expect of the server: pods and containers by name, and nothing of how it is done.
type model struct {
	r    *rig
	pods map[string]*modelPod
	ids  map[string]string // last ID of each name, also of what is gone
}

type modelPod struct {
	ready      bool
	containers map[string]*modelContainer
}

type modelContainer struct {
	state cri.ContainerState
	code  int32
}

func (p *modelPod) end() {
	p.ready = false
	for _, c := range p.containers {
		if c.state != cri.ContainerState_CONTAINER_EXITED {
			c.state, c.code = cri.ContainerState_CONTAINER_EXITED, 137
		}
	}
}

var modelNames = rapid.SampledFrom([]string{"a", "b"})

// pick draws a pod and a container of it; nil for what is not there.
func (m *model) pick(t *rapid.T) (name, pod string, p *modelPod, c *modelContainer) {
	pod = modelNames.Draw(t, "pod")
	name = pod + "-" + modelNames.Draw(t, "container")
	if p = m.pods[pod]; p != nil {
		c = p.containers[name]
	}
	return name, pod, p, c
}

// id is that of a name, or of nothing.
func (m *model) id(name string) string {
	if id := m.ids[name]; id != "" {
		return id
	}
	return newID()
}

func (m *model) runPod(t *rapid.T) {
	name := modelNames.Draw(t, "pod")
	resp, err := m.r.RunPodSandbox(t.Context(), &cri.RunPodSandboxRequest{Config: m.r.podConfig(name)})
	if m.pods[name] != nil {
		m.want(t, err, errdefs.ErrAlreadyExists)
		return
	}
	m.want(t, err, nil)
	m.pods[name], m.ids[name] = &modelPod{ready: true, containers: map[string]*modelContainer{}}, resp.GetPodSandboxId()
}

func (m *model) create(t *rapid.T) {
	name, pod, p, c := m.pick(t)
	resp, err := m.r.CreateContainer(t.Context(), m.r.createRequest(m.id(pod), name, "exec sleep 1000"))
	switch {
	case p == nil:
		m.want(t, err, errdefs.ErrNotFound)
	case !p.ready:
		m.want(t, err, errdefs.ErrFailedPrecondition)
	case c != nil:
		m.want(t, err, errdefs.ErrAlreadyExists)
	default:
		m.want(t, err, nil)
		p.containers[name], m.ids[name] = &modelContainer{state: cri.ContainerState_CONTAINER_CREATED}, resp.GetContainerId()
	}
}

func (m *model) start(t *rapid.T) {
	name, _, _, c := m.pick(t)
	_, err := m.r.StartContainer(t.Context(), &cri.StartContainerRequest{ContainerId: m.id(name)})
	switch {
	case c == nil:
		m.want(t, err, errdefs.ErrNotFound)
	case c.state != cri.ContainerState_CONTAINER_CREATED:
		m.want(t, err, errdefs.ErrFailedPrecondition)
	default:
		m.want(t, err, nil)
		c.state = cri.ContainerState_CONTAINER_RUNNING
	}
}

func (m *model) stop(t *rapid.T) {
	name, _, _, c := m.pick(t)
	_, err := m.r.StopContainer(t.Context(), &cri.StopContainerRequest{ContainerId: m.id(name)})
	m.want(t, err, nil)
	switch {
	case c == nil:
	case c.state == cri.ContainerState_CONTAINER_CREATED:
		c.state, c.code = cri.ContainerState_CONTAINER_EXITED, 128
	case c.state == cri.ContainerState_CONTAINER_RUNNING:
		c.state, c.code = cri.ContainerState_CONTAINER_EXITED, 137
	}
}

func (m *model) remove(t *rapid.T) {
	name, _, p, c := m.pick(t)
	_, err := m.r.RemoveContainer(t.Context(), &cri.RemoveContainerRequest{ContainerId: m.id(name)})
	m.want(t, err, nil)
	if c != nil {
		delete(p.containers, name)
	}
}

func (m *model) exec(t *rapid.T) {
	name, _, _, c := m.pick(t)
	resp, err := m.r.ExecSync(t.Context(), &cri.ExecSyncRequest{ContainerId: m.id(name), Cmd: []string{"sh", "-c", "exit 9"}, Timeout: 30})
	switch {
	case c == nil:
		m.want(t, err, errdefs.ErrNotFound)
	case c.state != cri.ContainerState_CONTAINER_RUNNING:
		m.want(t, err, errdefs.ErrFailedPrecondition)
	default:
		if m.want(t, err, nil); resp.GetExitCode() != 9 {
			t.Fatalf("exec: %v", resp)
		}
	}
}

func (m *model) stopPod(t *rapid.T) {
	name := modelNames.Draw(t, "pod")
	_, err := m.r.StopPodSandbox(t.Context(), &cri.StopPodSandboxRequest{PodSandboxId: m.id(name)})
	m.want(t, err, nil)
	if p := m.pods[name]; p != nil {
		p.end()
	}
}

func (m *model) removePod(t *rapid.T) {
	name := modelNames.Draw(t, "pod")
	_, err := m.r.RemovePodSandbox(t.Context(), &cri.RemovePodSandboxRequest{PodSandboxId: m.id(name)})
	m.want(t, err, nil)
	delete(m.pods, name)
}

// killVM ends a VM from outside, and waits until the server has noticed.
func (m *model) killVM(t *rapid.T) {
	name := modelNames.Draw(t, "pod")
	p := m.pods[name]
	if p == nil || !p.ready {
		t.Skip("no VM")
	}
	vm, err := m.r.sandbox(m.ids[name]).machine()
	m.want(t, err, nil)
	m.want(t, vm.Kill(t.Context()), nil)
	p.end()
	for limit := time.Now().Add(10 * time.Second); m.compare() != nil && time.Now().Before(limit); {
		time.Sleep(time.Millisecond)
	}
}

func (m *model) restart(*rapid.T) { m.r.restart() }

func (m *model) want(t *rapid.T, err, want error) {
	if !errors.Is(err, want) {
		t.Fatalf("error is %v, want %v", err, want)
	}
}

// compare tells where the server's lists differ from the model.
func (m *model) compare() error {
	var want, got []string
	for name, p := range m.pods {
		want = append(want, fmt.Sprintf("%s ready=%t", name, p.ready))
		for name, c := range p.containers {
			want = append(want, fmt.Sprintf("%s %s %d", name, c.state, c.code))
		}
	}
	pods, err := m.r.ListPodSandbox(context.Background(), &cri.ListPodSandboxRequest{})
	if err != nil {
		return err
	}
	for _, p := range pods.GetItems() {
		got = append(got, fmt.Sprintf("%s ready=%t", p.GetMetadata().GetName(), p.GetState() == cri.PodSandboxState_SANDBOX_READY))
	}
	containers, err := m.r.ListContainers(context.Background(), &cri.ListContainersRequest{})
	if err != nil {
		return err
	}
	for _, c := range containers.GetContainers() {
		status, err := m.r.ContainerStatus(context.Background(), &cri.ContainerStatusRequest{ContainerId: c.GetId()})
		if err != nil {
			return err
		}
		got = append(got, fmt.Sprintf("%s %s %d", c.GetMetadata().GetName(), c.GetState(), status.GetStatus().GetExitCode()))
	}
	slices.Sort(want)
	slices.Sort(got)
	if !slices.Equal(want, got) {
		return fmt.Errorf("the server has %q, the model %q", got, want)
	}
	return nil
}

// TestModel plays random verbs, deaths of VMs and restarts against the model, on one server after the other.
func TestModel(t *testing.T) {
	playModel(t, newRig(t), map[bool]time.Duration{false: 20 * time.Second, true: 10 * time.Second}[testing.Short() || raceDetector])
}

// playModel plays random verbs for so long.
func playModel(t *testing.T, r *rig, limit time.Duration) {
	rounds := 0
	deadline := time.Now().Add(limit)
	rapid.Check(t, func(t *rapid.T) {
		if time.Now().After(deadline) {
			return
		}
		rounds++
		r.removeAll()
		m := &model{r: r, pods: map[string]*modelPod{}, ids: map[string]string{}}
		t.Repeat(map[string]func(*rapid.T){
			"run": m.runPod, "create": m.create, "create2": m.create, "start": m.start, "start2": m.start, "stop": m.stop, "remove": m.remove, "exec": m.exec,
			"stopPod": m.stopPod, "removePod": m.removePod, "killVM": m.killVM, "restart": m.restart,
			"": func(t *rapid.T) {
				if err := m.compare(); err != nil {
					t.Fatal(err)
				}
			},
		})
	})
	t.Logf("%d sequences of verbs", rounds)
}

// TestMixedVerbs plays all verbs at once on the same few pods, some of them cancelled: whatever each one answers,
// all come back, and at the end everything can be removed and nothing is remembered.
func TestMixedVerbs(t *testing.T) {
	r := newRig(t)
	var mu sync.Mutex
	ids := map[string]string{}
	known := func(name string) string {
		mu.Lock()
		defer mu.Unlock()
		return ids[name]
	}
	learn := func(name, id string) {
		mu.Lock()
		defer mu.Unlock()
		if id != "" {
			ids[name] = id
		}
	}
	verbs := []func(ctx context.Context, pod, name string){
		func(ctx context.Context, pod, name string) {
			resp, _ := r.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: r.podConfig(pod)})
			learn(pod, resp.GetPodSandboxId())
		},
		func(ctx context.Context, pod, name string) {
			resp, _ := r.CreateContainer(ctx, r.createRequest(known(pod), name, "echo on; exec sleep 1000"))
			learn(name, resp.GetContainerId())
		},
		func(ctx context.Context, pod, name string) {
			r.StartContainer(ctx, &cri.StartContainerRequest{ContainerId: known(name)})
		},
		func(ctx context.Context, pod, name string) {
			r.StopContainer(ctx, &cri.StopContainerRequest{ContainerId: known(name), Timeout: 1})
		},
		func(ctx context.Context, pod, name string) {
			r.RemoveContainer(ctx, &cri.RemoveContainerRequest{ContainerId: known(name)})
		},
		func(ctx context.Context, pod, name string) {
			r.ExecSync(ctx, &cri.ExecSyncRequest{ContainerId: known(name), Cmd: []string{"true"}, Timeout: 5})
		},
		func(ctx context.Context, pod, name string) {
			r.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: known(pod)})
		},
		func(ctx context.Context, pod, name string) {
			r.RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{PodSandboxId: known(pod)})
		},
		func(ctx context.Context, pod, name string) {
			if vm, err := r.sandbox(known(pod)).machine(); err == nil {
				vm.Kill(ctx)
			}
		},
	}
	weights := []int{0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 4, 5, 5, 6, 7, 8}
	end := time.Now().Add(map[bool]time.Duration{false: 15 * time.Second, true: 8 * time.Second}[testing.Short() || raceDetector])
	seed := int(time.Now().UnixNano() % 1e6)
	t.Logf("seed %d", seed)
	for ; time.Now().Before(end); seed++ {
		plans := rapid.SliceOfN(rapid.SliceOfN(rapid.IntRange(0, 1<<20), 12, 12), 6, 6).Example(seed)
		var group errgroup.Group
		for _, plan := range plans {
			group.Go(func() error {
				for _, step := range plan {
					pod := string(rune('a' + step%2))
					name := pod + "-" + string(rune('a'+step/2%2))
					limit := time.Minute
					if step/4%4 == 0 {
						limit = time.Duration(step%100) * time.Millisecond
					}
					ctx, cancel := context.WithTimeout(context.Background(), limit)
					start := time.Now()
					verbs[weights[step/16%len(weights)]](ctx, pod, name)
					cancel()
					if took := time.Since(start); took > 45*time.Second {
						return fmt.Errorf("verb %d took %s", weights[step/16%len(weights)], took)
					}
				}
				return nil
			})
		}
		if err := group.Wait(); err != nil {
			t.Fatal(err)
		}
	}
	r.removeAll()
	for limit := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		r.mu.Lock()
		live := append(slices.Collect(maps.Keys(r.sandboxes)), slices.Collect(maps.Keys(r.containers))...)
		r.mu.Unlock()
		sandboxes, containers := r.store.Sandboxes(), r.store.Containers("")
		if len(live)+len(sandboxes)+len(containers) == 0 {
			break
		}
		if time.Now().After(limit) {
			t.Fatalf("still remembered are %v, sandboxes %v, containers %v", live, sandboxes, containers)
		}
	}
}
