package server

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sync/errgroup"

	"github.com/crivm/crivm/agentproto"
	"github.com/crivm/crivm/server/store"
	"github.com/crivm/crivm/vmruntime"
)

// The size of a VM changes around that of its containers: it grows before limits in the guest are raised,
// and shrinks after they were lowered, so that no limit ever promises what the VM does not have.

const (
	// growLimit bounds waiting until the guest uses what was added. Software emulation takes seconds for a CPU.
	growLimit = 60 * time.Second
	// shrinkLimit bounds waiting until the guest has let go of memory.
	shrinkLimit = 20 * time.Second
	onlinePause = 50 * time.Millisecond
	// maxGrowth is how many times its boot memory a VM can have: what describes further memory, 1/64 of it, comes
	// out of the boot memory.
	maxGrowth = 16
)

// growVM makes the VM at least as big as needed and returns when the guest uses it. When the guest does not
// take it in time, what it has taken is asked back. Called with sb.size held.
func (s *Server) growVM(ctx context.Context, sb *sandbox, need vmruntime.Size) (retErr error) {
	vm, err := sb.machine()
	if err != nil {
		return err
	}
	now, err := vm.Resize(ctx, vmruntime.Size{})
	if err != nil {
		return vmFailure(vm, err)
	}
	to := vmruntime.Size{VCPUs: max(now.VCPUs, need.VCPUs), MemoryBytes: max(now.MemoryBytes, need.MemoryBytes)}
	if to == now {
		return s.recordSize(sb, now)
	}
	rec, err := s.store.Sandbox(sb.id)
	if err != nil {
		return err
	}
	if to.MemoryBytes > maxGrowth*rec.VM.BootMemory {
		return fmt.Errorf("a guest that booted with %d bytes of memory cannot describe %d, only %d times as much: %w", rec.VM.BootMemory, to.MemoryBytes, maxGrowth, errdefs.ErrOutOfRange)
	}
	defer func() { // reads retErr only
		if retErr != nil {
			undo, cancel := detached(ctx, shrinkLimit)
			defer cancel()
			if _, err := vm.Resize(undo, now); err != nil {
				s.log.Error("undoing the growth of a VM", "sandbox", sb.id, "error", err)
			}
		}
	}()
	growCtx, cancel := context.WithTimeout(ctx, growLimit)
	defer cancel()
	agent, err := sb.client(growCtx)
	if err != nil {
		return err
	}
	before, err := agent.Online(growCtx, &agentproto.OnlineRequest{})
	if err != nil {
		return fmt.Errorf("size of the guest: %w", err)
	}
	// Both at once: a guest with much memory that is not yet in use takes no more.
	group, groupCtx := errgroup.WithContext(growCtx)
	group.Go(func() error { return s.resizeTo(groupCtx, vm, to) })
	group.Go(func() error {
		return s.awaitOnline(groupCtx, agent, before, vmruntime.Size{VCPUs: to.VCPUs, MemoryBytes: to.MemoryBytes - now.MemoryBytes})
	})
	if err := group.Wait(); err != nil {
		if errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil {
			err = fmt.Errorf("the guest does not take %d vCPUs and %d bytes of memory within %s: %w: %w", to.VCPUs, to.MemoryBytes, growLimit, err, errdefs.ErrUnavailable)
		}
		return vmFailure(vm, err)
	}
	s.log.Info("VM has grown", "sandbox", sb.id, "vcpus", to.VCPUs, "memory", to.MemoryBytes)
	return s.recordSize(sb, to)
}

// resizeTo asks until the VMM has reached the size.
func (s *Server) resizeTo(ctx context.Context, vm vmruntime.VM, to vmruntime.Size) error {
	for {
		got, err := vm.Resize(ctx, to)
		if err != nil {
			return err
		}
		if got.VCPUs >= to.VCPUs && got.MemoryBytes >= to.MemoryBytes {
			return nil
		}
		if !s.pause(ctx, onlinePause) {
			return fmt.Errorf("the VM has reached %d vCPUs and %d bytes of memory: %w", got.VCPUs, got.MemoryBytes, ctx.Err())
		}
	}
}

// awaitOnline has the guest take what was plugged until it has that many vCPUs and so much more memory than
// before. The guest notices later than the VMM. One that tells no size is believed.
func (s *Server) awaitOnline(ctx context.Context, agent *agentproto.Client, before *agentproto.OnlineResponse, want vmruntime.Size) error {
	for {
		got, err := agent.Online(ctx, &agentproto.OnlineRequest{})
		if err != nil {
			return fmt.Errorf("bringing CPUs and memory into use: %w", err)
		}
		// The kernel keeps some of the memory for what describes it.
		more := int64(got.GetMemoryTotalBytes()) - int64(before.GetMemoryTotalBytes())
		if before.GetCpus() == 0 || int(got.GetCpus()) >= want.VCPUs && more >= want.MemoryBytes-want.MemoryBytes/16 {
			return nil
		}
		if !s.pause(ctx, onlinePause) {
			return fmt.Errorf("the guest uses %d vCPUs and %d more bytes of memory: %w", got.GetCpus(), more, ctx.Err())
		}
	}
}

// shrinkVM gives back what is not needed, as far as the guest lets go of it and the VMM can: QEMU keeps its
// vCPUs, whose time the guest's cgroups limit. The size reached is recorded. Called with sb.size held.
func (s *Server) shrinkVM(ctx context.Context, sb *sandbox, need vmruntime.Size) error {
	vm, err := sb.machine()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, shrinkLimit)
	defer cancel()
	now, err := vm.Resize(ctx, vmruntime.Size{})
	if err != nil {
		return vmFailure(vm, err)
	}
	to := vmruntime.Size{VCPUs: min(now.VCPUs, need.VCPUs), MemoryBytes: min(now.MemoryBytes, need.MemoryBytes)}
	if to == now {
		return s.recordSize(sb, now)
	}
	got, err := vm.Resize(ctx, to)
	if err != nil {
		return vmFailure(vm, err)
	}
	s.log.Info("VM has shrunk", "sandbox", sb.id, "vcpus", got.VCPUs, "memory", got.MemoryBytes, "wantedVCPUs", to.VCPUs, "wantedMemory", to.MemoryBytes)
	return s.recordSize(sb, got)
}

func (s *Server) recordSize(sb *sandbox, size vmruntime.Size) error {
	rec, err := s.store.Sandbox(sb.id)
	if err != nil || rec.VM.VCPUs == size.VCPUs && rec.VM.Memory == size.MemoryBytes {
		return err
	}
	_, err = s.store.UpdateSandbox(sb.id, func(r *store.Sandbox) error {
		r.VM.VCPUs, r.VM.Memory = size.VCPUs, size.MemoryBytes
		return nil
	})
	return err
}

// ownMemory is what a process holds for itself and nobody else would: in a VMM, the memory that the guest
// has touched and its own. 0 when it cannot be told.
func ownMemory(pid int) int64 {
	f, err := os.Open(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0
	}
	defer f.Close()
	total := int64(0)
	for lines := bufio.NewScanner(f); lines.Scan(); {
		fields := strings.Fields(lines.Text())
		if len(fields) < 2 || fields[0] != "RssAnon:" && fields[0] != "RssShmem:" {
			continue
		}
		kib, err := strconv.ParseInt(fields[1], 10, 64)
		if err != nil {
			return 0
		}
		total += kib << 10
	}
	return total
}
