package qemu

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/errdefs"

	"github.com/crivm/crivm/vmruntime"
)

const (
	// commandWait bounds one monitor command. QEMU answers within milliseconds unless it hangs.
	commandWait = 30 * time.Second
	// lastEvents bounds how long after QEMU's end its last events are read, and how long after the loss of
	// its monitor its end is awaited.
	lastEvents = time.Second
	// killWait bounds the kill that ends a Shutdown.
	killWait = 15 * time.Second
)

// VM is one QEMU process.
type VM struct {
	spec    vmruntime.Spec
	proc    *vmruntime.Process
	console *console
	done    chan struct{}
	exit    vmruntime.Exit // before done is closed: not there

	agent agentLink

	// changing is held by what changes devices, size or run state, one at a time: a slot of 1.
	changing chan struct{}
	state    *state // guarded by changing

	mu       sync.Mutex
	monitor  *qmp
	killed   bool
	shutdown string                // reason of the SHUTDOWN event
	gone     map[string]chan error // waiters for the removal of a device
}

var _ vmruntime.VM = (*VM)(nil)

// attach connects to a QEMU that has just been started or adopted. Its process is left alone on error.
func attach(ctx context.Context, st *state, proc *vmruntime.Process) (_ *VM, retErr error) {
	vm := &VM{
		spec: st.Spec, proc: proc, state: st,
		done: make(chan struct{}), changing: make(chan struct{}, 1), gone: map[string]chan error{},
	}
	dialing, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		select {
		case <-proc.Done(): // QEMU's socket would keep us waiting: this daemon may hold its listening end
			cancel()
		case <-dialing.Done():
		}
	}()
	monitor, err := dialQMP(dialing, filepath.Join(st.Spec.Dir, qmpName), vm.onEvent)
	// QEMU opens the console before it greets. A console that cannot be read costs error messages only,
	// yet something is badly wrong then.
	c, consoleErr := openConsole(st.Spec.Dir)
	if err == nil {
		err = consoleErr
	}
	defer func() {
		if retErr == nil {
			return
		}
		if monitor != nil {
			monitor.Close()
		}
		if c != nil {
			c.close()
		}
	}()
	if err != nil {
		// Mostly QEMU is about to end, and why says more than a lost connection.
		select {
		case <-proc.Done():
			if c != nil {
				<-c.done
			}
			return nil, fmt.Errorf("%s: %w", endReason(proc, "", false, st.Spec.Dir), errdefs.ErrUnavailable)
		case <-time.After(lastEvents):
			return nil, err
		}
	}
	vm.monitor, vm.console = monitor, c
	if err := vm.reconcile(ctx); err != nil {
		return nil, err
	}
	vm.agent.init(filepath.Join(st.Spec.Dir, agentName))
	go vm.supervise()
	return vm, nil
}

// supervise lives as long as QEMU does and tells how it ended.
func (vm *VM) supervise() {
	log := filepath.Join(vm.spec.Dir, "vmm.log")
	vmruntime.WatchFiles(vm.proc.Done(), log)

	vm.mu.Lock()
	monitor := vm.monitor
	vm.mu.Unlock()
	t := time.NewTimer(lastEvents)
	defer t.Stop()
	select { // the reader meets the end of the connection after the last event
	case <-monitor.closed:
	case <-t.C:
	}
	select {
	case <-vm.console.done:
	case <-t.C:
	}
	vm.mu.Lock()
	code, signal := vm.proc.ExitStatus()
	vm.exit = vmruntime.Exit{At: time.Now(), Code: code, Signal: signal, Reason: endReason(vm.proc, vm.shutdown, vm.killed, vm.spec.Dir)}
	close(vm.done)
	vm.mu.Unlock()
	monitor.Close()
	vm.console.close()
	vm.agent.close()
	slog.Info("VM ended", "id", vm.spec.ID, "reason", vm.exit.Reason)
}

// endReason says in one line why QEMU ended. shutdown is QEMU's own word for it.
func endReason(p *vmruntime.Process, shutdown string, killed bool, dir string) string {
	code, signal := p.ExitStatus()
	panicked := panicMessage(dir)
	switch {
	case killed:
		return "killed"
	case shutdown == "guest-panic", panicked != "" && (shutdown == "guest-reset" || shutdown == ""):
		return strings.TrimSuffix("guest panicked: "+panicked, ": ")
	case shutdown == "guest-shutdown":
		return "guest powered off"
	case shutdown == "guest-reset":
		return "guest rebooted"
	case shutdown != "":
		return "VMM was ended: " + shutdown
	case signal != 0:
		return fmt.Sprintf("VMM was killed by signal %d (%v)", signal, syscall.Signal(signal))
	case code >= 0:
		return fmt.Sprintf("VMM exited with status %d", code)
	}
	return "VMM ended"
}

// onEvent runs on the monitor's reader.
func (vm *VM) onEvent(e event) {
	var data struct {
		Reason string `json:"reason"`
		Device string `json:"device"`
	}
	if len(e.Data) > 0 {
		if err := json.Unmarshal(e.Data, &data); err != nil {
			return
		}
	}
	vm.mu.Lock()
	defer vm.mu.Unlock()
	switch e.Name {
	case "SHUTDOWN":
		vm.shutdown = data.Reason
	case "GUEST_PANICKED":
		vm.shutdown = "guest-panic"
	case "DEVICE_DELETED", "DEVICE_UNPLUG_GUEST_ERROR":
		// The event comes a second time for the inner virtio device, without an id.
		ch := vm.gone[data.Device]
		if ch == nil || data.Device == "" {
			return
		}
		delete(vm.gone, data.Device)
		if e.Name != "DEVICE_DELETED" {
			ch <- fmt.Errorf("the guest keeps device %s: %w", data.Device, errdefs.ErrFailedPrecondition)
		}
		close(ch)
	}
}

// dead is the error of every call on a VM that has ended, nil while it runs.
func (vm *VM) dead() error {
	select {
	case <-vm.done:
		return fmt.Errorf("VM %s: %s: %w", vm.spec.ID, vm.exit.Reason, errdefs.ErrUnavailable)
	default:
		return nil
	}
}

// command runs one monitor command, on a new connection when the former broke. The caller's ctx may end
// without leaving a change half done: commands are short and run to their end.
func (vm *VM) command(ctx context.Context, name string, args, result any) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), commandWait)
	defer cancel()
	q, err := vm.connected(ctx)
	if err != nil {
		return err
	}
	return q.execute(ctx, name, args, result)
}

func (vm *VM) connected(ctx context.Context) (*qmp, error) {
	if err := vm.dead(); err != nil {
		return nil, err
	}
	vm.mu.Lock()
	q := vm.monitor
	vm.mu.Unlock()
	select {
	case <-q.closed:
	default:
		return q, nil
	}
	select {
	case <-vm.proc.Done():
		<-vm.done
		return nil, vm.dead()
	default:
	}
	ctx, cancel := context.WithTimeout(ctx, monitorWait)
	defer cancel()
	fresh, err := dialQMP(ctx, filepath.Join(vm.spec.Dir, qmpName), vm.onEvent)
	if err != nil {
		return nil, err
	}
	vm.mu.Lock()
	defer vm.mu.Unlock()
	if vm.monitor != q { // another call was faster
		fresh.Close()
		return vm.monitor, nil
	}
	vm.monitor = fresh
	return fresh, nil
}

// change waits for its turn to change the VM. end gives the turn back.
func (vm *VM) change(ctx context.Context) (end func(), err error) {
	if err := vm.dead(); err != nil {
		return nil, err
	}
	select {
	case vm.changing <- struct{}{}:
		return func() { <-vm.changing }, nil
	case <-vm.done:
		return nil, vm.dead()
	case <-ctx.Done():
		return nil, fmt.Errorf("VM %s: wait for another change: %w", vm.spec.ID, ctx.Err())
	}
}

// ID of the VM.
func (vm *VM) ID() string { return vm.spec.ID }

// Move implements vmruntime.VM.
func (vm *VM) Move(ctx context.Context, to vmruntime.Cgroup, oomScoreAdj int) error {
	if err := vm.proc.Move(ctx, to, oomScoreAdj); err != nil {
		return fmt.Errorf("VM %s: %w", vm.spec.ID, err)
	}
	return nil
}

// PID of QEMU.
func (vm *VM) PID() int { return vm.proc.PID() }

// Done is closed when QEMU has ended, which a reboot or a panic of the guest makes it do.
func (vm *VM) Done() <-chan struct{} { return vm.done }

// Exit is valid after Done.
func (vm *VM) Exit() vmruntime.Exit {
	select {
	case <-vm.done:
		return vm.exit
	default:
		return vmruntime.Exit{}
	}
}

// Console is the end of what the guest printed.
func (vm *VM) Console() string { return tail(vm.spec.Dir) }

// Pause stops the vCPUs.
func (vm *VM) Pause(ctx context.Context) error { return vm.run(ctx, "stop") }

// Resume lets them go on.
func (vm *VM) Resume(ctx context.Context) error { return vm.run(ctx, "cont") }

func (vm *VM) run(ctx context.Context, command string) error {
	end, err := vm.change(ctx)
	if err != nil {
		return err
	}
	defer end()
	if err := vm.command(ctx, command, nil, nil); err != nil {
		return fmt.Errorf("VM %s: %w", vm.spec.ID, err)
	}
	return nil
}

// Shutdown waits for the guest to power off until ctx ends, and then kills.
func (vm *VM) Shutdown(ctx context.Context) error {
	select {
	case <-vm.done:
	case <-ctx.Done():
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), killWait)
	defer cancel()
	return vm.Kill(ctx)
}

// Kill ends QEMU and removes what it left.
func (vm *VM) Kill(ctx context.Context) error {
	vm.mu.Lock()
	select {
	case <-vm.proc.Done():
	default:
		vm.killed = true
	}
	vm.mu.Unlock()
	if err := vm.proc.Kill(ctx); err != nil {
		return fmt.Errorf("VM %s: %w", vm.spec.ID, err)
	}
	<-vm.done
	removeFiles(vm.spec.Dir)
	return nil
}
