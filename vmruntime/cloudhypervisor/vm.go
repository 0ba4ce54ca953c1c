package cloudhypervisor

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"github.com/crivm/crivm/vmruntime"
	"github.com/crivm/crivm/vmruntime/chclient"
)

// vm is a running VM. What it has plugged is not kept here: the VMM's vm.info tells, also after a restart.
type vm struct {
	id, dir string
	proc    *vmruntime.Process
	client  *chclient.Client

	plug  chan struct{} // one token: hot-plug, resize, pause and resume are serialised
	ready chan struct{} // closed when the agent has said that it serves

	mu      sync.Mutex
	reason  string        // why the VM ends; the first one counts
	power   bool          // the VMM said that the guest is gone
	changed chan struct{} // closed and replaced when a device has been removed

	done chan struct{}
	exit vmruntime.Exit // written before done is closed

	watchers sync.WaitGroup
}

var _ vmruntime.VM = (*vm)(nil)

func newVM(id, dir string, p *vmruntime.Process) *vm {
	v := &vm{
		id: id, dir: dir, proc: p, client: chclient.New(apiPath(dir)),
		plug: make(chan struct{}, 1), ready: make(chan struct{}),
		changed: make(chan struct{}), done: make(chan struct{}),
	}
	v.plug <- struct{}{}
	return v
}

func (v *vm) ID() string            { return v.id }
func (v *vm) Done() <-chan struct{} { return v.done }
func (v *vm) PID() int              { return v.proc.PID() }
func (v *vm) Console() string       { return vmruntime.TailFile(consolePath(v.dir)) }

// Exit implements vmruntime.VM.
func (v *vm) Exit() vmruntime.Exit {
	select {
	case <-v.done:
		return v.exit
	default:
		return vmruntime.Exit{}
	}
}

// end kills the VMM for a reason, of which the first is told. The process is waited for by watch.
func (v *vm) end(reason string) {
	v.mu.Lock()
	if v.reason == "" {
		v.reason = reason
	}
	v.mu.Unlock()
	_ = v.proc.Signal(sigkill) // fails for lack of a process only
}

// Kill implements vmruntime.VM.
func (v *vm) Kill(ctx context.Context) error {
	select {
	case <-v.proc.Done(): // it has its own reason
	default:
		v.end("killed")
	}
	if err := v.proc.Kill(ctx); err != nil {
		return fmt.Errorf("VM %s: %w", v.id, err)
	}
	select {
	case <-v.done:
	case <-ctx.Done():
		return fmt.Errorf("VM %s: %w", v.id, ctx.Err())
	}
	v.watchers.Wait() // all of them end with done
	if err := removeFiles(v.dir); err != nil {
		return fmt.Errorf("VM %s: %w", v.id, err)
	}
	return nil
}

// Move implements vmruntime.VM.
func (v *vm) Move(ctx context.Context, to vmruntime.Cgroup, oomScoreAdj int) error {
	if err := v.proc.Move(ctx, to, oomScoreAdj); err != nil {
		return fmt.Errorf("VM %s: %w", v.id, err)
	}
	return nil
}

// Shutdown implements vmruntime.VM. The agent has asked the guest to power off; the VMM then exits by itself.
func (v *vm) Shutdown(ctx context.Context) error {
	select {
	case <-v.done:
	case <-ctx.Done():
		v.end("guest did not power off in time")
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupTimeout)
	defer cancel()
	return v.Kill(ctx)
}

// take waits for the turn of a call that changes the VM; the caller gives it back.
func (v *vm) take(ctx context.Context) (give func(), _ error) {
	select {
	case <-v.done:
		return nil, v.gone()
	default:
	}
	select {
	case <-v.plug:
		return func() { v.plug <- struct{}{} }, nil
	case <-v.done:
		return nil, v.gone()
	case <-ctx.Done():
		return nil, fmt.Errorf("waiting for an earlier call: %w", ctx.Err())
	}
}

func (v *vm) gone() error {
	return fmt.Errorf("VM is gone: %s: %w", v.exit.Reason, errdefs.ErrUnavailable)
}

// explain tells of an error whether it came with the end of the VM.
func (v *vm) explain(err error) error {
	if !errdefs.IsUnavailable(err) {
		return err
	}
	select {
	case <-v.done:
		return v.gone()
	case <-time.After(exitGrace): // the connection may break a moment before the process has ended
		return err
	}
}

// exitGrace is how long a VMM may take from its last sign of life to its end.
const exitGrace = 100 * time.Millisecond

// Pause implements vmruntime.VM; a paused VM stays so.
func (v *vm) Pause(ctx context.Context) error {
	return v.turn(ctx, "pause", chclient.StatePaused, v.client.Pause)
}

// Resume implements vmruntime.VM; a running VM goes on.
func (v *vm) Resume(ctx context.Context) error {
	return v.turn(ctx, "resume", chclient.StateRunning, v.client.Resume)
}

func (v *vm) turn(ctx context.Context, what string, want chclient.State, do func(context.Context) error) error {
	give, err := v.take(ctx)
	if err != nil {
		return fmt.Errorf("%s VM %s: %w", what, v.id, err)
	}
	defer give()
	if err := do(ctx); err != nil {
		// Not in the state for it: most likely in the wanted one.
		info, infoErr := v.client.Info(ctx)
		if infoErr == nil && info.State == want {
			return nil
		}
		return fmt.Errorf("%s VM %s: %w", what, v.id, v.explain(errors.Join(err, infoErr)))
	}
	return nil
}
