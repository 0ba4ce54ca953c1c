package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"
)

// lives are samples of pods' lives, one slice a verb.
type lives struct {
	run, aside, add, create, start, total, exec, stop, remove []time.Duration

	cpu []time.Duration // of the VMM, when RunPodSandbox returned
}

// vmm is a running VMM as its pod's status tells, and its command line.
type vmm struct {
	Name         string `json:"vmm"`
	Acceleration string `json:"acceleration"`
	PID          int    `json:"pid"`
	args         []string
	dir          string // of the VM: its working directory
	Slot         any    `json:"slot"` // of the pool, that the pod took; nil: none
}

// measureStart measures the verbs of a pod's life: pods of crivm and of containerd and boots of the bare VM in turns.
func (b *bench) measureStart(ctx context.Context, s *section) error {
	cold, warm, other := &lives{}, &lives{}, &lives{}
	if _, err := b.life(ctx, b.crivm, "", &lives{}); err != nil { // makes the scratch disk's template, proves the acceleration
		return fmt.Errorf("first pod: %w", err)
	}
	if b.peer != nil {
		if _, err := b.life(ctx, &b.peer.system, "", &lives{}); err != nil {
			return fmt.Errorf("first pod: %w", err)
		}
	}
	pod, err := b.crivm.runtime.RunPodSandbox(ctx, b.crivm.podConfig(), "")
	if err != nil {
		return err
	}
	machine, err := b.vmm(ctx, pod)
	if err != nil {
		return err
	}
	if err := b.crivm.remove(ctx, pod); err != nil {
		return err
	}
	floors, err := newFloor(machine, filepath.Join(b.dir, "floor"))
	if err != nil {
		s.Notes = append(s.Notes, "The bare floor was not measured: "+err.Error())
	} else if _, err := floors.boot(ctx, floors.full); err != nil {
		return fmt.Errorf("first floor: %w", err)
	}
	var full, bare, fullCPU, ratios []time.Duration
	steps := newStepTables()
	logged := b.logSize()
	for i := range b.o.rounds {
		turns := []func() error{
			func() error { _, err := b.life(ctx, b.crivm, "", cold); return err },
		}
		if b.peer != nil {
			turns = append(turns, func() error { _, err := b.life(ctx, &b.peer.system, "", other); return err })
		}
		if b.slots > 0 {
			turns = append(turns, func() error { _, err := b.life(ctx, b.crivm, warmHandler, warm); return err })
		}
		if floors != nil {
			turns = append(turns, func() error {
				f, err := floors.boot(ctx, floors.full)
				full, fullCPU = append(full, f.Wall), append(fullCPU, f.CPU)
				return err
			}, func() error {
				f, err := floors.boot(ctx, floors.bare)
				bare = append(bare, f.Wall)
				return err
			})
		}
		for t := range turns { // each is the first one in turn
			if err := b.awaitPool(ctx); err != nil {
				return err
			}
			if err := turns[(i+t)%len(turns)](); err != nil {
				return fmt.Errorf("round %d: %w", i+1, err)
			}
		}
		if floors != nil {
			ratios = append(ratios, time.Duration(float64(time.Millisecond)*float64(cold.run[i])/float64(full[i])))
		}
		fmt.Fprintf(os.Stderr, "start: round %d of %d, load %s\n", i+1, b.o.rounds, loadAverage())
	}
	log, err := logFrom(b.n.LogPath(), logged)
	if err != nil {
		return err
	}
	if err := steps.read(log, warmHandler); err != nil {
		return err
	}

	s.compare("cold RunPodSandbox / bare floor", times(cold.run), times(full), 1.15, false)
	s.compare("  median of the rounds' own ratios", times(ratios), newDist([]float64{1}), 0, false)
	s.compare("  VMM's CPU time until then", times(cold.cpu), times(fullCPU), 0, false)
	s.compare("  / floor without disk, NIC, rng, balloon and hot-plug ports", times(cold.run), times(bare), 0, false)
	s.compare("warm RunPodSandbox / containerd", times(warm.run), times(other.run), 0.8, false)
	s.compare("  CNI ADD taken away from both", times(warm.aside), times(other.aside), 0.5, false)
	s.compare("Run+Create+Start, warm / containerd", times(warm.total), times(other.total), 1.5, false)
	s.compare("Run+Create+Start, cold / containerd", times(cold.total), times(other.total), 0, false)

	t := s.table("one pod with one container")
	t.add("RunPodSandbox, cold", "ms", times(cold.run), times(other.run))
	t.add("RunPodSandbox, warm", "ms", times(warm.run), times(other.run))
	t.add("  CNI ADD in it, cold", "ms", times(cold.add), times(other.add))
	t.add("  CNI ADD in it, warm", "ms", times(warm.add), times(other.add))
	t.add("  warm, without CNI ADD", "ms", times(warm.aside), times(other.aside))
	t.add("CreateContainer, first in a cold pod", "ms", times(cold.create), times(other.create))
	t.add("CreateContainer, first in a warm pod", "ms", times(warm.create), times(other.create))
	t.add("StartContainer", "ms", times(append(slices.Clone(cold.start), warm.start...)), times(other.start))
	t.add("Run+Create+Start, cold", "ms", times(cold.total), times(other.total))
	t.add("Run+Create+Start, warm", "ms", times(warm.total), times(other.total))
	t.add(`ExecSync("true")`, "ms", times(append(slices.Clone(cold.exec), warm.exec...)), times(other.exec))
	t.add("StopPodSandbox, one running container", "ms", times(append(slices.Clone(cold.stop), warm.stop...)), times(other.stop))
	t.add("RemovePodSandbox", "ms", times(append(slices.Clone(cold.remove), warm.remove...)), times(other.remove))
	t = s.table("the bare floor")
	t.add("VMM start to the agent's first byte", "ms", times(full), nil)
	t.add("without devices", "ms", times(bare), nil)
	t.add("VMM's CPU time until then", "ms", times(fullCPU), nil)
	t.add("VMM's CPU time when RunPodSandbox returned", "ms", times(cold.cpu), nil)
	s.Tables = append(s.Tables, steps.tables()...)
	return nil
}

// life makes, uses and removes a pod with one container.
func (b *bench) life(ctx context.Context, sys *system, handler string, l *lives) (_ string, err error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	config := sys.podConfig()
	var pod, container string
	before := time.Duration(0)
	if sys != b.crivm {
		if before, err = sys.addTime(ctx, ""); err != nil {
			return "", err
		}
	}
	fail := func(verb string, err error) error { return fmt.Errorf("%s: %s: %w", sys.name, verb, err) }
	run, err := clock(func() error { pod, err = sys.runtime.RunPodSandbox(ctx, config, handler); return err })
	if err != nil {
		return "", fail("RunPodSandbox", err)
	}
	if sys == b.crivm {
		v, err := b.vmm(ctx, pod)
		if err != nil {
			return "", err
		}
		if (v.Slot != nil) != (handler == warmHandler) {
			return "", fmt.Errorf("crivm: pod with handler %q: slot is %v", handler, v.Slot)
		}
		used, err := cpuTime(v.PID)
		if err != nil {
			return "", err
		}
		l.cpu = append(l.cpu, used)
	}
	create, err := clock(func() error {
		container, err = sys.runtime.CreateContainer(ctx, pod, sys.containerConfig(sys.image, "sleep", "100000"), config)
		return err
	})
	if err != nil {
		return "", fail("CreateContainer", err)
	}
	start, err := clock(func() error { return sys.runtime.StartContainer(ctx, container) })
	if err != nil {
		return "", fail("StartContainer", err)
	}
	for range b.o.execs {
		d, err := clock(func() error {
			_, _, err := sys.runtime.ExecSync(ctx, container, []string{"true"}, time.Minute)
			return err
		})
		if err != nil {
			return "", fail("ExecSync", err)
		}
		l.exec = append(l.exec, d)
	}
	stop, err := clock(func() error { return sys.runtime.StopPodSandbox(ctx, pod) })
	if err != nil {
		return "", fail("StopPodSandbox", err)
	}
	remove, err := clock(func() error { return sys.runtime.RemovePodSandbox(ctx, pod) })
	if err != nil {
		return "", fail("RemovePodSandbox", err)
	}
	add, err := sys.addTime(ctx, pod)
	if err != nil {
		return "", err
	}
	add -= before
	l.run, l.add, l.aside = append(l.run, run), append(l.add, add), append(l.aside, run-add)
	l.create, l.start, l.total = append(l.create, create), append(l.start, start), append(l.total, run+create+start)
	l.stop, l.remove = append(l.stop, stop), append(l.remove, remove)
	return pod, nil
}

// vmm asks for a pod's VMM process and reads how it was started.
func (b *bench) vmm(ctx context.Context, pod string) (v vmm, err error) {
	status, err := b.crivm.runtime.PodSandboxStatus(ctx, pod, true)
	if err != nil {
		return v, fmt.Errorf("PodSandboxStatus: %w", err)
	}
	if err := json.Unmarshal([]byte(status.Info["info"]), &v); err != nil {
		return v, fmt.Errorf("PodSandboxStatus: verbose info: %w", err)
	}
	proc := fmt.Sprintf("/proc/%d", v.PID)
	line, err := os.ReadFile(filepath.Join(proc, "cmdline"))
	if err != nil {
		return v, fmt.Errorf("command line of the VMM: %w", err)
	}
	v.args = splitCommandLine(line)
	if v.dir, err = os.Readlink(filepath.Join(proc, "cwd")); err != nil {
		return v, fmt.Errorf("directory of the VM: %w", err)
	}
	return v, nil
}

// networkTime is what CNI ADD of a pod took, by crivm's log.
func (b *bench) networkTime(_ context.Context, pod string) (time.Duration, error) {
	log, err := os.ReadFile(b.n.LogPath())
	if err != nil {
		return 0, err
	}
	steps, err := readySteps(string(log), pod)
	if err != nil {
		return 0, err
	}
	for _, st := range steps {
		if st.Name == "cni add" {
			return st.Took, nil
		}
	}
	return 0, fmt.Errorf("crivm's log has no CNI ADD of sandbox %s", pod)
}

func (b *bench) logSize() int64 {
	info, err := os.Stat(b.n.LogPath())
	if err != nil {
		return 0
	}
	return info.Size()
}
