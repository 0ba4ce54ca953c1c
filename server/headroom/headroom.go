// Package headroom keeps the daemon alive where its cgroups limit it (a unit's MemoryMax= and TasksMax=, a container
// around it): the kernel ends a process that gets no memory, and Go one that gets no thread. What is under way keeps the
// rest; only what would begin something is refused, until there is room again.
package headroom

import (
	"context"
	"fmt"
	"log/slog"
	"math"
	"os"
	"path"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/tap"
)

const (
	memoryNeed = 32 << 20 // bytes that a call which begins something may take for a while: requests, mkfs, CNI plugins
	tasksNeed  = 48       // the same in processes and threads
	spareTasks = 32       // threads that the daemon has from its start, so that what is under way needs no new ones
	trimPause  = time.Second
)

// begins are the calls that take much: a VM's helpers, a container's disks, an image.
var begins = map[string]bool{"RunPodSandbox": true, "CreateContainer": true, "PullImage": true}

// Room watches the cgroups of this process.
type Room struct {
	proc, mount string // /proc/self/cgroup and /sys/fs/cgroup

	mu      sync.Mutex
	limit   uint64 // that Go knows of
	trimmed time.Time
}

// New prepares the process: it takes spare threads, and tells the garbage collector the limit unless GOMEMLIMIT does.
func New() *Room {
	r := &Room{proc: "/proc/self/cgroup", mount: "/sys/fs/cgroup"}
	spareThreads(spareTasks)
	r.mu.Lock()
	defer r.mu.Unlock()
	r.memory()
	return r
}

// Tap refuses, before it has been read, a call for which there is no room: codes.ResourceExhausted.
func (r *Room) Tap(ctx context.Context, call *tap.Info) (context.Context, error) {
	if !begins[path.Base(call.FullMethodName)] {
		return ctx, nil
	}
	if err := r.Check(); err != nil {
		slog.WarnContext(ctx, "call refused", "call", path.Base(call.FullMethodName), "error", err)
		return nil, status.Error(codes.ResourceExhausted, err.Error())
	}
	return ctx, nil
}

// Check fails with errdefs.ErrResourceExhausted, and names the file that says so, where the daemon has too little room to
// begin anything. A cgroup that cannot be read limits nothing.
func (r *Room) Check() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if g, free := r.tasks(); g != "" && free < tasksNeed {
		return fmt.Errorf("the daemon may have %d more processes and threads, by %s/pids.max, and %d are wanted to begin anything: %w", free, g, tasksNeed, errdefs.ErrResourceExhausted)
	}
	g, free := r.memory()
	if g != "" && free < memoryNeed && time.Since(r.trimmed) > trimPause {
		r.trimmed = time.Now()
		debug.FreeOSMemory()
		g, free = r.memory()
	}
	if g != "" && free < memoryNeed {
		return fmt.Errorf("the daemon may have %d KiB more memory, by the limit of %s, and %d KiB are wanted to begin anything: %w", free>>10, g, memoryNeed>>10, errdefs.ErrResourceExhausted)
	}
	return nil
}

// tasks is the cgroup with the least room for processes and threads, "" when none has a limit.
func (r *Room) tasks() (group string, free uint64) {
	for _, dir := range r.groups("pids") {
		limit, limited := number(filepath.Join(dir, "pids.max"))
		used, known := number(filepath.Join(dir, "pids.current"))
		if left := limit - min(used, limit); limited && known && (group == "" || left < free) {
			group, free = dir, left
		}
	}
	return group, free
}

// memory is tasks's like in bytes; page cache, which the kernel takes back, is free. Go is told the lowest limit.
func (r *Room) memory() (group string, free uint64) {
	lowest := uint64(math.MaxInt64)
	for _, dir := range r.groups("memory") {
		limit, limited := number(filepath.Join(dir, "memory.max"))
		used, known := number(filepath.Join(dir, "memory.current"))
		if !known { // cgroup v1, where no limit is a very large one
			limit, limited = number(filepath.Join(dir, "memory.limit_in_bytes"))
			used, known = number(filepath.Join(dir, "memory.usage_in_bytes"))
			limited = limited && limit < 1<<62
		}
		if !limited || !known {
			continue
		}
		used -= min(used, pageCache(filepath.Join(dir, "memory.stat")))
		if left := limit - min(used, limit); group == "" || left < free {
			group, free = dir, left
		}
		lowest = min(lowest, limit)
	}
	if lowest != r.limit && os.Getenv("GOMEMLIMIT") == "" {
		r.limit = lowest
		debug.SetMemoryLimit(int64(lowest) / 10 * 9)
	}
	return group, free
}

// groups are the directories of this process's cgroup and those above it, of the hierarchy with a controller.
func (r *Room) groups(controller string) (dirs []string) {
	text, err := os.ReadFile(r.proc)
	if err != nil {
		return nil
	}
	for line := range strings.Lines(string(text)) { // 4:memory:/a/b on cgroup v1, 0::/a/b on v2
		parts := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(parts) != 3 {
			continue
		}
		top := filepath.Join(r.mount, controller)
		if parts[0] == "0" {
			top = r.mount
		} else if parts[1] != controller {
			continue
		}
		for dir := filepath.Join(top, path.Clean("/"+parts[2])); strings.HasPrefix(dir, top); dir = filepath.Dir(dir) {
			dirs = append(dirs, dir)
		}
	}
	return dirs
}

// number reads a file of a cgroup; false for "max" and where there is none.
func number(path string) (uint64, bool) {
	text, err := os.ReadFile(path)
	if err != nil {
		return 0, false
	}
	n, err := strconv.ParseUint(strings.TrimSpace(string(text)), 10, 64)
	return n, err == nil
}

// pageCache is what of a cgroup's memory, and of those below it, are pages of files.
func pageCache(path string) (bytes uint64) {
	text, err := os.ReadFile(path)
	if err != nil {
		return 0
	}
	values := map[string]uint64{}
	for line := range strings.Lines(string(text)) {
		key, value, _ := strings.Cut(strings.TrimSpace(line), " ")
		values[key], _ = strconv.ParseUint(value, 10, 64)
	}
	if _, v1 := values["total_inactive_file"]; v1 {
		return values["total_inactive_file"] + values["total_active_file"]
	}
	return values["inactive_file"] + values["active_file"]
}

// spareThreads makes Go start n threads, which it keeps.
func spareThreads(n int) {
	var begun, ended sync.WaitGroup
	begun.Add(n)
	release := make(chan struct{})
	for range n {
		ended.Go(func() {
			runtime.LockOSThread()
			begun.Done()
			<-release
			runtime.UnlockOSThread()
		})
	}
	begun.Wait()
	close(release)
	ended.Wait()
}
