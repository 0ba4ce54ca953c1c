package server

import (
	"slices"
	"strconv"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crivm/crivm/agentproto"
	"github.com/crivm/crivm/vmruntime"
)

const (
	counter = cri.MetricType_COUNTER
	gauge   = cri.MetricType_GAUGE
)

// metrics are cAdvisor's, by its names and labels (github.com/google/cadvisor, docs/storage/prometheus.md),
// and ours. Where a metric exists for the pod too, its labels name and container are empty.
var metrics = slices.Concat(cpuMetrics, memoryMetrics, hugepageMetrics, fileMetrics, networkMetrics, processMetrics, pressureMetrics, specMetrics, ownMetrics)

var cpuMetrics = []metric{
	{"container_cpu_usage_seconds_total", "CPU time used.", counter, []string{"cpu"},
		func(c containerSubject) []point { return one(seconds(c.GetCpuUsageNanos()), "total") },
		func(p podSubject) []point { return one(seconds(p.host.CPUNanos), "total") }},
	{"container_cpu_user_seconds_total", "CPU time used outside of the kernel.", counter, nil,
		func(c containerSubject) []point { return one(seconds(c.GetCpuUserNanos())) },
		func(p podSubject) []point { return one(seconds(p.host.UserNanos)) }},
	{"container_cpu_system_seconds_total", "CPU time used in the kernel.", counter, nil,
		func(c containerSubject) []point { return one(seconds(c.GetCpuSystemNanos())) },
		func(p podSubject) []point { return one(seconds(p.host.SystemNanos)) }},
	{"container_cpu_cfs_periods_total", "Periods of the CPU quota that have passed.", counter, nil,
		func(c containerSubject) []point { return one(c.GetCpuPeriods()) }, nil},
	{"container_cpu_cfs_throttled_periods_total", "Periods in which the CPU quota was used up.", counter, nil,
		func(c containerSubject) []point { return one(c.GetCpuThrottledPeriods()) }, nil},
	{"container_cpu_cfs_throttled_seconds_total", "Time in which the CPU quota was used up.", counter, nil,
		func(c containerSubject) []point { return one(seconds(c.GetCpuThrottledNanos())) }, nil},
}

var memoryMetrics = []metric{
	{"container_memory_usage_bytes", "Memory in use, page cache included.", gauge, nil,
		func(c containerSubject) []point { return one(c.GetMemoryUsageBytes()) },
		func(p podSubject) []point { return one(p.host.MemoryBytes) }},
	{"container_memory_working_set_bytes", "Memory in use without file pages that were not used lately.", gauge, nil,
		func(c containerSubject) []point { return one(c.GetMemoryWorkingSetBytes()) },
		func(p podSubject) []point { return one(p.host.WorkingSetBytes) }},
	{"container_memory_rss", "Anonymous memory.", gauge, nil,
		func(c containerSubject) []point { return one(c.GetMemoryRssBytes()) },
		func(p podSubject) []point { return one(p.host.RSSBytes) }},
	{"container_memory_cache", "Page cache.", gauge, nil,
		func(c containerSubject) []point { return one(c.GetMemoryCacheBytes()) },
		func(p podSubject) []point { return one(p.host.CacheBytes) }},
	{"container_memory_swap", "Swap space in use.", gauge, nil,
		func(c containerSubject) []point { return one(c.GetSwapUsageBytes()) },
		func(p podSubject) []point { return one(p.host.SwapBytes) }},
	{"container_memory_mapped_file", "Memory of mapped files.", gauge, nil, func(c containerSubject) []point { return one(c.GetMemoryMappedBytes()) }, nil},
	{"container_memory_kernel_usage", "Memory of the guest's kernel.", gauge, nil, func(c containerSubject) []point { return one(c.GetMemoryKernelBytes()) }, nil},
	{"container_memory_max_usage_bytes", "The most memory that was in use.", gauge, nil, func(c containerSubject) []point { return one(c.GetMemoryPeakBytes()) }, nil},
	{"container_memory_failcnt", "How often the memory limit was hit.", counter, nil, func(c containerSubject) []point { return one(c.GetMemoryLimitHits()) }, nil},
	{"container_memory_failures_total", "Page faults.", counter, []string{"failure_type", "scope"},
		func(c containerSubject) []point { return faults(c.GetPageFaults(), c.GetMajorPageFaults()) },
		func(p podSubject) []point { return faults(p.host.PageFaults, p.host.MajorPageFaults) }},
	{"container_oom_events_total", "Processes killed for want of memory.", counter, nil, func(c containerSubject) []point { return one(c.GetOomKills()) }, nil},
}

// cAdvisor has the most that was in use too, which cgroup v2 does not tell.
var hugepageMetrics = []metric{
	{"container_hugetlb_usage_bytes", "Huge pages in use.", gauge, []string{"pagesize"}, hugepagePoints((*agentproto.HugepageStats).GetUsageBytes), nil},
	{"container_hugetlb_failcnt", "How often the limit of huge pages was hit.", counter, []string{"pagesize"}, hugepagePoints((*agentproto.HugepageStats).GetLimitHits), nil},
}

func hugepagePoints(figure func(*agentproto.HugepageStats) uint64) func(containerSubject) []point {
	return func(c containerSubject) []point {
		var points []point
		for _, h := range c.GetHugepages() {
			points = append(points, point{[]string{h.GetPageSize()}, figure(h)})
		}
		return points
	}
}

var fileMetrics = []metric{
	{"container_fs_usage_bytes", "Size of what was written to the container's own file system.", gauge, []string{"device"},
		func(c containerSubject) []point { return one(c.GetWritableLayerBytes(), scratchSerial) }, nil},
	{"container_fs_limit_bytes", "Size of the file system that holds what containers of the pod write.", gauge, []string{"device"},
		func(c containerSubject) []point { return one(c.pod.guest.GetScratch().GetTotalBytes(), scratchSerial) }, nil},
	{"container_fs_inodes_total", "Inodes of the file system that holds what containers of the pod write.", gauge, []string{"device"},
		func(c containerSubject) []point { return one(c.pod.guest.GetScratch().GetTotalInodes(), scratchSerial) }, nil},
	{"container_fs_inodes_free", "Free inodes of the file system that holds what containers of the pod write.", gauge, []string{"device"},
		func(c containerSubject) []point { return one(c.pod.guest.GetScratch().GetFreeInodes(), scratchSerial) }, nil},
	{"container_fs_reads_total", "Reads from disks.", counter, []string{"device"}, devices((*agentproto.DeviceStats).GetReads), nil},
	{"container_fs_reads_bytes_total", "Bytes read from disks.", counter, []string{"device"}, devices((*agentproto.DeviceStats).GetReadBytes), nil},
	{"container_fs_writes_total", "Writes to disks.", counter, []string{"device"}, devices((*agentproto.DeviceStats).GetWrites), nil},
	{"container_fs_writes_bytes_total", "Bytes written to disks.", counter, []string{"device"}, devices((*agentproto.DeviceStats).GetWriteBytes), nil},
	{"container_blkio_device_usage_total", "Bytes read from and written to disks.", counter, []string{"device", "major", "minor", "operation"},
		func(c containerSubject) []point {
			var points []point
			for _, d := range c.GetDevices() {
				major, minor := strconv.Itoa(int(d.GetMajor())), strconv.Itoa(int(d.GetMinor()))
				points = append(points,
					point{[]string{"/dev/" + d.GetName(), major, minor, "Read"}, d.GetReadBytes()},
					point{[]string{"/dev/" + d.GetName(), major, minor, "Write"}, d.GetWriteBytes()})
			}
			return points
		}, nil},
}

var networkMetrics = []metric{
	{"container_network_receive_bytes_total", "Bytes received.", counter, []string{"interface"}, nil, interfaces(func(i vmruntime.InterfaceUsage) uint64 { return i.RxBytes })},
	{"container_network_receive_packets_total", "Packets received.", counter, []string{"interface"}, nil, interfaces(func(i vmruntime.InterfaceUsage) uint64 { return i.RxPackets })},
	{"container_network_receive_errors_total", "Errors while receiving.", counter, []string{"interface"}, nil, interfaces(func(i vmruntime.InterfaceUsage) uint64 { return i.RxErrors })},
	{"container_network_receive_packets_dropped_total", "Packets dropped while receiving.", counter, []string{"interface"}, nil, interfaces(func(i vmruntime.InterfaceUsage) uint64 { return i.RxDropped })},
	{"container_network_transmit_bytes_total", "Bytes sent.", counter, []string{"interface"}, nil, interfaces(func(i vmruntime.InterfaceUsage) uint64 { return i.TxBytes })},
	{"container_network_transmit_packets_total", "Packets sent.", counter, []string{"interface"}, nil, interfaces(func(i vmruntime.InterfaceUsage) uint64 { return i.TxPackets })},
	{"container_network_transmit_errors_total", "Errors while sending.", counter, []string{"interface"}, nil, interfaces(func(i vmruntime.InterfaceUsage) uint64 { return i.TxErrors })},
	{"container_network_transmit_packets_dropped_total", "Packets dropped while sending.", counter, []string{"interface"}, nil, interfaces(func(i vmruntime.InterfaceUsage) uint64 { return i.TxDropped })},
}

var processMetrics = []metric{
	{"container_processes", "Processes.", gauge, nil, func(c containerSubject) []point { return one(c.GetProcesses()) }, nil},
	{"container_threads", "Threads.", gauge, nil, func(c containerSubject) []point { return one(c.GetPids()) }, nil},
	{"container_threads_max", "The most threads allowed; 0 for no limit.", gauge, nil, func(c containerSubject) []point { return one(c.GetPidsLimit()) }, nil},
	{"container_file_descriptors", "Open files.", gauge, nil, func(c containerSubject) []point { return one(c.GetFileDescriptors()) }, nil},
	{"container_sockets", "Open sockets.", gauge, nil, func(c containerSubject) []point { return one(c.GetSockets()) }, nil},
	{"container_ulimits_soft", "Soft limits of the first process.", gauge, []string{"ulimit"}, func(c containerSubject) []point { return one(c.GetFileLimit(), "max_open_files") }, nil},
	{"container_start_time_seconds", "When it was started, in seconds since 1970.", gauge, nil,
		func(c containerSubject) []point { return one(uint64(c.rec.StartedAt.Unix())) },
		func(p podSubject) []point { return one(uint64(p.rec.CreatedAt.Unix())) }},
	{"container_last_seen", "When these figures were taken, in seconds since 1970.", gauge, nil,
		func(c containerSubject) []point { return one(uint64(c.at.Unix())) },
		func(p podSubject) []point { return one(uint64(p.at.Unix())) }},
}

// Pressure of the pod is that of all of its guest.
var pressureMetrics = []metric{
	{"container_pressure_cpu_waiting_seconds_total", "Time in which some tasks waited for CPU time.", counter, nil,
		func(c containerSubject) []point { return some(c.GetCpuPressure()) }, func(p podSubject) []point { return some(p.guest.GetCpuPressure()) }},
	{"container_pressure_cpu_stalled_seconds_total", "Time in which all tasks waited for CPU time.", counter, nil,
		func(c containerSubject) []point { return full(c.GetCpuPressure()) }, func(p podSubject) []point { return full(p.guest.GetCpuPressure()) }},
	{"container_pressure_memory_waiting_seconds_total", "Time in which some tasks waited for memory.", counter, nil,
		func(c containerSubject) []point { return some(c.GetMemoryPressure()) }, func(p podSubject) []point { return some(p.guest.GetMemoryPressure()) }},
	{"container_pressure_memory_stalled_seconds_total", "Time in which all tasks waited for memory.", counter, nil,
		func(c containerSubject) []point { return full(c.GetMemoryPressure()) }, func(p podSubject) []point { return full(p.guest.GetMemoryPressure()) }},
	{"container_pressure_io_waiting_seconds_total", "Time in which some tasks waited for disks.", counter, nil,
		func(c containerSubject) []point { return some(c.GetIoPressure()) }, func(p podSubject) []point { return some(p.guest.GetIoPressure()) }},
	{"container_pressure_io_stalled_seconds_total", "Time in which all tasks waited for disks.", counter, nil,
		func(c containerSubject) []point { return full(c.GetIoPressure()) }, func(p podSubject) []point { return full(p.guest.GetIoPressure()) }},
}

var specMetrics = []metric{
	{"container_spec_cpu_period", "Length of a period of the CPU quota, in microseconds.", gauge, nil, func(c containerSubject) []point { return one(natural(c.resources().GetCpuPeriod())) }, nil},
	{"container_spec_cpu_quota", "CPU time allowed in a period, in microseconds.", gauge, nil,
		func(c containerSubject) []point {
			if c.resources().GetCpuQuota() <= 0 {
				return nil // no limit
			}
			return one(natural(c.resources().GetCpuQuota()))
		}, nil},
	{"container_spec_cpu_shares", "Weight of the container when CPU time is short.", gauge, nil, func(c containerSubject) []point { return one(natural(c.resources().GetCpuShares())) }, nil},
	{"container_spec_memory_limit_bytes", "Memory limit; 0 for none.", gauge, nil, func(c containerSubject) []point { return one(memoryLimit(c.resources().GetMemoryLimitInBytes())) }, nil},
	{"container_spec_memory_reservation_limit_bytes", "Memory that is protected from being taken away; CRI has no such field, so 0.", gauge, nil, func(containerSubject) []point { return one(0) }, nil},
	{"container_spec_memory_swap_limit_bytes", "Limit of memory and swap together; 0 for none.", gauge, nil, func(c containerSubject) []point { return one(memoryLimit(c.resources().GetMemorySwapLimitInBytes())) }, nil},
}

// ownMetrics make visible what a VM costs beyond its containers, to choose a RuntimeClass's overhead by.
var ownMetrics = []metric{
	{"crivm_pod_overhead_cpu_seconds_total", "CPU time of the pod's VM that is no container's: VMM, guest kernel, agent.", counter, nil, nil,
		func(p podSubject) []point { return one(seconds(p.overhead)) }},
	{"crivm_pod_overhead_memory_bytes", "Working set of the pod's VM that is no container's: VMM, guest kernel, agent, free memory of the guest that was in use before.", gauge, nil, nil,
		func(p podSubject) []point { return one(p.overheadMemory()) }},
	{"crivm_pod_guest_memory_bytes", "Memory that the guest's kernel has.", gauge, nil, nil, func(p podSubject) []point { return one(p.guest.GetMemoryTotalBytes()) }},
	{"crivm_pod_guest_memory_available_bytes", "Memory that the guest's kernel could still give.", gauge, nil, nil, func(p podSubject) []point { return one(p.guest.GetMemoryAvailableBytes()) }},
}

func (c containerSubject) resources() *cri.LinuxContainerResources {
	return c.rec.Config.GetLinux().GetResources()
}

func one(value uint64, labels ...string) []point { return []point{{labels, value}} }

func seconds(nanos uint64) uint64 { return nanos / 1e9 }

func natural(n int64) uint64 { return uint64(max(n, 0)) }

func memoryLimit(n int64) uint64 {
	if unlimitedMemory(n) {
		return 0
	}
	return uint64(n)
}

func faults(all, major uint64) []point {
	return []point{
		{[]string{"pgfault", "container"}, all}, {[]string{"pgmajfault", "container"}, major},
		{[]string{"pgfault", "hierarchy"}, all}, {[]string{"pgmajfault", "hierarchy"}, major},
	}
}

func devices(figure func(*agentproto.DeviceStats) uint64) func(containerSubject) []point {
	return func(c containerSubject) []point {
		var points []point
		for _, d := range c.GetDevices() {
			points = append(points, point{[]string{"/dev/" + d.GetName()}, figure(d)})
		}
		return points
	}
}

func interfaces(figure func(vmruntime.InterfaceUsage) uint64) func(podSubject) []point {
	return func(p podSubject) []point {
		var points []point
		for _, i := range podInterfaces(p.rec, p.host.Interfaces) {
			points = append(points, point{[]string{i.Name}, figure(i)})
		}
		return points
	}
}

func some(p *agentproto.Pressure) []point {
	if p == nil {
		return nil
	}
	return one(seconds(p.GetSome().GetTotalNanos()))
}

func full(p *agentproto.Pressure) []point {
	if p == nil {
		return nil
	}
	return one(seconds(p.GetFull().GetTotalNanos()))
}
