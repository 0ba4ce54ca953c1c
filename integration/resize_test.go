//go:build integration

package integration

import (
	"fmt"
	"strconv"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const mib = 1 << 20

func (p *pod) update(id string, r *cri.LinuxContainerResources) error {
	return p.n.Runtime.UpdateContainerResources(testContext(p.t, 2*time.Minute), id, &cri.ContainerResources{Linux: r})
}

func (p *pod) updatePod(r *cri.LinuxContainerResources) error {
	_, err := p.n.Runtime.UpdatePodSandboxResources(testContext(p.t, 2*time.Minute), &cri.UpdatePodSandboxResourcesRequest{PodSandboxId: p.id, Resources: r})
	return err
}

// limits are what the guest's kernel enforces on a container.
func (p *pod) limits(id string) string {
	p.t.Helper()
	return strings.Join(strings.Fields(p.exec(id, "cat", "/sys/fs/cgroup/cpu.max", "/sys/fs/cgroup/cpu.weight", "/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.high")), " ")
}

// guestSize is what the guest's kernel has: CPUs in use, and memory in bytes.
func (p *pod) guestSize(id string) (cpus int, memory int64) {
	p.t.Helper()
	for line := range strings.Lines(p.exec(id, "cat", "/proc/cpuinfo", "/proc/meminfo")) {
		if strings.HasPrefix(line, "processor") {
			cpus++
		}
		if rest, ok := strings.CutPrefix(line, "MemTotal:"); ok {
			kib, err := strconv.ParseInt(strings.Fields(rest)[0], 10, 64)
			if err != nil {
				p.t.Fatal(err)
			}
			memory = kib << 10
		}
	}
	return cpus, memory
}

func (p *pod) wantLimits(id, what, want string) {
	p.t.Helper()
	if got := p.limits(id); got != want {
		p.t.Errorf("%s: the guest enforces %q, want %q", what, got, want)
	}
}

func TestResizeContainer(t *testing.T) {
	p := runPod(t, shared)
	id := p.start("exec sleep 1000")
	cpus, memory := p.guestSize(id)
	p.wantLimits(id, "at first", "max 100000 100 max max")

	// CPUs and memory that the VM does not have yet.
	if err := p.update(id, &cri.LinuxContainerResources{CpuPeriod: 100000, CpuQuota: 200000, CpuShares: 1024, MemoryLimitInBytes: 400 * mib, Unified: map[string]string{"memory.high": "314572800"}}); err != nil {
		t.Fatal(err)
	}
	p.wantLimits(id, "raised", fmt.Sprint("200000 100000 39 ", 400*mib, " 314572800"))
	if c, m := p.guestSize(id); c != 2 || m < memory+250*mib {
		t.Errorf("the guest had %d CPUs and %d bytes of memory, has %d and %d", cpus, memory, c, m)
	}

	// Refused, and nothing changed.
	for name, c := range map[string]struct {
		r    *cri.LinuxContainerResources
		code codes.Code
	}{
		"a memory beyond the host": {&cri.LinuxContainerResources{MemoryLimitInBytes: 1 << 50}, codes.OutOfRange},
		"huge pages":               {&cri.LinuxContainerResources{HugepageLimits: []*cri.HugepageLimit{{PageSize: "1GB", Limit: 1024 * mib}}}, codes.Unimplemented},
		"what the kernel refuses":  {&cri.LinuxContainerResources{CpuQuota: 50000, Unified: map[string]string{"memory.high": "much"}}, codes.Unknown},
	} {
		err := p.update(id, c.r)
		if err == nil || c.code != codes.Unknown && status.Code(err) != c.code {
			t.Errorf("%s: %v", name, err)
		}
		p.wantLimits(id, name, fmt.Sprint("200000 100000 39 ", 400*mib, " 314572800"))
	}

	// Less, and what kubelet sends for none.
	if err := p.update(id, &cri.LinuxContainerResources{CpuQuota: 50000, MemoryLimitInBytes: 64 * mib}); err != nil {
		t.Fatal(err)
	}
	p.wantLimits(id, "lowered", fmt.Sprint("50000 100000 39 ", 64*mib, " 314572800"))
	if _, m := p.guestSize(id); m > memory+64*mib {
		t.Logf("the guest keeps %d bytes of memory; it booted with %d", m, memory)
	}
	if err := p.update(id, &cri.LinuxContainerResources{CpuQuota: -1001, MemoryLimitInBytes: 9223372036837994496}); err != nil {
		t.Fatal(err)
	}
	p.wantLimits(id, "no limits", "max 100000 39 max 314572800")
	resp, err := p.n.Runtime.ContainerStatus(t.Context(), id, false)
	if err != nil {
		t.Fatal(err)
	}
	if r := resp.Status.Resources.GetLinux(); r.GetCpuQuota() != -1001 || r.GetMemoryLimitInBytes() != 9223372036837994496 || r.GetCpuShares() != 1024 || r.GetUnified()["memory.high"] != "314572800" {
		t.Errorf("status shows %v", r)
	}
}

// What a container holds cannot be taken from it without killing it.
func TestResizeBelowUse(t *testing.T) {
	p := runPod(t, shared)
	id := p.start("x=$(head -c 16000000 /dev/zero | tr '\\0' a); echo ready; exec sleep 1000 & while :; do sleep 1; done")
	eventually(t, 4*time.Minute, "memory is in use", func() error {
		if !strings.Contains(p.logText(id), "ready") {
			return fmt.Errorf("not yet")
		}
		return nil
	})
	if err := p.update(id, &cri.LinuxContainerResources{MemoryLimitInBytes: 8 * mib}); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("a limit below what is in use: %v", err)
	}
	p.wantLimits(id, "after the refusal", "max 100000 100 max max")
}

func TestResizeCreated(t *testing.T) {
	p := runPod(t, shared)
	id, err := p.create("cat /sys/fs/cgroup/cpu.max /sys/fs/cgroup/memory.max", func(c *cri.ContainerConfig) {
		c.Linux.Resources = &cri.LinuxContainerResources{MemoryLimitInBytes: 32 * mib}
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := p.update(id, &cri.LinuxContainerResources{CpuPeriod: 50000, CpuQuota: 25000, MemoryLimitInBytes: 48 * mib}); err != nil {
		t.Fatal(err)
	}
	if err := p.n.Runtime.StartContainer(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	p.wait(id)
	if got, want := strings.Join(strings.Fields(p.logText(id)), " "), fmt.Sprint("25000 50000 ", 48*mib); got != want {
		t.Errorf("it started with %q, want %q", got, want)
	}
	if err := p.update(id, &cri.LinuxContainerResources{CpuShares: 2}); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("an exited container: %v", err)
	}
}

// As kubelet resizes a pod in place: the sandbox before containers that get more, after those that get less.
func TestResizePod(t *testing.T) {
	p := runPod(t, shared, func(c *cri.PodSandboxConfig) {
		c.Linux.Resources = &cri.LinuxContainerResources{CpuPeriod: 100000, CpuQuota: 100000, MemoryLimitInBytes: 96 * mib}
		c.Linux.Overhead = &cri.LinuxContainerResources{MemoryLimitInBytes: 512 * mib}
	})
	id := p.start("exec sleep 1000", func(c *cri.ContainerConfig) {
		c.Linux.Resources = &cri.LinuxContainerResources{CpuPeriod: 100000, CpuQuota: 100000, MemoryLimitInBytes: 96 * mib}
	})
	_, memory := p.guestSize(id)
	if err := p.update(id, &cri.LinuxContainerResources{MemoryLimitInBytes: 256 * mib}); status.Code(err) != codes.OutOfRange {
		t.Errorf("a container beyond its pod: %v", err)
	}
	for range 2 {
		if err := p.updatePod(&cri.LinuxContainerResources{CpuPeriod: 100000, CpuQuota: 200000, MemoryLimitInBytes: 256 * mib}); err != nil {
			t.Fatal(err)
		}
		if err := p.update(id, &cri.LinuxContainerResources{CpuPeriod: 100000, CpuQuota: 200000, MemoryLimitInBytes: 256 * mib}); err != nil {
			t.Fatal(err)
		}
	}
	if c, m := p.guestSize(id); c != 2 || m < memory+150*mib {
		t.Errorf("the guest had %d bytes of memory, has %d and %d CPUs", memory, m, c)
	}
	if err := p.update(id, &cri.LinuxContainerResources{CpuPeriod: 100000, CpuQuota: 100000, MemoryLimitInBytes: 96 * mib}); err != nil {
		t.Fatal(err)
	}
	if err := p.updatePod(&cri.LinuxContainerResources{CpuPeriod: 100000, CpuQuota: 100000, MemoryLimitInBytes: 96 * mib}); err != nil {
		t.Fatal(err)
	}
	p.wantLimits(id, "as at first", fmt.Sprint("100000 100000 100 ", 96*mib, " max"))
	if _, m := p.guestSize(id); m > memory+16*mib {
		t.Logf("the guest keeps %d bytes of memory; it booted with %d", m, memory)
	}
	if err := p.updatePod(&cri.LinuxContainerResources{MemoryLimitInBytes: 1 << 50}); status.Code(err) != codes.OutOfRange {
		t.Errorf("memory beyond the host: %v", err)
	}
	if s := p.status(); s.State != cri.PodSandboxState_SANDBOX_READY {
		t.Errorf("the sandbox is %s", s.State)
	}
}
