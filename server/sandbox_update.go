package server

import (
	"context"
	"fmt"
	"runtime"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crivm/crivm/server/store"
	"github.com/crivm/crivm/vmruntime"
)

// UpdatePodSandboxResources changes the limits of a READY pod, and with them the size of its VM. kubelet calls it
// before it raises the limits of containers and after it has lowered them, and changes the pod's cgroup on
// the host only when it has succeeded; so it returns when the guest uses what was added, or has given back
// what it can. Idempotent.
//
// Memory never shrinks below what the VM booted with, and a guest may keep some of the rest: it is its containers'
// limits that hold then. A limit below what the VMM holds on the host is refused: the pod's cgroup
// would kill the VM.
func (s *Server) UpdatePodSandboxResources(ctx context.Context, req *cri.UpdatePodSandboxResourcesRequest) (*cri.UpdatePodSandboxResourcesResponse, error) {
	if err := s.awaitSandbox(ctx, req.GetPodSandboxId()); err != nil {
		return nil, err
	}
	rec, err := s.visibleSandbox(req.GetPodSandboxId())
	if err != nil {
		return nil, err
	}
	if err := validateResources("resources", req.GetResources()); err != nil {
		return nil, err
	}
	if err := validateResources("overhead", req.GetOverhead()); err != nil {
		return nil, err
	}
	sb := s.sandbox(rec.ID)
	if err := sb.size.lock(ctx); err != nil {
		return nil, fmt.Errorf("sandbox %s: %w", rec.ID, err)
	}
	defer sb.size.unlock()
	if err := s.updateSandbox(ctx, sb, req); err != nil {
		return nil, fmt.Errorf("resources of sandbox %s: %w", rec.ID, err)
	}
	return &cri.UpdatePodSandboxResourcesResponse{}, nil
}

// updateSandbox is called with sb.size held.
func (s *Server) updateSandbox(ctx context.Context, sb *sandbox, req *cri.UpdatePodSandboxResourcesRequest) error {
	rec, err := s.visibleSandbox(sb.id)
	if err != nil {
		return err
	}
	if rec.State != store.SandboxReady {
		return fmt.Errorf("it is %s, not READY: %w", rec.State, errdefs.ErrFailedPrecondition)
	}
	updated := rec
	config := proto.Clone(rec.Config.PodSandboxConfig).(*cri.PodSandboxConfig) // a record's configuration is never changed in place
	if config.Linux == nil {
		config.Linux = &cri.LinuxPodSandboxConfig{}
	}
	config.Linux.Resources = mergeResources(config.Linux.Resources, req.GetResources())
	config.Linux.Overhead = mergeResources(config.Linux.Overhead, req.GetOverhead())
	updated.Config = store.SandboxConfig{PodSandboxConfig: config}
	if proto.Equal(config.Linux.Resources, rec.Config.GetLinux().GetResources()) && proto.Equal(config.Linux.Overhead, rec.Config.GetLinux().GetOverhead()) {
		return nil
	}
	if err := possibleVM(rec, config.Linux.Resources); err != nil {
		return err
	}
	if hugepages(config.Linux.Overhead) > 0 {
		return unsupported("overhead.hugepage_limits", "a VM costs no huge pages beyond its pod's")
	}
	need := neededSize(updated, s.store.Containers(rec.ID))
	pages := neededHugepages(config.Linux.Resources, s.store.Containers(rec.ID))
	if err := fitHugepages("resources", pages, need.MemoryBytes); err != nil {
		return err
	}
	if err := s.growVM(ctx, sb, need); err != nil {
		return fmt.Errorf("growing the VM: %w", err)
	}
	if err = s.setHugepages(ctx, sb, pages); err == nil {
		err = s.shrinkVM(ctx, sb, need)
	}
	if err == nil {
		err = s.fitsHost(sb, rec.Config.GetLinux(), config.Linux)
	}
	if err == nil {
		_, err = s.store.UpdateSandbox(rec.ID, func(r *store.Sandbox) error {
			if r.State != store.SandboxReady {
				return fmt.Errorf("it is %s meanwhile: %w", r.State, errdefs.ErrFailedPrecondition)
			}
			r.Config = updated.Config
			return nil
		})
	}
	if err != nil {
		s.pagesBack(ctx, sb, rec)
		s.resizeBack(ctx, sb, vmruntime.Size{VCPUs: rec.VM.VCPUs, MemoryBytes: rec.VM.Memory})
	}
	return err
}

// possibleVM refuses a size beyond the VM's ceilings, before anything is changed. More CPUs than the host has
// are no impossible limit: the pod never reaches it.
func possibleVM(rec store.Sandbox, r *cri.LinuxContainerResources) error {
	if n := min(vcpus(r), int64(runtime.NumCPU())); n > int64(rec.VM.MaxVCPUs) {
		return fmt.Errorf("resources.cpu_quota: %d CPUs are more than the %d that this VM can have (max_vcpus of the handler): %w", n, rec.VM.MaxVCPUs, errdefs.ErrOutOfRange)
	}
	if limit := r.GetMemoryLimitInBytes(); !unlimitedMemory(limit) && limit > rec.VM.MaxMemory-guestReserve {
		return fmt.Errorf("resources.memory_limit_in_bytes: %d is more than the %d that this pod can have (max_memory of the handler less %d for the guest): %w",
			limit, rec.VM.MaxMemory-guestReserve, guestReserve, errdefs.ErrOutOfRange)
	}
	return nil
}

// fitsHost refuses a pod limit under which the host would kill the VMM for what it holds already.
func (s *Server) fitsHost(sb *sandbox, was, config *cri.LinuxPodSandboxConfig) error {
	limit, overhead := config.GetResources().GetMemoryLimitInBytes(), config.GetOverhead().GetMemoryLimitInBytes()
	earlier := was.GetResources().GetMemoryLimitInBytes()
	if unlimitedMemory(limit) || !unlimitedMemory(earlier) && limit >= earlier {
		return nil
	}
	if unlimitedMemory(overhead) {
		overhead = guestReserve
	}
	vm, err := sb.machine()
	if err != nil {
		return err
	}
	if held := ownMemory(vm.PID()); held > limit+overhead {
		return fmt.Errorf("resources.memory_limit_in_bytes: the VM holds %d bytes on the host, more than %d and an overhead of %d, and its guest gives no more back: %w",
			held, limit, overhead, errdefs.ErrFailedPrecondition)
	}
	return nil
}

// resizeBack brings a VM back to what it needs after a change that failed.
func (s *Server) resizeBack(ctx context.Context, sb *sandbox, need vmruntime.Size) {
	ctx, cancel := detached(ctx, growLimit)
	defer cancel()
	err := s.growVM(ctx, sb, need)
	if err == nil {
		err = s.shrinkVM(ctx, sb, need)
	}
	if err != nil && s.lives(sb.id) {
		s.log.Error("bringing a VM back to its earlier size", "sandbox", sb.id, "error", err)
	}
}
