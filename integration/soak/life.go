package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// callLimit bounds one call: a boot under software emulation beside other pods takes long.
const callLimit = 10 * time.Minute

// life is one pod from RunPodSandbox to RemovePodSandbox.
type life struct {
	s      *soaking
	random *rand.Rand
	name   string
	dir    string // of its logs; also the host directory that its containers have
	config *cri.PodSandboxConfig

	// Guarded by soaking.mu.
	id     string
	writer string
	hit    string // what of it was killed
}

func (l *life) short() string { return l.id[:16] }

func (l *life) wasHit() string {
	l.s.mu.Lock()
	defer l.s.mu.Unlock()
	return l.hit
}

// work lives one life after the other until the time is over.
func (s *soaking) work(ctx context.Context, worker int) {
	random := s.random(worker)
	for turn := 0; time.Now().Before(s.end) && ctx.Err() == nil; turn++ {
		name := fmt.Sprintf("soak-%d-%d", worker, turn)
		l := &life{s: s, random: random, name: name, dir: filepath.Join(s.n.Dir, "logs", name)}
		if err := l.live(ctx); err != nil {
			s.fail(fmt.Errorf("pod %s (%s), killed of it: %q: %w", name, l.id, l.wasHit(), err))
		}
		s.count("lives of pods")
	}
}

// try makes a call until it is answered by a crivm that lives.
func (l *life) try(ctx context.Context, what string, call func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, callLimit)
	defer cancel()
	for {
		if err := l.s.awaitUp(ctx); err != nil {
			return fmt.Errorf("%s: %w", what, err)
		}
		err := call(ctx)
		if code := status.Code(err); err == nil || ctx.Err() != nil || !transport(code, err) {
			l.s.count("calls: " + what)
			if err != nil {
				err = fmt.Errorf("%s: %w", what, err)
			}
			return err
		}
		l.s.count("calls that died with crivm")
		select {
		case <-time.After(50 * time.Millisecond):
		case <-ctx.Done():
		}
	}
}

// transport tells the end of a connection from an answer.
func transport(code codes.Code, err error) bool {
	text := err.Error()
	return (code == codes.Unavailable || code == codes.Canceled) && (strings.Contains(text, "connection error") || strings.Contains(text, "error reading from server") ||
		strings.Contains(text, "transport is closing") || strings.Contains(text, "server preface") || strings.Contains(text, "EOF") || strings.Contains(text, "closing transport") ||
		strings.Contains(text, "connection refused") || strings.Contains(text, "no such file"))
}

// live is the whole life. What fails in a pod of which a part was killed is no failure; what is true of a dead pod is
// checked then.
func (l *life) live(ctx context.Context) (retErr error) {
	if err := os.MkdirAll(l.dir, 0o755); err != nil {
		return err
	}
	defer func() { retErr = errors.Join(retErr, l.remove(ctx)) }()
	if err := l.run(ctx); err != nil {
		return err
	}
	err := l.verbs(ctx)
	if err == nil {
		err = l.stop(ctx)
	}
	if l.wasHit() != "" { // it may have been killed after all that
		return l.dead(ctx)
	}
	return err
}

func (l *life) run(ctx context.Context) error {
	l.config = &cri.PodSandboxConfig{
		Metadata: &cri.PodSandboxMetadata{Name: l.name, Namespace: "soak", Uid: l.name}, Hostname: l.name, LogDirectory: l.dir, Labels: map[string]string{"name": l.name},
		Linux: &cri.LinuxPodSandboxConfig{SecurityContext: &cri.LinuxSandboxSecurityContext{Privileged: true}},
	}
	return l.try(ctx, "RunPodSandbox", func(ctx context.Context) error {
		pods, err := l.s.n.Runtime.ListPodSandbox(ctx, &cri.PodSandboxFilter{LabelSelector: l.config.Labels})
		if err != nil {
			return err
		}
		id := ""
		if len(pods) > 0 {
			id = pods[0].GetId()
		} else if id, err = l.s.n.Runtime.RunPodSandbox(ctx, l.config, ""); err != nil {
			return err
		}
		l.s.mu.Lock()
		l.id = id
		l.s.progress++
		l.s.mu.Unlock()
		return nil
	})
}

// start makes and starts a container once, as kubelet does: by looking what is there before each try.
func (l *life) start(ctx context.Context, name, script string) (id string, _ error) {
	config := &cri.ContainerConfig{
		Metadata: &cri.ContainerMetadata{Name: name}, Image: &cri.ImageSpec{Image: busybox}, LogPath: name + ".log", Labels: map[string]string{"container": l.name + "/" + name},
		Command: []string{"sh", "-c", "echo started >>/host/" + name + ".starts; " + script},
		Mounts:  []*cri.Mount{{HostPath: l.dir, ContainerPath: "/host"}},
		Linux:   &cri.LinuxContainerConfig{Resources: &cri.LinuxContainerResources{}, SecurityContext: &cri.LinuxContainerSecurityContext{Privileged: true}},
	}
	err := l.try(ctx, "CreateContainer", func(ctx context.Context) error {
		there, err := l.s.n.Runtime.ListContainers(ctx, &cri.ContainerFilter{LabelSelector: config.Labels})
		if err != nil {
			return err
		}
		if len(there) > 0 {
			id = there[0].GetId()
			return nil
		}
		id, err = l.s.n.Runtime.CreateContainer(ctx, l.id, config, l.config)
		return err
	})
	if err != nil {
		return "", err
	}
	return id, l.try(ctx, "StartContainer", func(ctx context.Context) error {
		resp, err := l.s.n.Runtime.ContainerStatus(ctx, id, false)
		if err != nil || resp.GetStatus().GetState() != cri.ContainerState_CONTAINER_CREATED {
			return err
		}
		return l.s.n.Runtime.StartContainer(ctx, id)
	})
}

// verbs starts the writer of numbered lines and does random things beside it.
func (l *life) verbs(ctx context.Context) error {
	writer, err := l.start(ctx, "writer", `trap 'echo end; echo end >&2; exit 7' TERM; i=0; while :; do seq $((i+1)) $((i+100)); seq $((i+1)) $((i+100)) >&2; i=$((i+100)); sleep 0.1; done`)
	if err != nil {
		return err
	}
	l.s.mu.Lock()
	l.writer, l.s.pods[l.id] = writer, l
	l.s.mu.Unlock()
	for step := range 4 + l.random.IntN(12) {
		if l.wasHit() != "" || ctx.Err() != nil {
			return ctx.Err()
		}
		switch l.random.IntN(6) {
		case 0, 1:
			err = l.job(ctx, fmt.Sprintf("job%d", step))
		case 2:
			err = l.try(ctx, "ExecSync", func(ctx context.Context) error {
				out, _, err := l.s.n.Runtime.ExecSync(ctx, writer, []string{"echo", "alive"}, time.Minute)
				if err == nil && string(out) != "alive\n" {
					err = fmt.Errorf("exec says %q", out)
				}
				return err
			})
		case 3:
			err = l.rotate(ctx, step)
		case 4:
			err = l.try(ctx, "ContainerStats", func(ctx context.Context) error {
				_, err := l.s.n.Runtime.ContainerStats(ctx, writer)
				return err
			})
		default:
			err = l.try(ctx, "UpdateContainerResources", func(ctx context.Context) error {
				return l.s.n.Runtime.UpdateContainerResources(ctx, writer, &cri.ContainerResources{Linux: &cri.LinuxContainerResources{CpuShares: 100 + l.random.Int64N(1000)}})
			})
		}
		if err != nil {
			return err
		}
		select {
		case <-time.After(time.Duration(l.random.IntN(2000)) * time.Millisecond):
		case <-ctx.Done():
		}
	}
	return nil
}

// job is a container that ends by itself: its exit code and its output are known before.
func (l *life) job(ctx context.Context, name string) error {
	code, lines := l.random.IntN(200), 1+l.random.IntN(3000)
	id, err := l.start(ctx, name, fmt.Sprintf("seq 1 %d; exit %d", lines, code))
	if err != nil {
		return err
	}
	status, err := l.exit(ctx, id)
	if err != nil || l.wasHit() != "" {
		return err
	}
	if status.GetExitCode() != int32(code) {
		return fmt.Errorf("%s has exit code %d, want %d: %s", name, status.GetExitCode(), code, status.GetMessage())
	}
	got, err := l.logged(name, 0)
	if err == nil && got["stdout"] != lines {
		err = fmt.Errorf("%s: %d lines are logged, want %d", name, got["stdout"], lines)
	}
	if err != nil {
		return err
	}
	l.s.count("containers that ended by themselves")
	l.s.mu.Lock()
	l.s.progress++
	l.s.mu.Unlock()
	if err := l.startedOnce(name); err != nil {
		return err
	}
	return l.try(ctx, "RemoveContainer", func(ctx context.Context) error { return l.s.n.Runtime.RemoveContainer(ctx, id) })
}

func (l *life) exit(ctx context.Context, id string) (found *cri.ContainerStatus, _ error) {
	deadline := time.Now().Add(callLimit)
	for {
		err := l.try(ctx, "ContainerStatus", func(ctx context.Context) error {
			resp, err := l.s.n.Runtime.ContainerStatus(ctx, id, false)
			found = resp.GetStatus()
			return err
		})
		if err != nil || found.GetState() == cri.ContainerState_CONTAINER_EXITED {
			return found, err
		}
		if time.Now().After(deadline) {
			return nil, fmt.Errorf("container %s does not exit: %v", id, found)
		}
		select {
		case <-time.After(100 * time.Millisecond):
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// rotate renames the writer's log, as kubelet does, and mostly says so.
func (l *life) rotate(ctx context.Context, step int) error {
	path := filepath.Join(l.dir, "writer.log")
	if err := os.Rename(path, fmt.Sprintf("%s.%03d", path, step)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return l.try(ctx, "ReopenContainerLog", func(ctx context.Context) error { return l.s.n.Runtime.ReopenContainerLog(ctx, l.writer) })
}

// stop ends the writer and checks all that it ever said.
func (l *life) stop(ctx context.Context) error {
	err := l.try(ctx, "StopContainer", func(ctx context.Context) error { return l.s.n.Runtime.StopContainer(ctx, l.writer, 60) })
	if err != nil || l.wasHit() != "" {
		return err
	}
	status, err := l.exit(ctx, l.writer)
	if err != nil || l.wasHit() != "" {
		return err
	}
	if status.GetExitCode() != 7 {
		return fmt.Errorf("the writer has exit code %d: %v", status.GetExitCode(), status)
	}
	got, err := l.logged("writer", 2)
	if err != nil {
		return err
	}
	// The signal comes between two commands of the shell: the streams are at most one of them apart.
	if d := got["stdout"] - got["stderr"]; got["stdout"]%100 != 0 || d != 0 && d != 100 {
		return fmt.Errorf("the writer's log ends with %v", got)
	}
	l.s.count("writers whose log was whole")
	return l.startedOnce("writer")
}

// logged checks the lines of a container, over all its rotated logs: numbers from 1 without a gap, then ends "end" lines
// in all. It returns the last numbers.
func (l *life) logged(name string, ends int) (map[string]int, error) {
	paths, err := filepath.Glob(filepath.Join(l.dir, name+".log.*"))
	if err != nil {
		return nil, err
	}
	last, ended := map[string]int{}, 0
	for _, path := range append(paths, filepath.Join(l.dir, name+".log")) {
		f, err := os.Open(path)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		scanner := bufio.NewScanner(f)
		for row := 1; scanner.Scan(); row++ {
			parts := strings.SplitN(scanner.Text(), " ", 4)
			if len(parts) != 4 || parts[2] != "F" {
				return nil, fmt.Errorf("%s:%d: %q", path, row, scanner.Text())
			}
			if parts[3] == "end" {
				ended++
				continue
			}
			if number, err := strconv.Atoi(parts[3]); err != nil || number != last[parts[1]]+1 {
				return nil, fmt.Errorf("%s:%d: %s has %q after %d", path, row, parts[1], parts[3], last[parts[1]])
			}
			last[parts[1]]++
		}
		if err := scanner.Err(); err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
	}
	if ended != ends {
		return nil, fmt.Errorf("%s: %d ends, want %d", name, ended, ends)
	}
	return last, nil
}

func (l *life) startedOnce(name string) error {
	text, err := os.ReadFile(filepath.Join(l.dir, name+".starts"))
	if err != nil || string(text) != "started\n" {
		return fmt.Errorf("%s began so often: %q (%v)", name, text, err)
	}
	return nil
}

// dead checks what is true of a pod of which a part was killed, unless the kill has missed: NOTREADY in time, every
// container EXITED, not with 0 unless it had ended before, and no line of its log doubled or out of order.
func (l *life) dead(ctx context.Context) error {
	deadline := time.Now().Add(2 * time.Minute) // a guest that hangs under emulation has 30 s
	var state cri.PodSandboxState
	for {
		err := l.try(ctx, "PodSandboxStatus", func(ctx context.Context) error {
			resp, err := l.s.n.Runtime.PodSandboxStatus(ctx, l.id, false)
			state = resp.GetStatus().GetState()
			return err
		})
		if err != nil {
			return err
		}
		if state == cri.PodSandboxState_SANDBOX_NOTREADY {
			break
		}
		if time.Now().After(deadline) {
			return errors.New("the pod is still READY")
		}
		select {
		case <-time.After(200 * time.Millisecond):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	var all []*cri.Container
	err := l.try(ctx, "ListContainers", func(ctx context.Context) (err error) {
		all, err = l.s.n.Runtime.ListContainers(ctx, &cri.ContainerFilter{PodSandboxId: l.id})
		return err
	})
	if err != nil {
		return err
	}
	for _, c := range all {
		status, err := l.exit(ctx, c.GetId())
		if err != nil {
			return err
		}
		if status.GetMetadata().GetName() == "writer" && status.GetExitCode() == 0 || status.GetReason() == "" {
			return fmt.Errorf("container of a dead pod: %v", status)
		}
	}
	if _, err := l.logged("writer", 0); err != nil && !strings.Contains(err.Error(), "ends, want") && !strings.HasSuffix(err.Error(), "no such file or directory") {
		return err
	}
	l.s.count("pods that were seen dead")
	return nil
}

// remove ends the life, whatever it was.
func (l *life) remove(ctx context.Context) error {
	if l.id == "" {
		return nil
	}
	l.s.mu.Lock()
	delete(l.s.pods, l.id)
	l.s.mu.Unlock()
	err := l.try(ctx, "StopPodSandbox", func(ctx context.Context) error { return l.s.n.Runtime.StopPodSandbox(ctx, l.id) })
	return errors.Join(err, l.try(ctx, "RemovePodSandbox", func(ctx context.Context) error { return l.s.n.Runtime.RemovePodSandbox(ctx, l.id) }))
}
