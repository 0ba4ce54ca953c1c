package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"

	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const lineLength = 100 // bytes, with the newline

// measureOutput measures how fast a container's stdout reaches its log file: from StartContainer's answer until the container is
// EXITED and its whole output is in the file.
func (b *bench) measureOutput(ctx context.Context, s *section) error {
	const fileBytes = 4 << 20
	line := append(bytes.Repeat([]byte("x"), lineLength-1), '\n')
	lines := bytes.Repeat(line, fileBytes/lineLength)
	if err := pushLines(b.registry, lines); err != nil {
		return fmt.Errorf("image with lines: %w", err)
	}
	ref := b.registry.Addr() + "/" + linesRepository
	systems := []*system{b.crivm}
	if b.peer != nil {
		systems = append(systems, &b.peer.system)
	}
	for _, sys := range systems {
		if _, err := sys.pull(ctx, ref); err != nil {
			return err
		}
	}
	copies := max(1, b.o.outputMB*1_000_000/len(lines))
	samples := map[*system][]float64{}
	growth := map[*system][]float64{}
	var machine, daemon []float64 // CPU time of crivm's, in ms
	for i := range b.o.outputs {
		for n := range systems {
			sys := systems[(i+n)%len(systems)]
			o, err := b.output(ctx, sys, ref, copies, len(lines))
			if err != nil {
				return err
			}
			samples[sys], growth[sys] = append(samples[sys], o.rate), append(growth[sys], o.growth)
			if sys == b.crivm {
				machine, daemon = append(machine, o.cpu["vmm"]), append(daemon, o.cpu["daemon"])
			}
		}
		fmt.Fprintf(os.Stderr, "stdout: round %d of %d, load %s\n", i+1, b.o.outputs, loadAverage())
	}
	var other, otherGrowth *dist
	if b.peer != nil {
		other, otherGrowth = newDist(samples[&b.peer.system]), newDist(growth[&b.peer.system])
	}
	t := s.table(fmt.Sprintf("%d MB of lines of %d bytes to stdout", copies*len(lines)/1_000_000, lineLength))
	t.add("to the log file", "MB/s", newDist(samples[b.crivm]), other)
	t.add("daemon's peak memory, growth", "MiB", newDist(growth[b.crivm]), otherGrowth)
	t.add("VMM's CPU time", "ms", newDist(machine), nil)
	t.add("daemon's CPU time", "ms", newDist(daemon), nil)
	s.compare("stdout to the log file / containerd", newDist(samples[b.crivm]), other, 0.5, true)
	return nil
}

// printed is what it took to bring a container's output into its log.
type printed struct {
	rate, growth float64            // MB/s; MiB of the daemon
	cpu          map[string]float64 // ms, by kind of process
}

// output runs one container that prints a file so many times.
func (b *bench) output(ctx context.Context, sys *system, ref string, copies, bytesEach int) (o printed, retErr error) {
	ctx, cancel := context.WithTimeout(ctx, callLimit)
	defer cancel()
	command := []string{"cat"}
	for range copies {
		command = append(command, "/lines")
	}
	config := sys.podConfig()
	pod, err := sys.runtime.RunPodSandbox(ctx, config, "")
	if err != nil {
		return o, fmt.Errorf("%s: RunPodSandbox: %w", sys.name, err)
	}
	defer func() {
		if err := sys.remove(ctx, pod); err != nil && retErr == nil {
			retErr = err
		}
	}()
	spec := sys.containerConfig(ref, command...)
	container, err := sys.runtime.CreateContainer(ctx, pod, spec, config)
	if err != nil {
		return o, fmt.Errorf("%s: CreateContainer: %w", sys.name, err)
	}
	if err := resetPeak(sys.pid); err != nil {
		return o, err
	}
	before, err := memory(sys.pid, "VmRSS")
	if err != nil {
		return o, err
	}
	if err := sys.runtime.StartContainer(ctx, container); err != nil {
		return o, fmt.Errorf("%s: StartContainer: %w", sys.name, err)
	}
	begin := time.Now()
	processes := b.processes(sys)
	used, err := allCPU(processes)
	if err != nil {
		return o, err
	}
	if err := await(ctx, 10*time.Millisecond, func() (bool, error) {
		status, err := sys.runtime.ContainerStatus(ctx, container, false)
		if err != nil {
			return false, err
		}
		if code := status.GetStatus().GetExitCode(); code != 0 {
			return false, fmt.Errorf("%s: container ended with %d: %s", sys.name, code, status.GetStatus().GetMessage())
		}
		return status.GetStatus().GetState() == criv1.ContainerState_CONTAINER_EXITED, nil
	}); err != nil {
		return o, err
	}
	took := time.Since(begin)
	path := filepath.Join(config.GetLogDirectory(), spec.GetLogPath())
	late := false
	if err := await(ctx, 10*time.Millisecond, func() (bool, error) { // a runtime may write the last lines after it has said EXITED
		text, err := os.ReadFile(path)
		if err != nil || bytes.Count(text, []byte{'\n'}) == copies*bytesEach/lineLength {
			return true, err
		}
		late = true
		return false, nil
	}); err != nil {
		return o, fmt.Errorf("%s: log: %w", sys.name, err)
	}
	if late {
		took = time.Since(begin)
	}
	peak, err := memory(sys.pid, "VmHWM")
	if err != nil {
		return o, err
	}
	usedNow, err := allCPU(processes)
	if err != nil {
		return o, err
	}
	o.cpu = map[string]float64{}
	for _, p := range processes {
		o.cpu[p.kind] += float64(usedNow[p.pid]-used[p.pid]) / 1e6
	}
	o.rate, o.growth = float64(copies*bytesEach)/1e6/took.Seconds(), max(0, peak-before)
	return o, os.Remove(path)
}

// await asks again and again until done or the context ends.
func await(ctx context.Context, every time.Duration, done func() (bool, error)) error {
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		ok, err := done()
		if ok || err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
	}
}
