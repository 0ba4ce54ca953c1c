package vmruntime

import (
	"errors"
	"os"
	"strconv"
	"strings"
	"testing"
)

func inCgroup(t *testing.T, pid int, want string) {
	t.Helper()
	for line := range strings.Lines(procFile(t, pid, "cgroup")) {
		if !strings.HasSuffix(strings.TrimSpace(line), ":"+want) {
			t.Errorf("cgroup %q, want %s", line, want)
		}
	}
}

// TestMove: a process is accounted elsewhere, also by a later daemon, and neither cgroup stays.
func TestMove(t *testing.T) {
	needRoot(t)
	trees, err := hierarchies()
	if err != nil {
		t.Fatal(err)
	}
	if len(trees) == 0 {
		t.Skip("no cgroup file system is mounted")
	}
	dir := t.TempDir()
	s := longRun(t, dir)
	s.Process.Cgroup = Cgroup{Parent: "/crivmtest-pool", Name: "slot", ParentWeight: 10}
	p := launch(t, s)
	for _, h := range trees {
		file, want := h.mount+"/crivmtest-pool/cpu.weight", "10"
		if !h.v2 {
			file, want = h.mount+"/crivmtest-pool/cpu.shares", "102"
		}
		if b, err := os.ReadFile(file); err == nil && strings.TrimSpace(string(b)) != want {
			t.Errorf("%s is %s, want %s", file, b, want)
		}
	}
	to := Cgroup{Parent: "/crivmtest-move", Name: "pod"}
	for range 2 { // idempotent
		if err := p.Move(t.Context(), to, 500); err != nil {
			t.Fatal(err)
		}
		inCgroup(t, p.PID(), "/crivmtest-move/pod")
	}
	noCgroup(t, "/crivmtest-pool")
	if adj := strings.TrimSpace(procFile(t, p.PID(), "oom_score_adj")); adj != strconv.Itoa(500) {
		t.Errorf("OOM score is %s", adj)
	}
	adopted, err := Adopt(dir)
	if err != nil {
		t.Fatal(err)
	}
	if adopted.cgroup != to || adopted.left != nil {
		t.Errorf("a later daemon finds %v and %v", adopted.cgroup, adopted.left)
	}

	// A daemon that died amid a move: the record names both, the process is in the old one.
	next := Cgroup{Parent: "/crivmtest-next", Name: "pod"}
	r, err := readRecord(dir)
	if err != nil {
		t.Fatal(err)
	}
	r.Cgroup, r.Left = next, &to
	rewrite(t, dir, r)
	group, err := makeCgroup(next, dir)
	if err != nil {
		t.Fatal(err)
	}
	group.close()
	if err := SweepDir(t.Context(), dir); err != nil {
		t.Fatal(err)
	}
	waitDone(t, p)
	noCgroup(t, "/crivmtest-move")
	noCgroup(t, "/crivmtest-next")
}

// TestMoveLeavesTheDaemon: a thread of this process that is in the old cgroup still, as after a launch on cgroup v1, does
// not take the process along.
func TestMoveLeavesTheDaemon(t *testing.T) {
	needRoot(t)
	trees, err := hierarchies()
	if err != nil {
		t.Fatal(err)
	}
	from, to := Cgroup{Parent: "/crivmtest-mine", Name: "slot"}, Cgroup{Parent: "/crivmtest-theirs", Name: "pod"}
	s := longRun(t, t.TempDir())
	s.Process.Cgroup = from
	p := launch(t, s)
	before := procFile(t, os.Getpid(), "cgroup")
	entered, leave, left := make(chan error), make(chan struct{}), make(chan error)
	go func() {
		left <- onThread(func() error {
			var errs []error
			for _, h := range trees {
				if !h.v2 {
					errs = append(errs, os.WriteFile(h.mount+"/crivmtest-mine/slot/tasks", []byte("0"), 0))
				}
			}
			entered <- errors.Join(errs...)
			<-leave
			return nil
		})
	}()
	if err := <-entered; err != nil {
		t.Fatal(err)
	}
	if err := p.Move(t.Context(), to, 0); err != nil {
		t.Error(err)
	}
	if after := procFile(t, os.Getpid(), "cgroup"); after != before {
		t.Errorf("this process has become one of %s", after)
	}
	inCgroup(t, p.PID(), "/crivmtest-theirs/pod")
	close(leave)
	if err := errors.Join(<-left, p.Kill(t.Context())); err != nil {
		t.Error(err)
	}
	noCgroup(t, "/crivmtest-mine")
	noCgroup(t, "/crivmtest-theirs")
}

// TestMoveIsFinished by a later daemon that moves once more.
func TestMoveIsFinished(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	s := longRun(t, dir)
	from, to := Cgroup{Parent: "/crivmtest-from", Name: "slot"}, Cgroup{Parent: "/crivmtest-to", Name: "pod"}
	s.Process.Cgroup = from
	child := launch(t, s)
	r, err := readRecord(dir)
	if err != nil {
		t.Fatal(err)
	}
	r.Cgroup, r.Left = to, &from
	rewrite(t, dir, r)
	p, err := Adopt(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Move(t.Context(), to, 0); err != nil {
		t.Fatal(err)
	}
	inCgroup(t, p.PID(), "/crivmtest-to/pod")
	noCgroup(t, "/crivmtest-from")
	if err := p.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	waitDone(t, child)
	noCgroup(t, "/crivmtest-to")
}
