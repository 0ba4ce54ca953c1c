package vmruntime

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Trace is a process or a cgroup that Launch made, whoever asked for it.
type Trace struct {
	Dir    string // LaunchSpec.Dir; it may be gone
	PID    int    // 0: a cgroup
	Cgroup string // directory of the cgroup's leaf in one of the hierarchies
}

// Traces lists the processes and cgroup leaves that Launch made for directories below a path. A process is known by its
// working directory, which it also names on its command line, as leader of a session; a cgroup by the mark that Launch
// put on it.
func Traces(below string) ([]Trace, error) {
	below = filepath.Clean(below)
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, fmt.Errorf("list processes: %w", err)
	}
	var found []Trace
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		cwd, err := os.Readlink(filepath.Join("/proc", e.Name(), "cwd"))
		if err != nil {
			continue // ended meanwhile
		}
		dir := strings.TrimSuffix(cwd, " (deleted)")
		if !strings.HasPrefix(dir, below+"/") {
			continue
		}
		cmdline, err := os.ReadFile(filepath.Join("/proc", e.Name(), "cmdline"))
		if err != nil || !namesPath(cmdline, dir) {
			continue
		}
		if sid, err := unix.Getsid(pid); err != nil || sid != pid {
			continue
		}
		found = append(found, Trace{Dir: dir, PID: pid})
	}
	cgroups, err := markedCgroups(below)
	return append(found, cgroups...), err
}

// markedCgroups finds leaves by their marks.
func markedCgroups(below string) ([]Trace, error) {
	trees, err := hierarchies()
	if err != nil {
		return nil, err
	}
	var found []Trace
	for _, h := range trees {
		err := filepath.WalkDir(h.mount, func(path string, d fs.DirEntry, err error) error {
			if err != nil || !d.IsDir() { // others come and go while this looks
				return nil
			}
			mark := make([]byte, 4096)
			n, err := unix.Lgetxattr(path, cgroupXattr, mark)
			if dir := string(mark[:max(n, 0)]); err == nil && strings.HasPrefix(dir, below+"/") {
				found = append(found, Trace{Dir: dir, Cgroup: path})
				return fs.SkipDir
			}
			return nil
		})
		if err != nil {
			return nil, fmt.Errorf("list cgroups: %w", err)
		}
	}
	return found, nil
}

// RemoveCgroup removes the leaf of a trace, which must be empty, and those of its parents that Launch made and that are
// empty then. Idempotent.
func (t Trace) RemoveCgroup() error {
	if err := unix.Rmdir(t.Cgroup); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("remove cgroup %s: %w", t.Cgroup, err)
	}
	removeMadeParents(t.Cgroup)
	return nil
}

// removeMadeParents removes the empty directories above a leaf that Launch made.
func removeMadeParents(leaf string) {
	for p := filepath.Dir(leaf); ; p = filepath.Dir(p) {
		if _, err := unix.Getxattr(p, cgroupXattr, nil); err != nil {
			return // not ours
		}
		if err := unix.Rmdir(p); err != nil {
			return // in use
		}
	}
}
