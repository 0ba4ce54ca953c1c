package server

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"runtime"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crivm/crivm/agentproto"
	"github.com/crivm/crivm/server/store"
	"github.com/crivm/crivm/vmruntime"
)

// UpdateContainerResources changes the limits of a CREATED or RUNNING container. A field that is 0 or empty
// stays as it is (CRI: "not specified"); a negative quota or memory limit means none. When it returns, the
// guest enforces what ContainerStatus shows; when it fails, both are as before. Idempotent.
//
// In a pod without a memory or CPU limit of its own the VM grows before the container's limit is raised, and
// shrinks after it was lowered. oom_score_adj stays what the process was made with, and is reported so.
func (s *Server) UpdateContainerResources(ctx context.Context, req *cri.UpdateContainerResourcesRequest) (*cri.UpdateContainerResourcesResponse, error) {
	if err := s.awaitContainer(ctx, req.GetContainerId()); err != nil {
		return nil, err
	}
	rec, err := s.visibleContainer(req.GetContainerId())
	if err != nil {
		return nil, err
	}
	if req.GetWindows() != nil {
		return nil, unsupported("windows", "crivm runs Linux containers only")
	}
	if len(req.GetAnnotations()) > 0 { // options of a runtime, not the container's annotations
		return nil, unsupported("annotations", "crivm knows no options for an update")
	}
	if err := validateResources("linux", req.GetLinux()); err != nil {
		return nil, err
	}
	c := s.container(rec.ID)
	if err := c.op.lock(ctx); err != nil {
		return nil, fmt.Errorf("container %s: %w", rec.ID, err)
	}
	defer c.op.unlock()
	if err := s.updateContainer(ctx, rec.ID, req.GetLinux()); err != nil {
		return nil, fmt.Errorf("resources of container %s: %w", rec.ID, err)
	}
	return &cri.UpdateContainerResourcesResponse{}, nil
}

// updateContainer is called with the container's op lock held.
func (s *Server) updateContainer(ctx context.Context, id string, change *cri.LinuxContainerResources) error {
	rec, err := s.visibleContainer(id)
	if err != nil {
		return err
	}
	if rec.State != store.ContainerCreated && rec.State != store.ContainerRunning {
		return fmt.Errorf("it is %s, neither CREATED nor RUNNING: %w", rec.State, errdefs.ErrFailedPrecondition)
	}
	before := rec.Config.GetLinux().GetResources()
	after := mergeResources(before, change)
	if change == nil {
		return nil
	}
	after.OomScoreAdj = before.GetOomScoreAdj()
	if proto.Equal(before, after) {
		return nil
	}
	updated := rec
	config := proto.Clone(rec.Config.ContainerConfig).(*cri.ContainerConfig) // a record's configuration is never changed in place
	if config.Linux == nil {
		config.Linux = &cri.LinuxContainerConfig{}
	}
	config.Linux.Resources = after
	updated.Config = store.ContainerConfig{ContainerConfig: config}

	sb := s.sandbox(rec.SandboxID)
	if err := sb.size.lock(ctx); err != nil {
		return err
	}
	defer sb.size.unlock()
	sandboxRec, err := s.store.Sandbox(rec.SandboxID)
	if err != nil {
		return err
	}
	if sandboxRec.State != store.SandboxReady {
		return fmt.Errorf("sandbox %s is %s, not READY: %w", sandboxRec.ID, sandboxRec.State, errdefs.ErrFailedPrecondition)
	}
	agent, err := sb.client(ctx)
	if err != nil {
		return err
	}
	if err := possible(ctx, sandboxRec, rec.ID, before, after, agent); err != nil {
		return err
	}
	others := s.store.Containers(rec.SandboxID)
	for i := range others {
		if others[i].ID == rec.ID {
			others[i] = updated
		}
	}
	need := neededSize(sandboxRec, others)
	if before.GetMemoryLimitInBytes() == after.GetMemoryLimitInBytes() { // a call changes what it speaks of
		need.MemoryBytes = sandboxRec.VM.Memory
	}
	if before.GetCpuQuota() == after.GetCpuQuota() && before.GetCpuPeriod() == after.GetCpuPeriod() {
		need.VCPUs = sandboxRec.VM.VCPUs
	}
	if err := s.growVM(ctx, sb, need); err != nil {
		return fmt.Errorf("growing the VM: %w", err)
	}
	pod := sandboxRec.Config.GetLinux().GetResources()
	pages, pagesAfter := neededHugepages(pod, s.store.Containers(rec.SandboxID)), neededHugepages(pod, others)
	if pagesAfter > pages {
		if err = fitHugepages("linux", pagesAfter, sandboxRec.VM.Memory); err == nil {
			err = s.setHugepages(ctx, sb, pagesAfter)
		}
	}
	if err == nil {
		err = s.applyLimits(ctx, agent, rec.ID, after, before)
	}
	if err == nil {
		_, err = s.store.UpdateContainer(rec.ID, func(r *store.Container) error {
			if r.State == store.ContainerExited {
				return fmt.Errorf("it has exited meanwhile: %w", errdefs.ErrFailedPrecondition)
			}
			r.Config = updated.Config
			return nil
		})
	}
	undo, cancel := detached(ctx, shrinkLimit)
	defer cancel()
	if err != nil {
		if undoErr := s.applyLimits(undo, agent, rec.ID, before, after); undoErr != nil && !errdefs.IsFailedPrecondition(undoErr) {
			s.log.Error("setting the earlier limits of a container again", "container", rec.ID, "error", undoErr)
		}
		need, pagesAfter = vmruntime.Size{VCPUs: sandboxRec.VM.VCPUs, MemoryBytes: sandboxRec.VM.Memory}, pages
	}
	if pagesErr := s.setHugepages(undo, sb, pagesAfter); pagesErr != nil {
		s.log.Warn("giving huge pages back", "sandbox", sb.id, "error", pagesErr)
	}
	if shrinkErr := s.shrinkVM(undo, sb, need); shrinkErr != nil { // the container has what was asked for
		s.log.Warn("shrinking a VM", "sandbox", sb.id, "error", shrinkErr)
	}
	return err
}

// possible refuses what the VM or the container cannot have, before anything is changed.
func possible(ctx context.Context, rec store.Sandbox, id string, before, after *cri.LinuxContainerResources, agent *agentproto.Client) error {
	if n := min(vcpus(after), int64(runtime.NumCPU())); n > vcpus(before) && n > int64(rec.VM.MaxVCPUs) {
		return fmt.Errorf("linux.cpu_quota: %d CPUs are more than the %d that this VM can have (max_vcpus of the handler): %w", n, rec.VM.MaxVCPUs, errdefs.ErrOutOfRange)
	}
	limit, was := after.GetMemoryLimitInBytes(), before.GetMemoryLimitInBytes()
	if limit == was || unlimitedMemory(limit) {
		return nil
	}
	if unlimitedMemory(was) || limit > was {
		pod := rec.Config.GetLinux().GetResources().GetMemoryLimitInBytes()
		switch {
		case !unlimitedMemory(pod) && limit > pod:
			return fmt.Errorf("linux.memory_limit_in_bytes: %d is more than the %d of its pod, which UpdatePodSandboxResources can raise: %w", limit, pod, errdefs.ErrOutOfRange)
		case limit > rec.VM.MaxMemory-guestReserve:
			return fmt.Errorf("linux.memory_limit_in_bytes: %d is more than the %d that containers can have in this VM (max_memory of the handler less %d for the guest): %w",
				limit, rec.VM.MaxMemory-guestReserve, guestReserve, errdefs.ErrOutOfRange)
		}
		if !unlimitedMemory(was) {
			return nil
		}
	}
	return fitsUse(ctx, agent, id, limit)
}

// fitsUse refuses a limit below what the container holds and the kernel cannot take back: it would be killed.
func fitsUse(ctx context.Context, agent *agentproto.Client, id string, limit int64) error {
	stats, err := agent.Stats(ctx, &agentproto.StatsRequest{ContainerIds: []string{id}})
	if err != nil {
		return fmt.Errorf("memory in use: %w", err)
	}
	for _, c := range stats.GetContainers() {
		if c.GetContainerId() == id && c.GetMemoryRssBytes() > uint64(limit) {
			return fmt.Errorf("linux.memory_limit_in_bytes: %d is less than the %d bytes that the container has in use; it would be killed: %w", limit, c.GetMemoryRssBytes(), errdefs.ErrFailedPrecondition)
		}
	}
	return nil
}

// applyLimits sets limits in the guest; `from` is what they were.
func (s *Server) applyLimits(ctx context.Context, agent *agentproto.Client, id string, to, from *cri.LinuxContainerResources) error {
	text, err := json.Marshal(changedResources(to, from))
	if err != nil {
		return fmt.Errorf("OCI resources: %w", err)
	}
	if _, err := agent.UpdateContainer(ctx, &agentproto.UpdateContainerRequest{ContainerId: id, Resources: text}); err != nil {
		return fmt.Errorf("in the guest: %w", err)
	}
	return nil
}

// mergeResources is what resources are after a change: fields that it does not specify stay.
func mergeResources(old, change *cri.LinuxContainerResources) *cri.LinuxContainerResources {
	if change == nil {
		return old
	}
	out := &cri.LinuxContainerResources{}
	if old != nil {
		out = proto.Clone(old).(*cri.LinuxContainerResources)
	}
	for _, field := range []struct {
		to   *int64
		from int64
	}{
		{&out.CpuPeriod, change.GetCpuPeriod()},
		{&out.CpuQuota, change.GetCpuQuota()},
		{&out.CpuShares, change.GetCpuShares()},
		{&out.MemoryLimitInBytes, change.GetMemoryLimitInBytes()},
		{&out.MemorySwapLimitInBytes, change.GetMemorySwapLimitInBytes()},
		{&out.OomScoreAdj, change.GetOomScoreAdj()},
	} {
		if field.from != 0 {
			*field.to = field.from
		}
	}
	if change.GetCpusetCpus() != "" {
		out.CpusetCpus = change.GetCpusetCpus()
	}
	if change.GetCpusetMems() != "" {
		out.CpusetMems = change.GetCpusetMems()
	}
	out.HugepageLimits = mergeHugepages(out.HugepageLimits, change.GetHugepageLimits())
	if len(change.GetUnified()) > 0 {
		unified := maps.Clone(out.GetUnified())
		if unified == nil {
			unified = map[string]string{}
		}
		maps.Copy(unified, change.GetUnified())
		out.Unified = unified
	}
	return out
}
