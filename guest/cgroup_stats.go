package guest

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/crivm/crivm/agentproto"
)

// maxDescriptors bounds how many open files of a container are looked at for one answer.
const maxDescriptors = 1 << 16

// Stats implements Runtime: figures of the container's cgroup and those below it. Files that this kernel does
// not have leave their figures 0.
func (r *ociRuntime) Stats(id string, descriptors bool, s *agentproto.ContainerStats) error {
	dir := r.cgroup.path(id)
	if _, err := os.Stat(dir); err != nil {
		return fmt.Errorf("cgroup of container %s: %w", id, errdefs.ErrNotFound)
	}
	file := func(name string) string { return filepath.Join(dir, name) }

	cpu := readTable(file("cpu.stat"))
	s.CpuUsageNanos, s.CpuUserNanos, s.CpuSystemNanos = cpu["usage_usec"]*1000, cpu["user_usec"]*1000, cpu["system_usec"]*1000
	s.CpuPeriods, s.CpuThrottledPeriods, s.CpuThrottledNanos = cpu["nr_periods"], cpu["nr_throttled"], cpu["throttled_usec"]*1000
	s.CpuPressure = readPressure(file("cpu.pressure"))

	memory, events := readTable(file("memory.stat")), readTable(file("memory.events"))
	s.MemoryUsageBytes = readNumber(file("memory.current"))
	s.MemoryWorkingSetBytes = s.MemoryUsageBytes - min(memory["inactive_file"], s.MemoryUsageBytes)
	s.MemoryRssBytes, s.MemoryCacheBytes = memory["anon"], memory["file"]
	s.MemoryMappedBytes, s.MemoryKernelBytes = memory["file_mapped"], memory["kernel"]
	s.MemoryLimitBytes, s.MemoryPeakBytes = readNumber(file("memory.max")), readNumber(file("memory.peak"))
	s.PageFaults, s.MajorPageFaults = memory["pgfault"], memory["pgmajfault"]
	s.MemoryLimitHits, s.OomKills = events["max"], events["oom_kill"]
	s.SwapUsageBytes, s.SwapLimitBytes = readNumber(file("memory.swap.current")), readNumber(file("memory.swap.max"))
	s.MemoryPressure = readPressure(file("memory.pressure"))

	s.Hugepages = hugepageStats(dir)

	s.Pids, s.PidsLimit = readNumber(file("pids.current")), readNumber(file("pids.max"))
	s.Devices = readDevices(file("io.stat"))
	s.IoPressure = readPressure(file("io.pressure"))

	processes := r.cgroup.processes(id)
	s.Processes = uint64(len(processes))
	if descriptors {
		s.FileDescriptors, s.Sockets = openFiles(processes)
		if len(processes) > 0 {
			s.FileLimit = fileLimit(processes[0])
		}
	}
	return nil
}

// readPressure reads pressure stall information; nil when the kernel has none.
//
//	some avg10=0.00 avg60=0.00 avg300=0.00 total=0
//	full avg10=0.00 avg60=0.00 avg300=0.00 total=0
func readPressure(path string) *agentproto.Pressure {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil
	}
	p := &agentproto.Pressure{}
	for line := range strings.Lines(string(b)) {
		kind, values, _ := strings.Cut(line, " ")
		l := &agentproto.PressureLine{}
		for field := range strings.FieldsSeq(values) {
			key, value, _ := strings.Cut(field, "=")
			switch key {
			case "avg10":
				l.Avg10, _ = strconv.ParseFloat(value, 64)
			case "avg60":
				l.Avg60, _ = strconv.ParseFloat(value, 64)
			case "avg300":
				l.Avg300, _ = strconv.ParseFloat(value, 64)
			case "total":
				micros, _ := strconv.ParseUint(value, 10, 64)
				l.TotalNanos = micros * 1000
			}
		}
		switch kind {
		case "some":
			p.Some = l
		case "full":
			p.Full = l
		}
	}
	return p
}

// readDevices reads io.stat: "254:0 rbytes=4096 wbytes=0 rios=1 wios=0 dbytes=0 dios=0".
func readDevices(path string) []*agentproto.DeviceStats {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil
	}
	devices := []*agentproto.DeviceStats{}
	for line := range strings.Lines(string(b)) {
		fields := strings.Fields(line)
		if len(fields) < 2 {
			continue
		}
		d := &agentproto.DeviceStats{}
		if n, err := fmt.Sscanf(fields[0], "%d:%d", &d.Major, &d.Minor); n != 2 || err != nil {
			continue
		}
		for _, field := range fields[1:] {
			key, value, _ := strings.Cut(field, "=")
			n, _ := strconv.ParseUint(value, 10, 64)
			switch key {
			case "rbytes":
				d.ReadBytes = n
			case "wbytes":
				d.WriteBytes = n
			case "rios":
				d.Reads = n
			case "wios":
				d.Writes = n
			}
		}
		if target, err := os.Readlink("/sys/dev/block/" + fields[0]); err == nil {
			d.Name = filepath.Base(target)
		}
		devices = append(devices, d)
	}
	return devices
}

// openFiles counts open files, and how many of them are sockets.
func openFiles(pids []int) (files, sockets uint64) {
	for _, pid := range pids {
		dir := fmt.Sprintf("/proc/%d/fd", pid)
		entries, err := os.ReadDir(dir)
		if err != nil {
			continue // it has ended
		}
		for _, e := range entries {
			if files++; files > maxDescriptors {
				return maxDescriptors, sockets
			}
			if target, err := os.Readlink(filepath.Join(dir, e.Name())); err == nil && strings.HasPrefix(target, "socket:") {
				sockets++
			}
		}
	}
	return files, sockets
}

// fileLimit is the soft limit of open files of a process; 0 when it cannot be had.
func fileLimit(pid int) uint64 {
	var limit unix.Rlimit
	if err := unix.Prlimit(pid, unix.RLIMIT_NOFILE, nil, &limit); err != nil {
		return 0
	}
	return limit.Cur
}
