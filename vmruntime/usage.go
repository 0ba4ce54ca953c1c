package vmruntime

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
)

// Usage is what a VM costs its host. CPU, memory, cache and swap are those of the VMM's own cgroup leaf where
// it has one, which counts what the kernel does for it too (vhost threads, page cache); else of the process.
type Usage struct {
	CPUNanos, UserNanos, SystemNanos uint64

	MemoryBytes     uint64 // all that is charged
	WorkingSetBytes uint64 // without file pages that were not used lately
	RSSBytes        uint64 // of the process: anonymous and shared memory, which guest memory is
	CacheBytes      uint64
	SwapBytes       uint64

	PageFaults, MajorPageFaults uint64 // of the process; the first counts minor and major ones
	Threads                     uint64

	Interfaces []InterfaceUsage // of the VMM's network namespace

	shared uint64 // shared memory of the process, which guest memory may be
	leaf   bool   // memory is the cgroup's
}

// AddServer adds what a process costs that serves the VM and maps its memory, which is counted once.
func (u *Usage) AddServer(s Usage) {
	u.CPUNanos += s.CPUNanos
	u.UserNanos += s.UserNanos
	u.SystemNanos += s.SystemNanos
	if !s.leaf { // a cgroup is charged for what its processes were the first to touch
		s.MemoryBytes -= min(s.shared, s.MemoryBytes)
		s.WorkingSetBytes -= min(s.shared, s.WorkingSetBytes)
	}
	u.MemoryBytes += s.MemoryBytes
	u.WorkingSetBytes += s.WorkingSetBytes
	u.RSSBytes += s.RSSBytes - min(s.shared, s.RSSBytes)
	u.CacheBytes += s.CacheBytes
	u.SwapBytes += s.SwapBytes
	u.PageFaults += s.PageFaults
	u.MajorPageFaults += s.MajorPageFaults
	u.Threads += s.Threads
}

// InterfaceUsage are the counters of a network interface of the host, as the host sees them.
type InterfaceUsage struct {
	Name                                    string
	RxBytes, RxPackets, RxErrors, RxDropped uint64
	TxBytes, TxPackets, TxErrors, TxDropped uint64
}

const (
	clockTick     = 1e9 / 100 // nanoseconds; USER_HZ, the same on all machines
	cgroupPrefix  = "crivm-"  // of leaves that hold a VMM and nothing else
	maxInterfaces = 64
)

var cgroupTrees = sync.OnceValues(hierarchies)

// ReadUsage asks the host's kernel about a VMM. The caller makes sure, before and after, that pid still is one.
// NotFound when there is no such process.
func ReadUsage(pid int) (Usage, error) {
	dir := filepath.Join("/proc", strconv.Itoa(pid))
	u := Usage{}
	if err := u.readProcess(dir); err != nil {
		return Usage{}, err
	}
	if trees, err := cgroupTrees(); err == nil { // without cgroups there are the process's own figures
		if b, err := os.ReadFile(filepath.Join(dir, "cgroup")); err == nil {
			u.readCgroups(trees, string(b))
		}
	}
	if b, err := os.ReadFile(filepath.Join(dir, "net/dev")); err == nil {
		u.Interfaces = parseInterfaces(b)
	}
	return u, nil
}

func (u *Usage) readProcess(dir string) error {
	b, err := os.ReadFile(filepath.Join(dir, "stat"))
	if err != nil {
		return fmt.Errorf("figures of a VMM: %w: %w", errdefs.ErrNotFound, err)
	}
	// proc_pid_stat(5): the name, in brackets, may hold anything; minflt is field 10.
	fields := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
	if len(fields) < 18 {
		return fmt.Errorf("figures of a VMM: %s/stat has %d fields: %w", dir, len(fields), errdefs.ErrInternal)
	}
	number := func(field int) uint64 {
		n, _ := strconv.ParseUint(fields[field-3], 10, 64)
		return n
	}
	u.MajorPageFaults = number(12)
	u.PageFaults = number(10) + u.MajorPageFaults
	u.UserNanos, u.SystemNanos = number(14)*clockTick, number(15)*clockTick
	u.CPUNanos = u.UserNanos + u.SystemNanos
	u.Threads = number(20)
	status := numbers(filepath.Join(dir, "status"))
	u.shared = status["RssShmem:"] << 10
	u.RSSBytes = status["RssAnon:"]<<10 + u.shared
	u.CacheBytes = status["RssFile:"] << 10
	u.MemoryBytes = u.RSSBytes + u.CacheBytes
	u.WorkingSetBytes = u.MemoryBytes
	u.SwapBytes = status["VmSwap:"] << 10
	return nil
}

// readCgroups replaces the process's figures by those of its cgroups, as far as they are its own.
func (u *Usage) readCgroups(trees []hierarchy, membership string) {
	for line := range strings.Lines(membership) {
		parts := strings.SplitN(strings.TrimSpace(line), ":", 3) // 4:memory:/kubepods/pod1/crivm-2
		if len(parts) != 3 || !strings.HasPrefix(path.Base(parts[2]), cgroupPrefix) {
			continue
		}
		if parts[1] == "" {
			if i := slices.IndexFunc(trees, func(h hierarchy) bool { return h.v2 }); i >= 0 {
				u.readUnified(filepath.Join(trees[i].mount, parts[2]))
			}
			continue
		}
		for controller := range strings.SplitSeq(parts[1], ",") {
			i := slices.IndexFunc(trees, func(h hierarchy) bool { return !h.v2 && slices.Contains(strings.Split(h.options, ","), controller) })
			if i < 0 {
				continue
			}
			dir := filepath.Join(trees[i].mount, parts[2])
			switch controller {
			case "cpuacct":
				u.readCPUAccounting(dir)
			case "memory":
				u.readMemory(dir)
			}
		}
	}
}

// readUnified reads a leaf of version 2. A host with both versions has no controllers here.
func (u *Usage) readUnified(dir string) {
	if cpu := numbers(filepath.Join(dir, "cpu.stat")); cpu["usage_usec"] > 0 {
		u.CPUNanos, u.UserNanos, u.SystemNanos = cpu["usage_usec"]*1000, cpu["user_usec"]*1000, cpu["system_usec"]*1000
	}
	if usage, ok := number(filepath.Join(dir, "memory.current")); ok {
		stat := numbers(filepath.Join(dir, "memory.stat"))
		u.leaf = true
		u.MemoryBytes, u.CacheBytes = usage, stat["file"]
		u.WorkingSetBytes = usage - min(usage, stat["inactive_file"])
		if swap, ok := number(filepath.Join(dir, "memory.swap.current")); ok {
			u.SwapBytes = swap
		}
	}
}

func (u *Usage) readCPUAccounting(dir string) {
	if usage, ok := number(filepath.Join(dir, "cpuacct.usage")); ok {
		stat := numbers(filepath.Join(dir, "cpuacct.stat"))
		u.CPUNanos, u.UserNanos, u.SystemNanos = usage, stat["user"]*clockTick, stat["system"]*clockTick
	}
}

func (u *Usage) readMemory(dir string) {
	if usage, ok := number(filepath.Join(dir, "memory.usage_in_bytes")); ok {
		stat := numbers(filepath.Join(dir, "memory.stat"))
		u.leaf = true
		u.MemoryBytes, u.CacheBytes = usage, stat["total_cache"]
		u.WorkingSetBytes = usage - min(usage, stat["total_inactive_file"])
		if swap, ok := stat["total_swap"]; ok {
			u.SwapBytes = swap
		}
	}
}

// numbers reads a file of lines "key number ..."; empty when it cannot be read.
func numbers(path string) map[string]uint64 {
	table := map[string]uint64{}
	b, err := os.ReadFile(path)
	if err != nil {
		return table
	}
	for line := range strings.Lines(string(b)) {
		fields := strings.Fields(line)
		if len(fields) < 2 {
			continue
		}
		if n, err := strconv.ParseUint(fields[1], 10, 64); err == nil {
			table[fields[0]] = n
		}
	}
	return table
}

// number reads a file of one number.
func number(path string) (uint64, bool) {
	b, err := os.ReadFile(path)
	if err != nil {
		return 0, false
	}
	n, err := strconv.ParseUint(strings.TrimSpace(string(b)), 10, 64)
	return n, err == nil
}

// parseInterfaces reads proc_pid_net(5)'s dev: two lines of headings, then "eth0: " and 16 numbers, of which
// the first four and the ninth to twelfth are bytes, packets, errors and drops.
func parseInterfaces(b []byte) []InterfaceUsage {
	var found []InterfaceUsage
	for sc := bufio.NewScanner(bytes.NewReader(b)); sc.Scan() && len(found) < maxInterfaces; {
		name, rest, ok := strings.Cut(sc.Text(), ":")
		fields := strings.Fields(rest)
		if !ok || len(fields) < 12 {
			continue
		}
		n := make([]uint64, len(fields))
		for i, f := range fields {
			n[i], _ = strconv.ParseUint(f, 10, 64)
		}
		found = append(found, InterfaceUsage{
			Name: strings.TrimSpace(name), RxBytes: n[0], RxPackets: n[1], RxErrors: n[2], RxDropped: n[3],
			TxBytes: n[8], TxPackets: n[9], TxErrors: n[10], TxDropped: n[11],
		})
	}
	return found
}
