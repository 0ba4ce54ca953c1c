package guest

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"sync"
	"syscall"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// keptExits is how many exits of processes that nobody asked for (yet) are remembered.
const keptExits = 1024

// Reaper starts processes and collects the exits of all children of the agent. There is one in a
// process: it is the only caller of wait4, so no exit is taken from under somebody else's feet.
//
// As PID 1 the agent is the parent of every orphan of the guest. A process that the OCI runtime left
// behind can have exited before the agent learns its pid; such exits are kept (the last keptExits of
// them) for Adopt. Everything below happens under one lock, wait4 and fork included, which is what makes
// "the pid exists" and "its exit is in the store" exclude each other, and signalling a pid safe.
type Reaper struct {
	all     bool
	signals chan os.Signal
	stopped chan struct{}

	mu       sync.Mutex
	children map[int]*Child
	exits    map[int]unix.WaitStatus // of children nobody registered; only when all
	order    []int                   // keys of exits, oldest first
}

// Child is a process whose exit the Reaper hands over.
type Child struct {
	PID     int
	session int // session of an exec; 0 when not known
	done    chan struct{}
	status  unix.WaitStatus
}

// Done is closed when the process has been reaped.
func (c *Child) Done() <-chan struct{} { return c.done }

// Status is valid after Done.
func (c *Child) Status() unix.WaitStatus { return c.status }

// Command is a program to run. It inherits nothing but what is listed here.
type Command struct {
	Path  string   // absolute
	Args  []string // without argv[0]
	Name  string   // argv[0]; "" is Path
	Env   []string
	Dir   string
	Files []*os.File // become descriptors 0, 1, 2, ...; nil ones are /dev/null
	Attr  *syscall.SysProcAttr
	// Expendable programs start with an oom_score_adj of 0 instead of inheriting the agent's.
	Expendable bool
	// Idle programs run, with all that they start, when nothing else wants to (SCHED_IDLE).
	Idle bool
}

// NewReaper starts reaping. With all it reaps every child of this process (PID 1 and the stand-alone
// agent); without it only those that were started or adopted through it, so that it can live in one process
// with users of os/exec (tests). In both cases the process becomes the subreaper of its descendants.
func NewReaper(all bool) (*Reaper, error) {
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return nil, fmt.Errorf("become child subreaper: %w", err)
	}
	r := &Reaper{
		all:      all,
		signals:  make(chan os.Signal, 1),
		stopped:  make(chan struct{}),
		children: map[int]*Child{},
		exits:    map[int]unix.WaitStatus{},
	}
	signal.Notify(r.signals, unix.SIGCHLD)
	go func() {
		defer close(r.stopped)
		for range r.signals {
			r.reap()
		}
	}()
	return r, nil
}

// Close stops reaping; processes that still run are not touched.
func (r *Reaper) Close() {
	signal.Stop(r.signals)
	close(r.signals)
	<-r.stopped
}

// Start runs a program.
func (r *Reaper) Start(c Command) (*Child, error) {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer null.Close()
	files := []uintptr{}
	for i := range max(3, len(c.Files)) {
		fd, err := descriptor(null)
		if i < len(c.Files) && c.Files[i] != nil {
			fd, err = descriptor(c.Files[i])
		}
		if err != nil {
			return nil, fmt.Errorf("descriptor %d of %s: %w", i, c.Path, err)
		}
		files = append(files, fd)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if c.Expendable {
		defer unprotect()()
	}
	pid, err := syscall.ForkExec(c.Path, append([]string{cmp.Or(c.Name, c.Path)}, c.Args...), &syscall.ProcAttr{
		Dir: c.Dir, Env: c.Env, Files: files, Sys: c.Attr,
	})
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", c.Path, err)
	}
	if c.Idle {
		// It only makes way for others; a program that has ended already does so too.
		unix.SchedSetAttr(pid, &unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_IDLE}, 0)
	}
	return r.registerLocked(pid), nil
}

// Run runs a program to its end and returns its status; it is killed when ctx ends.
func (r *Reaper) Run(ctx context.Context, c Command) (unix.WaitStatus, error) {
	child, err := r.Start(c)
	if err != nil {
		return 0, err
	}
	select {
	case <-child.Done():
		return child.Status(), nil
	case <-ctx.Done():
		r.Signal(child, unix.SIGKILL)
		<-child.Done()
		return child.Status(), fmt.Errorf("%s: %w", c.Path, ctx.Err())
	}
}

// Adopt registers a process that was started by a child (the OCI runtime) and left to the agent.
// It may have exited already. ErrNotFound when it neither exists nor left an exit.
func (r *Reaper) Adopt(pid int) (*Child, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if c, ok := r.children[pid]; ok {
		return c, nil
	}
	if unix.Kill(pid, 0) == nil { // running, or a zombie that reap has not seen: both will be reaped
		c := r.registerLocked(pid)
		if !r.all {
			r.collectLocked(c)
		}
		return c, nil
	}
	status, ok := r.exits[pid]
	if !ok {
		return nil, fmt.Errorf("process %d: %w", pid, errdefs.ErrNotFound)
	}
	delete(r.exits, pid)
	c := &Child{PID: pid, done: make(chan struct{}), status: status}
	close(c.done)
	return c, nil
}

// Signal sends a signal to a child; false when it has ended.
func (r *Reaper) Signal(c *Child, sig unix.Signal) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.children[c.PID] == c && unix.Kill(c.PID, sig) == nil
}

// reap collects what has exited.
func (r *Reaper) reap() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.all {
		for _, c := range r.children {
			r.collectLocked(c)
		}
		return
	}
	for {
		var status unix.WaitStatus
		pid, err := unix.Wait4(-1, &status, unix.WNOHANG, nil)
		if err == unix.EINTR {
			continue
		}
		if err != nil || pid <= 0 {
			return
		}
		if c, ok := r.children[pid]; ok {
			r.endLocked(c, status)
			continue
		}
		r.keepLocked(pid, status)
	}
}

// collectLocked reaps one child if it has exited.
func (r *Reaper) collectLocked(c *Child) {
	var status unix.WaitStatus
	pid, err := unix.Wait4(c.PID, &status, unix.WNOHANG, nil)
	if err == nil && pid == c.PID {
		r.endLocked(c, status)
	}
}

func (r *Reaper) registerLocked(pid int) *Child {
	c := &Child{PID: pid, done: make(chan struct{})}
	r.children[pid] = c
	return c
}

func (r *Reaper) endLocked(c *Child, status unix.WaitStatus) {
	delete(r.children, c.PID)
	c.status = status
	close(c.done)
}

func (r *Reaper) keepLocked(pid int, status unix.WaitStatus) {
	if _, ok := r.exits[pid]; !ok {
		r.order = append(r.order, pid)
	}
	r.exits[pid] = status
	for len(r.order) > keptExits {
		delete(r.exits, r.order[0])
		r.order = r.order[1:]
	}
}

// unprotect gives this process an ordinary oom_score_adj, for a child to inherit together with the lower
// bound up to which a process without privileges may change it, and returns the function that restores it.
func unprotect() func() {
	const path = "/proc/self/oom_score_adj"
	own, err := os.ReadFile(path)
	if err != nil || string(own) == "0\n" {
		return func() {}
	}
	if err := os.WriteFile(path, []byte("0"), 0); err != nil {
		slog.Error("oom_score_adj of a child", "error", err)
	}
	return func() {
		if err := os.WriteFile(path, own, 0); err != nil {
			slog.Error("oom_score_adj of the agent", "error", err)
		}
	}
}

// descriptor is the number of f's descriptor, without changing its mode as Fd does.
func descriptor(f *os.File) (uintptr, error) {
	conn, err := f.SyscallConn()
	if err != nil {
		return 0, err
	}
	var fd uintptr
	err = conn.Control(func(n uintptr) { fd = n })
	return fd, err
}
