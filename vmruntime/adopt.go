package vmruntime

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// recordName is the process record in a VM's directory.
const recordName = "vmm.json"

// record tells a later daemon which process runs a VM. A pid alone may have been reused: start time and
// boot id say whether it is still the same process. PID is 0 from before the start until just after it.
type record struct {
	PID       int    `json:"pid"`
	StartTime uint64 `json:"startTime"` // clock ticks after boot, field 22 of /proc/PID/stat
	BootID    string `json:"bootID"`
	Cgroup    Cgroup `json:"cgroup"`
	// Left is the cgroup that the process is being moved from; it may be in either.
	Left *Cgroup `json:"left,omitempty"`
}

func writeRecord(dir string, r record) error {
	return SaveState(filepath.Join(dir, recordName), r)
}

func readRecord(dir string) (record, error) {
	var r record
	if err := LoadState(filepath.Join(dir, recordName), &r); err != nil {
		return record{}, fmt.Errorf("process record: %w", err)
	}
	return r, nil
}

func removeRecord(dir string) { RemoveState(filepath.Join(dir, recordName)) }

// Adopt finds the process that an earlier daemon launched with this Dir: by its record, or when that is
// missing or stale by looking at all processes. errdefs.ErrNotFound when none runs; SweepDir then removes
// what it left.
func Adopt(dir string) (*Process, error) {
	r, err := readRecord(dir)
	if err == nil && r.PID > 0 && r.BootID == bootID() {
		p, err := adoptPID(dir, r)
		if err == nil || !errdefs.IsNotFound(err) {
			return p, err
		}
	}
	pids, err := scan(dir)
	if err != nil {
		return nil, err
	}
	for _, pid := range pids {
		start, err := startTime(pid)
		if err != nil {
			continue // ended meanwhile
		}
		found := record{PID: pid, StartTime: start, BootID: bootID(), Cgroup: r.Cgroup, Left: r.Left}
		p, err := adoptPID(dir, found)
		if errdefs.IsNotFound(err) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if err := writeRecord(dir, found); err != nil {
			return nil, err
		}
		return p, nil
	}
	return nil, fmt.Errorf("VMM of %s: %w", dir, errdefs.ErrNotFound)
}

// adoptPID opens the process and then checks that it is the recorded one: in this order no other process
// can come in between.
func adoptPID(dir string, r record) (*Process, error) {
	p, err := newProcess(dir, r.PID, r.Cgroup)
	if errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EINVAL) {
		return nil, fmt.Errorf("process %d: %w", r.PID, errdefs.ErrNotFound)
	}
	if err != nil {
		return nil, err
	}
	start, err := startTime(r.PID)
	if err != nil || start != r.StartTime {
		p.pidfd.Close()
		return nil, fmt.Errorf("process %d: %w", r.PID, errdefs.ErrNotFound)
	}
	p.left = r.Left
	go p.watch()
	return p, nil
}

// SweepDir kills whatever was launched with this Dir and still runs, and removes its cgroup leaf and
// record. Idempotent.
func SweepDir(ctx context.Context, dir string) error {
	r, err := readRecord(dir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		// Unreadable: the scan below finds the process all the same; only an empty cgroup may stay.
		r = record{}
	}
	// A second round finds a process that was just between fork and exec in the first.
	for round := 0; ; round++ {
		p, err := Adopt(dir)
		if errdefs.IsNotFound(err) {
			break
		}
		if err != nil {
			return err
		}
		if round == 10 {
			return fmt.Errorf("processes of %s appear again and again", dir)
		}
		if err := p.Kill(ctx); err != nil {
			return err
		}
	}
	if err := removeCgroups(ctx, r.Cgroup, r.Left); err != nil {
		return err
	}
	removeRecord(dir)
	return nil
}

// scan lists processes that Launch started with this directory: session leaders with it as working
// directory and on their command line. A shell, an editor or a tail that merely works there does not match.
func scan(dir string) ([]int, error) {
	dir = filepath.Clean(dir)
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, fmt.Errorf("list processes: %w", err)
	}
	var pids []int
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		cmdline, err := os.ReadFile(filepath.Join("/proc", e.Name(), "cmdline"))
		if err != nil || !namesPath(cmdline, dir) {
			continue
		}
		cwd, err := os.Readlink(filepath.Join("/proc", e.Name(), "cwd"))
		if err != nil || !sameDir(cwd, dir) {
			continue
		}
		if sid, err := unix.Getsid(pid); err != nil || sid != pid {
			continue
		}
		pids = append(pids, pid)
	}
	return pids, nil
}

func sameDir(cwd, dir string) bool {
	if strings.TrimSuffix(cwd, " (deleted)") == dir {
		return true
	}
	a, errA := os.Stat(cwd)
	b, errB := os.Stat(dir)
	return errA == nil && errB == nil && os.SameFile(a, b)
}

// namesPath reports whether an argument contains path as a whole path or as the beginning of a longer
// one: "/run/a" is in "/run/a/x", "file=/run/a,ro" and "unix:/run/a", not in "/run/ab" or "/mnt/run/a".
func namesPath(cmdline []byte, path string) bool {
	for arg := range bytes.SplitSeq(cmdline, []byte{0}) {
		for rest, off := arg, 0; ; {
			i := bytes.Index(rest, []byte(path))
			if i < 0 {
				break
			}
			start, end := off+i, off+i+len(path)
			before := start == 0 || bytes.IndexByte([]byte("=:,"), arg[start-1]) >= 0
			after := end == len(arg) || bytes.IndexByte([]byte("/,:"), arg[end]) >= 0
			if before && after {
				return true
			}
			rest, off = arg[start+1:], start+1
		}
	}
	return false
}

// startTime is when a process started, in clock ticks after boot. errdefs.ErrNotFound for a process that
// does not exist or has ended and waits to be reaped.
func startTime(pid int) (uint64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, fmt.Errorf("process %d: %w: %w", pid, errdefs.ErrNotFound, err)
	}
	// The second field is the program's name in parentheses, which itself may hold any character.
	i := bytes.LastIndexByte(b, ')')
	fields := strings.Fields(string(b[i+1:]))
	if i < 0 || len(fields) < 20 {
		return 0, fmt.Errorf("process %d: unexpected stat %q", pid, b)
	}
	if state := fields[0]; state == "Z" || state == "X" {
		return 0, fmt.Errorf("process %d has ended: %w", pid, errdefs.ErrNotFound)
	}
	return strconv.ParseUint(fields[19], 10, 64)
}

// bootID names this boot of the host; something that never matches a record when the kernel does not tell.
func bootID() string {
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "unknown " + time.Now().String()
	}
	return strings.TrimSpace(string(b))
}
