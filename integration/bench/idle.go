package main

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// share is what an idle pod costs, in MiB of PSS or in parts of a CPU.
type share struct{ daemon, vmm, guest, helpers float64 }

func (a share) total() float64 { return a.daemon + a.vmm + a.guest + a.helpers }

// measureIdle starts pods with one sleeping container each and measures what each of them adds: memory, and CPU over a window.
// The pods of the two runtimes do not run at the same time.
func (b *bench) measureIdle(ctx context.Context, s *section) error {
	if err := b.restart(ctx); err != nil { // what earlier sections have left in memory would count against the first pod
		return err
	}
	pods := b.o.idlePods
	memoryTable := s.table(fmt.Sprintf("memory of an idle pod, PSS; mean of %d", pods))
	cpuTable := s.table(fmt.Sprintf("CPU of an idle pod over %s; mean of %d", b.o.idleWindow, pods))
	ourMemory, ourCPU, err := b.idle(ctx, b.crivm, pods)
	if err != nil {
		return err
	}
	var otherMemory, otherCPU *share
	if b.peer != nil {
		m, c, err := b.idle(ctx, &b.peer.system, pods)
		if err != nil {
			return err
		}
		otherMemory, otherCPU = &m, &c
	}
	rows := func(t *table, unit string, scale float64, ours share, other *share) {
		part := func(name string, of func(share) float64) {
			var peer *dist
			if other != nil {
				peer = newDist([]float64{scale * of(*other)})
			}
			t.add(name, unit, newDist([]float64{scale * of(ours)}), peer)
		}
		part("daemon, growth per pod", func(s share) float64 { return s.daemon })
		part("VMM without the guest's memory; containerd: none", func(s share) float64 { return s.vmm })
		part("guest's memory; containerd: pause and the container", func(s share) float64 { return s.guest })
		part("helpers: virtiofsd; containerd: shim", func(s share) float64 { return s.helpers })
		part("whole pod", share.total)
	}
	rows(memoryTable, "MiB", 1, ourMemory, otherMemory)
	rows(cpuTable, "‰ of a CPU", 1000, ourCPU, otherCPU)
	s.Ratios = append(s.Ratios, ratio{"crivm's daemon, MiB of PSS per further idle pod", ourMemory.daemon, 0.5, false})
	return nil
}

func (b *bench) idle(ctx context.Context, sys *system, pods int) (mem, cpu share, retErr error) {
	ctx, cancel := context.WithTimeout(ctx, callLimit)
	defer cancel()
	defer func() {
		if err := sys.removeAllPods(context.WithoutCancel(ctx)); err != nil && retErr == nil {
			retErr = err
		}
	}()
	begin := func() error { _, _, err := sys.start(ctx, "", sys.image, "sleep", "100000"); return err }
	if err := begin(); err != nil { // what the first pod costs is the daemon's own: buffers, code that is read for the first time
		return mem, cpu, err
	}
	window := func() (time.Duration, map[int]time.Duration, error) {
		before, err := allCPU(b.processes(sys))
		if err != nil {
			return 0, nil, err
		}
		start := time.Now()
		select {
		case <-time.After(b.o.idleWindow):
		case <-ctx.Done():
			return 0, nil, ctx.Err()
		}
		after, err := allCPU(b.processes(sys))
		for pid := range after {
			after[pid] -= before[pid]
		}
		return time.Since(start), after, err
	}
	settle(ctx)
	one, err := pss(sys.pid)
	if err != nil {
		return mem, cpu, err
	}
	oneTime, oneCPU, err := window()
	if err != nil {
		return mem, cpu, err
	}
	for range pods {
		if err := begin(); err != nil {
			return mem, cpu, err
		}
	}
	settle(ctx)
	all, err := pss(sys.pid)
	if err != nil {
		return mem, cpu, err
	}
	mem.daemon = (all - one) / float64(pods)
	allTime, used, err := window()
	if err != nil {
		return mem, cpu, err
	}
	n := float64(pods + 1) // other processes are counted of all pods
	cpu.daemon = (used[sys.pid].Seconds()/allTime.Seconds() - oneCPU[sys.pid].Seconds()/oneTime.Seconds()) / float64(pods)
	for _, p := range b.processes(sys) {
		if p.pid == sys.pid {
			continue
		}
		whole, err := pss(p.pid)
		if err != nil {
			return mem, cpu, err
		}
		rate := used[p.pid].Seconds() / allTime.Seconds() / n
		switch p.kind {
		case "vmm":
			guest, err := guestMemory(p.pid)
			if err != nil {
				return mem, cpu, err
			}
			mem.vmm, mem.guest = mem.vmm+(whole-guest)/n, mem.guest+guest/n
			cpu.vmm += rate
		case "container":
			mem.guest, cpu.guest = mem.guest+whole/n, cpu.guest+rate
		default:
			mem.helpers, cpu.helpers = mem.helpers+whole/n, cpu.helpers+rate
		}
	}
	return mem, cpu, nil
}

// settle lets what pods do after their start come to an end.
func settle(ctx context.Context) {
	select {
	case <-time.After(8 * time.Second):
	case <-ctx.Done():
	}
}

type process struct {
	pid  int
	kind string // daemon, vmm, container or helper
}

// processes are a runtime's: the daemon and all that names its directory or descends from its shims.
func (b *bench) processes(sys *system) (found []process) {
	found = append(found, process{sys.pid, "daemon"})
	parents := map[int]int{}
	lines := map[int]string{}
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	for _, dir := range dirs {
		pid, _ := strconv.Atoi(filepath.Base(dir))
		line, err := os.ReadFile(filepath.Join(dir, "cmdline"))
		if err != nil || pid == os.Getpid() {
			continue
		}
		if stat, err := os.ReadFile(filepath.Join(dir, "stat")); err == nil {
			_, after, _ := strings.Cut(string(stat), ") ")
			if f := strings.Fields(after); len(f) > 1 {
				parents[pid], _ = strconv.Atoi(f[1])
			}
		}
		lines[pid] = strings.ReplaceAll(string(line), "\x00", " ")
	}
	mark := b.n.RunDir
	if sys != b.crivm {
		mark = b.peer.runDir
	}
	for pid, line := range lines {
		shim := strings.Contains(lines[parents[pid]], mark) && parents[pid] != sys.pid
		switch {
		case pid == sys.pid:
		case strings.Contains(line, mark) && strings.Contains(line, "virtiofsd"), strings.Contains(line, mark) && strings.Contains(line, "containerd-shim"):
			found = append(found, process{pid, "helper"})
		case strings.Contains(line, mark) && sys == b.crivm:
			found = append(found, process{pid, "vmm"})
		case shim && sys != b.crivm:
			found = append(found, process{pid, "container"})
		}
	}
	return found
}

// pss is a process's proportional set size in MiB.
func pss(pid int) (float64, error) {
	return smapsField(fmt.Sprintf("/proc/%d/smaps_rollup", pid), "Pss:")
}

func smapsField(path, key string) (float64, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(text)) {
		if rest, ok := strings.CutPrefix(line, key); ok {
			kib, err := strconv.ParseFloat(strings.Fields(rest)[0], 64)
			return kib / 1024, err
		}
	}
	return 0, fmt.Errorf("%s has no %s", path, key)
}

// memory is a field of /proc/PID/status in MiB.
func memory(pid int, key string) (float64, error) {
	return smapsField(fmt.Sprintf("/proc/%d/status", pid), key+":")
}

// resetPeak makes VmHWM the present resident size.
func resetPeak(pid int) error {
	return os.WriteFile(fmt.Sprintf("/proc/%d/clear_refs", pid), []byte("5"), 0)
}

// guestMemory is the PSS in MiB of the mappings of a VMM that are the guest's memory: files in memory that VMMs make for it;
// without any, the mapping with the most PSS.
func guestMemory(pid int) (float64, error) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/smaps", pid))
	if err != nil {
		return 0, err
	}
	defer f.Close()
	var named, most float64
	file := false // whether the mapping at hand is such a file
	for lines := bufio.NewScanner(f); lines.Scan(); {
		line := lines.Text()
		rest, ok := strings.CutPrefix(line, "Pss:")
		if !ok {
			if begin, _, header := strings.Cut(line, " "); header && strings.Contains(begin, "-") {
				file = strings.Contains(line, "memfd:") || strings.Contains(line, "/dev/shm/")
			}
			continue
		}
		kib, err := strconv.ParseFloat(strings.Fields(rest)[0], 64)
		if err != nil {
			return 0, err
		}
		if file {
			named += kib
		}
		most = max(most, kib)
	}
	if named == 0 {
		named = most
	}
	return named / 1024, nil
}

// allCPU is the CPU time that processes have used so far, by process.
func allCPU(all []process) (map[int]time.Duration, error) {
	used := map[int]time.Duration{}
	for _, p := range all {
		tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", p.pid))
		if err != nil {
			return nil, err
		}
		for _, t := range tasks {
			text, err := os.ReadFile(t)
			if err != nil {
				continue // the thread has ended
			}
			if f := strings.Fields(string(text)); len(f) > 0 {
				nanos, err := strconv.ParseInt(f[0], 10, 64)
				if err != nil {
					return nil, err
				}
				used[p.pid] += time.Duration(nanos)
			}
		}
	}
	return used, nil
}
