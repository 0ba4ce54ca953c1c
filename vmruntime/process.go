package vmruntime

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// killWait bounds how long Kill waits for a killed process, whatever its context allows. A process
// in uninterruptible sleep (dead storage) may take longer; Kill then says so and can be called again.
const killWait = 10 * time.Second

// LaunchSpec is one VMM process to start.
type LaunchSpec struct {
	Dir  string   // the VM's private directory: working directory, process record, log; must be in Args
	Path string   // absolute path of the program
	Args []string // without the program's name

	// ExtraFiles are inherited as descriptors 3, 4, ...; the caller closes its own after Launch.
	ExtraFiles []*os.File
	Process    ProcessSpec
	Groups     []int // supplementary groups, such as those of /dev/kvm and /dev/vhost-vsock
	// Mounts, if any, is called in the process's new mount namespace before the process starts. What it
	// mounts there no other process sees, and it goes when the process ends.
	Mounts func() error
	// LogFile receives stdout and stderr, appended; "" means Dir/vmm.log. WatchFiles bounds it.
	LogFile string
}

// Process is a VMM process, either a child of this daemon or adopted from an earlier one. It is only ever
// signalled through its pidfd, so a recycled pid cannot be hit. All methods are safe for concurrent use.
type Process struct {
	dir   string
	pid   int
	pidfd *os.File
	done  chan struct{}

	moving sync.Mutex // guards the two below
	cgroup Cgroup
	left   *Cgroup // what it is moved from, as in the record

	// code and signal are written before done is closed.
	code, signal int
}

// Launch starts a process that outlives the daemon: own session, own mount namespace (mounts of the host
// propagate into it, never out of it), the given network namespace, credentials and cgroup, no new
// privileges, an environment of PATH alone. Which process it is gets recorded in Dir, the cgroup even
// before it is made. On error no process, cgroup or record is left.
func Launch(ctx context.Context, s LaunchSpec) (_ *Process, retErr error) {
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("launch %s: %w", s.Path, err)
	}
	logFile := s.LogFile
	if logFile == "" {
		logFile = filepath.Join(s.Dir, "vmm.log")
	}
	log, err := os.OpenFile(logFile, os.O_WRONLY|os.O_CREATE|os.O_APPEND|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("VMM log: %w", err)
	}
	defer log.Close()
	if err := writeRecord(s.Dir, record{Cgroup: s.Process.Cgroup}); err != nil {
		return nil, err
	}
	defer func() {
		if retErr != nil {
			removeRecord(s.Dir)
		}
	}()
	group, err := makeCgroup(s.Process.Cgroup, s.Dir)
	if err != nil {
		return nil, err
	}
	defer group.close()
	defer func() {
		if retErr != nil {
			retErr = errors.Join(retErr, removeCgroup(context.WithoutCancel(ctx), s.Process.Cgroup))
		}
	}()

	if err := limitSelf(); err != nil {
		return nil, err
	}
	cmd := command(s, log, group)
	if err := onThread(func() error { return startHere(s, cmd, group) }); err != nil {
		return nil, fmt.Errorf("launch %s: %w", s.Path, err)
	}
	p, err := newProcess(s.Dir, cmd.Process.Pid, s.Process.Cgroup)
	if err != nil {
		_ = cmd.Process.Kill() // our child and not waited for: its pid cannot have been reused
		_, _ = cmd.Process.Wait()
		return nil, fmt.Errorf("launch %s: %w", s.Path, err)
	}
	go p.reap(cmd)
	if err := p.settle(ctx, s); err != nil {
		return nil, errors.Join(fmt.Errorf("launch %s: %w", s.Path, err), p.end(context.WithoutCancel(ctx)))
	}
	return p, nil
}

func command(s LaunchSpec, log *os.File, group *cgroupDirs) *exec.Cmd {
	cmd := exec.Command(s.Path, s.Args...)
	cmd.Dir = s.Dir
	cmd.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
	cmd.Stdout, cmd.Stderr = log, log
	cmd.ExtraFiles = s.ExtraFiles
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if group.v2 != nil {
		cmd.SysProcAttr.UseCgroupFD = true
		cmd.SysProcAttr.CgroupFD = int(group.v2.Fd())
	}
	if os.Geteuid() == 0 {
		groups := make([]uint32, len(s.Groups))
		for i, g := range s.Groups {
			groups[i] = uint32(g)
		}
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: uint32(s.Process.UID), Gid: uint32(s.Process.GID), Groups: groups}
	}
	return cmd
}

// niceZero is how getpriority(2) as a system call tells a niceness of 0; what is above is preferred.
const niceZero = 20

// startHere turns the calling thread into what the child shall inherit and starts the child from it.
// The thread must not be used for anything else afterwards.
func startHere(s LaunchSpec, cmd *exec.Cmd, group *cgroupDirs) error {
	if err := group.enterV1(); err != nil {
		return err
	}
	if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("unshare mount namespace: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SLAVE, ""); err != nil {
		return fmt.Errorf("make mounts slaves: %w", err)
	}
	if s.Mounts != nil {
		if err := s.Mounts(); err != nil {
			return fmt.Errorf("mounts of the process: %w", err)
		}
	}
	if err := enterNetns(s.Process.NetnsPath); err != nil {
		return err
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("no_new_privs: %w", err)
	}
	// The daemon may be preferred (Nice= of its unit), not so its VMs.
	if priority, err := unix.Getpriority(unix.PRIO_PROCESS, 0); err == nil && priority > niceZero {
		if err := unix.Setpriority(unix.PRIO_PROCESS, 0, 0); err != nil {
			return fmt.Errorf("niceness: %w", err)
		}
	}
	return cmd.Start()
}

// settle does what can only be done to a running process: the record, limits, the OOM score, the scope.
func (p *Process) settle(ctx context.Context, s LaunchSpec) error {
	start, err := startTime(p.pid)
	if errdefs.IsNotFound(err) {
		return nil // ended already; Done tells
	}
	if err != nil {
		return err
	}
	r := record{PID: p.pid, StartTime: start, BootID: bootID(), Cgroup: s.Process.Cgroup}
	if err := writeRecord(s.Dir, r); err != nil {
		return err
	}
	if err := limitChild(p.pid); err != nil {
		return err
	}
	if adj := s.Process.OOMScoreAdj; adj != nil {
		p.setOOMScore(ctx, *adj)
	}
	if err := enterScope(ctx, s.Process.Cgroup, p.pid); err != nil {
		select {
		case <-p.done:
			return nil
		default:
			return err
		}
	}
	return nil
}

func newProcess(dir string, pid int, c Cgroup) (*Process, error) {
	fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("pidfd of %d: %w", pid, err)
	}
	return &Process{
		dir: dir, pid: pid, pidfd: os.NewFile(uintptr(fd), "pidfd"), cgroup: c,
		done: make(chan struct{}), code: -1,
	}, nil
}

// awaitExit returns when the process has ended. It parks the goroutine in the poller; no thread waits.
func (p *Process) awaitExit() {
	ended := func(fd uintptr, timeout int) bool {
		fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		n, err := unix.Poll(fds, timeout)
		return n > 0 || (err != nil && err != unix.EINTR)
	}
	raw, err := p.pidfd.SyscallConn()
	if err == nil {
		err = raw.Read(func(fd uintptr) bool { return ended(fd, 0) })
	}
	if err != nil { // the poller cannot watch it (a kernel before pidfd polling): give it a thread
		fd := p.pidfd.Fd()
		for !ended(fd, 1000) {
		}
	}
}

// reap waits for a child of this daemon, so that no zombie stays.
func (p *Process) reap(cmd *exec.Cmd) {
	p.awaitExit()
	state, err := cmd.Process.Wait()
	if err == nil {
		if ws, ok := state.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
			p.signal = int(ws.Signal())
		} else {
			p.code = state.ExitCode()
		}
	}
	close(p.done)
}

// watch waits for an adopted process, which init reaps.
func (p *Process) watch() {
	p.awaitExit()
	close(p.done)
}

// PID of the process.
func (p *Process) PID() int { return p.pid }

// Done is closed when the process has ended.
func (p *Process) Done() <-chan struct{} { return p.done }

// ExitStatus is valid after Done: the exit status, -1 when killed by a signal or unknown (an adopted
// process), and the signal that killed it, or 0.
func (p *Process) ExitStatus() (code, signal int) { return p.code, p.signal }

// Signal sends a signal. No error when the process has already ended.
func (p *Process) Signal(sig syscall.Signal) error {
	raw, err := p.pidfd.SyscallConn()
	if err != nil {
		return fmt.Errorf("signal process %d: %w", p.pid, err)
	}
	var sendErr error
	if err := raw.Control(func(fd uintptr) { sendErr = unix.PidfdSendSignal(int(fd), sig, nil, 0) }); err != nil {
		return fmt.Errorf("signal process %d: %w", p.pid, err)
	}
	if sendErr != nil && !errors.Is(sendErr, unix.ESRCH) {
		return fmt.Errorf("signal process %d: %w", p.pid, sendErr)
	}
	return nil
}

// InMountNamespace runs f on a thread that is in the process's mount namespace. f must start no goroutine.
func (p *Process) InMountNamespace(f func() error) error {
	raw, err := p.pidfd.SyscallConn()
	if err != nil {
		return fmt.Errorf("process %d: %w", p.pid, err)
	}
	var enterErr error
	return onThread(func() error {
		err := raw.Control(func(fd uintptr) {
			// Threads share their root directory, which the namespace changes for this one.
			if enterErr = unix.Unshare(unix.CLONE_FS); enterErr == nil {
				enterErr = unix.Setns(int(fd), unix.CLONE_NEWNS)
			}
		})
		if err := errors.Join(err, enterErr); err != nil {
			return fmt.Errorf("enter mount namespace of process %d: %w", p.pid, err)
		}
		return f()
	})
}

// Kill ends the process with SIGKILL, waits until it is gone (10 s at most) and removes its record and
// its cgroup leaf. Idempotent; the descriptor it holds is freed with the Process.
func (p *Process) Kill(ctx context.Context) error {
	if err := p.end(ctx); err != nil {
		return err
	}
	p.moving.Lock()
	defer p.moving.Unlock()
	if err := removeCgroups(ctx, p.cgroup, p.left); err != nil {
		return err
	}
	removeRecord(p.dir)
	return nil
}

func (p *Process) end(ctx context.Context) error {
	if err := p.Signal(syscall.SIGKILL); err != nil {
		return err
	}
	t := time.NewTimer(killWait)
	defer t.Stop()
	select {
	case <-p.done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("wait for killed process %d: %w", p.pid, ctx.Err())
	case <-t.C:
		return fmt.Errorf("killed process %d has not ended within %v", p.pid, killWait)
	}
}
