package server

import (
	"context"
	"strings"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crivm/crivm/server/store"
	"github.com/crivm/crivm/vmruntime"
)

// PodSandboxStats tells what a pod costs the node: CPU and memory are those of its VMM on the host, the VMM's
// own share included; the containers' figures are the guest's. Of a pod that is not READY there is its identity.
func (s *Server) PodSandboxStats(ctx context.Context, req *cri.PodSandboxStatsRequest) (*cri.PodSandboxStatsResponse, error) {
	rec, err := s.visibleSandbox(req.GetPodSandboxId())
	if err != nil {
		return nil, err
	}
	return &cri.PodSandboxStatsResponse{Stats: s.podStats(ctx, []store.Sandbox{rec})[0]}, nil
}

// ListPodSandboxStats tells it of all READY pods. The parts of a filter are AND-ed.
func (s *Server) ListPodSandboxStats(ctx context.Context, req *cri.ListPodSandboxStatsRequest) (*cri.ListPodSandboxStatsResponse, error) {
	return &cri.ListPodSandboxStatsResponse{Stats: s.podStats(ctx, s.measuredSandboxes(req.GetFilter()))}, nil
}

// StreamPodSandboxStats is ListPodSandboxStats in parts.
func (s *Server) StreamPodSandboxStats(req *cri.StreamPodSandboxStatsRequest, stream cri.RuntimeService_StreamPodSandboxStatsServer) error {
	return inParts(s.podStats(stream.Context(), s.measuredSandboxes(req.GetFilter())), func(part []*cri.PodSandboxStats) error {
		return stream.Send(&cri.StreamPodSandboxStatsResponse{PodSandboxStats: part})
	})
}

// measuredSandboxes are the READY ones that a filter lets through.
func (s *Server) measuredSandboxes(filter *cri.PodSandboxStatsFilter) []store.Sandbox {
	var found []store.Sandbox
	for _, rec := range s.store.Sandboxes() {
		if rec.State == store.SandboxReady && strings.HasPrefix(rec.ID, filter.GetId()) && matches(filter.GetLabelSelector(), rec.Config.GetLabels()) {
			found = append(found, rec)
		}
	}
	return found
}

// runningContainers are those of the given sandboxes, by sandbox.
func (s *Server) runningContainers(sandboxes []store.Sandbox) ([]store.Container, map[string][]store.Container) {
	wanted := map[string]bool{}
	for _, rec := range sandboxes {
		wanted[rec.ID] = true
	}
	var all []store.Container
	bySandbox := map[string][]store.Container{}
	for _, c := range s.store.Containers("") {
		if wanted[c.SandboxID] && c.State == store.ContainerRunning {
			all = append(all, c)
			bySandbox[c.SandboxID] = append(bySandbox[c.SandboxID], c)
		}
	}
	return all, bySandbox
}

func (s *Server) podStats(ctx context.Context, sandboxes []store.Sandbox) []*cri.PodSandboxStats {
	all, containers := s.runningContainers(sandboxes)
	s.collect(ctx, sandboxes, all, false)
	stats := make([]*cri.PodSandboxStats, 0, len(sandboxes))
	for _, rec := range sandboxes {
		stats = append(stats, s.sandboxStats(rec, containers[rec.ID]))
	}
	return stats
}

func (s *Server) sandboxStats(rec store.Sandbox, containers []store.Container) *cri.PodSandboxStats {
	stats := &cri.PodSandboxStats{
		Attributes: &cri.PodSandboxAttributes{
			Id: rec.ID, Metadata: rec.Config.GetMetadata(), Labels: rec.Config.GetLabels(), Annotations: rec.Config.GetAnnotations(),
		},
		Linux: &cri.LinuxPodSandboxStats{},
	}
	m := s.figures(rec.ID)
	if rec.State != store.SandboxReady || m.at.IsZero() {
		return stats
	}
	at := m.at.UnixNano()
	stats.Linux.Cpu = &cri.CpuUsage{
		Timestamp: at, UsageCoreNanoSeconds: value(m.host.CPUNanos), UsageNanoCores: value(m.rate.nanoCores), Psi: pressure(m.guest.GetCpuPressure()),
	}
	stats.Linux.Memory = &cri.MemoryUsage{
		Timestamp: at, WorkingSetBytes: value(m.host.WorkingSetBytes), UsageBytes: value(m.host.MemoryBytes), RssBytes: value(m.host.RSSBytes),
		PageFaults: value(m.host.PageFaults), MajorPageFaults: value(m.host.MajorPageFaults), Psi: pressure(m.guest.GetMemoryPressure()),
	}
	if limit := rec.Config.GetLinux().GetResources().GetMemoryLimitInBytes(); !unlimitedMemory(limit) {
		stats.Linux.Memory.AvailableBytes = value(uint64(limit) - min(uint64(limit), m.host.WorkingSetBytes))
	}
	stats.Linux.Network = podNetwork(rec, m)
	if psi := pressure(m.guest.GetIoPressure()); psi != nil {
		stats.Linux.Io = &cri.IoUsage{Timestamp: at, Psi: psi}
	}
	tasks := uint64(0)
	for _, c := range containers {
		stats.Linux.Containers = append(stats.Linux.Containers, s.containerStats(c))
		tasks += m.containers[c.ID].GetPids()
	}
	if !m.guestAt.IsZero() {
		stats.Linux.Process = &cri.ProcessUsage{Timestamp: timestamp(m.guestAt), ProcessCount: value(tasks)}
	}
	return stats
}

// cost is what a pod costs the node, and how much of it is not its containers', for people.
func (m sample) cost() map[string]any {
	return map[string]any{
		"at": m.at, "cpuNanos": m.host.CPUNanos, "memoryWorkingSetBytes": m.host.WorkingSetBytes,
		"overheadCPUNanos": m.overhead, "overheadMemoryBytes": m.overheadMemory(),
	}
}

// overheadMemory is memory of the pod that is no container's: what is in use now of VMM, guest kernel, agent,
// and what the guest has had in use and freed.
func (m sample) overheadMemory() uint64 {
	used := uint64(0)
	for _, c := range m.containers {
		if c.GetRunning() {
			used += c.GetMemoryWorkingSetBytes()
		}
	}
	return m.host.WorkingSetBytes - min(m.host.WorkingSetBytes, used)
}

// podNetwork are the pod's interfaces as the host counts them; nil when they cannot be seen.
func podNetwork(rec store.Sandbox, m sample) *cri.NetworkUsage {
	usage := &cri.NetworkUsage{Timestamp: timestamp(m.at)}
	for n, i := range podInterfaces(rec, m.host.Interfaces) {
		counters := &cri.NetworkInterfaceUsage{
			Name: i.Name, RxBytes: value(i.RxBytes), RxErrors: value(i.RxErrors), TxBytes: value(i.TxBytes), TxErrors: value(i.TxErrors),
		}
		if n == 0 {
			usage.DefaultInterface = counters
			continue
		}
		usage.Interfaces = append(usage.Interfaces, counters)
	}
	if usage.DefaultInterface == nil {
		return nil
	}
	return usage
}

// podInterfaces picks the pod's interfaces, the default one first, out of those of its network namespace. What
// CNI made there has the pod's name for it and carries the pod's traffic only; where it is not to be seen, the
// tap has the same counters from the other end.
func podInterfaces(rec store.Sandbox, host []vmruntime.InterfaceUsage) []vmruntime.InterfaceUsage {
	if rec.Network == nil {
		return nil
	}
	byName := map[string]vmruntime.InterfaceUsage{}
	for _, i := range host {
		byName[i.Name] = i
	}
	var found []vmruntime.InterfaceUsage
	for _, i := range rec.Network.Interfaces {
		if u, ok := byName[i.Name]; ok {
			found = append(found, u)
			continue
		}
		if u, ok := byName[i.Tap]; ok {
			found = append(found, vmruntime.InterfaceUsage{
				Name: i.Name, RxBytes: u.TxBytes, RxPackets: u.TxPackets, RxErrors: u.TxErrors, RxDropped: u.TxDropped,
				TxBytes: u.RxBytes, TxPackets: u.RxPackets, TxErrors: u.RxErrors, TxDropped: u.RxDropped,
			})
		}
	}
	return found
}
