package guest

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/crivm/crivm/agentproto"
)

// container is one container from CreateContainer to DeleteContainer.
//
//	CREATED ──Start──▶ RUNNING ──exit──▶ EXITED
//	   └──────Start fails, or killed───────▲
type container struct {
	id  string
	dir string // bundle: config.json, root file system

	op       sync.Mutex // one verb at a time
	undo     []func(context.Context) error
	startErr error // what Start will say: the command cannot be executed
	deleted  bool

	mu    sync.Mutex
	spec  *specs.Spec
	state agentproto.State
	main  *process
	execs map[string]*process
	layer *layerSize // of the writable layer; nil without one

	terminationLog string // path of the file; "" without one
}

// CreateContainer implements agentproto.AgentService.
func (a *Agent) CreateContainer(ctx context.Context, r *agentproto.CreateContainerRequest) (_ *agentproto.CreateContainerResponse, retErr error) {
	ctx, steps := withSteps(ctx)
	id := r.GetContainerId()
	if err := checkID("container id", id); err != nil {
		return nil, err
	}
	c := &container{id: id, dir: filepath.Join(a.Dir, "containers", id), execs: map[string]*process{}}
	c.op.Lock()
	defer c.op.Unlock()
	a.mu.Lock()
	_, exists := a.containers[id]
	if !exists {
		a.containers[id] = c
	}
	a.mu.Unlock()
	if exists {
		return nil, fmt.Errorf("container %s: %w", id, errdefs.ErrAlreadyExists)
	}
	defer func() {
		if retErr != nil {
			ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupTimeout)
			defer cancel()
			if err := a.teardownLocked(ctx, c); err != nil {
				slog.Error("remains of a container that could not be created", "container", id, "error", err)
			}
			a.forget(c)
		}
	}()
	user, err := a.create(ctx, c, r)
	if err != nil {
		return nil, fmt.Errorf("container %s: %w", id, err)
	}
	return &agentproto.CreateContainerResponse{User: user, Steps: steps.list()}, nil
}

const (
	// cleanupTimeout bounds a roll-back.
	cleanupTimeout = 15 * time.Second
	// deleteTimeout bounds a deletion: a process that is stuck in the kernel does not die.
	deleteTimeout = 60 * time.Second
)

// create does the work of CreateContainer and leaves the undoing to the caller.
func (a *Agent) create(ctx context.Context, c *container, r *agentproto.CreateContainerRequest) (*agentproto.ResolvedUser, error) {
	spec, err := parseSpec(r.GetOciSpec())
	if err != nil {
		return nil, err
	}
	if err := os.Mkdir(c.dir, 0o711); err != nil {
		return nil, err
	}
	c.undo = append(c.undo, func(context.Context) error { return os.RemoveAll(c.dir) })

	done := step(ctx, "root file system")
	root, err := a.prepareRoot(ctx, c, r.GetRootfs().GetImageSerial())
	if err != nil {
		return nil, fmt.Errorf("root file system: %w", err)
	}
	done()
	done = step(ctx, "user and mounts")
	user, err := a.completeSpec(ctx, c, spec, root, r)
	if err != nil {
		return nil, err
	}

	done()
	io, child, err := newStdio(r.GetStdio(), containerOutputBytes)
	if err != nil {
		return nil, err
	}
	defer child.close()
	p := newProcess(io)
	if err := a.namespaces.Load().join(c, spec, child); err != nil {
		io.close()
		return nil, err
	}
	c.mu.Lock()
	c.spec, c.main = spec, p
	c.mu.Unlock()

	c.undo = append(c.undo, func(ctx context.Context) error { return a.Runtime.Delete(ctx, c.id) })
	done = step(ctx, "OCI runtime create")
	started, err := a.Runtime.Create(ctx, Bundle{ID: c.id, Dir: c.dir, Spec: spec, Stdio: child})
	done()
	switch {
	case isCommandFailure(err): // CRI wants to hear of it from StartContainer
		c.startErr = err
		p.io.discard() // what the runtime itself said there
	case err != nil:
		return nil, err
	default:
		io.attach(started.Master)
	}
	c.mu.Lock()
	c.state = agentproto.State_STATE_CREATED
	c.mu.Unlock()
	if started != nil && started.Process != nil {
		a.watch(c, p, started.Process)
	}
	return user, nil
}

// watch follows the container's own process to its end.
func (a *Agent) watch(c *container, p *process, child *Child) {
	c.mu.Lock()
	p.child = child
	c.mu.Unlock()
	go func() {
		<-child.Done()
		exit := exitOf(child.Status())
		exit.OomKilled = a.Runtime.OOMKilled(c.id)
		ctx, cancel := context.WithTimeout(context.Background(), cleanupTimeout)
		defer cancel()
		if err := a.Runtime.SignalAll(ctx, c.id, unix.SIGKILL); err != nil {
			slog.Error("kill what is left of a container", "container", c.id, "error", err)
		}
		c.exited(p, exit)
	}()
}

// exited makes the container EXITED, unless it is already.
func (c *container) exited(p *process, exit *agentproto.Exit) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.state == agentproto.State_STATE_EXITED {
		return
	}
	c.state = agentproto.State_STATE_EXITED
	p.finish(exit)
}

// StartContainer implements agentproto.AgentService.
func (a *Agent) StartContainer(ctx context.Context, r *agentproto.StartContainerRequest) (*agentproto.StartContainerResponse, error) {
	ctx, steps := withSteps(ctx)
	c, err := a.container(r.GetContainerId())
	if err != nil {
		return nil, err
	}
	c.op.Lock()
	defer c.op.Unlock()
	c.mu.Lock()
	state, p := c.state, c.main
	c.mu.Unlock()
	if state != agentproto.State_STATE_CREATED {
		return nil, fmt.Errorf("container %s is %s: %w", c.id, stateName(state), errdefs.ErrFailedPrecondition)
	}
	if c.startErr != nil {
		c.exited(p, &agentproto.Exit{Code: exitNotStarted})
		return nil, fmt.Errorf("container %s: %w", c.id, c.startErr)
	}
	done := step(ctx, "OCI runtime start")
	child, err := a.Runtime.Start(ctx, c.id)
	done()
	if err != nil {
		c.exited(p, &agentproto.Exit{Code: exitNotStarted})
		p.io.finish()
		if killErr := a.Runtime.SignalAll(context.WithoutCancel(ctx), c.id, unix.SIGKILL); killErr != nil {
			slog.Error("kill a container that did not start", "container", c.id, "error", killErr)
		}
		return nil, fmt.Errorf("container %s: %w", c.id, err)
	}
	c.mu.Lock()
	if c.state == agentproto.State_STATE_CREATED {
		c.state = agentproto.State_STATE_RUNNING
	}
	if child == nil {
		child = p.child
	} else {
		defer a.watch(c, p, child)
	}
	c.mu.Unlock()
	return &agentproto.StartContainerResponse{Pid: int32(child.PID), Steps: steps.list()}, nil
}

// DeleteContainer implements agentproto.AgentService.
func (a *Agent) DeleteContainer(ctx context.Context, r *agentproto.DeleteContainerRequest) (*agentproto.DeleteContainerResponse, error) {
	if err := a.deleteContainer(ctx, r.GetContainerId()); err != nil {
		return nil, err
	}
	return &agentproto.DeleteContainerResponse{}, nil
}

func (a *Agent) deleteContainer(ctx context.Context, id string) error {
	c, err := a.container(id)
	if err != nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, deleteTimeout)
	defer cancel()
	c.op.Lock()
	defer c.op.Unlock()
	if c.deleted {
		return nil
	}
	if err := a.teardownLocked(ctx, c); err != nil {
		return fmt.Errorf("delete container %s: %w", id, err)
	}
	a.forget(c)
	return nil
}

// teardownLocked ends the container and undoes everything that create did, in reverse. What fails stays
// on the list, so that it can be called again. The op lock is held.
func (a *Agent) teardownLocked(ctx context.Context, c *container) error {
	c.mu.Lock()
	p := c.main
	execs := []*process{}
	for _, e := range c.execs {
		execs = append(execs, e)
	}
	c.mu.Unlock()
	if p != nil {
		if err := a.Runtime.SignalAll(ctx, c.id, unix.SIGKILL); err != nil {
			return err
		}
		if c.hasState() {
			execs = append(execs, p)
		}
		for _, e := range execs {
			c.signal(a.Reaper, e, unix.SIGKILL)
			if _, err := e.wait(ctx); err != nil {
				return fmt.Errorf("killed process has not ended: %w", err)
			}
			e.io.close()
		}
		p.io.close()
	}
	var failed []error
	for i := len(c.undo) - 1; i >= 0; i-- {
		if err := c.undo[i](ctx); err != nil {
			failed = append(failed, err)
			continue
		}
		c.undo = slices.Delete(c.undo, i, i+1)
	}
	return errors.Join(failed...)
}

// hasState tells whether creation got as far as to give the container a process.
func (c *container) hasState() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.state != agentproto.State_STATE_UNSPECIFIED
}

// hasProcess tells whether there is something in the container to be signalled.
func (c *container) hasProcess(p *process) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return p.child != nil
}

func (a *Agent) forget(c *container) {
	c.deleted = true
	a.mu.Lock()
	defer a.mu.Unlock()
	delete(a.containers, c.id)
}

// ListContainers implements agentproto.AgentService. A container that is being created is not listed.
func (a *Agent) ListContainers(context.Context, *agentproto.ListContainersRequest) (*agentproto.ListContainersResponse, error) {
	resp := &agentproto.ListContainersResponse{Volumes: a.volumes.copies.list()}
	for _, c := range a.all() {
		c.mu.Lock()
		info := &agentproto.ContainerInfo{ContainerId: c.id, State: c.state}
		for id := range c.execs {
			info.ExecIds = append(info.ExecIds, id)
		}
		if c.state == agentproto.State_STATE_EXITED {
			info.Exit = c.main.exit
		}
		c.mu.Unlock()
		if info.State == agentproto.State_STATE_UNSPECIFIED {
			continue
		}
		slices.Sort(info.ExecIds)
		resp.Containers = append(resp.Containers, info)
	}
	return resp, nil
}

// all returns the containers by id.
func (a *Agent) all() []*container {
	a.mu.Lock()
	defer a.mu.Unlock()
	cs := []*container{}
	for _, c := range a.containers {
		cs = append(cs, c)
	}
	slices.SortFunc(cs, func(x, y *container) int {
		if x.id < y.id {
			return -1
		}
		return 1
	})
	return cs
}

// process finds the container's own process (execID "") or an exec.
func (c *container) process(execID string) (*process, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	p := c.main
	if execID != "" {
		p = c.execs[execID]
	}
	if p == nil || c.state == agentproto.State_STATE_UNSPECIFIED {
		return nil, fmt.Errorf("process %q of container %s: %w", execID, c.id, errdefs.ErrNotFound)
	}
	return p, nil
}

// signal sends a signal to one process. A container that has no process yet ends by a signal that would
// have ended its process.
func (c *container) signal(reaper *Reaper, p *process, sig unix.Signal) {
	c.mu.Lock()
	child := p.child
	waiting := child == nil && p == c.main && c.state == agentproto.State_STATE_CREATED
	c.mu.Unlock()
	if child != nil {
		reaper.Signal(child, sig)
		return
	}
	if waiting && (sig == unix.SIGKILL || sig == unix.SIGTERM) {
		c.exited(p, &agentproto.Exit{Code: 128 + int32(sig), Signal: int32(sig)})
		p.io.finish()
	}
}

func stateName(s agentproto.State) string {
	switch s {
	case agentproto.State_STATE_CREATED:
		return "created"
	case agentproto.State_STATE_RUNNING:
		return "running"
	case agentproto.State_STATE_EXITED:
		return "exited"
	}
	return "being created"
}
