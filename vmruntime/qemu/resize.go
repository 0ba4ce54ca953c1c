package qemu

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	"github.com/containerd/errdefs"

	"github.com/crivm/crivm/vmruntime"
)

const (
	// resizeWait bounds the wait for the guest to take or give memory.
	resizeWait = 10 * time.Second
	resizePoll = 20 * time.Millisecond
	memBlock   = 2 << 20 // virtio-mem's granularity, bytes
)

// Resize plugs vCPUs and moves the virtio-mem device's size. vCPUs are never unplugged: QEMU 7.2 aborts on
// memory hot-plug after that, and the guest's cgroups limit CPU time anyway. Memory shrinks as far as the
// guest lets go of it, never below what it booted with. A zero field stays as it is.
func (vm *VM) Resize(ctx context.Context, s vmruntime.Size) (vmruntime.Size, error) {
	if s.VCPUs > vm.spec.MaxVCPUs || s.MemoryBytes > vm.spec.MaxMemoryBytes || s.VCPUs < 0 || s.MemoryBytes < 0 {
		return vmruntime.Size{}, fmt.Errorf("VM %s: resize to %d vCPUs and %d bytes; at most %d and %d: %w",
			vm.spec.ID, s.VCPUs, s.MemoryBytes, vm.spec.MaxVCPUs, vm.spec.MaxMemoryBytes, errdefs.ErrOutOfRange)
	}
	end, err := vm.change(ctx)
	if err != nil {
		return vmruntime.Size{}, err
	}
	defer end()
	var reached vmruntime.Size
	if reached.VCPUs, err = vm.addCPUs(ctx, s.VCPUs); err == nil {
		reached.MemoryBytes, err = vm.setMemory(ctx, s.MemoryBytes)
	}
	if err != nil {
		return reached, fmt.Errorf("VM %s: resize: %w", vm.spec.ID, err)
	}
	return reached, nil
}

// addCPUs plugs vCPUs until there are n, and returns how many there are.
func (vm *VM) addCPUs(ctx context.Context, n int) (int, error) {
	var slots []struct {
		Type  string                     `json:"type"`
		Props map[string]json.RawMessage `json:"props"`
		Path  *string                    `json:"qom-path"` // absent for a free slot
	}
	if err := vm.command(ctx, "query-hotpluggable-cpus", nil, &slots); err != nil {
		return 0, err
	}
	have := 0
	for _, s := range slots {
		if s.Path != nil {
			have++
		}
	}
	// QEMU lists the slots from the highest down; Linux likes its CPUs in order.
	for i := len(slots) - 1; i >= 0 && have < n; i-- {
		if slots[i].Path != nil {
			continue
		}
		args := map[string]any{"driver": slots[i].Type, "id": fmt.Sprintf("cpu-%d", i)}
		for k, v := range slots[i].Props {
			args[k] = v
		}
		if err := vm.command(ctx, "device_add", args, nil); err != nil {
			return have, err
		}
		have++
	}
	return have, nil
}

// setMemory asks the guest for a total of bytes, waits a while, and returns how much it has.
func (vm *VM) setMemory(ctx context.Context, bytes int64) (int64, error) {
	boot := vm.spec.MemoryBytes
	if hotpluggable(vm.spec) == 0 {
		return boot, nil
	}
	size, err := vm.pluggedMemory(ctx)
	if err != nil {
		return 0, err
	}
	if bytes == 0 {
		return boot + size, nil
	}
	want := (max(bytes-boot, 0) + memBlock - 1) / memBlock * memBlock
	err = vm.command(ctx, "qom-set", map[string]any{
		"path": "/machine/peripheral/mem", "property": "requested-size", "value": want,
	}, nil)
	if err != nil {
		return boot + size, err
	}
	limit := time.NewTimer(resizeWait)
	defer limit.Stop()
	poll := time.NewTicker(resizePoll)
	defer poll.Stop()
	for {
		if size, err = vm.pluggedMemory(ctx); err != nil || size == want {
			return boot + size, err
		}
		select {
		case <-poll.C:
		case <-limit.C:
			return boot + size, nil
		case <-ctx.Done():
			return boot + size, nil
		}
	}
}

func (vm *VM) pluggedMemory(ctx context.Context) (int64, error) {
	var size int64
	err := vm.command(ctx, "qom-get", map[string]any{"path": "/machine/peripheral/mem", "property": "size"}, &size)
	return size, err
}
