package vmruntime

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// moveRounds bounds moving what a process starts meanwhile; there is a millisecond between two.
const moveRounds = 200

// Move puts the process, with what it may have started, into another cgroup and removes the one that it was in, and
// gives it another OOM score. Both cgroups are in the record until the old one is gone, so a daemon that dies amid it
// leaves none of them. Idempotent.
func (p *Process) Move(ctx context.Context, to Cgroup, oomScoreAdj int) error {
	p.moving.Lock()
	defer p.moving.Unlock()
	r, err := readRecord(p.dir)
	if err != nil {
		return fmt.Errorf("move process %d: %w", p.pid, err)
	}
	if r.Cgroup != to {
		from := r.Cgroup
		r.Cgroup, r.Left = to, &from
		if err := writeRecord(p.dir, r); err != nil {
			return err
		}
		p.cgroup, p.left = to, &from
	}
	group, err := makeCgroup(to, p.dir)
	if err != nil {
		return fmt.Errorf("move process %d: %w", p.pid, err)
	}
	defer group.close()
	if _, err := startTime(p.pid); err != nil { // never move who has its pid now
		return fmt.Errorf("move process %d: %w", p.pid, err)
	}
	err = group.enter(p.pid)
	if err == nil {
		err = enterScope(ctx, to, p.pid)
	}
	if err != nil {
		return fmt.Errorf("move process %d: %w", p.pid, err)
	}
	p.setOOMScore(ctx, oomScoreAdj)
	if p.left == nil || !leaveCgroup(*p.left, group) {
		return nil // Kill tries again
	}
	r.Left, p.left = nil, nil
	return writeRecord(p.dir, r)
}

// enter moves a running process with all its threads.
func (d *cgroupDirs) enter(pid int) error {
	for _, leaf := range d.leaves() {
		// On cgroup v1 memory follows its process if the new leaf says so; v2 leaves it where it was charged.
		_ = os.WriteFile(filepath.Join(leaf, "memory.move_charge_at_immigrate"), []byte("3"), 0)
		if err := os.WriteFile(filepath.Join(leaf, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0); err != nil {
			return fmt.Errorf("enter cgroup: %w", err)
		}
	}
	return nil
}

func (d *cgroupDirs) leaves() []string {
	if d.v2 != nil {
		return append(slices.Clone(d.v1), d.v2.Name())
	}
	return d.v1
}

// leaveCgroup moves what is still in a cgroup, such as children of the process, and removes it; false when something is
// left. A thread of the daemon that has started a process there (cgroup v1) makes the daemon one of the cgroup's processes
// until it has ended, which it is about to: it is waited for, and the daemon never moved.
func leaveCgroup(from Cgroup, to *cgroupDirs) bool {
	if from.Name == "" || from.Systemd { // systemd drops an empty scope
		return true
	}
	leaf, err := from.leaf()
	if err != nil {
		return false
	}
	trees, err := hierarchies()
	if err != nil {
		return false
	}
	gone := true
	for _, h := range trees {
		dir := filepath.Join(h.mount, leaf)
		for round := range moveRounds {
			b, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
			if err != nil || len(b) == 0 {
				break
			}
			if round > 0 {
				time.Sleep(time.Millisecond)
			}
			for pid := range strings.FieldsSeq(string(b)) {
				if n, err := strconv.Atoi(pid); err == nil && n > 0 && n != os.Getpid() {
					_ = to.enter(n) // it may have ended
				}
			}
		}
		if err := unix.Rmdir(dir); err != nil && err != unix.ENOENT {
			gone = false
			continue
		}
		removeMadeParents(dir)
	}
	return gone
}

// setOOMScore is best effort: lowering needs CAP_SYS_RESOURCE, which a containerised daemon lacks.
func (p *Process) setOOMScore(ctx context.Context, adj int) {
	if err := os.WriteFile(fmt.Sprintf("/proc/%d/oom_score_adj", p.pid), []byte(strconv.Itoa(adj)), 0); err != nil && !errors.Is(err, os.ErrNotExist) {
		slog.WarnContext(ctx, "VMM keeps its OOM score", "pid", p.pid, "wanted", adj, "error", err)
	}
}
