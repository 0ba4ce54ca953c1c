package server

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crivm/crivm/server/store"
	"github.com/crivm/crivm/vmruntime"
)

// frozen is a pod whose guest does not run, until the VM is resumed.
func (r *rig) frozen(pod string) vmruntime.VM {
	r.t.Helper()
	vm, err := r.sandbox(pod).machine()
	if err != nil {
		r.t.Fatal(err)
	}
	if err := vm.Pause(r.t.Context()); err != nil {
		r.t.Fatal(err)
	}
	return vm
}

func (r *rig) setHealth(limit time.Duration) {
	handler := r.opts.Handlers[""]
	handler.HealthTimeout = limit
	r.opts.Handlers[""] = handler
}

// TestRestartBesideSilentGuest: a guest that does not answer a new daemon holds up nothing but verbs on itself, and is
// ended when its time is over.
func TestRestartBesideSilentGuest(t *testing.T) {
	r := newRig(t)
	silent, other := r.runPod("a"), r.runPod("b")
	lost, well := r.run(silent, "c", "exec sleep 1000"), r.run(other, "d", "exec sleep 1000")
	r.setHealth(2 * time.Second)
	r.frozen(silent)
	r.stop()
	r.early = true
	start := time.Now()
	r.start()
	if took := time.Since(start); took > 3*time.Second { // adoption itself takes longer than that
		t.Errorf("the server serves after %s", took)
	}
	pods, err := r.ListPodSandbox(t.Context(), &cri.ListPodSandboxRequest{Filter: &cri.PodSandboxFilter{State: &cri.PodSandboxStateValue{State: cri.PodSandboxState_SANDBOX_READY}}})
	if err != nil || len(pods.GetItems()) != 2 {
		t.Errorf("READY are %v (%v)", pods, err)
	}
	if out, err := r.ExecSync(t.Context(), &cri.ExecSyncRequest{ContainerId: well, Cmd: []string{"echo", "on"}, Timeout: 20}); err != nil || string(out.GetStdout()) != "on\n" {
		t.Errorf("exec in the other pod: %v (%v)", out, err)
	}
	select {
	case <-r.restored:
		t.Error("all is settled already; the rest of this test shows nothing")
	default:
	}
	for name, call := range map[string]func(ctx context.Context) error{
		"create": func(ctx context.Context) error {
			_, err := r.CreateContainer(ctx, r.createRequest(silent, "new", "true"))
			return err
		},
		"stop": func(ctx context.Context) error {
			_, err := r.StopContainer(ctx, &cri.StopContainerRequest{ContainerId: lost})
			return err
		},
		"remove": func(ctx context.Context) error {
			_, err := r.RemoveContainer(ctx, &cri.RemoveContainerRequest{ContainerId: lost})
			return err
		},
		"exec": func(ctx context.Context) error {
			_, err := r.ExecSync(ctx, &cri.ExecSyncRequest{ContainerId: lost, Cmd: []string{"true"}})
			return err
		},
		"stopPod": func(ctx context.Context) error {
			_, err := r.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: silent})
			return err
		},
	} {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
		if err := call(ctx); !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "taken over") {
			t.Errorf("%s on a sandbox that is not settled: %v", name, err)
		}
		cancel()
	}
	if _, err := r.StopContainer(t.Context(), &cri.StopContainerRequest{ContainerId: lost}); err != nil { // waits
		t.Error(err)
	}
	if s := r.exit(lost); s.GetExitCode() != 137 || !strings.Contains(s.GetMessage(), "did not survive") {
		t.Errorf("container of the silent guest is %v", s)
	}
	if status, err := r.PodSandboxStatus(t.Context(), &cri.PodSandboxStatusRequest{PodSandboxId: silent}); err != nil || status.GetStatus().GetState() != cri.PodSandboxState_SANDBOX_NOTREADY {
		t.Errorf("sandbox of the silent guest is %v (%v)", status, err)
	}
	<-r.restored
}

// TestRestartBesideSlowGuest: one that only takes its time is adopted beside the serving, with all that runs in it; and
// a daemon that ends before then has decided nothing.
func TestRestartBesideSlowGuest(t *testing.T) {
	r := newRig(t)
	pod := r.runPod("a")
	release := filepath.Join(r.dir, "release")
	id := r.run(pod, "c", "echo one; while [ ! -e "+release+" ]; do sleep 0.02; done; echo two; exit 6")
	vm := r.frozen(pod)
	r.early = true
	for range 2 {
		r.restart()
		select {
		case <-r.restored:
			t.Fatal("a frozen guest was adopted, or given up")
		default:
		}
	}
	if err := vm.Resume(t.Context()); err != nil {
		t.Fatal(err)
	}
	if out, err := r.ExecSync(t.Context(), &cri.ExecSyncRequest{ContainerId: id, Cmd: []string{"echo", "on"}, Timeout: 20}); err != nil || string(out.GetStdout()) != "on\n" {
		t.Errorf("exec: %v (%v)", out, err)
	}
	if err := os.WriteFile(release, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if s := r.exit(id); s.GetExitCode() != 6 || r.log(s) != "one\ntwo\n" {
		t.Errorf("container is %v, its log %q", s, r.log(s))
	}
}

// TestRestartUndoesBeforeRetry: kubelet's retry of a RunPodSandbox amid which the daemon died waits until that is undone.
func TestRestartUndoesBeforeRetry(t *testing.T) {
	r := newRig(t)
	pod := r.runPod("a")
	vm := r.frozen(pod)
	r.Server.cancel()
	if _, err := r.store.UpdateSandbox(pod, func(rec *store.Sandbox) error { rec.State = store.SandboxCreating; return nil }); err != nil {
		t.Fatal(err)
	}
	r.stop()
	r.early = true
	r.start()
	if again := r.runPod("a"); again == pod {
		t.Error("the half made sandbox is taken for a whole one")
	}
	if !gone(vm.PID()) {
		t.Error("the VM of the half made sandbox still runs")
	}
}

// TestRestartFinishesStop: a container that ended by itself while no daemon was there, in a sandbox that was being stopped,
// has its own exit code and its last output.
func TestRestartFinishesStop(t *testing.T) {
	r := newRig(t)
	pod := r.runPod("a")
	release, ended := filepath.Join(r.dir, "release"), filepath.Join(r.dir, "ended")
	id := r.run(pod, "c", "while [ ! -e "+release+" ]; do sleep 0.02; done; echo last words; echo > "+ended+"; exit 7")
	sleeper := r.run(pod, "d", "echo asleep; exec sleep 1000")
	r.Server.cancel()
	if _, err := r.store.UpdateSandbox(pod, func(rec *store.Sandbox) error { rec.State = store.SandboxStopping; return nil }); err != nil {
		t.Fatal(err)
	}
	r.stop()
	if err := os.WriteFile(release, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the container ends", func() error { _, err := os.Stat(ended); return err })
	r.start()
	if s := r.exit(id); s.GetExitCode() != 7 || r.log(s) != "last words\n" {
		t.Errorf("container that ended meanwhile is %v, its log %q", s, r.log(s))
	}
	if s := r.exit(sleeper); s.GetExitCode() != 137 || r.log(s) != "asleep\n" {
		t.Errorf("container that was killed is %v, its log %q", s, r.log(s))
	}
	if rec, err := r.store.Sandbox(pod); err != nil || rec.State != store.SandboxNotReady {
		t.Errorf("sandbox is %v (%v)", rec.State, err)
	}
}

// eventually waits for a condition that comes by itself.
func eventually(t testing.TB, what string, check func() error) {
	t.Helper()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	limit := time.NewTimer(30 * time.Second)
	defer limit.Stop()
	for {
		err := check()
		if err == nil {
			return
		}
		select {
		case <-tick.C:
		case <-limit.C:
			t.Fatalf("not within 30 s: %s: %v", what, err)
		}
	}
}

// manyPods makes pods, each with a container that runs.
func (r *rig) manyPods(n int) {
	r.t.Helper()
	var group errgroup.Group
	group.SetLimit(8)
	for i := range n {
		group.Go(func() error {
			resp, err := r.RunPodSandbox(r.t.Context(), &cri.RunPodSandboxRequest{Config: r.podConfig(fmt.Sprint("p", i))})
			if err != nil {
				return err
			}
			c, err := r.CreateContainer(r.t.Context(), r.createRequest(resp.GetPodSandboxId(), fmt.Sprint("c", i), "exec sleep 1000"))
			if err != nil {
				return err
			}
			_, err = r.StartContainer(r.t.Context(), &cri.StartContainerRequest{ContainerId: c.GetContainerId()})
			return err
		})
	}
	if err := group.Wait(); err != nil {
		r.t.Fatal(err)
	}
}

// TestRestartOfManyPods prints how long a daemon takes to serve again, with pods that all live, and then how long it
// takes to notice that they do not.
func TestRestartOfManyPods(t *testing.T) {
	r := newRig(t)
	const pods = 100
	n := pods
	if testing.Short() || raceDetector {
		n = 20
	}
	r.manyPods(n)
	r.early = true
	r.stop()
	start := time.Now()
	r.start()
	serving := time.Since(start)
	<-r.restored
	t.Logf("restart with %d pods: serving after %s, all adopted after %s", n, serving.Round(time.Millisecond), time.Since(start).Round(time.Millisecond))
	if serving > 5*time.Second {
		t.Errorf("serving after %s", serving)
	}
	list, err := r.ListContainers(t.Context(), &cri.ListContainersRequest{Filter: &cri.ContainerFilter{State: &cri.ContainerStateValue{State: cri.ContainerState_CONTAINER_RUNNING}}})
	if err != nil || len(list.GetContainers()) != n {
		t.Errorf("%d containers run (%v)", len(list.GetContainers()), err)
	}
	took := r.killAll()
	p99 := took[(len(took)*99+99)/100-1]
	t.Logf("a killed VMM is NOTREADY and told: median %s, p99 %s of %d", took[len(took)/2].Round(time.Millisecond), p99.Round(time.Millisecond), len(took))
	if p99 > 2*time.Second && !raceDetector {
		t.Errorf("p99 is %s", p99)
	}
}

// BenchmarkRestart is from the opening of the records of 100 pods to the serving of CRI.
func BenchmarkRestart(b *testing.B) {
	r := newRig(b)
	r.manyPods(100)
	for b.Loop() {
		r.restart()
	}
}
