package guest

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// cgroups is the mount point of the cgroup v2 hierarchy in which every container has a cgroup.
type cgroups string

func (g cgroups) path(id string) string { return filepath.Join(string(g), cgroupParent, id) }

// SignalAll implements Runtime.
func (r *ociRuntime) SignalAll(_ context.Context, id string, sig unix.Signal) error {
	if sig == unix.SIGKILL {
		err := os.WriteFile(filepath.Join(r.cgroup.path(id), "cgroup.kill"), []byte("1"), 0)
		if gone(err) {
			return nil
		}
		return err
	}
	for _, pid := range r.cgroup.processes(id) {
		unix.Kill(pid, sig)
	}
	return nil
}

// processes lists the processes of a container, those in cgroups that it made itself included.
func (g cgroups) processes(id string) []int {
	pids := []int{}
	filepath.WalkDir(g.path(id), func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.IsDir() {
			return nil
		}
		b, err := os.ReadFile(filepath.Join(path, "cgroup.procs"))
		if err != nil {
			return nil
		}
		for field := range strings.FieldsSeq(string(b)) {
			if pid, err := strconv.Atoi(field); err == nil && pid > 1 {
				pids = append(pids, pid)
			}
		}
		return nil
	})
	return pids
}

// killRounds bounds how often KillTree looks for processes that were started while it killed others.
const killRounds = 16

// KillTree implements Runtime. What a process started is known by its session, which only a
// process that makes its own leaves, and by its ancestors, which only an orphan loses.
func (r *ociRuntime) KillTree(id string, child *Child) {
	for range killRounds {
		found := false
		family := map[int]bool{child.PID: true}
		pids := r.cgroup.processes(id)
		for grown := true; grown; { // until no further descendant is found
			grown = false
			for _, pid := range pids {
				parent, session := kin(pid)
				if !family[pid] && (family[parent] || session != 0 && session == child.session) {
					family[pid], grown = true, true
				}
			}
		}
		for _, pid := range pids {
			if family[pid] && unix.Kill(pid, unix.SIGKILL) == nil {
				found = true
			}
		}
		if !found {
			return
		}
	}
}

// kin reads a process's parent and session from /proc/<pid>/stat.
func kin(pid int) (parent, session int) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, 0
	}
	_, rest, _ := strings.Cut(string(b[max(0, strings.LastIndexByte(string(b), ')')):]), " ")
	fields := strings.Fields(rest) // state, ppid, pgrp, session
	if len(fields) < 4 {
		return 0, 0
	}
	parent, _ = strconv.Atoi(fields[1])
	session, _ = strconv.Atoi(fields[3])
	return parent, session
}

// OOMKilled implements Runtime.
func (r *ociRuntime) OOMKilled(id string) bool {
	return readTable(filepath.Join(r.cgroup.path(id), "memory.events"))["oom_kill"] > 0
}

// removeRetries and removeDelay bound the wait for killed processes to leave a cgroup.
const (
	removeRetries = 200
	removeDelay   = 10 * time.Millisecond
)

// remove deletes a container's cgroup and those below it.
func (g cgroups) remove(id string) error {
	var err error
	for range removeRetries {
		if err = removeTree(g.path(id)); !errors.Is(err, unix.EBUSY) {
			return err
		}
		os.WriteFile(filepath.Join(g.path(id), "cgroup.kill"), []byte("1"), 0)
		time.Sleep(removeDelay)
	}
	return err
}

// removeTree removes cgroup directories from the leaves up.
func removeTree(path string) error {
	err := unix.Rmdir(path)
	if err == nil || gone(err) {
		return nil
	}
	entries, readErr := os.ReadDir(path)
	if readErr != nil {
		return notExist(readErr)
	}
	for _, e := range entries {
		if e.IsDir() {
			if err := removeTree(filepath.Join(path, e.Name())); err != nil {
				return err
			}
		}
	}
	if err := unix.Rmdir(path); err != nil && !gone(err) {
		return fmt.Errorf("remove cgroup %s: %w", path, err)
	}
	return nil
}

// gone tells whether a cgroup or a file of it is not there (any more).
func gone(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV)
}

// Update implements Runtime.
func (r *ociRuntime) Update(_ context.Context, id string, res *specs.LinuxResources) error {
	dir := r.cgroup.path(id)
	if _, err := os.Stat(dir); err != nil {
		return fmt.Errorf("cgroup of container %s: %w", id, errdefs.ErrNotFound)
	}
	for _, w := range cgroupWrites(res) {
		path := filepath.Join(dir, w.file)
		err := os.WriteFile(path, []byte(w.value), 0)
		if errors.Is(err, fs.ErrNotExist) && w.optional {
			continue
		}
		if err != nil {
			return fmt.Errorf("write %q to %s: %w", w.value, w.file, err)
		}
	}
	return nil
}

// cgroupWrite is one value for one file of a cgroup.
type cgroupWrite struct {
	file, value string
	optional    bool // nothing is lost when the kernel has no such file
}

// cgroupWrites translates OCI limits, which are in cgroup v1's terms, to cgroup v2's.
func cgroupWrites(res *specs.LinuxResources) []cgroupWrite {
	writes := []cgroupWrite{}
	if cpu := res.CPU; cpu != nil {
		if cpu.Shares != nil && *cpu.Shares > 0 {
			writes = append(writes, cgroupWrite{file: "cpu.weight", value: strconv.FormatUint(cpuWeight(*cpu.Shares), 10)})
		}
		if cpu.Quota != nil || cpu.Period != nil {
			quota, period := "max", uint64(100000)
			if cpu.Quota != nil && *cpu.Quota > 0 {
				quota = strconv.FormatInt(*cpu.Quota, 10)
			}
			if cpu.Period != nil && *cpu.Period > 0 {
				period = *cpu.Period
			}
			writes = append(writes, cgroupWrite{file: "cpu.max", value: fmt.Sprintf("%s %d", quota, period)})
		}
		if cpu.Idle != nil {
			writes = append(writes, cgroupWrite{file: "cpu.idle", value: strconv.FormatInt(*cpu.Idle, 10), optional: true})
		}
	}
	if m := res.Memory; m != nil {
		if m.Reservation != nil && *m.Reservation > 0 {
			writes = append(writes, cgroupWrite{file: "memory.low", value: limit(*m.Reservation)})
		}
		if m.Limit != nil && *m.Limit != 0 {
			writes = append(writes, cgroupWrite{file: "memory.max", value: limit(*m.Limit)})
			if m.Swap != nil && *m.Swap != 0 { // v1 counts memory and swap together
				swap := *m.Swap
				if swap > 0 && *m.Limit > 0 {
					swap = max(0, swap-*m.Limit)
				}
				writes = append(writes, cgroupWrite{file: "memory.swap.max", value: limit(swap), optional: true})
			}
		}
	}
	if res.Pids != nil && res.Pids.Limit != nil && *res.Pids.Limit != 0 {
		writes = append(writes, cgroupWrite{file: "pids.max", value: limit(*res.Pids.Limit)})
	}
	for _, h := range res.HugepageLimits {
		writes = append(writes, cgroupWrite{file: "hugetlb." + h.Pagesize + ".max", value: strconv.FormatUint(h.Limit, 10), optional: true})
	}
	for file, value := range res.Unified {
		writes = append(writes, cgroupWrite{file: filepath.Base(file), value: value})
	}
	return writes
}

// cpuWeight maps cpu.shares (2 to 262144) to cpu.weight (1 to 10000).
func cpuWeight(shares uint64) uint64 {
	shares = min(max(shares, 2), 262144)
	return 1 + (shares-2)*9999/262142
}

// limit spells a limit; negative is none.
func limit(n int64) string {
	if n < 0 {
		return "max"
	}
	return strconv.FormatInt(n, 10)
}
