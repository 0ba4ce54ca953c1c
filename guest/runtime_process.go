package guest

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/crivm/crivm/agentproto"
)

// ProcessRuntime runs the commands of containers as plain processes of the machine it is on: with their
// arguments, environment, stdio, terminal, signals and exits, and with nothing else. There are no
// namespaces, no cgroup, no root file system, no mounts, no limits, no capabilities and no other user:
// whatever the spec says of these is not applied, and Stats tells nothing. It exists for tests of what is
// above the runtime.
type ProcessRuntime struct {
	reaper *Reaper

	mu         sync.Mutex
	containers map[string]*plainContainer
}

type plainContainer struct {
	spec     *specs.Spec
	stdio    []*os.File // held from Create to Start
	terminal bool
	children map[*Child]bool // each leads a session and process group of its own
}

// NewProcessRuntime returns a Runtime whose processes are children of reaper.
func NewProcessRuntime(reaper *Reaper) *ProcessRuntime {
	return &ProcessRuntime{reaper: reaper, containers: map[string]*plainContainer{}}
}

// Version implements Runtime.
func (r *ProcessRuntime) Version() string { return "plain processes, not isolated" }

// Create implements Runtime. There is no process before Start.
func (r *ProcessRuntime) Create(_ context.Context, b Bundle) (*Started, error) {
	files, master, err := plainStdio(b.Stdio)
	if err != nil {
		return nil, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.containers[b.ID] = &plainContainer{
		spec: b.Spec, stdio: files, terminal: b.Stdio.Terminal, children: map[*Child]bool{},
	}
	return &Started{Master: master}, nil
}

// Start implements Runtime.
func (r *ProcessRuntime) Start(_ context.Context, id string) (*Child, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	c, ok := r.containers[id]
	if !ok {
		return nil, fmt.Errorf("container %s: %w", id, errdefs.ErrNotFound)
	}
	defer closeFiles(c.stdio)
	return r.runLocked(c, c.spec.Process, c.stdio, c.terminal)
}

// Exec implements Runtime.
func (r *ProcessRuntime) Exec(_ context.Context, id string, p *specs.Process, stdio ChildStdio) (*Started, error) {
	files, master, err := plainStdio(stdio)
	if err != nil {
		return nil, err
	}
	defer closeFiles(files)
	r.mu.Lock()
	defer r.mu.Unlock()
	c, ok := r.containers[id]
	if !ok {
		return nil, fmt.Errorf("container %s: %w", id, errdefs.ErrNotFound)
	}
	child, err := r.runLocked(c, p, files, stdio.Terminal)
	if err != nil {
		if master != nil {
			master.Close()
		}
		return nil, err
	}
	return &Started{Process: child, Master: master}, nil
}

// SignalAll implements Runtime: it reaches the process groups of the container's processes.
func (r *ProcessRuntime) SignalAll(_ context.Context, id string, sig unix.Signal) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if c, ok := r.containers[id]; ok {
		for child := range c.children {
			unix.Kill(-child.PID, sig)
		}
	}
	return nil
}

// KillTree implements Runtime: it reaches the process group.
func (r *ProcessRuntime) KillTree(_ string, child *Child) { unix.Kill(-child.PID, unix.SIGKILL) }

// Delete implements Runtime.
func (r *ProcessRuntime) Delete(ctx context.Context, id string) error {
	r.SignalAll(ctx, id, unix.SIGKILL)
	r.mu.Lock()
	defer r.mu.Unlock()
	if c, ok := r.containers[id]; ok {
		closeFiles(c.stdio)
		delete(r.containers, id)
	}
	return nil
}

// OOMKilled implements Runtime; a plain process has no limit.
func (r *ProcessRuntime) OOMKilled(string) bool { return false }

// Update implements Runtime. Limits are taken and not applied; a file of a cgroup is refused as one that the
// kernel does not have.
func (r *ProcessRuntime) Update(_ context.Context, _ string, res *specs.LinuxResources) error {
	for file := range res.Unified {
		return fmt.Errorf("%s of a plain process: %w", file, errdefs.ErrNotFound)
	}
	return nil
}

// Stats implements Runtime.
func (r *ProcessRuntime) Stats(string, bool, *agentproto.ContainerStats) error { return nil }

func (r *ProcessRuntime) runLocked(c *plainContainer, p *specs.Process, files []*os.File, terminal bool) (*Child, error) {
	path, err := lookCommand(p.Args[0], p.Env, p.Cwd)
	if err != nil {
		return nil, err
	}
	dir := p.Cwd
	if st, err := os.Stat(dir); err != nil || !st.IsDir() {
		dir = "/"
	}
	child, err := r.reaper.Start(Command{
		Path: path, Args: p.Args[1:], Env: p.Env, Dir: dir, Files: files,
		Attr: &syscall.SysProcAttr{Setsid: true, Setctty: terminal},
	})
	if err != nil {
		return nil, commandError(p.Args[0], err)
	}
	c.children[child] = true
	return child, nil
}

// plainStdio makes descriptors 0 to 2 that stay valid after the caller has closed its own.
func plainStdio(s ChildStdio) ([]*os.File, *os.File, error) {
	if s.Terminal {
		master, slave, err := openTerminal()
		if err != nil {
			return nil, nil, err
		}
		return []*os.File{slave, slave, slave}, master, nil
	}
	files := []*os.File{}
	for _, f := range []*os.File{s.Stdin, s.Stdout, s.Stderr} {
		if f == nil {
			files = append(files, nil)
			continue
		}
		fd, err := descriptor(f)
		if err == nil {
			var n int
			n, err = unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 3)
			fd = uintptr(n)
		}
		if err != nil {
			closeFiles(files)
			return nil, nil, fmt.Errorf("duplicate stdio: %w", err)
		}
		files = append(files, os.NewFile(fd, f.Name()))
	}
	return files, nil, nil
}

// lookCommand finds a program as execvpe(3) would.
func lookCommand(name string, env []string, dir string) (string, error) {
	if strings.Contains(name, "/") {
		path := name
		if !filepath.IsAbs(path) {
			path = filepath.Join(dir, name)
		}
		return path, checkExecutable(name, path)
	}
	path := "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
	for _, kv := range env {
		if v, ok := strings.CutPrefix(kv, "PATH="); ok {
			path = v
		}
	}
	var denied error
	for _, d := range filepath.SplitList(path) {
		err := checkExecutable(name, filepath.Join(d, name))
		if err == nil {
			return filepath.Join(d, name), nil
		}
		if errors.Is(err, errdefs.ErrPermissionDenied) {
			denied = err
		}
	}
	if denied != nil {
		return "", denied
	}
	return "", notInPath(name)
}

func checkExecutable(name, path string) error {
	st, err := os.Stat(path)
	if err != nil {
		return commandError(name, err)
	}
	if st.IsDir() || st.Mode()&0o111 == 0 {
		return commandError(name, fs.ErrPermission)
	}
	return nil
}

func closeFiles(files []*os.File) {
	for _, f := range files {
		if f != nil {
			f.Close()
		}
	}
}
