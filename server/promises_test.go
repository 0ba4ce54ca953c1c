package server

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crivm/crivm/server/store"
)

// What kubelet relies on and nothing else here shows.

// ready waits for a file that a container's script makes.
func (r *rig) ready(path string) {
	r.t.Helper()
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		if _, err := os.Stat(path); err == nil {
			return
		}
		if time.Now().After(deadline) {
			r.t.Fatalf("no %s after 30 s", path)
		}
	}
}

// TestConcurrentStops: of StopContainer calls at the same time the signal is sent once, the shortest grace counts,
// and each returns when the exit is recorded.
func TestConcurrentStops(t *testing.T) {
	r := newRig(t)
	set, told := filepath.Join(r.dir, "set"), filepath.Join(r.dir, "told")
	id := r.run(r.runPod("a"), "c", "trap 'echo told; : > "+told+"' TERM; : > "+set+"; while :; do sleep 0.05; done")
	r.ready(set)
	start := time.Now()
	var calls sync.WaitGroup
	for _, grace := range []int64{3600, 3600, 3600, 1, 3600} {
		calls.Go(func() {
			if _, err := r.StopContainer(t.Context(), &cri.StopContainerRequest{ContainerId: id, Timeout: grace}); err != nil {
				t.Errorf("grace of %d s: %v", grace, err)
			}
			resp, err := r.ContainerStatus(t.Context(), &cri.ContainerStatusRequest{ContainerId: id})
			if err != nil || resp.GetStatus().GetState() != cri.ContainerState_CONTAINER_EXITED {
				t.Errorf("status when StopContainer has returned: %v (%v)", resp, err)
			}
		})
		r.ready(told) // what comes later comes after the signal
	}
	calls.Wait()
	if took := time.Since(start); took < time.Second {
		t.Errorf("killed after %s, before the shortest grace", took)
	}
	if s := r.exit(id); s.GetExitCode() != 137 || r.log(s) != "told\n" {
		t.Errorf("exit code %d, log %q; want 137 and one line", s.GetExitCode(), r.log(s))
	}
}

// TestStopSignalIsSentAgain: the first call could not reach the agent; the next one does not wait for a signal that
// was never sent.
func TestStopSignalIsSentAgain(t *testing.T) {
	r := newRig(t)
	pod := r.runPod("a")
	set := filepath.Join(r.dir, "set")
	id := r.run(pod, "c", "trap 'exit 7' TERM; : > "+set+"; while :; do sleep 0.05; done")
	r.ready(set)
	sb := r.sandbox(pod)
	if err := sb.dial.lock(t.Context()); err != nil { // nobody can connect
		t.Fatal(err)
	}
	sb.disconnect()
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if _, err := r.StopContainer(ctx, &cri.StopContainerRequest{ContainerId: id, Timeout: 3600}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("stop without an agent: %v", err)
	}
	sb.dial.unlock()
	if _, err := r.StopContainer(t.Context(), &cri.StopContainerRequest{ContainerId: id, Timeout: 60}); err != nil {
		t.Error(err)
	}
	if s := r.exit(id); s.GetExitCode() != 7 {
		t.Errorf("exit code %d, want that of the trap", s.GetExitCode())
	}
}

// TestDeadAgent: with a guest that answers nothing, and no health check that would end it, StopContainer fails when
// its request does, and StopPodSandbox and RemovePodSandbox end within their limits and with the truth.
func TestDeadAgent(t *testing.T) {
	r := newRig(t)
	pod := r.runPod("a")
	id := r.run(pod, "c", "exec sleep 1000")
	created := r.create(pod, "created", "exit 0")
	r.frozen(pod)
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if _, err := r.StopContainer(ctx, &cri.StopContainerRequest{ContainerId: id}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("stop of a container in a dead guest: %v", err)
	}
	start := time.Now()
	if _, err := r.StopPodSandbox(t.Context(), &cri.StopPodSandboxRequest{PodSandboxId: pod}); err != nil {
		t.Error(err)
	}
	if took := time.Since(start); took > teardownLimit {
		t.Errorf("StopPodSandbox took %s", took)
	}
	for _, c := range []string{id, created} {
		if s := r.exit(c); s.GetExitCode() != 137 || s.GetReason() != reasonError || s.GetFinishedAt() == 0 {
			t.Errorf("container of a stopped sandbox is %v", s)
		}
	}
	for range 2 {
		if _, err := r.StopContainer(t.Context(), &cri.StopContainerRequest{ContainerId: id, Timeout: 3600}); err != nil {
			t.Error(err)
		}
		if _, err := r.RemoveContainer(t.Context(), &cri.RemoveContainerRequest{ContainerId: id}); err != nil {
			t.Error(err)
		}
		if _, err := r.RemovePodSandbox(t.Context(), &cri.RemovePodSandboxRequest{PodSandboxId: pod}); err != nil {
			t.Error(err)
		}
	}
}

// TestLogPathIsNeverEmpty: kubelet removes what the pattern log_path* finds, so "" would be everything in its directory,
// and /dev/null the node's.
func TestLogPathIsNeverEmpty(t *testing.T) {
	r := newRig(t)
	pod := r.runPod("a")
	silent := r.createRequest(pod, "silent", "exit 0")
	silent.Config.LogPath = ""
	resp, err := r.CreateContainer(t.Context(), silent)
	if err != nil {
		t.Fatal(err)
	}
	silentID := resp.GetContainerId()
	ended, running, created := r.run(pod, "ended", "exit 0"), r.run(pod, "running", "exec sleep 1000"), r.create(pod, "created", "exit 0")
	r.exit(ended)
	check := func(when string) {
		t.Helper()
		for id, want := range map[string]string{silentID: filepath.Join(os.DevNull, silentID+".log"), ended: filepath.Join(r.dir, "logs/ended.log"), running: filepath.Join(r.dir, "logs/running.log"), created: filepath.Join(r.dir, "logs/created.log")} {
			resp, err := r.ContainerStatus(t.Context(), &cri.ContainerStatusRequest{ContainerId: id})
			if err != nil || resp.GetStatus().GetLogPath() != want {
				t.Errorf("%s log_path is %q (%v), want %q", when, resp.GetStatus().GetLogPath(), err, want)
			}
		}
		status, err := r.ContainerStatus(t.Context(), &cri.ContainerStatusRequest{ContainerId: silentID})
		if err != nil {
			t.Fatal(err)
		}
		if hits, err := filepath.Glob(status.GetStatus().GetLogPath() + "*"); err != nil || len(hits) > 0 {
			t.Errorf("%s kubelet would remove %q (%v) with a container that has no log", when, hits, err)
		}
		statuses, err := r.PodSandboxStatus(t.Context(), &cri.PodSandboxStatusRequest{PodSandboxId: pod})
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range statuses.GetContainersStatuses() {
			if !filepath.IsAbs(s.GetLogPath()) {
				t.Errorf("%s log_path in the pod's status is %q", when, s.GetLogPath())
			}
		}
	}
	check("at first")
	r.restart()
	check("after a restart")
	vm, err := r.sandbox(pod).machine()
	if err != nil {
		t.Fatal(err)
	}
	if err := vm.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	r.exit(running)
	check("in a dead VM")
	r.restart()
	check("after a restart with a dead VM")
}

// TestReopenOnlyOfTheRunning: kubelet renames a log before it asks, and back when it is refused, which a new file would
// prevent.
func TestReopenOnlyOfTheRunning(t *testing.T) {
	r := newRig(t)
	pod := r.runPod("a")
	ended, running := r.run(pod, "ended", "echo last"), r.run(pod, "running", "exec sleep 1000")
	status := r.exit(ended)
	rotated := status.GetLogPath() + ".rotated"
	if err := os.Rename(status.GetLogPath(), rotated); err != nil {
		t.Fatal(err)
	}
	if _, err := r.ReopenContainerLog(t.Context(), &cri.ReopenContainerLogRequest{ContainerId: ended}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("log of an exited container: %v", err)
	}
	if _, err := os.Stat(status.GetLogPath()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("its log is made anew: %v", err)
	}
	path := filepath.Join(r.dir, "logs/running.log")
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if _, err := r.ReopenContainerLog(t.Context(), &cri.ReopenContainerLogRequest{ContainerId: running}); err != nil {
		t.Errorf("log of a running container: %v", err)
	}
	if _, err := os.Stat(path); err != nil {
		t.Error(err)
	}
}

// TestExecSyncEnds: at its deadline, with the client, and at once where there is no such command; and then nothing
// of it is left running.
func TestExecSyncEnds(t *testing.T) {
	r := newRig(t)
	id := r.run(r.runPod("a"), "c", "exec sleep 1000")
	running := func(mark string) (found []string) {
		files, _ := filepath.Glob("/proc/[0-9]*/cmdline")
		for _, file := range files {
			if line, err := os.ReadFile(file); err == nil && strings.Contains(string(line), mark) {
				found = append(found, strings.ReplaceAll(string(line), "\x00", " "))
			}
		}
		return found
	}
	for name, timeout := range map[string]int64{"deadline": 1, "client": 0} {
		ctx, cancel := context.WithCancel(t.Context())
		begun := filepath.Join(r.dir, "begun-"+name)
		script := fmt.Sprintf("sh -c 'while :; do sleep 0.1; done' %s & : > %s; wait", begun, begun)
		if name == "client" {
			go func() { r.ready(begun); cancel() }()
		}
		_, err := r.ExecSync(ctx, &cri.ExecSyncRequest{ContainerId: id, Cmd: []string{"sh", "-c", script}, Timeout: timeout})
		if name == "deadline" && !errors.Is(err, context.DeadlineExceeded) || name == "client" && !errors.Is(err, context.Canceled) {
			t.Errorf("%s: %v", name, err)
		}
		cancel()
		for deadline := time.Now().Add(20 * time.Second); len(running(begun)) > 0; time.Sleep(5 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("%s: there still run %q", name, running(begun))
			}
		}
	}
	start := time.Now()
	_, err := r.ExecSync(t.Context(), &cri.ExecSyncRequest{ContainerId: id, Cmd: []string{"/no/such/command"}, Timeout: 3600})
	if !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), "/no/such/command") {
		t.Errorf("a missing command: %v", err)
	}
	if took := time.Since(start); took > time.Minute {
		t.Errorf("a missing command fails after %s", took)
	}
}

// TestOOMKilledComesWithTheExit: there is no moment at which a container has EXITED for want of memory and the reason
// is another.
func TestOOMKilledComesWithTheExit(t *testing.T) {
	r := newRig(t)
	id := r.run(r.runPod("a"), "c", "exec sleep 1000")
	seen := make(chan string, 8)
	r.store.Observe(store.Observers{Container: func(_, after *store.Container) {
		if after != nil && after.State == store.ContainerExited {
			seen <- after.Reason
		}
	}})
	if err := r.exited(id, exitRecord{at: time.Now(), code: 137, reason: reasonOOMKilled}); err != nil {
		t.Fatal(err)
	}
	if err := r.exited(id, exitRecord{at: time.Now(), code: 1, reason: reasonError}); err != nil { // of the VM's end, later
		t.Fatal(err)
	}
	r.store.Observe(r.observers())
	close(seen)
	for reason := range seen {
		if reason != reasonOOMKilled {
			t.Errorf("EXITED with reason %s", reason)
		}
	}
	if s := r.exit(id); s.GetExitCode() != 137 || s.GetReason() != reasonOOMKilled {
		t.Errorf("status is %v", s)
	}
}
