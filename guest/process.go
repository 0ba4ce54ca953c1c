package guest

import (
	"context"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/crivm/crivm/agentproto"
)

// exitNotStarted is the exit code of a command that could not be executed, as kubelet knows it.
const exitNotStarted = 128

// process is a container's own process or an exec.
type process struct {
	io    *stdio
	ended chan struct{}
	exit  *agentproto.Exit // valid after ended
	child *Child           // guarded by container.mu; nil before there is one
}

func newProcess(io *stdio) *process {
	return &process{io: io, ended: make(chan struct{})}
}

// finish records the exit. Called once.
func (p *process) finish(exit *agentproto.Exit) {
	exit.UnixNanos = time.Now().UnixNano()
	p.exit = exit
	p.io.ended()
	close(p.ended)
}

// wait returns the exit once there is one.
func (p *process) wait(ctx context.Context) (*agentproto.Exit, error) {
	select {
	case <-p.ended:
		return p.exit, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (p *process) hasEnded() bool {
	select {
	case <-p.ended:
		return true
	default:
		return false
	}
}

// exitOf translates a wait status.
func exitOf(status unix.WaitStatus) *agentproto.Exit {
	if status.Signaled() {
		sig := int32(status.Signal())
		return &agentproto.Exit{Code: 128 + sig, Signal: sig}
	}
	return &agentproto.Exit{Code: int32(status.ExitStatus())}
}

// Wait implements agentproto.AgentService.
func (a *Agent) Wait(ctx context.Context, r *agentproto.WaitRequest) (*agentproto.WaitResponse, error) {
	c, p, err := a.process(r.GetContainerId(), r.GetExecId())
	if err != nil {
		return nil, err
	}
	exit, err := p.wait(ctx)
	if err != nil {
		return nil, fmt.Errorf("wait for container %s: %w", r.GetContainerId(), err)
	}
	resp := &agentproto.WaitResponse{Exit: exit}
	if r.GetExecId() == "" {
		resp.TerminationLog = c.readTerminationLog()
	}
	return resp, nil
}

// Signal implements agentproto.AgentService.
func (a *Agent) Signal(ctx context.Context, r *agentproto.SignalRequest) (*agentproto.SignalResponse, error) {
	c, p, err := a.process(r.GetContainerId(), r.GetExecId())
	if err != nil {
		return nil, err
	}
	sig := unix.Signal(r.GetSignal())
	if sig < 0 || sig > 64 {
		return nil, fmt.Errorf("signal %d: %w", sig, errdefs.ErrInvalidArgument)
	}
	if r.GetAll() {
		if err := a.Runtime.SignalAll(ctx, c.id, sig); err != nil {
			return nil, fmt.Errorf("signal %d to all of container %s: %w", sig, c.id, err)
		}
	}
	if !r.GetAll() || !c.hasProcess(p) {
		c.signal(a.Reaper, p, sig)
	}
	return &agentproto.SignalResponse{}, nil
}

// ResizeTTY implements agentproto.AgentService.
func (a *Agent) ResizeTTY(_ context.Context, r *agentproto.ResizeTTYRequest) (*agentproto.ResizeTTYResponse, error) {
	_, p, err := a.process(r.GetContainerId(), r.GetExecId())
	if err != nil {
		return nil, err
	}
	if err := p.io.resize(r.GetRows(), r.GetColumns()); err != nil {
		return nil, fmt.Errorf("container %s: %w", r.GetContainerId(), err)
	}
	return &agentproto.ResizeTTYResponse{}, nil
}
