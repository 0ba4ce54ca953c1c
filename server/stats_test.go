package server

import (
	"context"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crivm/crivm/agentproto"
	"github.com/crivm/crivm/cni"
	"github.com/crivm/crivm/server/store"
	"github.com/crivm/crivm/vmruntime"
)

func TestPlausibleFigures(t *testing.T) {
	limits := ceilings{cpus: 2, memory: 1000, layer: 500}
	before := &agentproto.ContainerStats{CpuUsageNanos: 5e9, PageFaults: 70, OomKills: 1, Devices: []*agentproto.DeviceStats{{Major: 8, Name: "sda", Reads: 9}}}
	tests := []struct {
		name     string
		told     *agentproto.ContainerStats
		earlier  *agentproto.ContainerStats
		passed   time.Duration
		cpu      uint64
		faults   uint64
		memory   uint64
		layer    uint64
		devices  int
		pressure float64
	}{
		{name: "true", told: &agentproto.ContainerStats{CpuUsageNanos: 7e9, PageFaults: 80, MemoryUsageBytes: 900, WritableLayerBytes: 400}, earlier: before, passed: 10 * time.Second,
			cpu: 7e9, faults: 80, memory: 900, layer: 400},
		{name: "counters fall", told: &agentproto.ContainerStats{CpuUsageNanos: 1, PageFaults: 1}, earlier: before, passed: time.Second, cpu: 5e9, faults: 70},
		{name: "more CPU time than there is", told: &agentproto.ContainerStats{CpuUsageNanos: math.MaxUint64}, earlier: before, passed: 10 * time.Second, cpu: 5e9 + 22e9, faults: 70},
		{name: "a clock that went back", told: &agentproto.ContainerStats{CpuUsageNanos: 9e9}, earlier: before, passed: -time.Hour, cpu: 5e9, faults: 70},
		{name: "the first of all", told: &agentproto.ContainerStats{CpuUsageNanos: 9e9, PageFaults: math.MaxUint64}, passed: time.Second, cpu: 4e9, faults: maxCount},
		{name: "more than the VM has", told: &agentproto.ContainerStats{MemoryUsageBytes: 1 << 60, WritableLayerBytes: 1 << 60}, passed: time.Second, memory: 1000, layer: 500},
		{name: "devices", told: &agentproto.ContainerStats{Devices: []*agentproto.DeviceStats{
			{Major: 8, Name: "sda", Reads: 3}, {Major: 8, Name: "sdb"}, {Major: 9, Name: "../etc"}, {Major: 10}, {Major: 11, Name: "x\"} 1\nevil 1"},
		}}, earlier: before, cpu: 5e9, faults: 70, devices: 1},
		{name: "pressure", told: &agentproto.ContainerStats{CpuPressure: &agentproto.Pressure{Some: &agentproto.PressureLine{Avg10: 1e9, Avg60: math.NaN(), Avg300: math.Inf(-1)}}}, pressure: 100},
	}
	for _, tt := range tests {
		got := limits.plausible(tt.told, tt.earlier, tt.passed)
		if got.CpuUsageNanos != tt.cpu || got.PageFaults != tt.faults || got.MemoryUsageBytes != tt.memory || got.WritableLayerBytes != tt.layer || len(got.Devices) != tt.devices {
			t.Errorf("%s: %v", tt.name, got)
		}
		if tt.devices > 0 && got.Devices[0].Reads != 9 {
			t.Errorf("%s: reads fell to %d", tt.name, got.Devices[0].Reads)
		}
		if some := got.CpuPressure.GetSome(); some.GetAvg10() != tt.pressure || some.GetAvg60() != 0 || some.GetAvg300() != 0 {
			t.Errorf("%s: pressure %v", tt.name, some)
		}
	}
}

func TestCPURate(t *testing.T) {
	start := time.Unix(1000, 0)
	at := func(seconds float64) time.Time { return start.Add(time.Duration(seconds * float64(time.Second))) }
	readings := []struct {
		at        float64
		cpu, want uint64
	}{
		{2, 1e9, 5e8},          // since start
		{3, 2e9, 5e8},          // too soon
		{12, 11e9, 1e9},        // one CPU
		{13, 11e9, 1e9},        // too soon
		{17, 11e9, 0},          // nothing
		{22, 1e9, 0},           // less than before
		{32, 21e9, 2000000000}, // two CPUs
	}
	var r cpuRate
	for _, reading := range readings {
		r = r.next(at(reading.at), reading.cpu, start)
		if r.nanoCores != reading.want {
			t.Errorf("at %v s: %d, want %d", reading.at, r.nanoCores, reading.want)
		}
	}
}

func TestSampleKeepsCPUTimeOfTheGone(t *testing.T) {
	records := []store.Container{{ID: "a", StartedAt: time.Unix(1000, 0)}, {ID: "b", StartedAt: time.Unix(1000, 0)}}
	limits := ceilings{cpus: 4, memory: 1 << 30, layer: 1 << 30}
	answer := func(a, b uint64) *agentproto.StatsResponse {
		return &agentproto.StatsResponse{Containers: []*agentproto.ContainerStats{
			{ContainerId: "a", CpuUsageNanos: a, Running: true}, {ContainerId: "b", CpuUsageNanos: b, Running: true}, {ContainerId: "unknown", CpuUsageNanos: 1e12, Running: true},
		}}
	}
	m := sample{}.withHost(vmruntime.Usage{CPUNanos: 10e9}, time.Unix(1010, 0), time.Unix(1000, 0))
	m = m.withGuest(answer(2e9, 3e9), time.Unix(1010, 0), records, limits)
	if m.overhead != 5e9 || len(m.containers) != 2 || len(m.guest.Containers) != 0 {
		t.Errorf("first: overhead %d, containers %v", m.overhead, m.containers)
	}
	m = m.withHost(vmruntime.Usage{CPUNanos: 12e9}, time.Unix(1020, 0), time.Unix(1000, 0)).withGuest(answer(3e9, 0), time.Unix(1020, 0), records[:1], limits)
	if m.overhead != 6e9 || m.endedCPU != 3e9 {
		t.Errorf("after the end of one: overhead %d, ended %d", m.overhead, m.endedCPU)
	}
	m = m.withHost(vmruntime.Usage{CPUNanos: 1e9}, time.Unix(1021, 0), time.Unix(1000, 0)).withGuest(&agentproto.StatsResponse{}, time.Unix(1021, 0), records[:1], limits)
	if m.overhead != 6e9 || m.host.CPUNanos != 12e9 || m.containers["a"].GetCpuUsageNanos() != 3e9 || m.containers["a"].GetRunning() {
		t.Errorf("after a silent answer: %+v", m)
	}
}

func TestPodInterfaces(t *testing.T) {
	rec := store.Sandbox{Network: &cni.Attachment{Interfaces: []cni.Interface{{Name: "eth0", Tap: "tap0"}, {Name: "net1", Tap: "tap1"}}}}
	host := []vmruntime.InterfaceUsage{{Name: "lo", RxBytes: 9}, {Name: "tap0", RxBytes: 8}, {Name: "tap1", RxBytes: 2, TxBytes: 3, TxDropped: 4}, {Name: "eth0", RxBytes: 1}}
	want := []vmruntime.InterfaceUsage{{Name: "eth0", RxBytes: 1}, {Name: "net1", RxBytes: 3, RxDropped: 4, TxBytes: 2}}
	if got := podInterfaces(rec, host); !slices.Equal(got, want) {
		t.Errorf("interfaces are %+v", got)
	}
	if got := podNetwork(rec, sample{}); got != nil {
		t.Errorf("a network without figures is %v", got)
	}
}

func TestStats(t *testing.T) {
	r := newRig(t)
	pod := r.runPod("a")
	other := r.runPod("b")
	running := r.run(pod, "running", "exec sleep 1000")
	created := r.create(pod, "created", "exec sleep 1000")
	ended := r.run(pod, "ended", "exit 0")
	r.exit(ended)
	elsewhere := r.run(other, "elsewhere", "exec sleep 1000")

	list := func(f *cri.ContainerStatsFilter) map[string]*cri.ContainerStats {
		resp, err := r.ListContainerStats(t.Context(), &cri.ListContainerStatsRequest{Filter: f})
		if err != nil {
			t.Fatal(err)
		}
		found := map[string]*cri.ContainerStats{}
		for _, s := range resp.GetStats() {
			found[s.GetAttributes().GetId()] = s
		}
		return found
	}
	all := list(nil)
	if len(all) != 2 || all[running] == nil || all[elsewhere] == nil {
		t.Errorf("listed are %v", all)
	}
	s := all[running]
	mount := s.GetWritableLayer().GetFsId().GetMountpoint()
	if s.GetAttributes().GetMetadata().GetName() != "running" || s.GetCpu().GetTimestamp() == 0 || s.GetCpu().GetUsageNanoCores() == nil || s.GetMemory().GetTimestamp() == 0 ||
		s.GetSwap().GetTimestamp() == 0 || mount != filepath.Join(r.opts.StateDir, "pods") {
		t.Errorf("stats are %v", s)
	}
	if info, err := os.Stat(mount); err != nil || !info.IsDir() {
		t.Errorf("mount point %s: %v", mount, err)
	}
	for name, test := range map[string]struct {
		filter *cri.ContainerStatsFilter
		want   int
	}{
		"id":          {&cri.ContainerStatsFilter{Id: running}, 1},
		"short id":    {&cri.ContainerStatsFilter{Id: running[:13]}, 1},
		"not running": {&cri.ContainerStatsFilter{Id: created}, 0},
		"sandbox":     {&cri.ContainerStatsFilter{PodSandboxId: other}, 1},
		"both":        {&cri.ContainerStatsFilter{Id: running, PodSandboxId: other}, 0},
		"labels":      {&cri.ContainerStatsFilter{LabelSelector: map[string]string{"no": "such"}}, 0},
	} {
		if got := list(test.filter); len(got) != test.want {
			t.Errorf("%s: %v", name, got)
		}
	}
	for _, id := range []string{created, ended} {
		resp, err := r.ContainerStats(t.Context(), &cri.ContainerStatsRequest{ContainerId: id})
		if err != nil || resp.GetStats().GetAttributes().GetId() != id || resp.GetStats().GetCpu() != nil || resp.GetStats().GetMemory() != nil || resp.GetStats().GetWritableLayer() == nil {
			t.Errorf("stats of a container that does not run: %v (%v)", resp, err)
		}
	}
	if _, err := r.ContainerStats(t.Context(), &cri.ContainerStatsRequest{ContainerId: "unknown"}); !errdefs.IsNotFound(err) {
		t.Errorf("unknown container: %v", err)
	}
	if _, err := r.PodSandboxStats(t.Context(), &cri.PodSandboxStatsRequest{}); !errdefs.IsNotFound(err) {
		t.Errorf("kubelet's probe: %v", err)
	}

	p, err := r.PodSandboxStats(t.Context(), &cri.PodSandboxStatsRequest{PodSandboxId: pod})
	if err != nil {
		t.Fatal(err)
	}
	linux := p.GetStats().GetLinux()
	if linux.GetCpu().GetUsageCoreNanoSeconds() == nil || linux.GetMemory().GetUsageBytes().GetValue() == 0 || linux.GetMemory().GetWorkingSetBytes().GetValue() == 0 ||
		linux.GetNetwork().GetDefaultInterface().GetName() != "eth0" || linux.GetProcess().GetTimestamp() == 0 || len(linux.GetContainers()) != 1 || p.GetStats().GetAttributes().GetId() != pod {
		t.Errorf("pod's stats are %v", p)
	}
	pods, err := r.ListPodSandboxStats(t.Context(), &cri.ListPodSandboxStatsRequest{})
	if err != nil || len(pods.GetStats()) != 2 {
		t.Errorf("pods are %v (%v)", pods, err)
	}
	if _, err := r.StopPodSandbox(t.Context(), &cri.StopPodSandboxRequest{PodSandboxId: pod}); err != nil {
		t.Fatal(err)
	}
	if pods, err = r.ListPodSandboxStats(t.Context(), &cri.ListPodSandboxStatsRequest{}); err != nil || len(pods.GetStats()) != 1 {
		t.Errorf("pods after a stop are %v (%v)", pods, err)
	}
	if p, err = r.PodSandboxStats(t.Context(), &cri.PodSandboxStatsRequest{PodSandboxId: pod}); err != nil || p.GetStats().GetAttributes().GetId() != pod || p.GetStats().GetLinux().GetCpu() != nil {
		t.Errorf("stats of a stopped pod: %v (%v)", p, err)
	}
	if all := list(nil); len(all) != 1 || all[elsewhere] == nil {
		t.Errorf("listed after a stop are %v", all)
	}
}

// freeze stops a process and waits until each of its threads stands still: the signal only asks for it.
func freeze(t *testing.T, pid int) {
	t.Helper()
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	running := func() bool {
		states, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid))
		if err != nil || len(states) == 0 {
			t.Fatalf("process %d has no threads (%v)", pid, err)
		}
		return slices.ContainsFunc(states, func(path string) bool {
			text, _ := os.ReadFile(path) // gone with its thread
			_, state, _ := strings.Cut(string(text), ") ")
			return state != "" && state[0] != 'T'
		})
	}
	for deadline := time.Now().Add(time.Minute); running(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("process %d does not stop", pid)
		}
	}
}

func TestStatsOfAHungGuest(t *testing.T) {
	r := newRig(t)
	hung, other := r.runPod("hung"), r.runPod("other")
	first := r.run(hung, "first", "exec sleep 1000")
	r.run(other, "other", "exec sleep 1000")
	list := func() map[string]*cri.ContainerStats {
		resp, err := r.ListContainerStats(t.Context(), &cri.ListContainerStatsRequest{})
		if err != nil {
			t.Fatal(err)
		}
		found := map[string]*cri.ContainerStats{}
		for _, s := range resp.GetStats() {
			found[s.GetAttributes().GetMetadata().GetName()] = s
		}
		return found
	}
	before := list()["first"].GetCpu().GetTimestamp()
	vm, err := r.sandbox(hung).machine()
	if err != nil {
		t.Fatal(err)
	}
	freeze(t, vm.PID())
	resumed := false
	resume := func() {
		if !resumed {
			resumed = true
			if err := syscall.Kill(vm.PID(), syscall.SIGCONT); err != nil {
				t.Error(err)
			}
		}
	}
	defer resume()
	answersFromMemory(t, r, hung, first)
	for _, rec := range r.store.Sandboxes() { // the figures must be too old to be answered with
		m := &r.sandbox(rec.ID).stats
		m.mu.Lock()
		m.began = m.began.Add(-sampleAge)
		m.mu.Unlock()
	}
	start := time.Now()
	found := list()
	if took := time.Since(start); took > sampleWait+time.Second {
		t.Errorf("the first call took %s", took)
	}
	if len(found) != 2 || found["first"].GetCpu().GetTimestamp() != before || found["other"].GetCpu().GetTimestamp() <= before {
		t.Errorf("stats beside a hung guest are %v", found)
	}
	// A guest that was waited for in vain is not waited for again.
	start = time.Now()
	found = list()
	if took := time.Since(start); took > sampleWait/2 || len(found) != 2 {
		t.Errorf("a later call took %s: %v", took, found)
	}
	if p, err := r.PodSandboxStats(t.Context(), &cri.PodSandboxStatsRequest{PodSandboxId: hung}); err != nil || p.GetStats().GetLinux().GetMemory().GetUsageBytes().GetValue() == 0 {
		t.Errorf("pod's stats: %v (%v)", p, err)
	}
	resume()
	for deadline := time.Now().Add(2 * sampleLimit); list()["first"].GetCpu().GetTimestamp() == before; time.Sleep(100 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("no new figures after the guest woke up")
		}
	}
	if _, err := r.StopContainer(t.Context(), &cri.StopContainerRequest{ContainerId: first}); err != nil {
		t.Error(err)
	}
}

// answersFromMemory makes the calls that kubelet repeats, about a pod whose guest answers nothing: one that asked it would
// get no answer in time.
func answersFromMemory(t *testing.T, r *rig, pod, container string) {
	t.Helper()
	client := r.client()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	for name, call := range map[string]func() error{
		"Version":        func() error { _, err := client.Version(ctx, &cri.VersionRequest{}); return err },
		"Status":         func() error { _, err := client.Status(ctx, &cri.StatusRequest{Verbose: true}); return err },
		"RuntimeConfig":  func() error { _, err := client.RuntimeConfig(ctx, &cri.RuntimeConfigRequest{}); return err },
		"ListPodSandbox": func() error { _, err := client.ListPodSandbox(ctx, &cri.ListPodSandboxRequest{}); return err },
		"ListContainers": func() error { _, err := client.ListContainers(ctx, &cri.ListContainersRequest{}); return err },
		"PodSandboxStatus": func() error {
			_, err := client.PodSandboxStatus(ctx, &cri.PodSandboxStatusRequest{PodSandboxId: pod, Verbose: true})
			return err
		},
		"ContainerStatus": func() error {
			_, err := client.ContainerStatus(ctx, &cri.ContainerStatusRequest{ContainerId: container, Verbose: true})
			return err
		},
	} {
		if err := call(); err != nil {
			t.Errorf("%s beside a hung guest: %v", name, err)
		}
	}
}

// sent collects what a stream sends.
type sent[T any] struct {
	grpc.ServerStream
	ctx      context.Context
	messages []*T
}

func (s *sent[T]) Context() context.Context { return s.ctx }
func (s *sent[T]) Send(m *T) error          { s.messages = append(s.messages, m); return nil }

func TestMetricsAndStreams(t *testing.T) {
	r := newRig(t)
	pod := r.runPod("a")
	id := r.run(pod, "c", "exec sleep 1000")
	descriptors, err := r.ListMetricDescriptors(t.Context(), &cri.ListMetricDescriptorsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	keys := map[string][]string{}
	for _, d := range descriptors.GetDescriptors() {
		if keys[d.GetName()] != nil || d.GetHelp() == "" || !slices.Equal(d.GetLabelKeys()[:6], []string{"id", "name", "image", "namespace", "pod", "container"}) {
			t.Errorf("descriptor %v", d)
		}
		keys[d.GetName()] = d.GetLabelKeys()
	}
	resp, err := r.ListPodSandboxMetrics(t.Context(), &cri.ListPodSandboxMetricsRequest{})
	if err != nil || len(resp.GetPodMetrics()) != 1 || resp.GetPodMetrics()[0].GetPodSandboxId() != pod || len(resp.GetPodMetrics()[0].GetContainerMetrics()) != 1 ||
		resp.GetPodMetrics()[0].GetContainerMetrics()[0].GetContainerId() != id {
		t.Fatalf("metrics are %v (%v)", resp, err)
	}
	p := resp.GetPodMetrics()[0]
	seen := map[string]bool{}
	for _, m := range slices.Concat(p.GetMetrics(), p.GetContainerMetrics()[0].GetMetrics()) {
		series := fmt.Sprint(m.GetName(), m.GetLabelValues())
		if seen[series] {
			t.Errorf("twice: %s", series)
		}
		seen[series], seen[m.GetName()] = true, true
		if len(m.GetLabelValues()) != len(keys[m.GetName()]) || m.GetTimestamp() == 0 || m.GetValue() == nil {
			t.Errorf("%v, whose labels are %v", m, keys[m.GetName()])
		}
	}
	// The plain processes of the fake guest have no cgroup.
	absent := []string{
		"container_blkio_device_usage_total", "container_fs_reads_total", "container_fs_reads_bytes_total", "container_fs_writes_total", "container_fs_writes_bytes_total",
		"container_spec_cpu_quota", "container_pressure_cpu_waiting_seconds_total", "container_pressure_cpu_stalled_seconds_total",
		"container_pressure_memory_waiting_seconds_total", "container_pressure_memory_stalled_seconds_total", "container_pressure_io_waiting_seconds_total",
		"container_pressure_io_stalled_seconds_total", "container_hugetlb_usage_bytes", "container_hugetlb_failcnt",
	}
	for name := range keys {
		if !seen[name] && !slices.Contains(absent, name) {
			t.Errorf("no value of %s", name)
		}
	}

	metrics := &sent[cri.StreamPodSandboxMetricsResponse]{ctx: t.Context()}
	pods := &sent[cri.StreamPodSandboxStatsResponse]{ctx: t.Context()}
	containers := &sent[cri.StreamContainerStatsResponse]{ctx: t.Context()}
	for _, err := range []error{
		r.StreamPodSandboxMetrics(&cri.StreamPodSandboxMetricsRequest{}, metrics),
		r.StreamPodSandboxStats(&cri.StreamPodSandboxStatsRequest{Filter: &cri.PodSandboxStatsFilter{Id: pod}}, pods),
		r.StreamContainerStats(&cri.StreamContainerStatsRequest{Filter: &cri.ContainerStatsFilter{Id: id}}, containers),
	} {
		if err != nil {
			t.Error(err)
		}
	}
	if len(metrics.messages) != 1 || metrics.messages[0].GetPodSandboxMetrics()[0].GetPodSandboxId() != pod ||
		len(pods.messages) != 1 || pods.messages[0].GetPodSandboxStats()[0].GetAttributes().GetId() != pod ||
		len(containers.messages) != 1 || containers.messages[0].GetContainerStats()[0].GetAttributes().GetId() != id {
		t.Errorf("streams sent %v, %v, %v", metrics.messages, pods.messages, containers.messages)
	}
}
