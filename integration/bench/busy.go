package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	busyPause = 5 * time.Millisecond // between rounds of calls: kubelet is not the only one that waits for a CPU
	busyQuiet = 400                  // rounds of calls without boots
)

// unitNice is Nice= of contrib/crivm.service; its CPUWeight= is as much more as the same niceness of a session.
const unitNice = -10

// setNice sets the niceness of all threads of a process, and of its session, where the kernel makes sessions groups of the
// scheduler (sched(7), autogroup).
func setNice(pid, nice int) error {
	if err := os.WriteFile(fmt.Sprintf("/proc/%d/autogroup", pid), []byte(strconv.Itoa(nice)), 0); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("niceness of the session of process %d: %w", pid, err)
	}
	tasks, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
	if err != nil {
		return err
	}
	for _, task := range tasks {
		tid, err := strconv.Atoi(task.Name())
		if err == nil {
			err = unix.Setpriority(unix.PRIO_PROCESS, tid, nice)
		}
		if err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("niceness of process %d: %w", pid, err)
		}
	}
	return nil
}

// measureBusy times the calls that kubelet makes every second while 20 real VMs boot on the machine, and
// without.
// On a machine with less CPUs than VMs a call takes as long as its processes wait for one: a time of the machine's
// scheduler and not of crivm's. So the time that a thread of this program waits after a sleep of a millisecond is
// measured beside the calls, with the same load.
func (b *bench) measureBusy(ctx context.Context, s *section) error {
	_, container, err := b.crivm.start(ctx, "", b.crivm.image, "sleep", "100000")
	if err != nil {
		return err
	}
	defer b.crivm.removeAllPods(context.WithoutCancel(ctx))
	for _, pid := range []int{b.crivm.pid, os.Getpid()} {
		if err := setNice(pid, unitNice); err != nil {
			return err
		}
		defer setNice(pid, 0)
	}
	t := s.table(fmt.Sprintf("calls on a node with few pods, by themselves and while %d VMs boot", b.o.busyPods))
	quiet := b.callAround(ctx, container, func(rounds int) bool { return rounds >= busyQuiet })
	if quiet.err != nil {
		return quiet.err
	}
	quiet.report(t, "")

	ended := make(chan error, b.o.busyPods)
	var boots sync.WaitGroup
	begin := time.Now()
	for range b.o.busyPods {
		config := b.crivm.podConfig()
		boots.Go(func() {
			_, err := b.crivm.runtime.RunPodSandbox(ctx, config, "")
			ended <- err
		})
	}
	done := make(chan struct{})
	go func() { boots.Wait(); close(done) }()
	busy := b.callAround(ctx, container, func(int) bool {
		select {
		case <-done:
			return true
		default:
			return false
		}
	})
	<-done
	close(ended)
	if busy.err != nil {
		return busy.err
	}
	ready := 0
	for err := range ended { // on a machine that is too busy for so many boots the calls are worth a look all the same
		if err != nil {
			fmt.Fprintf(os.Stderr, "busy: %v\n", err)
			continue
		}
		ready++
	}
	s.Notes = append(s.Notes, fmt.Sprintf("%d of %d VMs were READY after %s, the others ended at their boot timeout.", ready, b.o.busyPods, time.Since(begin).Round(time.Second)))
	busy.report(t, fmt.Sprintf(", %d VMs boot", b.o.busyPods))
	s.Ratios = append(s.Ratios, ratio{fmt.Sprintf("ContainerStatus while %d VMs boot, p99 in ms", b.o.busyPods), percentile(busy.status, 99), 2, false})
	s.Notes = append(s.Notes, fmt.Sprintf("The daemon has the niceness and weight that its unit gives it (Nice=%d), and so has this program, whose own waiting for a CPU would count else.", unitNice))
	s.Notes = append(s.Notes, "\"sleep of 1 ms\" is what this program's own sleep takes longer, with the same load: what is lost to waiting for a CPU before any work is done.")
	return nil
}

// around are the times of calls, in milliseconds.
type around struct {
	status, containers, sandboxes, sleep []float64
	err                                  error
}

// callAround makes the calls, in an order of chance, until it is told to end.
func (b *bench) callAround(ctx context.Context, container string, end func(rounds int) bool) (a around) {
	for rounds := 0; !end(rounds); rounds++ {
		for _, c := range shuffled([]struct {
			to   *[]float64
			call func() error
		}{
			{&a.status, func() error { _, err := b.crivm.runtime.ContainerStatus(ctx, container, false); return err }},
			{&a.containers, func() error { _, err := b.crivm.runtime.ListContainers(ctx, nil); return err }},
			{&a.sandboxes, func() error { _, err := b.crivm.runtime.ListPodSandbox(ctx, nil); return err }},
			{&a.sleep, func() error {
				return unix.Nanosleep(&unix.Timespec{Nsec: int64(time.Millisecond)}, nil)
			}},
		}) {
			took, err := clock(c.call)
			if err != nil && !errors.Is(err, unix.EINTR) {
				a.err = err
				return a
			}
			*c.to = append(*c.to, float64(took.Microseconds())/1000)
		}
		time.Sleep(busyPause)
	}
	for i := range a.sleep {
		a.sleep[i] = max(0, a.sleep[i]-1)
	}
	return a
}

func (a around) report(t *table, suffix string) {
	for _, r := range []struct {
		name    string
		samples []float64
	}{{"ContainerStatus", a.status}, {"ListContainers", a.containers}, {"ListPodSandbox", a.sandboxes}, {"sleep of 1 ms, late by", a.sleep}} {
		t.add(r.name+suffix, "ms", newDist(r.samples), nil)
		t.add(r.name+suffix+", p99", "ms", newDist([]float64{percentile(r.samples, 99)}), nil)
	}
}

// percentile is the p-th of samples; 0 without any.
func percentile(samples []float64, p int) float64 {
	if len(samples) == 0 {
		return 0
	}
	return slices.Sorted(slices.Values(samples))[int(math.Ceil(float64(p*len(samples))/100))-1]
}

// shuffled changes the order: the first call after a pause takes longer than the others, whichever it is.
func shuffled[T any](s []T) []T {
	rand.Shuffle(len(s), func(i, j int) { s[i], s[j] = s[j], s[i] })
	return s
}
