package server

import (
	"context"
	"math"
	"sync"
	"time"

	"github.com/crivm/crivm/agentproto"
	"github.com/crivm/crivm/server/store"
	"github.com/crivm/crivm/vmruntime"
)

const (
	// sampleAge is how old figures may be that a call answers with.
	sampleAge = 900 * time.Millisecond
	// sampleWait bounds how long a call waits for newer figures, of all guests together; firstWait for the
	// first ones, without which a container would be missing.
	sampleWait = time.Second
	firstWait  = 5 * time.Second
	// sampleLimit bounds how long a guest is waited for, without a call waiting.
	sampleLimit = 20 * time.Second
	// rateWindow is the least time over which CPU usage is averaged.
	rateWindow = 5 * time.Second
)

// sampler keeps the latest figures of a sandbox. Nothing is measured unless somebody asks: a round then reads
// the host's figures and asks the agent, and ends by itself. Calls answer from memory; they wait for a round
// for sampleWait, or firstWait, at most, and not at all if the last one took longer.
type sampler struct {
	mu          sync.Mutex
	latest      sample
	round       chan struct{} // closed at the end of the round under way; nil without one
	began       time.Time     // the last round
	descriptors bool          // the last round counted open files
	took        time.Duration // the last round, or what a call has waited in vain for it
	silent      bool          // the guest gave no answer in the last round
}

// sample are the figures of a sandbox at a moment. It is a value: what it points to is never changed.
type sample struct {
	at   time.Time // when the host was asked; zero: there are none
	host vmruntime.Usage
	rate cpuRate

	guestAt    time.Time // when the guest was asked; zero: it has not answered yet
	guest      *agentproto.StatsResponse
	containers map[string]containerSample
	endedCPU   uint64 // CPU time of containers that are gone
	overhead   uint64 // CPU time that is the VM's and no container's; never falls
}

// containerSample are a container's figures as its guest told them, made plausible.
type containerSample struct {
	*agentproto.ContainerStats
	at   time.Time
	rate cpuRate
}

// cpuRate averages CPU time over the last rateWindow or more.
type cpuRate struct {
	at        time.Time
	cpu       uint64
	nanoCores uint64
}

// next takes a further reading. The first is averaged since start.
func (r cpuRate) next(at time.Time, cpu uint64, start time.Time) cpuRate {
	if r.at.IsZero() {
		return cpuRate{at: at, cpu: cpu, nanoCores: perSecond(cpu, at.Sub(start))}
	}
	if at.Sub(r.at) < rateWindow {
		return r
	}
	return cpuRate{at: at, cpu: cpu, nanoCores: perSecond(cpu-min(cpu, r.cpu), at.Sub(r.at))}
}

func perSecond(nanos uint64, span time.Duration) uint64 {
	if span < 10*time.Millisecond {
		return 0
	}
	return uint64(float64(nanos) / span.Seconds())
}

// refresh sees to it that the sandbox has figures from a round that began after since, and returns what to
// wait for; nil when there is nothing to wait for, or no hope that it comes within patience.
func (s *Server) refresh(rec store.Sandbox, since time.Time, patience time.Duration, descriptors bool) <-chan struct{} {
	if rec.State != store.SandboxReady || s.life.Err() != nil {
		return nil
	}
	sb := s.sandbox(rec.ID)
	vm, err := sb.machine()
	if err != nil {
		return nil
	}
	m := &sb.stats
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.round == nil {
		if m.began.After(since) && (m.descriptors || !descriptors) {
			return nil
		}
		m.round, m.began, m.descriptors = make(chan struct{}), time.Now(), descriptors
		s.goTask(func() { s.measure(sb, vm, rec, descriptors) })
	}
	if m.took > patience {
		return nil
	}
	return m.round
}

// collect brings the figures of sandboxes up to date, as far as their guests answer in time. The containers
// are those that a caller wants to see; each is in the figures then, though it was started just now.
func (s *Server) collect(ctx context.Context, sandboxes []store.Sandbox, containers []store.Container, descriptors bool) {
	start := time.Now()
	since, patience := map[string]time.Time{}, map[string]time.Duration{}
	for _, rec := range sandboxes {
		since[rec.ID], patience[rec.ID] = start.Add(-sampleAge), sampleWait
	}
	for _, c := range containers {
		if c.StartedAt.After(since[c.SandboxID]) {
			since[c.SandboxID] = c.StartedAt
		}
		if !s.figures(c.SandboxID).containers[c.ID].GetRunning() {
			patience[c.SandboxID] = firstWait
		}
	}
	for _, rec := range sandboxes {
		s.refresh(rec, since[rec.ID], patience[rec.ID], descriptors)
	}
	for _, rec := range sandboxes {
		for {
			round := s.refresh(rec, since[rec.ID], patience[rec.ID], descriptors)
			if round == nil || !s.await(ctx, rec.ID, round, start, patience[rec.ID]) {
				break
			}
		}
	}
}

// await waits for a round until patience, counted from start, ends; false when it was in vain.
func (s *Server) await(ctx context.Context, sandboxID string, round <-chan struct{}, start time.Time, patience time.Duration) bool {
	limit := time.NewTimer(time.Until(start.Add(patience)))
	defer limit.Stop()
	select {
	case <-round:
		return true
	case <-ctx.Done():
		return false
	case <-limit.C:
	}
	m := &s.sandbox(sandboxID).stats
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.round == round { // the next call does not wait for it again
		m.took = max(m.took, patience+1)
	}
	return false
}

// measure is one round.
func (s *Server) measure(sb *sandbox, vm vmruntime.VM, rec store.Sandbox, descriptors bool) {
	m := &sb.stats
	ctx, cancel := context.WithTimeout(s.life, sampleLimit)
	defer cancel()
	began := time.Now()
	if usage, err := hostUsage(sb, vm); err == nil {
		select {
		case <-vm.Done(): // the figures may be another process's
		default:
			m.mu.Lock()
			m.latest = m.latest.withHost(usage, began, rec.CreatedAt)
			m.mu.Unlock()
		}
	}
	asked := time.Now()
	var answer *agentproto.StatsResponse
	client, err := sb.client(ctx)
	if err == nil {
		answer, err = client.Stats(ctx, &agentproto.StatsRequest{Descriptors: descriptors})
	}
	known := s.store.Containers(rec.ID)
	m.mu.Lock()
	defer m.mu.Unlock()
	if err == nil {
		m.latest = m.latest.withGuest(answer, asked.Add(time.Since(asked)/2), known, s.ceilings(rec))
	}
	now, _ := s.store.Sandbox(rec.ID) // one that is being stopped has reason not to answer
	if err != nil && !m.silent && s.life.Err() == nil && now.State == store.SandboxReady {
		s.log.Warn("the guest does not answer for statistics; the last ones stand", "sandbox", rec.ID, "error", err)
	}
	m.took, m.silent = time.Since(began), err != nil
	if err != nil {
		m.took = max(m.took, firstWait+1)
	}
	close(m.round)
	m.round = nil
}

// hostUsage is what the VMM and the server of shared directories cost.
func hostUsage(sb *sandbox, vm vmruntime.VM) (vmruntime.Usage, error) {
	usage, err := vmruntime.ReadUsage(vm.PID())
	if err != nil {
		return usage, err
	}
	sb.mu.Lock()
	files := sb.files
	sb.mu.Unlock()
	if files == nil {
		return usage, nil
	}
	server, err := vmruntime.ReadUsage(files.PID())
	select {
	case <-files.Done():
	default:
		if err == nil {
			usage.AddServer(server)
		}
	}
	return usage, nil
}

// figures are the latest figures of a sandbox.
func (s *Server) figures(sandboxID string) sample {
	s.mu.Lock()
	sb, ok := s.sandboxes[sandboxID]
	s.mu.Unlock()
	if !ok {
		return sample{}
	}
	sb.stats.mu.Lock()
	defer sb.stats.mu.Unlock()
	return sb.stats.latest
}

func (m sample) withHost(u vmruntime.Usage, at, start time.Time) sample {
	u.CPUNanos = max(u.CPUNanos, m.host.CPUNanos)
	m.host, m.at = u, at
	m.rate = m.rate.next(at, u.CPUNanos, start)
	return m
}

// withGuest takes a guest's answer for the containers that have a record.
func (m sample) withGuest(answer *agentproto.StatsResponse, at time.Time, known []store.Container, c ceilings) sample {
	told := map[string]*agentproto.ContainerStats{}
	for _, s := range answer.GetContainers() {
		told[s.GetContainerId()] = s
	}
	before := m.containers
	m.containers = map[string]containerSample{}
	running := uint64(0)
	for _, rec := range known {
		earlier, sampled := before[rec.ID]
		s, ok := told[rec.ID]
		if !ok {
			s = &agentproto.ContainerStats{ContainerId: rec.ID}
		}
		start := rec.StartedAt
		if start.IsZero() {
			start = rec.CreatedAt
		}
		last := earlier.at
		if !sampled {
			last = start
		}
		s = c.plausible(s, earlier.ContainerStats, at.Sub(last))
		next := containerSample{ContainerStats: s, at: at, rate: earlier.rate.next(at, s.GetCpuUsageNanos(), start)}
		m.containers[rec.ID] = next
		running += s.GetCpuUsageNanos()
	}
	for id, earlier := range before {
		if _, ok := m.containers[id]; !ok {
			m.endedCPU += earlier.GetCpuUsageNanos()
		}
	}
	answer.Containers = nil // whatever else it named
	for _, p := range []*agentproto.Pressure{answer.GetCpuPressure(), answer.GetMemoryPressure(), answer.GetIoPressure()} {
		plausiblePressure(p)
	}
	m.guest, m.guestAt = answer, at
	m.overhead = max(m.overhead, m.host.CPUNanos-min(m.host.CPUNanos, running+m.endedCPU))
	return m
}

// ceilings are what the figures of a guest cannot exceed.
type ceilings struct {
	cpus          uint64
	memory, layer uint64 // bytes
}

func (s *Server) ceilings(rec store.Sandbox) ceilings {
	c := ceilings{cpus: uint64(max(rec.VM.MaxVCPUs, 1)), memory: uint64(max(rec.VM.MaxMemory, 0)), layer: uint64(max(s.opts.Handlers[rec.Handler].ScratchBytes, 0))}
	if c.memory == 0 { // a record of an earlier version
		c.memory, c.cpus = maxCount, 1024
	}
	if c.layer == 0 { // the handler is gone
		c.layer = maxCount
	}
	return c
}

const (
	maxCount = 1 << 56 // of anything that a guest counts
	maxTasks = 1 << 22 // of a Linux kernel
	// cpuSlack is how far a guest's CPU time may seem to run ahead: the answer is not of one moment.
	cpuSlack = time.Second
	// maxDevices bounds the disks of one container.
	maxDevices = 32
)

// plausible makes of a guest's figures ones that can be true: counters do not fall, CPU time does not exceed
// what so many CPUs have in the time that has passed, memory not the VM's. A container that has ended keeps
// its counters. before may be nil.
func (c ceilings) plausible(now, before *agentproto.ContainerStats, passed time.Duration) *agentproto.ContainerStats {
	if before == nil {
		before = &agentproto.ContainerStats{}
	}
	was := counters(before)
	for i, n := range counters(now) {
		*n = max(min(*n, maxCount), *was[i])
	}
	most := before.CpuUsageNanos + uint64(max(passed+cpuSlack, 0))*c.cpus
	now.CpuUsageNanos = min(now.CpuUsageNanos, most)
	for _, n := range []*uint64{
		&now.MemoryUsageBytes, &now.MemoryWorkingSetBytes, &now.MemoryRssBytes, &now.MemoryCacheBytes, &now.MemoryMappedBytes, &now.MemoryKernelBytes, &now.MemoryPeakBytes,
	} {
		*n = min(*n, c.memory)
	}
	for _, n := range []*uint64{&now.MemoryLimitBytes, &now.SwapUsageBytes, &now.SwapLimitBytes, &now.WritableLayerInodes, &now.FileDescriptors, &now.Sockets} {
		*n = min(*n, maxCount)
	}
	for _, n := range []*uint64{&now.Pids, &now.PidsLimit, &now.Processes} {
		*n = min(*n, maxTasks)
	}
	now.WritableLayerBytes = min(now.WritableLayerBytes, c.layer)
	now.Devices = plausibleDevices(now.Devices, before.Devices)
	now.Hugepages = c.plausibleHugepages(now.Hugepages, before.Hugepages)
	for _, p := range []*agentproto.Pressure{now.CpuPressure, now.MemoryPressure, now.IoPressure} {
		plausiblePressure(p)
	}
	return now
}

// counters are the figures of a container that never fall.
func counters(s *agentproto.ContainerStats) []*uint64 {
	return []*uint64{
		&s.CpuUsageNanos, &s.CpuUserNanos, &s.CpuSystemNanos, &s.CpuPeriods, &s.CpuThrottledPeriods, &s.CpuThrottledNanos,
		&s.PageFaults, &s.MajorPageFaults, &s.MemoryLimitHits, &s.OomKills,
	}
}

// plausibleDevices drops devices that a container cannot have; of others counters do not fall.
func plausibleDevices(now, before []*agentproto.DeviceStats) []*agentproto.DeviceStats {
	type number struct{ major, minor uint32 }
	was := map[number]*agentproto.DeviceStats{}
	for _, d := range before {
		was[number{d.Major, d.Minor}] = d
	}
	seen := map[number]bool{}
	var kept []*agentproto.DeviceStats
	for _, d := range now {
		key := number{d.Major, d.Minor}
		if len(kept) == maxDevices || seen[key] || !deviceName(d.Name) {
			continue
		}
		seen[key] = true
		earlier := was[key]
		d.ReadBytes = max(min(d.ReadBytes, maxCount), earlier.GetReadBytes())
		d.WriteBytes = max(min(d.WriteBytes, maxCount), earlier.GetWriteBytes())
		d.Reads = max(min(d.Reads, maxCount), earlier.GetReads())
		d.Writes = max(min(d.Writes, maxCount), earlier.GetWrites())
		kept = append(kept, d)
	}
	return kept
}

// deviceName tells whether a name, which becomes the value of a metric's label, is one that kernels give.
func deviceName(name string) bool {
	for _, r := range name {
		if (r < 'a' || r > 'z') && (r < '0' || r > '9') && r != '-' && r != '_' {
			return false
		}
	}
	return len(name) > 0 && len(name) <= 32
}

func plausiblePressure(p *agentproto.Pressure) {
	for _, l := range []*agentproto.PressureLine{p.GetSome(), p.GetFull()} {
		if l == nil {
			continue
		}
		l.TotalNanos = min(l.TotalNanos, maxCount)
		for _, percent := range []*float64{&l.Avg10, &l.Avg60, &l.Avg300} {
			if math.IsNaN(*percent) {
				*percent = 0
			}
			*percent = min(max(*percent, 0), 100)
		}
	}
}
