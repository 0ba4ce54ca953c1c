package vmruntime

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// longRun is a process that runs until it is killed and has dir on its command line, as a VMM has.
func longRun(t *testing.T, dir string) LaunchSpec {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, "follow"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	return LaunchSpec{Dir: dir, Path: "/usr/bin/tail", Args: []string{"-f", filepath.Join(dir, "follow")}}
}

func launch(t *testing.T, s LaunchSpec) *Process {
	t.Helper()
	p, err := Launch(t.Context(), s)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.Kill(context.Background()); err != nil {
			t.Error(err)
		}
	})
	return p
}

func waitDone(t *testing.T, p *Process) {
	t.Helper()
	select {
	case <-p.Done():
	case <-time.After(10 * time.Second):
		t.Fatalf("process %d has not ended", p.PID())
	}
}

// exists reports whether a process runs; a zombie does not.
func exists(pid int) bool {
	_, err := startTime(pid)
	return err == nil
}

// procFile waits until the child has executed its program: Launch returns after exec, by os/exec's pipe.
func procFile(t *testing.T, pid int, name string) string {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", pid, name))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestLaunchEnvironment(t *testing.T) {
	needRoot(t)
	ns := exec.Command("/usr/bin/sleep", "60")
	ns.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET}
	if err := ns.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = ns.Process.Kill(); _ = ns.Wait() }()
	netns := fmt.Sprintf("/proc/%d/ns/net", ns.Process.Pid)

	// Not t.TempDir alone: the unprivileged process works in it.
	dir := t.TempDir()
	for p := dir; strings.HasPrefix(p, os.TempDir()) && p != os.TempDir(); p = filepath.Dir(p) {
		if err := os.Chmod(p, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	extra, err := os.Open("/dev/zero")
	if err != nil {
		t.Fatal(err)
	}
	defer extra.Close()
	adj := 500
	s := longRun(t, dir)
	s.ExtraFiles = []*os.File{extra}
	s.Groups = []int{4242, 4343}
	s.Process = ProcessSpec{NetnsPath: netns, UID: 12345, GID: 12346, OOMScoreAdj: &adj}
	p := launch(t, s)

	status := procFile(t, p.PID(), "status")
	for _, want := range []string{"Uid:\t12345\t12345", "Gid:\t12346\t12346", "Groups:\t4242 4343", "NoNewPrivs:\t1", "CapEff:\t0000000000000000"} {
		if !strings.Contains(status, want) {
			t.Errorf("status lacks %q:\n%s", want, status)
		}
	}
	if env := procFile(t, p.PID(), "environ"); !strings.HasPrefix(env, "PATH=") || strings.Count(env, "\x00") != 1 {
		t.Errorf("environment %q, want PATH alone", env)
	}
	if got := procFile(t, p.PID(), "oom_score_adj"); strings.TrimSpace(got) != "500" {
		t.Errorf("oom_score_adj %q", got)
	}
	limits := procFile(t, p.PID(), "limits")
	for line := range strings.Lines(limits) {
		f := strings.Fields(line)
		switch {
		case strings.HasPrefix(line, "Max core") && f[4] != "0":
			t.Errorf("core limit: %s", line)
		case strings.HasPrefix(line, "Max open files"):
			if n, _ := strconv.Atoi(f[3]); n < minOpenFiles {
				t.Errorf("open files: %s", line)
			}
		}
	}
	link := func(pid int, name string) string {
		l, err := os.Readlink(fmt.Sprintf("/proc/%d/%s", pid, name))
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	if got, want := link(p.PID(), "ns/net"), link(ns.Process.Pid, "ns/net"); got != want {
		t.Errorf("network namespace %s, want %s", got, want)
	}
	if got, host := link(p.PID(), "ns/mnt"), link(os.Getpid(), "ns/mnt"); got == host {
		t.Error("shares the host's mount namespace")
	}
	if got := link(p.PID(), "fd/3"); got != "/dev/zero" {
		t.Errorf("descriptor 3 is %s", got)
	}
	if link(p.PID(), "cwd") != dir {
		t.Error("works elsewhere")
	}
	if sid, _ := unix.Getsid(p.PID()); sid != p.PID() {
		t.Error("is not a session leader")
	}
	// The daemon's own threads must be as before.
	for _, name := range []string{"net", "mnt"} {
		tasks, err := os.ReadDir("/proc/self/task")
		if err != nil {
			t.Fatal(err)
		}
		want := link(os.Getpid(), "ns/"+name)
		for _, task := range tasks {
			got, err := os.Readlink("/proc/self/task/" + task.Name() + "/ns/" + name)
			if err == nil && got != want {
				// The launching thread may still be on its way out.
				deadline := time.Now().Add(5 * time.Second)
				for err == nil && time.Now().Before(deadline) {
					_, err = os.Readlink("/proc/self/task/" + task.Name() + "/ns/" + name)
					time.Sleep(5 * time.Millisecond)
				}
				if err == nil {
					t.Errorf("thread %s is in another %s namespace", task.Name(), name)
				}
			}
		}
	}
}

func TestLaunchMountsPropagateInward(t *testing.T) {
	needRoot(t)
	shared := t.TempDir()
	if err := unix.Mount("tmpfs", shared, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = unix.Unmount(shared, unix.MNT_DETACH) }()
	if err := unix.Mount("", shared, "", unix.MS_SHARED, ""); err != nil {
		t.Fatal(err)
	}
	sub := filepath.Join(shared, "sub")
	if err := os.Mkdir(sub, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", sub, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	p := launch(t, longRun(t, t.TempDir()))
	if !strings.Contains(procFile(t, p.PID(), "mountinfo"), sub+" ") {
		t.Fatal("mount is not seen by the process at all")
	}
	// An unmount on the host must reach the process, or it would keep the file system busy for ever.
	if err := unix.Unmount(sub, 0); err != nil {
		t.Fatal(err)
	}
	if strings.Contains(procFile(t, p.PID(), "mountinfo"), sub+" ") {
		t.Error("unmount on the host did not reach the process")
	}
}

func TestExitStatus(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	s := LaunchSpec{Dir: dir, Path: "/bin/sh", Args: []string{"-c", "echo to-log; exit 7", dir}}
	p := launch(t, s)
	waitDone(t, p)
	if code, sig := p.ExitStatus(); code != 7 || sig != 0 {
		t.Errorf("exit status %d, signal %d; want 7, 0", code, sig)
	}
	if got := TailFile(filepath.Join(dir, "vmm.log")); got != "to-log" {
		t.Errorf("log %q", got)
	}
	if unix.Kill(p.PID(), 0) == nil {
		t.Error("a zombie is left")
	}

	p = launch(t, longRun(t, t.TempDir()))
	if err := p.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	waitDone(t, p)
	if code, sig := p.ExitStatus(); code != -1 || sig != int(syscall.SIGTERM) {
		t.Errorf("exit status %d, signal %d; want -1, 15", code, sig)
	}
	if err := p.Signal(syscall.SIGKILL); err != nil {
		t.Errorf("signal to an ended process: %v", err)
	}
}

func TestLaunchFailures(t *testing.T) {
	needRoot(t)
	for name, change := range map[string]func(*LaunchSpec){
		"no such program": func(s *LaunchSpec) { s.Path = "/nonexistent/vmm" },
		"no such netns":   func(s *LaunchSpec) { s.Process.NetnsPath = "/nonexistent/netns" },
		"not a netns":     func(s *LaunchSpec) { s.Process.NetnsPath = "/dev/null" },
		"bad cgroup name": func(s *LaunchSpec) { s.Process.Cgroup.Name = "a/b" },
		"no systemd": func(s *LaunchSpec) {
			if _, err := os.Stat("/run/systemd/system"); err == nil {
				s.Path = "/nonexistent/vmm" // there is one, so this case would succeed
			}
			s.Process.Cgroup = Cgroup{Systemd: true, Parent: "crivmtest.slice", Name: "x"}
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			s := longRun(t, dir)
			s.Process.Cgroup = Cgroup{Parent: "/crivmtest-fail", Name: "leaf"}
			change(&s)
			p, err := Launch(t.Context(), s)
			if err == nil {
				_ = p.Kill(t.Context())
				t.Fatal("no error")
			}
			if pids, err := scan(dir); err != nil || len(pids) > 0 {
				t.Errorf("processes left: %v %v", pids, err)
			}
			if _, err := os.Stat(filepath.Join(dir, recordName)); !errors.Is(err, os.ErrNotExist) {
				t.Error("record left")
			}
			noCgroup(t, "/crivmtest-fail")
		})
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Launch(ctx, longRun(t, t.TempDir())); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled launch: %v", err)
	}
}

func noCgroup(t *testing.T, name string) {
	t.Helper()
	trees, err := hierarchies()
	if err != nil {
		t.Fatal(err)
	}
	for _, h := range trees {
		if _, err := os.Stat(h.mount + name); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("cgroup left: %s%s", h.mount, name)
		}
	}
}

// TestNiceness: a VMM is not preferred as the daemon may be.
func TestNiceness(t *testing.T) {
	needRoot(t)
	all := func(nice int) {
		t.Helper()
		tasks, err := filepath.Glob("/proc/self/task/*")
		if err != nil {
			t.Fatal(err)
		}
		for _, task := range tasks {
			tid, err := strconv.Atoi(filepath.Base(task))
			if err == nil {
				err = unix.Setpriority(unix.PRIO_PROCESS, tid, nice)
			}
			if err != nil && !errors.Is(err, unix.ESRCH) {
				t.Skipf("niceness cannot be set here: %v", err)
			}
		}
	}
	defer all(0)
	all(-5)
	p := launch(t, longRun(t, t.TempDir()))
	if priority, err := unix.Getpriority(unix.PRIO_PROCESS, p.PID()); err != nil || priority != niceZero {
		t.Errorf("niceness is %d (%v)", niceZero-priority, err)
	}
	if err := p.Kill(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestCgroup(t *testing.T) {
	needRoot(t)
	trees, err := hierarchies()
	if err != nil {
		t.Fatal(err)
	}
	if len(trees) == 0 {
		t.Skip("no cgroup file system is mounted")
	}
	const parent = "/crivmtest-cgroup/pods"
	var running []*Process
	for i := range 3 {
		s := longRun(t, t.TempDir())
		s.Process.Cgroup = Cgroup{Parent: parent, Name: fmt.Sprintf("vm%d", i)}
		running = append(running, launch(t, s))
	}
	for i, p := range running {
		want := fmt.Sprintf("%s/vm%d", parent, i)
		lines := strings.TrimSpace(procFile(t, p.PID(), "cgroup"))
		if n := strings.Count(lines, "\n") + 1; n != len(trees) {
			t.Errorf("in %d hierarchies, %d are mounted", n, len(trees))
		}
		for line := range strings.Lines(lines) {
			if !strings.HasSuffix(strings.TrimSpace(line), ":"+want) {
				t.Errorf("cgroup %q, want %s", line, want)
			}
		}
	}
	for _, p := range running {
		for range 2 { // idempotent
			if err := p.Kill(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
	}
	noCgroup(t, "/crivmtest-cgroup")

	// A parent that another VM, or a daemon that was killed, has made and not filled yet: its cpuset (version 1) takes no task.
	for _, h := range trees {
		if err := os.Mkdir(h.mount+"/crivmtest-empty", 0o755); err != nil {
			t.Fatal(err)
		}
		defer os.Remove(h.mount + "/crivmtest-empty")
	}
	late := longRun(t, t.TempDir())
	late.Process.Cgroup = Cgroup{Parent: "/crivmtest-empty", Name: "leaf"}
	if err := launch(t, late).Kill(t.Context()); err != nil {
		t.Error(err)
	}

	// A parent that is not ours stays.
	for _, h := range trees {
		dir := h.mount + "/crivmtest-kubelet"
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		defer os.Remove(dir)
		if strings.Contains(","+h.options+",", ",cpuset,") {
			if err := inheritCPUSet(h.mount, dir); err != nil {
				t.Fatal(err)
			}
		}
	}
	s := longRun(t, t.TempDir())
	s.Process.Cgroup = Cgroup{Parent: "/crivmtest-kubelet", Name: "leaf"}
	if err := launch(t, s).Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, h := range trees {
		if _, err := os.Stat(h.mount + "/crivmtest-kubelet"); err != nil {
			t.Errorf("parent of another owner was removed: %v", err)
		}
		if _, err := os.Stat(h.mount + "/crivmtest-kubelet/leaf"); err == nil {
			t.Errorf("leaf left in %s", h.mount)
		}
	}
}

func TestAdopt(t *testing.T) {
	needRoot(t)
	for name, spoil := range map[string]func(t *testing.T, dir string, r record){
		"by record":      func(*testing.T, string, record) {},
		"without record": func(t *testing.T, dir string, _ record) { removeRecord(dir) },
		"record from before the start": func(t *testing.T, dir string, r record) {
			rewrite(t, dir, record{Cgroup: r.Cgroup})
		},
		"record of a reused pid": func(t *testing.T, dir string, r record) {
			r.PID, r.StartTime = os.Getpid(), r.StartTime+1
			rewrite(t, dir, r)
		},
		"record of another boot": func(t *testing.T, dir string, r record) {
			r.BootID, r.PID = "before", os.Getpid()
			r.StartTime, _ = startTime(r.PID)
			rewrite(t, dir, r)
		},
		"broken record": func(t *testing.T, dir string, _ record) {
			if err := os.WriteFile(filepath.Join(dir, recordName), []byte("{"), 0o600); err != nil {
				t.Fatal(err)
			}
		},
		"record by another user": func(t *testing.T, dir string, r record) {
			r.PID = os.Getpid()
			r.StartTime, _ = startTime(r.PID)
			rewrite(t, dir, r)
			if err := os.Chown(filepath.Join(dir, recordName), 12345, 12345); err != nil {
				t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			child := launch(t, longRun(t, dir))
			r, err := readRecord(dir)
			if err != nil || r.PID != child.PID() {
				t.Fatalf("record %+v, %v", r, err)
			}
			spoil(t, dir, r)
			p, err := Adopt(dir)
			if err != nil {
				t.Fatal(err)
			}
			if p.PID() != child.PID() {
				t.Fatalf("adopted %d, want %d", p.PID(), child.PID())
			}
			select {
			case <-p.Done():
				t.Fatal("done while it runs")
			default:
			}
			if err := p.Kill(t.Context()); err != nil {
				t.Fatal(err)
			}
			waitDone(t, child)
			if _, err := os.Stat(filepath.Join(dir, recordName)); !errors.Is(err, os.ErrNotExist) {
				t.Error("record left")
			}
			if _, err := Adopt(dir); !errdefs.IsNotFound(err) {
				t.Errorf("adopted a dead process: %v", err)
			}
		})
	}
}

func rewrite(t *testing.T, dir string, r record) {
	t.Helper()
	if err := writeRecord(dir, r); err != nil {
		t.Fatal(err)
	}
}

func TestSweepDir(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	s := longRun(t, dir)
	s.Process.Cgroup = Cgroup{Parent: "/crivmtest-sweep", Name: "leaf"}
	child := launch(t, s)
	// A neighbour whose directory begins with the same characters, and a person reading a file of the VM.
	other := launch(t, func() LaunchSpec {
		next := dir + "b"
		if err := os.Mkdir(next, 0o755); err != nil {
			t.Fatal(err)
		}
		return longRun(t, next)
	}())
	var readers []*exec.Cmd
	for _, inside := range []bool{true, false} { // in the directory from a shell; elsewhere in a terminal of its own
		reader := exec.Command("/usr/bin/tail", "-f", filepath.Join(dir, "follow"))
		reader.Dir, reader.SysProcAttr = "/", &syscall.SysProcAttr{Setsid: true}
		if inside {
			reader.Dir, reader.SysProcAttr = dir, nil
		}
		if err := reader.Start(); err != nil {
			t.Fatal(err)
		}
		defer func() { _ = reader.Process.Kill(); _ = reader.Wait() }()
		readers = append(readers, reader)
	}

	for range 2 { // idempotent
		if err := SweepDir(t.Context(), dir); err != nil {
			t.Fatal(err)
		}
		waitDone(t, child)
	}
	if !exists(other.PID()) || !exists(readers[0].Process.Pid) || !exists(readers[1].Process.Pid) {
		t.Error("killed a process that was not this VM's")
	}
	if _, err := os.Stat(filepath.Join(dir, recordName)); !errors.Is(err, os.ErrNotExist) {
		t.Error("record left")
	}
	noCgroup(t, "/crivmtest-sweep")

	// A daemon that died between making the cgroup and starting the process.
	c := Cgroup{Parent: "/crivmtest-sweep", Name: "early"}
	rewrite(t, dir, record{Cgroup: c})
	group, err := makeCgroup(c, t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	group.close()
	if err := SweepDir(t.Context(), dir); err != nil {
		t.Fatal(err)
	}
	noCgroup(t, "/crivmtest-sweep")
	if err := SweepDir(t.Context(), filepath.Join(dir, "never-was")); err != nil {
		t.Errorf("sweep of nothing: %v", err)
	}
}

func TestNamesPath(t *testing.T) {
	for _, c := range []struct {
		arg  string
		want bool
	}{
		{"/run/a", true},
		{"/run/a/qmp.sock", true},
		{"unix:/run/a/qmp.sock,server=on", true},
		{"file=/run/a,ro", true},
		{"/run/ab", false},
		{"/run/ab,/run/a", true},
		{"/mnt/run/a", false},
		{"x/run/a/y", false},
		{"/run/a b", false},
		{"", false},
	} {
		if got := namesPath([]byte("qemu\x00"+c.arg+"\x00-x\x00"), "/run/a"); got != c.want {
			t.Errorf("%q: %v", c.arg, got)
		}
	}
	if namesPath([]byte("/run\x00/a\x00"), "/run/a") {
		t.Error("matched across arguments")
	}
}

func TestStartTime(t *testing.T) {
	self, err := startTime(os.Getpid())
	if err != nil || self == 0 {
		t.Errorf("own start time %d, %v", self, err)
	}
	if _, err := startTime(1 << 30); !errdefs.IsNotFound(err) {
		t.Errorf("no such process: %v", err)
	}
	zombie := exec.Command("/bin/true")
	if err := zombie.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = zombie.Wait() }()
	deadline := time.Now().Add(10 * time.Second)
	for {
		if _, err := startTime(zombie.Process.Pid); errdefs.IsNotFound(err) {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("a zombie counts as running")
		}
		time.Sleep(time.Millisecond)
	}
}
