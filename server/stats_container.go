package server

import (
	"context"
	"path/filepath"
	"strings"
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crivm/crivm/agentproto"
	"github.com/crivm/crivm/server/store"
)

// ContainerStats tells what one container uses. One that does not run has its identity and, as long as its
// pod has not been stopped, the size of its writable layer.
func (s *Server) ContainerStats(ctx context.Context, req *cri.ContainerStatsRequest) (*cri.ContainerStatsResponse, error) {
	rec, err := s.visibleContainer(req.GetContainerId())
	if err != nil {
		return nil, err
	}
	if sandbox, err := s.store.Sandbox(rec.SandboxID); err == nil {
		s.collect(ctx, []store.Sandbox{sandbox}, []store.Container{rec}, false)
	}
	return &cri.ContainerStatsResponse{Stats: s.containerStats(rec)}, nil
}

// ListContainerStats tells what the running containers use. The parts of a filter are AND-ed.
func (s *Server) ListContainerStats(ctx context.Context, req *cri.ListContainerStatsRequest) (*cri.ListContainerStatsResponse, error) {
	return &cri.ListContainerStatsResponse{Stats: s.listContainerStats(ctx, req.GetFilter())}, nil
}

// StreamContainerStats is ListContainerStats in parts.
func (s *Server) StreamContainerStats(req *cri.StreamContainerStatsRequest, stream cri.RuntimeService_StreamContainerStatsServer) error {
	return inParts(s.listContainerStats(stream.Context(), req.GetFilter()), func(part []*cri.ContainerStats) error {
		return stream.Send(&cri.StreamContainerStatsResponse{ContainerStats: part})
	})
}

func (s *Server) listContainerStats(ctx context.Context, filter *cri.ContainerStatsFilter) []*cri.ContainerStats {
	var containers []store.Container
	used := map[string]bool{}
	for _, rec := range s.store.Containers("") {
		if rec.State != store.ContainerRunning || !strings.HasPrefix(rec.ID, filter.GetId()) ||
			!strings.HasPrefix(rec.SandboxID, filter.GetPodSandboxId()) || !matches(filter.GetLabelSelector(), rec.Config.GetLabels()) {
			continue
		}
		containers = append(containers, rec)
		used[rec.SandboxID] = true
	}
	var sandboxes []store.Sandbox
	for id := range used {
		if rec, err := s.store.Sandbox(id); err == nil {
			sandboxes = append(sandboxes, rec)
		}
	}
	s.collect(ctx, sandboxes, containers, false)
	stats := make([]*cri.ContainerStats, 0, len(containers))
	for _, rec := range containers {
		stats = append(stats, s.containerStats(rec))
	}
	return stats
}

// containerStats makes CRI's figures of the latest sample. A container of which nothing is known yet has its
// identity only: 0 would be a lie.
func (s *Server) containerStats(rec store.Container) *cri.ContainerStats {
	stats := &cri.ContainerStats{Attributes: &cri.ContainerAttributes{
		Id: rec.ID, Metadata: rec.Config.GetMetadata(), Labels: rec.Config.GetLabels(), Annotations: rec.Config.GetAnnotations(),
	}}
	figures, ok := s.figures(rec.SandboxID).containers[rec.ID]
	if !ok {
		return stats
	}
	at := figures.at.UnixNano()
	// What is written is on the pod's scratch disk, a file below the pods' directory.
	stats.WritableLayer = &cri.FilesystemUsage{
		Timestamp: at, FsId: &cri.FilesystemIdentifier{Mountpoint: filepath.Join(s.opts.StateDir, "pods")},
		UsedBytes: value(figures.GetWritableLayerBytes()), InodesUsed: value(figures.GetWritableLayerInodes()),
	}
	if rec.State != store.ContainerRunning || !figures.GetRunning() {
		return stats
	}
	stats.Cpu = &cri.CpuUsage{
		Timestamp: at, UsageCoreNanoSeconds: value(figures.GetCpuUsageNanos()), UsageNanoCores: value(figures.rate.nanoCores), Psi: pressure(figures.GetCpuPressure()),
	}
	stats.Memory = &cri.MemoryUsage{
		Timestamp: at, WorkingSetBytes: value(figures.GetMemoryWorkingSetBytes()), UsageBytes: value(figures.GetMemoryUsageBytes()),
		RssBytes: value(figures.GetMemoryRssBytes()), PageFaults: value(figures.GetPageFaults()), MajorPageFaults: value(figures.GetMajorPageFaults()),
		Psi: pressure(figures.GetMemoryPressure()),
	}
	if limit := figures.GetMemoryLimitBytes(); limit > 0 {
		stats.Memory.AvailableBytes = value(limit - min(limit, figures.GetMemoryWorkingSetBytes()))
	}
	stats.Swap = &cri.SwapUsage{
		Timestamp: at, SwapUsageBytes: value(figures.GetSwapUsageBytes()),
		SwapAvailableBytes: value(figures.GetSwapLimitBytes() - min(figures.GetSwapLimitBytes(), figures.GetSwapUsageBytes())), // no limit: the guest has no swap
	}
	if psi := pressure(figures.GetIoPressure()); psi != nil {
		stats.Io = &cri.IoUsage{Timestamp: at, Psi: psi}
	}
	return stats
}

func value(n uint64) *cri.UInt64Value { return &cri.UInt64Value{Value: n} }

// pressure is nil when the guest's kernel has none.
func pressure(p *agentproto.Pressure) *cri.PsiStats {
	if p == nil {
		return nil
	}
	line := func(l *agentproto.PressureLine) *cri.PsiData {
		return &cri.PsiData{Total: l.GetTotalNanos(), Avg10: l.GetAvg10(), Avg60: l.GetAvg60(), Avg300: l.GetAvg300()}
	}
	return &cri.PsiStats{Some: line(p.GetSome()), Full: line(p.GetFull())}
}

// timestamp is CRI's form of a moment; 0 for none.
func timestamp(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixNano()
}
