package server

import (
	"regexp"
	"strings"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

var (
	cpuListForm = regexp.MustCompile(`^[0-9]+(-[0-9]+)?(,[0-9]+(-[0-9]+)?)*$`)
	unifiedForm = regexp.MustCompile(`^(memory|cpu|io|pids|hugetlb|misc|rdma)(\.[a-zA-Z0-9_]+)+$`)
)

// validateResources checks limits before anything is done with them. cpuset_cpus and cpuset_mems name CPUs
// and nodes of the host; the guest has its own numbering: they are given back in the status and change nothing.
func validateResources(field string, r *cri.LinuxContainerResources) error {
	quota, period := r.GetCpuQuota(), r.GetCpuPeriod()
	switch {
	case period != 0 && (period < 1000 || period > 1000000): // what the kernel takes, in µs
		return invalid(field+".cpu_period", "%d is not between 1000 and 1000000", period)
	case quota > 0 && quota < 1000:
		return invalid(field+".cpu_quota", "%d is less than 1000", quota)
	case r.GetCpuShares() < 0:
		return invalid(field+".cpu_shares", "%d is negative", r.GetCpuShares())
	case r.GetOomScoreAdj() < -1000 || r.GetOomScoreAdj() > 1000:
		return invalid(field+".oom_score_adj", "%d is not between -1000 and 1000", r.GetOomScoreAdj())
	case r.GetCpusetCpus() != "" && !cpuListForm.MatchString(r.GetCpusetCpus()):
		return invalid(field+".cpuset_cpus", "%q is not a list of CPUs", r.GetCpusetCpus())
	case r.GetCpusetMems() != "" && !cpuListForm.MatchString(r.GetCpusetMems()):
		return invalid(field+".cpuset_mems", "%q is not a list of memory nodes", r.GetCpusetMems())
	}
	if err := validateHugepages(field, r.GetHugepageLimits()); err != nil {
		return err
	}
	for key, value := range r.GetUnified() {
		switch {
		case strings.HasPrefix(key, "cpuset."):
			return unsupported(field+".unified", "%s counts the CPUs of the host; the guest has its own", key)
		case !unifiedForm.MatchString(key):
			return invalid(field+".unified", "%q is not a limit of cgroup v2", key)
		case value == "" || strings.ContainsAny(value, "\n\x00"):
			return invalid(field+".unified", "%q is not a value for %s", value, key)
		}
	}
	if swap := r.GetMemorySwapLimitInBytes(); !unlimitedMemory(swap) && swap > r.GetMemoryLimitInBytes() {
		return unsupported(field+".memory_swap_limit_in_bytes", "%d is more than the memory limit, and the guest has no swap", swap)
	}
	return nil
}
