package vmtest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/crivm/crivm/guest"
)

// guestProcess is the guest of a booted VM.
type guestProcess struct {
	cmd    *exec.Cmd
	socket string // where its agent serves
	ready  chan struct{}
	killed atomic.Bool
	gone   chan struct{}
}

// startGuest starts the agent in a process of its own, whose containers end with it where PID namespaces can be
// had. dir is where the vsock's socket lies; what the guest leaves there goes with it.
func startGuest(m *machine, dir string) (*guestProcess, error) {
	f := loadFaults()
	work := filepath.Join(dir, "guest")
	if err := os.MkdirAll(work, 0o700); err != nil {
		return nil, err
	}
	os.Remove(filepath.Join(work, "agent.sock"))
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	r, w, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer w.Close()
	g := &guestProcess{socket: filepath.Join(work, "agent.sock"), ready: make(chan struct{}), gone: make(chan struct{})}
	var console *os.File
	if m.serial != nil {
		if console, err = m.serial.input(); err != nil {
			r.Close()
			return nil, err
		}
		defer console.Close()
		fmt.Fprint(console, f.Console)
	}
	start := func(namespaces uintptr) error {
		g.cmd = exec.Command(self, work)
		g.cmd.Args[0] = guestName
		g.cmd.Env = os.Environ()
		g.cmd.ExtraFiles = []*os.File{w}
		g.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Pdeathsig: syscall.SIGKILL, Cloneflags: namespaces}
		if console != nil {
			g.cmd.Stdout, g.cmd.Stderr = console, console
		}
		return g.cmd.Start()
	}
	err = start(unix.CLONE_NEWPID | unix.CLONE_NEWNS)
	if errors.Is(err, unix.EPERM) {
		err = start(0)
	}
	if err != nil {
		r.Close()
		return nil, err
	}
	go func() {
		defer r.Close()
		if n, _ := r.Read(make([]byte, 1)); n != 1 || f.NoHello {
			return // gone before it served
		}
		time.Sleep(time.Duration(f.BootDelay) * time.Millisecond)
		close(g.ready)
		m.guestServes(g)
	}()
	go func() {
		defer close(g.gone)
		err := g.cmd.Wait()
		switch {
		case g.killed.Load():
		case err == nil:
			go m.powerOff(g)
		default:
			go m.reboot() // as a triple fault
		}
	}()
	return g, nil
}

func (g *guestProcess) kill() {
	g.killed.Store(true)
	g.cmd.Process.Kill()
	<-g.gone
}

func (g *guestProcess) freeze(stop bool) {
	sig := syscall.SIGCONT
	if stop {
		sig = syscall.SIGSTOP
	}
	g.cmd.Process.Signal(sig)
}

// guestServes tells the host, as the agent does from its side of the vsock.
func (m *machine) guestServes(g *guestProcess) {
	m.mu.Lock()
	v := m.vsock
	current := m.guest == g
	m.mu.Unlock()
	if v == nil || !current || loadFaults().NoReady {
		return
	}
	conn, err := net.DialTimeout("unix", v.readyPath(), time.Second)
	if err != nil {
		return // the agent gets a reset and goes on
	}
	conn.Close()
}

// guestMain is the guest: the agent and its containers. It returns the exit status: 0 is a power-off.
func guestMain() int {
	fail := func(err error) int {
		fmt.Fprintln(os.Stderr, "guest: "+err.Error())
		return 1
	}
	if os.Getpid() == 1 {
		// In a mount namespace of its own, which must not leak into the VMM's.
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
			return fail(err)
		}
		if err := unix.Mount("proc", "/proc", "proc", 0, ""); err != nil {
			return fail(err)
		}
	}
	work := os.Args[1]
	reaper, err := guest.NewReaper(true)
	if err != nil {
		return fail(err)
	}
	a, err := guest.NewAgent(guest.Options{
		Runtime: guest.NewProcessRuntime(reaper), Reaper: reaper, Version: "fake",
		Dir: filepath.Join(work, "agent"), PlainRoot: "/",
		PowerOff: func() { exitNow(0) },
	})
	if err != nil {
		return fail(err)
	}
	l, err := net.Listen("unix", filepath.Join(work, "agent.sock"))
	if err != nil {
		return fail(err)
	}
	ready := os.NewFile(3, "ready")
	ready.Write([]byte{1})
	ready.Close()
	fmt.Fprintln(os.Stderr, "fake guest: agent serves")
	if err := guest.Serve(context.Background(), l, a); err != nil {
		return fail(err)
	}
	return 0
}
