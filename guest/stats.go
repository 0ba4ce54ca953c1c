package guest

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/crivm/crivm/agentproto"
)

// Stats implements agentproto.AgentService. Containers that are unknown are left out; one without processes
// has the size of its writable layer only.
func (a *Agent) Stats(_ context.Context, r *agentproto.StatsRequest) (*agentproto.StatsResponse, error) {
	resp := &agentproto.StatsResponse{}
	wanted := map[string]bool{}
	for _, id := range r.GetContainerIds() {
		wanted[id] = true
	}
	for _, c := range a.all() {
		if len(wanted) > 0 && !wanted[c.id] {
			continue
		}
		c.mu.Lock()
		layer, state := c.layer, c.state
		c.mu.Unlock()
		if state == agentproto.State_STATE_UNSPECIFIED {
			continue
		}
		s := &agentproto.ContainerStats{ContainerId: c.id, UnixNanos: time.Now().UnixNano()}
		if err := a.Runtime.Stats(c.id, r.GetDescriptors(), s); err == nil {
			s.Running = true
		}
		if layer != nil {
			s.WritableLayerBytes, s.WritableLayerInodes = layer.get()
		}
		resp.Containers = append(resp.Containers, s)
	}
	resp.MemoryTotalBytes, resp.MemoryAvailableBytes = memory()
	resp.CpuPressure = readPressure("/proc/pressure/cpu")
	resp.MemoryPressure = readPressure("/proc/pressure/memory")
	resp.IoPressure = readPressure("/proc/pressure/io")
	if scratch, err := a.scratch(); err == nil {
		resp.Scratch = usage(scratch)
	}
	return resp, nil
}

// usage is the size of the file system that path is on; nil when it cannot be had.
func usage(path string) *agentproto.Filesystem {
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		return nil
	}
	return &agentproto.Filesystem{
		TotalBytes: st.Blocks * uint64(st.Frsize), FreeBytes: st.Bavail * uint64(st.Frsize), TotalInodes: st.Files, FreeInodes: st.Ffree,
	}
}

// memory is MemTotal and MemAvailable in bytes.
func memory() (total, available uint64) {
	for key, kib := range readTable("/proc/meminfo") {
		switch key {
		case "MemTotal:":
			total = kib << 10
		case "MemAvailable:":
			available = kib << 10
		}
	}
	return total, available
}

// readTable reads a file of lines "key number ..."; empty when it cannot be read.
func readTable(path string) map[string]uint64 {
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

// readNumber reads a file of one number; 0 for "max" and when it cannot be read.
func readNumber(path string) uint64 {
	b, err := os.ReadFile(path)
	if err != nil {
		return 0
	}
	n, _ := strconv.ParseUint(strings.TrimSpace(string(b)), 10, 64)
	return n
}

// Online implements agentproto.AgentService. An agent that owns no machine tells no size.
func (a *Agent) Online(context.Context, *agentproto.OnlineRequest) (*agentproto.OnlineResponse, error) {
	if a.machine == nil {
		return &agentproto.OnlineResponse{}, nil
	}
	if err := onlineAll("/sys/devices/system/cpu/cpu[0-9]*/online", "1"); err != nil {
		return nil, err
	}
	// Movable, so that it can be taken away again.
	if err := onlineAll("/sys/devices/system/memory/memory[0-9]*/state", "online_movable"); err != nil {
		return nil, err
	}
	resp := &agentproto.OnlineResponse{Cpus: onlineCPUs()}
	resp.MemoryTotalBytes, _ = memory()
	return resp, nil
}

// onlineAll switches on what is off: files that say "0" or "offline".
func onlineAll(pattern, value string) error {
	paths, err := filepath.Glob(pattern)
	if err != nil {
		return err
	}
	for _, path := range paths {
		b, err := os.ReadFile(path)
		if state := strings.TrimSpace(string(b)); err != nil || state != "0" && state != "offline" {
			continue
		}
		if err := os.WriteFile(path, []byte(value), 0); err != nil {
			return fmt.Errorf("online %s: %w", path, err)
		}
	}
	return nil
}

// onlineCPUs counts the CPUs in use: "0-3,5" are five.
func onlineCPUs() uint32 {
	b, err := os.ReadFile("/sys/devices/system/cpu/online")
	if err != nil {
		return 0
	}
	return countList(strings.TrimSpace(string(b)))
}

func countList(list string) uint32 {
	count := uint32(0)
	for part := range strings.SplitSeq(list, ",") {
		first, last, ranged := strings.Cut(part, "-")
		from, err := strconv.ParseUint(first, 10, 16)
		to := from
		if err == nil && ranged {
			to, err = strconv.ParseUint(last, 10, 16)
		}
		if err == nil && to >= from {
			count += uint32(to-from) + 1
		}
	}
	return count
}
