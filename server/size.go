package server

import (
	"math"
	"runtime"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crivm/crivm/server/store"
	"github.com/crivm/crivm/vmruntime"
)

const (
	// guestReserve is memory that a VM has beyond its pod's limit: guest kernel, agent, OCI runtime. Without
	// it a pod at its limit would run the guest, not its container, out of memory.
	guestReserve = 160 << 20
	// memoryAlign is what VMMs and virtio-mem ask for.
	memoryAlign = 2 << 20
)

// vmSize is what a VM boots with: the pod's limits where it has some, else the handler's default. Pod
// overhead is not part of it: it pays for the VMM on the host.
func vmSize(h Handler, config *cri.PodSandboxConfig) vmruntime.Size {
	size := vmruntime.Size{VCPUs: h.VCPUs, MemoryBytes: alignMemory(h.Memory)}
	r := config.GetLinux().GetResources()
	if n := vcpus(r); n > 0 {
		size.VCPUs = int(min(n, int64(runtime.NumCPU())))
	}
	if limit := r.GetMemoryLimitInBytes(); !unlimitedMemory(limit) {
		size.MemoryBytes = alignMemory(limit + guestReserve)
	}
	return size
}

// neededSize is what the VM of a running sandbox should have: its pod's limits where it has some, else what
// it booted with or what the limits of its containers add up to, whichever is more. Memory never goes below
// what it booted with; neither goes beyond its ceiling.
func neededSize(rec store.Sandbox, containers []store.Container) vmruntime.Size {
	var quotas float64
	var limits int64
	for _, c := range containers {
		if c.State != store.ContainerCreated && c.State != store.ContainerRunning {
			continue
		}
		r := c.Config.GetLinux().GetResources()
		if r.GetCpuQuota() > 0 && r.GetCpuPeriod() > 0 {
			quotas += float64(r.GetCpuQuota()) / float64(r.GetCpuPeriod())
		}
		if limit := r.GetMemoryLimitInBytes(); !unlimitedMemory(limit) {
			limits = min(limits+limit, rec.VM.MaxMemory)
		}
	}
	r := rec.Config.GetLinux().GetResources()
	cpus, memory := max(int64(rec.VM.BootVCPUs), int64(math.Ceil(quotas))), limits+guestReserve
	if n := vcpus(r); n > 0 {
		cpus = n
	}
	if limit := r.GetMemoryLimitInBytes(); !unlimitedMemory(limit) {
		memory = min(limit, rec.VM.MaxMemory) + guestReserve
	}
	return vmruntime.Size{
		VCPUs:       int(min(cpus, int64(runtime.NumCPU()), int64(rec.VM.MaxVCPUs))),
		MemoryBytes: min(max(alignMemory(memory), rec.VM.BootMemory), rec.VM.MaxMemory),
	}
}

// vcpus is a CPU limit in whole CPUs; 0 for none.
func vcpus(r *cri.LinuxContainerResources) int64 {
	quota, period := r.GetCpuQuota(), r.GetCpuPeriod()
	if quota <= 0 || period <= 0 {
		return 0
	}
	return (quota-1)/period + 1
}

func alignMemory(n int64) int64 { return (n + memoryAlign - 1) / memoryAlign * memoryAlign }
