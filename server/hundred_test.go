package server

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// TestHundredPods plays the lives of 100 pods, sixteen at a time, as an impatient kubelet does: every third call is
// cancelled amid it and made again until it succeeds, while others list. All end as they should, and nothing is left.
// CRIVM_TEST_SEED repeats a run's choices.
func TestHundredPods(t *testing.T) {
	r := newRig(t)
	pods := 100
	if testing.Short() || raceDetector {
		pods = 24
	}
	seed := uint64(time.Now().UnixNano())
	if text := os.Getenv("CRIVM_TEST_SEED"); text != "" {
		var err error
		if seed, err = strconv.ParseUint(text, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("CRIVM_TEST_SEED=%d", seed)
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	listing, stop := context.WithCancel(ctx)
	var lists errgroup.Group
	lists.Go(func() error { // as PLEG does, without the pause
		for listing.Err() == nil {
			_, err := r.ListPodSandbox(listing, &cri.ListPodSandboxRequest{})
			_, err2 := r.ListContainers(listing, &cri.ListContainersRequest{})
			_, err3 := r.ListContainerStats(listing, &cri.ListContainerStatsRequest{})
			if err := errors.Join(err, err2, err3); err != nil && listing.Err() == nil {
				return err
			}
		}
		return nil
	})
	var group errgroup.Group
	group.SetLimit(16)
	for i := range pods {
		group.Go(func() error {
			k := impatient{r: r, random: rand.New(rand.NewPCG(seed, uint64(i)))}
			if err := k.life(ctx, fmt.Sprint("p", i)); err != nil {
				return fmt.Errorf("pod %d: %w", i, err)
			}
			return nil
		})
	}
	err := group.Wait()
	stop()
	if err := errors.Join(err, lists.Wait()); err != nil {
		t.Fatal(err)
	}
	if s, c := r.store.Sandboxes(), r.store.Containers(""); len(s)+len(c) > 0 {
		t.Errorf("left are %d sandboxes and %d containers", len(s), len(c))
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.sandboxes)+len(r.containers) > 0 {
		t.Errorf("still remembered are %d sandboxes and %d containers", len(r.sandboxes), len(r.containers))
	}
}

// impatient is a kubelet that cancels calls.
type impatient struct {
	r      *rig
	random *rand.Rand
}

// call makes a call until it succeeds. Only a call that was cancelled may fail.
func (k *impatient) call(ctx context.Context, what string, do func(context.Context) error) error {
	for try := range 20 {
		limited, cancel, brief := ctx, context.CancelFunc(func() {}), false
		if try < 19 && k.random.IntN(3) == 0 {
			limited, cancel = context.WithTimeout(ctx, time.Duration(k.random.IntN(50_000))*time.Microsecond)
			brief = true
		}
		err := do(limited)
		// The guest, which knows the deadline, may be the first to say that it is over.
		left := limited.Err() != nil || brief && errors.Is(err, context.DeadlineExceeded)
		cancel()
		if err == nil {
			return nil
		}
		if ctx.Err() != nil || !left {
			return fmt.Errorf("%s, try %d: %w", what, try, err)
		}
	}
	return fmt.Errorf("%s does not succeed", what)
}

func (k *impatient) life(ctx context.Context, name string) error {
	r := k.r
	var pod string
	err := k.call(ctx, "RunPodSandbox", func(ctx context.Context) error {
		resp, err := r.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: r.podConfig(name)})
		pod = resp.GetPodSandboxId()
		return err
	})
	if err != nil {
		return err
	}
	for _, c := range []struct {
		name, script string
		code         int32
	}{{"job", "echo on; exit 3", 3}, {"server", "exec sleep 1000", 137}} {
		var id string
		state := func(ctx context.Context) cri.ContainerState {
			s, err := r.ContainerStatus(ctx, &cri.ContainerStatusRequest{ContainerId: id})
			if err != nil {
				return cri.ContainerState_CONTAINER_UNKNOWN
			}
			return s.GetStatus().GetState()
		}
		if err := k.call(ctx, "CreateContainer", func(ctx context.Context) error {
			resp, err := r.CreateContainer(ctx, r.createRequest(pod, c.name, c.script))
			id = resp.GetContainerId()
			return err
		}); err != nil {
			return err
		}
		if err := k.call(ctx, "StartContainer", func(limited context.Context) error {
			if state(ctx) != cri.ContainerState_CONTAINER_CREATED { // a cancelled call may have started it
				return nil
			}
			_, err := r.StartContainer(limited, &cri.StartContainerRequest{ContainerId: id})
			return err
		}); err != nil {
			return err
		}
		if c.name == "server" {
			for _, step := range []struct {
				what string
				do   func(context.Context) error
			}{
				{"ExecSync", func(ctx context.Context) error {
					resp, err := r.ExecSync(ctx, &cri.ExecSyncRequest{ContainerId: id, Cmd: []string{"sh", "-c", "exit 9"}, Timeout: 60})
					if err == nil && resp.GetExitCode() != 9 {
						err = fmt.Errorf("exit code %d", resp.GetExitCode())
					}
					return err
				}},
				{"UpdateContainerResources", func(ctx context.Context) error {
					_, err := r.UpdateContainerResources(ctx, &cri.UpdateContainerResourcesRequest{ContainerId: id, Linux: &cri.LinuxContainerResources{CpuShares: 200}})
					return err
				}},
				{"StopContainer", func(ctx context.Context) error {
					_, err := r.StopContainer(ctx, &cri.StopContainerRequest{ContainerId: id})
					return err
				}},
			} {
				if err := k.call(ctx, step.what, step.do); err != nil {
					return err
				}
			}
		}
		select {
		case <-r.container(id).exited:
		case <-ctx.Done():
			return fmt.Errorf("%s does not exit", c.name)
		}
		s, err := r.ContainerStatus(ctx, &cri.ContainerStatusRequest{ContainerId: id})
		if err != nil || s.GetStatus().GetExitCode() != c.code {
			return fmt.Errorf("%s is %v (%v)", c.name, s, err)
		}
	}
	if err := k.call(ctx, "StopPodSandbox", func(ctx context.Context) error {
		_, err := r.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: pod})
		return err
	}); err != nil {
		return err
	}
	return k.call(ctx, "RemovePodSandbox", func(ctx context.Context) error {
		_, err := r.RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{PodSandboxId: pod})
		return err
	})
}
