package server

import (
	"context"
	"errors"
	"math"
	"os"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	oci "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crivm/crivm/server/store"
	"github.com/crivm/crivm/vmruntime"
	"github.com/crivm/crivm/vmruntime/vmtest"
)

const mib = 1 << 20

func (r *rig) update(id string, change *cri.LinuxContainerResources) error {
	_, err := r.UpdateContainerResources(r.t.Context(), &cri.UpdateContainerResourcesRequest{ContainerId: id, Linux: change})
	return err
}

func (r *rig) updatePod(id string, change *cri.LinuxContainerResources) error {
	_, err := r.UpdatePodSandboxResources(r.t.Context(), &cri.UpdatePodSandboxResourcesRequest{PodSandboxId: id, Resources: change})
	return err
}

func (r *rig) resources(id string) *cri.LinuxContainerResources {
	r.t.Helper()
	resp, err := r.ContainerStatus(r.t.Context(), &cri.ContainerStatusRequest{ContainerId: id})
	if err != nil {
		r.t.Fatal(err)
	}
	return resp.GetStatus().GetResources().GetLinux()
}

// vmSize is the size that the VMM tells, which must be the recorded one.
func (r *rig) vmSize(pod string) vmruntime.Size {
	r.t.Helper()
	vm, err := r.sandbox(pod).machine()
	if err != nil {
		r.t.Fatal(err)
	}
	size, err := vm.Resize(r.t.Context(), vmruntime.Size{})
	if err != nil {
		r.t.Fatal(err)
	}
	rec, err := r.store.Sandbox(pod)
	if err != nil || rec.VM.VCPUs != size.VCPUs || rec.VM.Memory != size.MemoryBytes {
		r.t.Errorf("recorded size is %+v (%v), the VMM's %+v", rec.VM, err, size)
	}
	return size
}

func TestUpdateContainerResources(t *testing.T) {
	r := newRig(t)
	pod := r.runPod("a")
	id := r.run(pod, "c", "exec sleep 1000")
	created := r.create(pod, "later", "exit 0")
	steps := []struct {
		name   string
		change *cri.LinuxContainerResources
		want   *cri.LinuxContainerResources
		size   vmruntime.Size
	}{
		{"limits grow the VM of a pod without limits", &cri.LinuxContainerResources{CpuPeriod: 100000, CpuQuota: 150000, CpuShares: 512, MemoryLimitInBytes: 64 * mib, CpusetCpus: "0-3"},
			&cri.LinuxContainerResources{CpuPeriod: 100000, CpuQuota: 150000, CpuShares: 512, MemoryLimitInBytes: 64 * mib, CpusetCpus: "0-3"}, vmruntime.Size{VCPUs: 2, MemoryBytes: 224 * mib}},
		{"what is not specified stays", &cri.LinuxContainerResources{CpusetCpus: "1"},
			&cri.LinuxContainerResources{CpuPeriod: 100000, CpuQuota: 150000, CpuShares: 512, MemoryLimitInBytes: 64 * mib, CpusetCpus: "1"}, vmruntime.Size{VCPUs: 2, MemoryBytes: 224 * mib}},
		{"less shrinks it", &cri.LinuxContainerResources{MemoryLimitInBytes: 32 * mib, CpuQuota: 50000, OomScoreAdj: 500},
			&cri.LinuxContainerResources{CpuPeriod: 100000, CpuQuota: 50000, CpuShares: 512, MemoryLimitInBytes: 32 * mib, CpusetCpus: "1"}, vmruntime.Size{VCPUs: 1, MemoryBytes: 192 * mib}},
		{"no limits", &cri.LinuxContainerResources{MemoryLimitInBytes: 9223372036837994496, CpuQuota: -1001},
			&cri.LinuxContainerResources{CpuPeriod: 100000, CpuQuota: -1001, CpuShares: 512, MemoryLimitInBytes: 9223372036837994496, CpusetCpus: "1"}, vmruntime.Size{VCPUs: 1, MemoryBytes: 160 * mib}},
	}
	for _, id := range []string{id, created} {
		for _, s := range steps {
			for range 2 {
				if err := r.update(id, s.change); err != nil {
					t.Fatalf("%s: %v", s.name, err)
				}
				if got := r.resources(id); !proto.Equal(got, s.want) {
					t.Errorf("%s: resources are %v, want %v", s.name, got, s.want)
				}
				if got := r.vmSize(pod); got != s.size {
					t.Errorf("%s: size of the VM is %+v, want %+v", s.name, got, s.size)
				}
			}
		}
	}
	want := r.resources(id)
	r.restart()
	if got := r.resources(id); !proto.Equal(got, want) {
		t.Errorf("after a restart resources are %v, want %v", got, want)
	}
	if err := r.update(id, &cri.LinuxContainerResources{CpuShares: 600}); err != nil || r.resources(id).GetCpuShares() != 600 {
		t.Errorf("after a restart: %v, %v", err, r.resources(id))
	}
}

func TestUpdateContainerRefused(t *testing.T) {
	r := newRig(t)
	handler := r.opts.Handlers[""]
	handler.MaxVCPUs = 1
	r.opts.Handlers[""] = handler
	pod := r.runPod("a")
	id := r.run(pod, "c", "exec sleep 1000")
	before, size := proto.Clone(r.resources(id)), r.vmSize(pod)
	for name, c := range map[string]struct {
		change *cri.LinuxContainerResources
		is     func(error) bool
		text   string
	}{
		"more memory than the ceiling": {&cri.LinuxContainerResources{MemoryLimitInBytes: 97 * mib}, errdefs.IsOutOfRange, "max_memory"},
		"more CPUs than the ceiling":   {&cri.LinuxContainerResources{CpuPeriod: 100000, CpuQuota: 150000}, errdefs.IsOutOfRange, "max_vcpus"},
		"huge pages":                   {&cri.LinuxContainerResources{HugepageLimits: []*cri.HugepageLimit{{PageSize: "1GB", Limit: 1 << 30}}}, errdefs.IsNotImplemented, "linux.hugepage_limits"},
		"swap":                         {&cri.LinuxContainerResources{MemoryLimitInBytes: 32 * mib, MemorySwapLimitInBytes: 64 * mib}, errdefs.IsNotImplemented, "linux.memory_swap_limit_in_bytes"},
		"a period":                     {&cri.LinuxContainerResources{CpuPeriod: 10}, errdefs.IsInvalidArgument, "linux.cpu_period"},
		"a file that is none":          {&cri.LinuxContainerResources{Unified: map[string]string{"cgroup.kill": "1"}}, errdefs.IsInvalidArgument, "linux.unified"},
		"what the guest refuses":       {&cri.LinuxContainerResources{Unified: map[string]string{"memory.high": "1"}, MemoryLimitInBytes: 90 * mib}, errdefs.IsNotFound, "memory.high"},
	} {
		if err := r.update(id, c.change); !c.is(err) || !strings.Contains(err.Error(), c.text) {
			t.Errorf("%s: %v", name, err)
		}
		if got := r.resources(id); !proto.Equal(got, before) {
			t.Errorf("%s: resources are %v, were %v", name, got, before)
		}
		if got := r.vmSize(pod); got.VCPUs != size.VCPUs || got.MemoryBytes > 160*mib {
			t.Errorf("%s: size of the VM is %+v, was %+v", name, got, size)
		}
	}
	if err := r.update("unknown", &cri.LinuxContainerResources{}); !errdefs.IsNotFound(err) {
		t.Errorf("an unknown container: %v", err)
	}
	gone := r.run(pod, "gone", "exit 0")
	r.exit(gone)
	if err := r.update(gone, &cri.LinuxContainerResources{CpuShares: 5}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("an exited container: %v", err)
	}
}

func TestUpdatePodSandboxResources(t *testing.T) {
	r := newRig(t)
	pod := r.runPod("a")
	for _, s := range []struct {
		name   string
		change *cri.LinuxContainerResources
		size   vmruntime.Size
	}{
		{"more", &cri.LinuxContainerResources{CpuPeriod: 100000, CpuQuota: 200000, MemoryLimitInBytes: 64 * mib}, vmruntime.Size{VCPUs: 2, MemoryBytes: 224 * mib}},
		{"more CPUs than the host has", &cri.LinuxContainerResources{CpuPeriod: 100000, CpuQuota: 25600000, MemoryLimitInBytes: 64 * mib}, vmruntime.Size{VCPUs: 2, MemoryBytes: 224 * mib}},
		{"less CPU", &cri.LinuxContainerResources{CpuQuota: 100000}, vmruntime.Size{VCPUs: 1, MemoryBytes: 224 * mib}},
		{"less than it booted with", &cri.LinuxContainerResources{MemoryLimitInBytes: 48 * mib}, vmruntime.Size{VCPUs: 1, MemoryBytes: 208 * mib}},
		{"no limits", &cri.LinuxContainerResources{CpuQuota: -1001, MemoryLimitInBytes: 9223372036837994496}, vmruntime.Size{VCPUs: 1, MemoryBytes: 160 * mib}},
	} {
		for range 2 {
			if err := r.updatePod(pod, s.change); err != nil {
				t.Fatalf("%s: %v", s.name, err)
			}
			if got := r.vmSize(pod); got != s.size {
				t.Errorf("%s: size of the VM is %+v, want %+v", s.name, got, s.size)
			}
		}
	}
	id := r.create(pod, "c", "exit 0")
	if err := r.updatePod(pod, &cri.LinuxContainerResources{MemoryLimitInBytes: 64 * mib}); err != nil {
		t.Fatal(err)
	}
	if err := r.update(id, &cri.LinuxContainerResources{MemoryLimitInBytes: 65 * mib}); !errdefs.IsOutOfRange(err) || !strings.Contains(err.Error(), "its pod") {
		t.Errorf("a container beyond its pod: %v", err)
	}
	size := r.vmSize(pod)
	for name, c := range map[string]*cri.LinuxContainerResources{
		"memory": {MemoryLimitInBytes: 97 * mib}, "memory near the end": {MemoryLimitInBytes: math.MaxInt64 / 3},
		"less than the VMM holds": {MemoryLimitInBytes: 1 - guestReserve + ownMemoryOf(r, pod)},
	} {
		if c.MemoryLimitInBytes <= 0 {
			continue // the fake VMM holds less than the reserve
		}
		if err := r.updatePod(pod, c); !errdefs.IsOutOfRange(err) && !errdefs.IsFailedPrecondition(err) {
			t.Errorf("%s: %v", name, err)
		}
		if got := r.vmSize(pod); got != size {
			t.Errorf("%s: size of the VM is %+v, was %+v", name, got, size)
		}
	}
	want := proto.Clone(mustSandbox(r, pod).Config.PodSandboxConfig)
	r.restart()
	if got := mustSandbox(r, pod).Config; !proto.Equal(got.PodSandboxConfig, want) || got.GetLinux().GetResources().GetMemoryLimitInBytes() != 64*mib {
		t.Errorf("after a restart the pod's resources are %v", got.GetLinux().GetResources())
	}
	if err := r.updatePod("unknown", &cri.LinuxContainerResources{}); !errdefs.IsNotFound(err) {
		t.Errorf("an unknown sandbox: %v", err)
	}
	if _, err := r.StopPodSandbox(t.Context(), &cri.StopPodSandboxRequest{PodSandboxId: pod}); err != nil {
		t.Fatal(err)
	}
	if err := r.updatePod(pod, &cri.LinuxContainerResources{CpuShares: 3}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("a stopped sandbox: %v", err)
	}
}

// A guest that does not take memory: the call fails in time, and all is as before.
func TestGuestTakesNoMemory(t *testing.T) {
	r := newRig(t)
	pod := r.runPod("a")
	id := r.run(pod, "c", "exec sleep 1000")
	before, size := r.resources(id), r.vmSize(pod)
	vmtest.Inject(t, mustSandbox(r, pod).VMDir, vmtest.Faults{MemoryStuck: true})
	for name, call := range map[string]func(context.Context) error{
		"container": func(ctx context.Context) error {
			_, err := r.UpdateContainerResources(ctx, &cri.UpdateContainerResourcesRequest{ContainerId: id, Linux: &cri.LinuxContainerResources{MemoryLimitInBytes: 64 * mib}})
			return err
		},
		"pod": func(ctx context.Context) error {
			_, err := r.UpdatePodSandboxResources(ctx, &cri.UpdatePodSandboxResourcesRequest{PodSandboxId: pod, Resources: &cri.LinuxContainerResources{MemoryLimitInBytes: 64 * mib}})
			return err
		},
	} {
		ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
		if err := call(ctx); !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "growing the VM") {
			t.Errorf("%s: %v", name, err)
		}
		cancel()
		if got := r.resources(id); !proto.Equal(got, before) {
			t.Errorf("%s: resources are %v, were %v", name, got, before)
		}
		if got := r.vmSize(pod); got != size || mustSandbox(r, pod).Config.GetLinux() != nil {
			t.Errorf("%s: size is %+v, was %+v; pod is %v", name, got, size, mustSandbox(r, pod).Config)
		}
	}
	vmtest.Inject(t, mustSandbox(r, pod).VMDir, vmtest.Faults{})
	if err := r.update(id, &cri.LinuxContainerResources{MemoryLimitInBytes: 64 * mib}); err != nil {
		t.Errorf("when it takes memory again: %v", err)
	}
	if got := r.vmSize(pod); got.MemoryBytes != 224*mib {
		t.Errorf("size is %+v", got)
	}
}

func ownMemoryOf(r *rig, pod string) int64 {
	vm, err := r.sandbox(pod).machine()
	if err != nil {
		r.t.Fatal(err)
	}
	return ownMemory(vm.PID())
}

func mustSandbox(r *rig, pod string) store.Sandbox {
	r.t.Helper()
	rec, err := r.store.Sandbox(pod)
	if err != nil {
		r.t.Fatal(err)
	}
	return rec
}

// A pod's limit that the host would enforce by killing the VM, and one that the guest could not live with.
func TestUpdatePodUndone(t *testing.T) {
	r := newRig(t)
	handler := r.opts.Handlers[""]
	handler.MaxMemory = 4096 * mib
	r.opts.Handlers[""] = handler
	pod := r.runPod("a")
	if err := r.updatePod(pod, &cri.LinuxContainerResources{MemoryLimitInBytes: 64 * mib}); err != nil {
		t.Fatal(err)
	}
	config, size := proto.Clone(mustSandbox(r, pod).Config.PodSandboxConfig), r.vmSize(pod)
	for name, c := range map[string]struct {
		limit int64
		is    func(error) bool
		text  string
	}{
		"less than the VMM holds":          {mib, errdefs.IsFailedPrecondition, "holds"},
		"more than the guest can describe": {3000 * mib, errdefs.IsOutOfRange, "describe"},
	} {
		_, err := r.UpdatePodSandboxResources(t.Context(), &cri.UpdatePodSandboxResourcesRequest{
			PodSandboxId: pod, Resources: &cri.LinuxContainerResources{MemoryLimitInBytes: c.limit}, Overhead: &cri.LinuxContainerResources{MemoryLimitInBytes: 1},
		})
		if !c.is(err) || !strings.Contains(err.Error(), c.text) {
			t.Errorf("%s: %v", name, err)
		}
		if got := r.vmSize(pod); got != size || size.MemoryBytes != 224*mib {
			t.Errorf("%s: size is %+v, was %+v", name, got, size)
		}
		if got := mustSandbox(r, pod).Config; !proto.Equal(got.PodSandboxConfig, config) {
			t.Errorf("%s: pod is %v, was %v", name, got, config)
		}
	}
}

func TestFitsHost(t *testing.T) {
	r := newRig(t)
	pod := r.runPod("a")
	sb := r.sandbox(pod)
	held := ownMemoryOf(r, pod)
	if held <= mib {
		t.Fatalf("the VMM holds %d bytes", held)
	}
	config := func(limit, overhead int64) *cri.LinuxPodSandboxConfig {
		return &cri.LinuxPodSandboxConfig{Resources: &cri.LinuxContainerResources{MemoryLimitInBytes: limit}, Overhead: &cri.LinuxContainerResources{MemoryLimitInBytes: overhead}}
	}
	for _, c := range []struct {
		was, now *cri.LinuxPodSandboxConfig
		ok       bool
	}{
		{config(0, 0), config(mib, held/2), false},
		{config(2*mib, 0), config(mib, held/2), false},
		{config(mib, 0), config(2*mib, 1), true}, // raised
		{config(0, 0), config(mib, 4*held), true},
		{config(0, 0), config(0, 1), true},
	} {
		if err := r.fitsHost(sb, c.was, c.now); (err == nil) != c.ok || err != nil && !errdefs.IsFailedPrecondition(err) {
			t.Errorf("from %v to %v with %d held: %v", c.was, c.now, held, err)
		}
	}
	if got := ownMemory(os.Getpid()); got <= 0 {
		t.Errorf("memory of this process is %d", got)
	}
}

func TestChangedResources(t *testing.T) {
	from := &cri.LinuxContainerResources{CpuPeriod: 100000, CpuQuota: 50000, CpuShares: 100, MemoryLimitInBytes: mib, Unified: map[string]string{"memory.high": "5", "io.max": "x"}}
	out := changedResources(&cri.LinuxContainerResources{CpuPeriod: 100000, CpuQuota: -5, MemoryLimitInBytes: math.MaxInt64 - 1}, from)
	if out.CPU.Quota == nil || *out.CPU.Quota != -1 || *out.Memory.Limit != -1 || out.Unified["memory.high"] != "max" || out.Unified["cpu.weight"] != "100" || out.Unified["io.max"] != "" {
		t.Errorf("limits that are no more: %+v %+v %v", out.CPU, out.Memory, out.Unified)
	}
	out = changedResources(from, &cri.LinuxContainerResources{})
	if *out.CPU.Quota != 50000 || *out.CPU.Shares != 100 || *out.Memory.Limit != mib || out.Unified["io.max"] != "x" || from.Unified["cpu.weight"] != "" {
		t.Errorf("new limits: %+v %+v %v", out.CPU, out.Memory, out.Unified)
	}
	var none *oci.LinuxMemory
	if out := changedResources(nil, nil); out.Memory != none {
		t.Errorf("nothing to nothing: %+v", out)
	}
}

func TestNeededSize(t *testing.T) {
	limits := func(cpus float64, memory int64) *cri.LinuxContainerResources {
		return &cri.LinuxContainerResources{CpuPeriod: 100000, CpuQuota: int64(cpus * 100000), MemoryLimitInBytes: memory}
	}
	running := func(r *cri.LinuxContainerResources) store.Container {
		return store.Container{State: store.ContainerRunning, Config: store.ContainerConfig{ContainerConfig: &cri.ContainerConfig{Linux: &cri.LinuxContainerConfig{Resources: r}}}}
	}
	exited := running(limits(8, 8<<30))
	exited.State = store.ContainerExited
	cpus := min(4, runtime.NumCPU())
	for name, c := range map[string]struct {
		pod        *cri.LinuxContainerResources
		containers []store.Container
		want       vmruntime.Size
	}{
		"nothing":                         {nil, nil, vmruntime.Size{VCPUs: 1, MemoryBytes: 512 * mib}},
		"a pod":                           {limits(1.5, 1000*mib), nil, vmruntime.Size{VCPUs: min(2, cpus), MemoryBytes: 1160 * mib}},
		"a small pod":                     {limits(0.1, mib), nil, vmruntime.Size{VCPUs: 1, MemoryBytes: 512 * mib}},
		"a pod beyond all":                {limits(1000, 1<<60), nil, vmruntime.Size{VCPUs: cpus, MemoryBytes: 4096 * mib}},
		"containers":                      {nil, []store.Container{running(limits(0.6, 400*mib)), running(limits(0.6, 400*mib+1)), running(nil), exited}, vmruntime.Size{VCPUs: min(2, cpus), MemoryBytes: 962 * mib}},
		"containers beyond all":           {nil, []store.Container{running(limits(100, 1<<61)), running(limits(100, 1<<61))}, vmruntime.Size{VCPUs: cpus, MemoryBytes: 4096 * mib}},
		"a pod's limits, not containers'": {limits(1, 600*mib), []store.Container{running(limits(4, 3000*mib))}, vmruntime.Size{VCPUs: 1, MemoryBytes: 760 * mib}},
	} {
		rec := store.Sandbox{
			VM:     store.VMSize{BootVCPUs: 1, VCPUs: 1, MaxVCPUs: 4, BootMemory: 512 * mib, Memory: 512 * mib, MaxMemory: 4096 * mib},
			Config: store.SandboxConfig{PodSandboxConfig: &cri.PodSandboxConfig{Linux: &cri.LinuxPodSandboxConfig{Resources: c.pod}}},
		}
		if got := neededSize(rec, c.containers); got != c.want {
			t.Errorf("%s: size is %+v, want %+v", name, got, c.want)
		}
	}
}
