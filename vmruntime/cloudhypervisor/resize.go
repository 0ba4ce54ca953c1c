package cloudhypervisor

import (
	"context"
	"fmt"
	"time"

	"github.com/containerd/errdefs"

	"github.com/crivm/crivm/vmruntime"
	"github.com/crivm/crivm/vmruntime/chclient"
)

const (
	// resizeWait is how long the guest may take to plug or unplug memory; what is reached then is told.
	resizeWait = 3 * time.Second
	resizePoll = 20 * time.Millisecond
	// While a removal of vCPUs is pending the VMM takes no other.
	pendingTries = 50
	pendingPause = 20 * time.Millisecond
)

// Resize implements vmruntime.VM; 0 keeps a size. vCPUs are told as asked for: the guest takes and gives them back
// in its own time. Memory is told as the guest has it, and cannot go below what the VM was booted with.
func (v *vm) Resize(ctx context.Context, want vmruntime.Size) (vmruntime.Size, error) {
	fail := func(err error) (vmruntime.Size, error) {
		return vmruntime.Size{}, fmt.Errorf("resize VM %s: %w", v.id, v.explain(err))
	}
	give, err := v.take(ctx)
	if err != nil {
		return fail(err)
	}
	defer give()
	info, err := v.client.Info(ctx)
	if err != nil {
		return fail(err)
	}
	cpus, memory := info.Config.CPUs, info.Config.Memory
	if cpus == nil || memory == nil {
		return fail(fmt.Errorf("VMM tells no size: %w", errdefs.ErrUnknown))
	}
	if want.VCPUs == 0 {
		want.VCPUs = cpus.Boot
	}
	if want.MemoryBytes == 0 {
		want.MemoryBytes = memory.Size + memory.HotpluggedSize
	}
	if want.VCPUs < 1 || want.VCPUs > cpus.Max {
		return fail(fmt.Errorf("%d vCPUs, can have 1 to %d: %w", want.VCPUs, cpus.Max, errdefs.ErrOutOfRange))
	}
	target := (want.MemoryBytes + memoryBlock - 1) / memoryBlock * memoryBlock
	if target < memory.Size || target > memory.Size+memory.HotplugSize {
		return fail(fmt.Errorf("%d bytes of memory, can have %d to %d: %w", want.MemoryBytes, memory.Size, memory.Size+memory.HotplugSize, errdefs.ErrOutOfRange))
	}
	var r chclient.Resize
	if want.VCPUs != cpus.Boot {
		r.VCPUs = &want.VCPUs
	}
	// Asking for the size that was asked for last is an error.
	if target != memory.Size+memory.HotpluggedSize {
		r.RAM = &target
	}
	if r != (chclient.Resize{}) {
		if err := v.resize(ctx, r); err != nil {
			return fail(err)
		}
	}
	reached, err := v.awaitMemory(ctx, target)
	if err != nil {
		return fail(err)
	}
	return vmruntime.Size{VCPUs: want.VCPUs, MemoryBytes: reached}, nil
}

// resize tries again while the guest has not given back what it was asked for earlier.
func (v *vm) resize(ctx context.Context, r chclient.Resize) error {
	for try := 1; ; try++ {
		err := v.client.Resize(ctx, r)
		if !errdefs.IsUnavailable(err) || try == pendingTries {
			return err
		}
		select {
		case <-time.After(pendingPause):
		case <-v.done:
			return v.gone()
		case <-ctx.Done():
			return fmt.Errorf("%w: %w", ctx.Err(), err)
		}
	}
}

// awaitMemory waits until the guest has plugged or unplugged all that it was asked to, or does not get on.
func (v *vm) awaitMemory(ctx context.Context, target int64) (int64, error) {
	ctx, cancel := context.WithTimeout(ctx, resizeWait)
	defer cancel()
	for reached := int64(-1); ; {
		info, err := v.client.Info(ctx)
		switch {
		case err == nil:
			reached = info.MemoryActualSize
		case ctx.Err() == nil || reached < 0:
			return 0, err
		}
		if reached == target || ctx.Err() != nil {
			return reached, nil
		}
		select {
		case <-time.After(resizePoll):
		case <-v.done:
			return 0, v.gone()
		case <-ctx.Done():
		}
	}
}
