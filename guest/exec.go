package guest

import (
	"context"
	"fmt"
	"log/slog"
	"slices"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/crivm/crivm/agentproto"
)

// Exec implements agentproto.AgentService.
func (a *Agent) Exec(ctx context.Context, r *agentproto.ExecRequest) (*agentproto.ExecResponse, error) {
	c, err := a.container(r.GetContainerId())
	if err != nil {
		return nil, err
	}
	ctx, steps := withSteps(ctx)
	execID := r.GetExecId()
	if err := checkID("exec id", execID); err != nil {
		return nil, err
	}
	if len(r.GetArgs()) == 0 || r.GetArgs()[0] == "" {
		return nil, fmt.Errorf("exec %s without a command: %w", execID, errdefs.ErrInvalidArgument)
	}
	io, child, err := newStdio(r.GetStdio(), execOutputBytes)
	if err != nil {
		return nil, err
	}
	defer child.close()
	p := newProcess(io)
	spec, err := c.addExec(execID, p, r)
	if err != nil {
		io.close()
		return nil, err
	}
	if err := a.namespaces.Load().own(child, spec.User); err != nil {
		slog.Warn("exec", "container", c.id, "error", err) // it can still write to them
	}
	done := step(ctx, "OCI runtime exec")
	started, err := a.Runtime.Exec(ctx, c.id, spec, child)
	done()
	if err != nil {
		c.mu.Lock()
		delete(c.execs, execID)
		running := c.state == agentproto.State_STATE_RUNNING
		c.mu.Unlock()
		p.finish(&agentproto.Exit{Code: exitNotStarted})
		io.close()
		if !running {
			err = fmt.Errorf("ended meanwhile: %w", errdefs.ErrFailedPrecondition)
		}
		return nil, fmt.Errorf("exec in container %s: %w", c.id, err)
	}
	io.attach(started.Master)
	c.mu.Lock()
	p.child = started.Process
	c.mu.Unlock()
	go func() {
		<-started.Process.Done()
		p.finish(exitOf(started.Process.Status()))
	}()
	return &agentproto.ExecResponse{Pid: int32(started.Process.PID), Steps: steps.list()}, nil
}

// addExec registers an exec of a running container and says what it has to run.
func (c *container) addExec(execID string, p *process, r *agentproto.ExecRequest) (*specs.Process, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.state != agentproto.State_STATE_RUNNING {
		return nil, fmt.Errorf("container %s is %s, not running: %w", c.id, stateName(c.state), errdefs.ErrFailedPrecondition)
	}
	if _, ok := c.execs[execID]; ok {
		return nil, fmt.Errorf("exec %s of container %s: %w", execID, c.id, errdefs.ErrAlreadyExists)
	}
	c.execs[execID] = p
	spec := *c.spec.Process
	spec.Args = slices.Clone(r.GetArgs())
	spec.CommandLine = ""
	spec.Env = slices.Clone(spec.Env)
	setTerminal(&spec, r.GetStdio())
	return &spec, nil
}

// DeleteExec implements agentproto.AgentService.
func (a *Agent) DeleteExec(ctx context.Context, r *agentproto.DeleteExecRequest) (*agentproto.DeleteExecResponse, error) {
	c, err := a.container(r.GetContainerId())
	if err != nil {
		return &agentproto.DeleteExecResponse{}, nil
	}
	c.mu.Lock()
	p := c.execs[r.GetExecId()]
	var child *Child
	if p != nil {
		child = p.child
	}
	c.mu.Unlock()
	if p == nil {
		return &agentproto.DeleteExecResponse{}, nil
	}
	if child == nil && !p.hasEnded() {
		return nil, fmt.Errorf("exec %s of container %s is being started: %w", r.GetExecId(), c.id, errdefs.ErrUnavailable)
	}
	if child != nil {
		a.Runtime.KillTree(c.id, child)
		a.Reaper.Signal(child, unix.SIGKILL)
	}
	if _, err := p.wait(ctx); err != nil {
		return nil, fmt.Errorf("killed exec %s of container %s has not ended: %w", r.GetExecId(), c.id, err)
	}
	p.io.close()
	c.mu.Lock()
	delete(c.execs, r.GetExecId())
	c.mu.Unlock()
	return &agentproto.DeleteExecResponse{}, nil
}
