package guest

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// ociRuntime drives crun or runc, by the command line that both share. Signals, limits and statistics go
// straight to the containers' cgroups (version 2): starting a program for each would cost more than the
// thing itself.
type ociRuntime struct {
	name   string                 // path of the program, for messages
	sealed func() (string, error) // path of what is executed
	dir    string
	reaper *Reaper
	cgroup cgroups
	serial atomic.Uint64 // names files that belong to one call

	filters filterCache
	version atomic.Pointer[string]
}

// maxLog bounds what is read of a runtime's messages.
const maxLog = 64 << 10

// newOCIRuntime drives the runtime at path, which keeps its state below dir. cgroupRoot is where cgroup v2
// is mounted.
func newOCIRuntime(path, dir, cgroupRoot string, reaper *Reaper) (*ociRuntime, error) {
	for _, d := range []string{"state", "calls"} {
		if err := os.MkdirAll(filepath.Join(dir, d), 0o700); err != nil {
			return nil, fmt.Errorf("OCI runtime: %w", err)
		}
	}
	if _, err := os.Stat(path); err != nil {
		return nil, fmt.Errorf("OCI runtime: %w", err)
	}
	sealed := sync.OnceValues(func() (string, error) { return sealProgram(path) })
	return &ociRuntime{name: path, sealed: sealed, dir: dir, reaper: reaper, cgroup: cgroups(cgroupRoot)}, nil
}

// sealProgram copies a program to memory that nobody can change and returns the path of that, valid in this
// process and its children until they execute something. Both runtimes would otherwise make such a copy of
// themselves each time that they enter a container, and execute that.
func sealProgram(path string) (string, error) {
	from, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer from.Close()
	st, err := from.Stat()
	if err != nil {
		return "", err
	}
	fd, err := unix.MemfdCreate(filepath.Base(path), unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return "", fmt.Errorf("memory for %s: %w", path, err)
	}
	for left := st.Size(); left > 0; {
		n, err := unix.Sendfile(fd, int(from.Fd()), nil, int(left))
		if err != nil || n == 0 {
			unix.Close(fd)
			return "", fmt.Errorf("copy %s: %w", path, errors.Join(err, io.ErrUnexpectedEOF))
		}
		left -= int64(n)
	}
	seals := unix.F_SEAL_SEAL | unix.F_SEAL_SHRINK | unix.F_SEAL_GROW | unix.F_SEAL_WRITE
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, seals); err != nil {
		unix.Close(fd)
		return "", fmt.Errorf("seal %s: %w", path, err)
	}
	return "/proc/self/fd/" + strconv.Itoa(fd), nil
}

// Version implements Runtime; "" before AskVersion has been called.
func (r *ociRuntime) Version() string {
	if v := r.version.Load(); v != nil {
		return *v
	}
	return ""
}

// AskVersion runs the runtime to learn its version. It takes longer than a boot can spare.
func (r *ociRuntime) AskVersion(ctx context.Context) error {
	out := filepath.Join(r.dir, "version")
	f, err := os.OpenFile(out, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := r.execute(ctx, ChildStdio{Stdout: f}, "--version"); err != nil {
		return err
	}
	b, err := os.ReadFile(out)
	if err != nil {
		return err
	}
	v := firstLine(string(b))
	r.version.Store(&v)
	return nil
}

// call is one run of the runtime's program.
type call struct {
	pidFile, logFile, processFile, socket string
}

func (r *ociRuntime) newCall() call {
	base := filepath.Join(r.dir, "calls", strconv.FormatUint(r.serial.Add(1), 10))
	return call{pidFile: base + ".pid", logFile: base + ".log", processFile: base + ".json", socket: base + ".tty"}
}

func (c call) remove() {
	for _, f := range []string{c.pidFile, c.logFile, c.processFile, c.socket} {
		os.Remove(f)
	}
}

// execute runs the program to its end.
func (r *ociRuntime) execute(ctx context.Context, stdio ChildStdio, args ...string) (unix.WaitStatus, error) {
	path, err := r.sealed()
	if err != nil {
		return 0, fmt.Errorf("OCI runtime: %w", err)
	}
	return r.reaper.Run(ctx, Command{
		Path: path, Name: r.name, Args: args, Dir: "/", Idle: inIdleTime(ctx), Expendable: true, // crun does not apply an oomScoreAdj of 0
		Env:   []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"},
		Files: []*os.File{stdio.Stdin, stdio.Stdout, stdio.Stderr},
	})
}

// run runs the runtime; name is the command that the container is to run, for messages.
func (r *ociRuntime) run(ctx context.Context, c call, name string, stdio ChildStdio, args ...string) error {
	global := []string{"--root", filepath.Join(r.dir, "state"), "--log", c.logFile, "--log-format", "json"}
	status, err := r.execute(ctx, stdio, append(global, args...)...)
	if err != nil {
		return err
	}
	if status.Exited() && status.ExitStatus() == 0 {
		return nil
	}
	if status.Signaled() {
		return fmt.Errorf("OCI runtime %s killed by signal %d: %w", args[0], status.Signal(), errdefs.ErrUnknown)
	}
	return runtimeError(name, lastError(c.logFile))
}

// lastError is the last error message in a runtime's log.
func lastError(path string) string {
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	b, _ := io.ReadAll(io.LimitReader(f, maxLog))
	last := ""
	for line := range bytes.Lines(b) {
		var m struct{ Level, Msg string }
		if json.Unmarshal(line, &m) == nil && m.Msg != "" && (m.Level == "error" || last == "") {
			last = m.Msg
		}
	}
	return last
}

// begin runs create or exec, which leave a process behind, and adopts that.
func (r *ociRuntime) begin(ctx context.Context, c call, name string, stdio ChildStdio, args []string) (_ *Started, retErr error) {
	var console *consoleSocket
	if stdio.Terminal {
		var err error
		if console, err = listenConsole(c.socket); err != nil {
			return nil, err
		}
		defer console.close()
		args = append(args[:1:1], append([]string{"--console-socket", c.socket}, args[1:]...)...)
	}
	if err := r.run(ctx, c, name, stdio, args...); err != nil {
		return nil, err
	}
	b, err := os.ReadFile(c.pidFile)
	if err != nil {
		return nil, fmt.Errorf("OCI runtime left no pid: %w", err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil || pid <= 1 {
		return nil, fmt.Errorf("OCI runtime left pid %q: %w", b, errdefs.ErrUnknown)
	}
	child, err := r.reaper.Adopt(pid)
	if err != nil {
		return nil, err
	}
	started := &Started{Process: child}
	if console != nil {
		if started.Master, err = console.receive(ctx); err != nil {
			r.reaper.Signal(child, unix.SIGKILL)
			return nil, err
		}
	}
	return started, nil
}

// Create implements Runtime.
func (r *ociRuntime) Create(ctx context.Context, b Bundle) (*Started, error) {
	r.filters.apply(b.Spec)
	config, err := json.Marshal(b.Spec)
	if err != nil {
		return nil, fmt.Errorf("OCI spec: %w", err)
	}
	if err := os.WriteFile(filepath.Join(b.Dir, "config.json"), config, 0o600); err != nil {
		return nil, err
	}
	c := r.newCall()
	defer c.remove()
	started, err := r.begin(ctx, c, b.Spec.Process.Args[0], b.Stdio, []string{"create", "--bundle", b.Dir, "--pid-file", c.pidFile, b.ID})
	if err == nil {
		r.filters.learn(b.Spec, filepath.Join(r.dir, "state", b.ID))
	}
	return started, err
}

// Start implements Runtime.
func (r *ociRuntime) Start(ctx context.Context, id string) (*Child, error) {
	if r.release(id) {
		return nil, nil
	}
	c := r.newCall()
	defer c.remove()
	return nil, r.run(ctx, c, "", ChildStdio{}, "start", id)
}

// release does what "crun start" does, without starting a program for it: the container's process waits in
// open(2) for somebody to write to a FIFO. False when nobody waits there (runc does it the other way round),
// and then nothing was done.
func (r *ociRuntime) release(id string) bool {
	path := filepath.Join(r.dir, "state", id, "exec.fifo")
	fd, err := unix.Open(path, unix.O_WRONLY|unix.O_NONBLOCK|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return false
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFIFO {
		return false
	}
	if _, err := unix.Write(fd, []byte{0}); err != nil {
		return false
	}
	os.Remove(path) // by which the runtime knows that it runs
	return true
}

// Exec implements Runtime.
func (r *ociRuntime) Exec(ctx context.Context, id string, p *specs.Process, stdio ChildStdio) (*Started, error) {
	c := r.newCall()
	defer c.remove()
	process, err := json.Marshal(p)
	if err != nil {
		return nil, fmt.Errorf("process: %w", err)
	}
	if err := os.WriteFile(c.processFile, process, 0o600); err != nil {
		return nil, err
	}
	started, err := r.begin(ctx, c, p.Args[0], stdio, []string{"exec", "--process", c.processFile, "--detach", "--pid-file", c.pidFile, id})
	if err == nil {
		// The runtime makes each exec a session; its leader may be gone already.
		started.Process.session, _ = unix.Getsid(started.Process.PID)
	}
	return started, err
}

// Delete implements Runtime.
func (r *ociRuntime) Delete(ctx context.Context, id string) error {
	if _, err := os.Stat(filepath.Join(r.dir, "state", id)); errors.Is(err, os.ErrNotExist) {
		return r.cgroup.remove(id) // nothing there, or what a creation that failed has left
	}
	c := r.newCall()
	defer c.remove()
	if err := r.run(ctx, c, "", ChildStdio{}, "delete", "--force", id); err != nil {
		return err
	}
	return r.cgroup.remove(id)
}
