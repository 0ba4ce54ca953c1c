// Package guest is crivm-agent: what runs as PID 1 in a pod's VM, sets the guest up as a pod and runs its
// containers through an OCI runtime, on the orders of one host over package agentproto's wire.
//
// It owns everything inside the guest: mounts, interfaces, processes, their output until the host has
// acknowledged it, and their exits until the host deletes them. It never decides policy: what CRI says
// is in the OCI spec that the host sends; the agent adds what only the guest can know (users of the
// root file system, paths, namespaces). The host is trusted here; containers are not.
//
// Main is the whole program. Serve with an Agent of NewAgent also runs inside a test, without a VM.
package guest

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/crivm/crivm/agentproto"
)

// Options is what an Agent is made of.
type Options struct {
	Runtime Runtime // required
	Reaper  *Reaper // required; the one that Runtime uses
	// Dir is the agent's private directory, made when missing: bundles, copies of volumes, mount points.
	Dir string
	// Version is the build version told in Hello.
	Version string
	// PlainRoot is the root file system of all containers of an agent that owns no machine. "" gives each an
	// empty directory.
	PlainRoot string
	// PowerOff is called, once, after Shutdown was answered and all containers are gone.
	PowerOff func()

	// machine is the guest that the agent may change: mounts, interfaces, clock. Only the agent of a guest
	// has one. Without, SetupSandbox only remembers that it was called, and nothing is mounted.
	machine *machine
}

// Agent serves the control calls. Its methods are those of agentproto.AgentService.
type Agent struct {
	Options
	started time.Duration // monotonic time since boot when the agent was made
	volumes *volumes
	trims   *trimmer

	sandboxMu sync.Mutex    // serialises what changes the sandbox
	sandbox   *sandbox      // nil before SetupSandbox
	setUp     chan struct{} // closed when the sandbox is set up

	rehearsal    atomic.Pointer[rehearsal] // under way, or done; nil before
	networkDirty error                     // what a rehearsal has left of its network; guarded by sandboxMu
	// namespaces are those of a pod with a user namespace, made before setUp is closed; nil without one.
	namespaces atomic.Pointer[podNamespaces]

	mu         sync.Mutex
	containers map[string]*container
	down       sync.Once
}

var _ agentproto.AgentService = (*Agent)(nil)

// NewAgent makes an agent with no containers.
func NewAgent(o Options) (*Agent, error) {
	if o.Runtime == nil || o.Reaper == nil || !filepath.IsAbs(o.Dir) {
		return nil, fmt.Errorf("agent needs a runtime, a reaper and an absolute directory: %w", errdefs.ErrInvalidArgument)
	}
	for _, d := range []string{"", "containers", "images", "volumes"} {
		if err := os.MkdirAll(filepath.Join(o.Dir, d), 0o711); err != nil {
			return nil, fmt.Errorf("agent directory: %w", err)
		}
	}
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		return nil, fmt.Errorf("boot time: %w", err)
	}
	a := &Agent{Options: o, started: time.Duration(ts.Nano()), containers: map[string]*container{}, setUp: make(chan struct{}), trims: newTrimmer()}
	a.volumes = newVolumes(a)
	return a, nil
}

// Hello implements agentproto.AgentService.
func (a *Agent) Hello(_ context.Context, r *agentproto.HelloRequest) (*agentproto.HelloResponse, error) {
	if r.GetVersion() != agentproto.Version {
		return nil, fmt.Errorf("host speaks version %d of the agent protocol, the agent version %d: %w",
			r.GetVersion(), agentproto.Version, errdefs.ErrFailedPrecondition)
	}
	resp := &agentproto.HelloResponse{
		Version: agentproto.Version, AgentVersion: a.Version, OciRuntime: a.Runtime.Version(),
		SandboxReady: a.isSetUp(), BootNanos: int64(a.started), BootSteps: a.bootSteps(),
	}
	var uts unix.Utsname
	if err := unix.Uname(&uts); err == nil {
		resp.Kernel = unix.ByteSliceToString(uts.Release[:])
	}
	if b, err := os.ReadFile("/proc/sys/kernel/random/boot_id"); err == nil {
		resp.BootId = firstLine(string(b))
	}
	return resp, nil
}

func (a *Agent) isSetUp() bool {
	select {
	case <-a.setUp:
		return true
	default:
		return false
	}
}

// Ping implements agentproto.AgentService.
func (a *Agent) Ping(context.Context, *agentproto.PingRequest) (*agentproto.PingResponse, error) {
	return &agentproto.PingResponse{UnixNanos: time.Now().UnixNano()}, nil
}

// Shutdown implements agentproto.AgentService: the answer goes out first.
func (a *Agent) Shutdown(context.Context, *agentproto.ShutdownRequest) (*agentproto.ShutdownResponse, error) {
	time.AfterFunc(shutdownDelay, a.shutdown)
	return &agentproto.ShutdownResponse{}, nil
}

const (
	// shutdownDelay lets the answer to Shutdown reach the host.
	shutdownDelay = 20 * time.Millisecond
	// shutdownTimeout bounds what Shutdown does before the power goes anyway.
	shutdownTimeout = 10 * time.Second
)

// shutdown ends all containers and switches the power off, once.
func (a *Agent) shutdown() {
	a.down.Do(func() {
		ctx, cancel := context.WithTimeout(context.Background(), shutdownTimeout)
		defer cancel()
		if err := a.Close(ctx); err != nil {
			slog.Warn("containers at shutdown", "error", err)
		}
		if a.PowerOff != nil {
			a.PowerOff()
		}
	})
}

// Close kills and deletes all containers.
func (a *Agent) Close(ctx context.Context) error {
	a.mu.Lock()
	ids := []string{}
	for id := range a.containers {
		ids = append(ids, id)
	}
	a.mu.Unlock()
	var wg sync.WaitGroup
	errs := make([]error, len(ids))
	for i, id := range ids {
		wg.Go(func() { errs[i] = a.deleteContainer(ctx, id) })
	}
	wg.Wait()
	errs = append(errs, a.closeSandbox())
	return errors.Join(errs...)
}

// container finds a container.
func (a *Agent) container(id string) (*container, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	c, ok := a.containers[id]
	if !ok {
		return nil, fmt.Errorf("container %s: %w", id, errdefs.ErrNotFound)
	}
	return c, nil
}

// process finds a container's process (execID "") or one of its execs.
func (a *Agent) process(id, execID string) (*container, *process, error) {
	c, err := a.container(id)
	if err != nil {
		return nil, nil, err
	}
	p, err := c.process(execID)
	return c, p, err
}

// maxIDLength is the longest id: it becomes the name of a file.
const maxIDLength = 250

// checkID refuses what cannot be the name of a file: letters, digits and, not first, "_", ".", "-" are
// taken. (No regular expression: compiling one takes longer than all else before main.)
func checkID(what, id string) error {
	for i := range len(id) {
		if !alphanumeric(id[i]) && (i == 0 || !strings.ContainsRune("_.-", rune(id[i]))) {
			return fmt.Errorf("%s %q: %w", what, id, errdefs.ErrInvalidArgument)
		}
	}
	if id == "" || len(id) > maxIDLength {
		return fmt.Errorf("%s %q: %w", what, id, errdefs.ErrInvalidArgument)
	}
	return nil
}

func alphanumeric(c byte) bool {
	return c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9'
}

// notExist is nil for an error that says that something is already gone.
func notExist(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}
