//go:build integration

package integration

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// stats are the figures of one container, which the list must have.
func (p *pod) stats(id string) *cri.ContainerStats {
	p.t.Helper()
	list, err := p.n.Runtime.ListContainerStats(p.t.Context(), &cri.ContainerStatsFilter{Id: id})
	if err != nil {
		p.t.Fatal(err)
	}
	if len(list) != 1 || list[0].GetAttributes().GetId() != id {
		p.t.Fatalf("stats of %s are %v", id, list)
	}
	return list[0]
}

func (p *pod) podStats() *cri.LinuxPodSandboxStats {
	p.t.Helper()
	stats, err := p.n.Runtime.PodSandboxStats(p.t.Context(), p.id)
	if err != nil {
		p.t.Fatal(err)
	}
	return stats.GetLinux()
}

// A busy loop is one CPU, a sleeper none, and the pod pays for both and the VMM.
func TestStatsOfKnownLoad(t *testing.T) {
	p := runPod(t, shared)
	start := time.Now()
	busy := p.start("while :; do :; done")
	idle := p.start("exec sleep 1000")
	first := p.stats(busy)
	if took := time.Since(start); first.GetCpu().GetTimestamp() == 0 || first.GetMemory().GetTimestamp() == 0 {
		t.Fatalf("%s after its creation a container's figures are %v", took, first)
	}
	podBefore := p.podStats()
	var cpu float64
	for try := 1; ; try++ {
		// Asked as seldom as kubelet does: in software emulation the answers alone take a good part of a CPU.
		select {
		case <-time.After(10 * time.Second):
		case <-t.Context().Done():
			t.Fatal(t.Context().Err())
		}
		now := p.stats(busy)
		passed := now.GetCpu().GetTimestamp() - first.GetCpu().GetTimestamp()
		if passed <= 0 || now.GetCpu().GetUsageCoreNanoSeconds().GetValue() < first.GetCpu().GetUsageCoreNanoSeconds().GetValue() {
			t.Fatalf("after 10 s %v is %v", first.GetCpu(), now.GetCpu())
		}
		cpu = float64(now.GetCpu().GetUsageCoreNanoSeconds().GetValue()-first.GetCpu().GetUsageCoreNanoSeconds().GetValue()) / float64(passed)
		first = now
		rate := float64(now.GetCpu().GetUsageNanoCores().GetValue()) / 1e9
		if cpu > 0.9 && cpu < 1.1 && rate > 0.9 && rate < 1.1 {
			break
		}
		t.Logf("over %s a busy loop reads as %.3f CPU, its usage_nano_cores as %.3f", time.Duration(passed), cpu, rate)
		if try == 9 { // a starved machine disturbs a VM for a while, not forever
			t.Fatal("a busy loop does not read as 1 CPU")
		}
	}
	sleeper := p.stats(idle)
	if rate := sleeper.GetCpu().GetUsageNanoCores().GetValue(); rate > 5e7 {
		t.Errorf("a sleeper uses %d nano cores", rate)
	}
	podNow := p.podStats()
	podCPU := float64(podNow.GetCpu().GetUsageCoreNanoSeconds().GetValue()-podBefore.GetCpu().GetUsageCoreNanoSeconds().GetValue()) /
		float64(podNow.GetCpu().GetTimestamp()-podBefore.GetCpu().GetTimestamp())
	// The host may not give the VM a whole CPU all the time, which the guest does not know.
	if podCPU < 0.05 || len(podNow.GetContainers()) != 2 {
		t.Errorf("the pod uses %.3f CPU; %v", podCPU, podNow)
	}
	t.Logf("busy loop %.3f CPU, its pod %.3f", cpu, podCPU)
}

func TestStatsOfMemoryAndFiles(t *testing.T) {
	p := runPod(t, shared)
	c := p.start("exec sleep 1000")
	before := p.stats(c)
	podBefore := p.podStats().GetMemory().GetWorkingSetBytes().GetValue()
	p.exec(c, "sh", "-c", "dd if=/dev/zero of=/dev/shm/touched bs=1048576 count=64 && dd if=/dev/zero of=/file bs=1048576 count=5 && mkdir /dir && for i in 1 2 3 4 5 6 7 8 9; do echo $i > /dir/$i; done; sync")
	const touched = 64 << 20 // just what /dev/shm holds
	var now *cri.ContainerStats
	eventually(t, 40*time.Second, "64 MiB touched read as 64 MiB", func() error {
		now = p.stats(c)
		grown := int64(now.GetMemory().GetWorkingSetBytes().GetValue()) - int64(before.GetMemory().GetWorkingSetBytes().GetValue())
		if grown < touched*9/10 || grown > touched*11/10 {
			return fmt.Errorf("the working set has grown by %d MiB", grown>>20)
		}
		return nil
	})
	if m := now.GetMemory(); m.GetUsageBytes().GetValue() < m.GetWorkingSetBytes().GetValue() || m.GetPageFaults().GetValue() == 0 || m.GetRssBytes().GetValue() == 0 || m.GetPsi() == nil {
		t.Errorf("memory is %v", m)
	}
	if now.GetCpu().GetPsi() == nil || now.GetIo().GetPsi() == nil || now.GetSwap() == nil {
		t.Errorf("no pressure or swap: %v", now)
	}
	eventually(t, 40*time.Second, "what is written shows", func() error {
		layer := p.stats(c).GetWritableLayer()
		grown := int64(layer.GetUsedBytes().GetValue()) - int64(before.GetWritableLayer().GetUsedBytes().GetValue())
		inodes := int64(layer.GetInodesUsed().GetValue()) - int64(before.GetWritableLayer().GetInodesUsed().GetValue())
		if grown < 5<<20 || grown > 6<<20 || inodes != 11 {
			return fmt.Errorf("the writable layer has grown by %d bytes and %d inodes", grown, inodes)
		}
		return nil
	})
	info, err := os.Stat(now.GetWritableLayer().GetFsId().GetMountpoint())
	if err != nil || !info.IsDir() || !filepath.IsAbs(now.GetWritableLayer().GetFsId().GetMountpoint()) {
		t.Errorf("mount point of the writable layer: %v (%v)", now.GetWritableLayer(), err)
	}
	eventually(t, 40*time.Second, "the pod's memory grows too", func() error {
		if m := p.podStats().GetMemory(); m.GetWorkingSetBytes().GetValue() < podBefore+touched/2 {
			return fmt.Errorf("from %d MiB to %v", podBefore>>20, m)
		}
		return nil
	})
	pod := p.podStats()
	if own := pod.GetMemory().GetWorkingSetBytes().GetValue(); own <= now.GetMemory().GetWorkingSetBytes().GetValue() || pod.GetProcess().GetProcessCount().GetValue() != 1 {
		t.Errorf("the pod's memory is %d, its container's %d; processes %v", own, now.GetMemory().GetWorkingSetBytes().GetValue(), pod.GetProcess())
	}
}

func TestStatsOfNetwork(t *testing.T) {
	p := runPod(t, shared)
	p.start("exec /usr/sbin/nginx echo :7", func(c *cri.ContainerConfig) { c.Image.Image = standin })
	before := p.podStats().GetNetwork().GetDefaultInterface()
	if before.GetName() != "eth0" {
		t.Errorf("default interface is %v", before)
	}
	const size = 1 << 20
	eventually(t, time.Minute, "a megabyte goes there and back", func() error {
		conn, err := net.DialTimeout("tcp", net.JoinHostPort(p.status().GetNetwork().GetIp(), "7"), 2*time.Second)
		if err != nil {
			return err
		}
		defer conn.Close()
		conn.SetDeadline(time.Now().Add(50 * time.Second))
		wrote := make(chan error, 1)
		go func() {
			_, err := conn.Write(make([]byte, size))
			wrote <- err
		}()
		n, err := io.ReadFull(conn, make([]byte, size))
		if err != nil {
			return fmt.Errorf("after %d bytes: %w", n, err)
		}
		return <-wrote
	})
	eventually(t, 20*time.Second, "the counters move", func() error {
		now := p.podStats().GetNetwork().GetDefaultInterface()
		rx, tx := now.GetRxBytes().GetValue()-before.GetRxBytes().GetValue(), now.GetTxBytes().GetValue()-before.GetTxBytes().GetValue()
		if rx < size || tx < size || rx > 2*size || tx > 2*size {
			return fmt.Errorf("by %d and %d", rx, tx)
		}
		return nil
	})
}

func TestStatsLists(t *testing.T) {
	p := runPod(t, shared)
	other := runPod(t, shared)
	label := func(c *cri.ContainerConfig) {
		c.Labels = map[string]string{"which": c.Metadata.Name, "foo": p.id[:8]}
		c.Annotations = map[string]string{"kept": "as it is"}
	}
	started := time.Now()
	a, b := p.start("exec sleep 1000", label), p.start("exec sleep 1000", label)
	c := other.start("exec sleep 1000")
	created, err := p.create("exec sleep 1000", label)
	if err != nil {
		t.Fatal(err)
	}
	ended := p.start("exit 0", label)
	p.wait(ended)
	known := map[string]*cri.ContainerStats{}
	ids := func(f *cri.ContainerStatsFilter) string {
		t.Helper()
		list, err := shared.Runtime.ListContainerStats(t.Context(), f)
		if err != nil {
			t.Fatal(err)
		}
		names := []string{}
		for _, s := range list {
			for name, id := range map[string]string{"a": a, "b": b, "c": c, "created": created, "ended": ended} {
				if s.GetAttributes().GetId() == id {
					names = append(names, name)
				}
			}
			known[s.GetAttributes().GetId()] = s
		}
		slices.Sort(names)
		return strings.Join(names, " ")
	}
	for _, test := range []struct {
		filter *cri.ContainerStatsFilter
		want   string
	}{
		{nil, "a b c"},
		{&cri.ContainerStatsFilter{Id: a}, "a"},
		{&cri.ContainerStatsFilter{Id: a[:13]}, "a"},
		{&cri.ContainerStatsFilter{PodSandboxId: p.id}, "a b"},
		{&cri.ContainerStatsFilter{PodSandboxId: other.id, Id: a}, ""},
		{&cri.ContainerStatsFilter{LabelSelector: map[string]string{"foo": p.id[:8]}}, "a b"},
		{&cri.ContainerStatsFilter{LabelSelector: map[string]string{"foo": "baz"}}, ""},
	} {
		if got := ids(test.filter); got != test.want {
			t.Errorf("%v: %q, want %q", test.filter, got, test.want)
		}
	}
	// At once, but for a guest that is too slow for that.
	eventually(t, time.Minute, "all have figures", func() error {
		ids(nil)
		for _, id := range []string{a, b, c} {
			s := known[id]
			if s.GetCpu().GetTimestamp() < started.UnixNano() || s.GetCpu().GetTimestamp() > time.Now().UnixNano() || s.GetCpu().GetUsageNanoCores() == nil || s.GetMemory().GetTimestamp() == 0 {
				return fmt.Errorf("stats of a running container: %v", s)
			}
		}
		return nil
	})
	for _, id := range []string{created, ended} {
		s, err := shared.Runtime.ContainerStats(t.Context(), id)
		if err != nil || s.GetAttributes().GetId() != id || s.GetAttributes().GetAnnotations()["kept"] != "as it is" || s.GetCpu() != nil {
			t.Errorf("stats of a container that does not run: %v (%v)", s, err)
		}
	}
	if s, err := shared.Runtime.ContainerStats(t.Context(), strings.Repeat("0", 64)); err == nil {
		t.Errorf("stats of no container: %v", s)
	}
	pods, err := shared.Runtime.ListPodSandboxStats(t.Context(), &cri.PodSandboxStatsFilter{Id: other.id, LabelSelector: map[string]string{"test": "yes"}})
	if err != nil || len(pods) != 1 || pods[0].GetAttributes().GetMetadata().GetName() != other.config.GetMetadata().GetName() || len(pods[0].GetLinux().GetContainers()) != 1 {
		t.Errorf("pods are %v (%v)", pods, err)
	}
	streamedStats(t, p.id, []string{a, b})
}

// streamedStats wants the streaming calls to give what lists give.
func streamedStats(t *testing.T, pod string, containers []string) {
	t.Helper()
	conn, err := grpc.NewClient(shared.Socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	client := cri.NewRuntimeServiceClient(conn)
	stats, err := client.StreamContainerStats(t.Context(), &cri.StreamContainerStatsRequest{Filter: &cri.ContainerStatsFilter{PodSandboxId: pod}})
	if err != nil {
		t.Fatal(err)
	}
	var found []string
	for {
		part, err := stats.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range part.GetContainerStats() {
			found = append(found, s.GetAttributes().GetId())
		}
	}
	slices.Sort(found)
	slices.Sort(containers)
	if !slices.Equal(found, containers) {
		t.Errorf("streamed are %v, want %v", found, containers)
	}
	pods, err := client.StreamPodSandboxStats(t.Context(), &cri.StreamPodSandboxStatsRequest{Filter: &cri.PodSandboxStatsFilter{Id: pod}})
	if err != nil {
		t.Fatal(err)
	}
	if part, err := pods.Recv(); err != nil || len(part.GetPodSandboxStats()) != 1 || part.GetPodSandboxStats()[0].GetLinux().GetCpu().GetTimestamp() == 0 {
		t.Errorf("streamed pods are %v (%v)", part, err)
	}
	metrics, err := client.StreamPodSandboxMetrics(t.Context(), &cri.StreamPodSandboxMetricsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if part, err := metrics.Recv(); err != nil || len(part.GetPodSandboxMetrics()) == 0 {
		t.Errorf("streamed metrics are %v (%v)", part, err)
	}
}

// cadvisorNames are those that kubelet's summary and critest's newer releases ask for; the last ones may be
// without a value.
var cadvisorNames = strings.Fields(`
	container_cpu_cfs_periods_total container_cpu_cfs_throttled_periods_total container_cpu_cfs_throttled_seconds_total
	container_cpu_system_seconds_total container_cpu_usage_seconds_total container_cpu_user_seconds_total
	container_file_descriptors container_fs_inodes_free container_fs_inodes_total container_fs_limit_bytes container_fs_usage_bytes
	container_last_seen container_memory_cache container_memory_failcnt container_memory_failures_total container_memory_kernel_usage
	container_memory_mapped_file container_memory_max_usage_bytes container_memory_rss container_memory_swap
	container_memory_usage_bytes container_memory_working_set_bytes
	container_network_receive_bytes_total container_network_receive_errors_total container_network_receive_packets_dropped_total
	container_network_receive_packets_total container_network_transmit_bytes_total container_network_transmit_errors_total
	container_network_transmit_packets_dropped_total container_network_transmit_packets_total
	container_oom_events_total container_processes container_sockets
	container_pressure_cpu_stalled_seconds_total container_pressure_cpu_waiting_seconds_total
	container_pressure_io_stalled_seconds_total container_pressure_io_waiting_seconds_total
	container_pressure_memory_stalled_seconds_total container_pressure_memory_waiting_seconds_total
	container_spec_cpu_period container_spec_cpu_quota container_spec_cpu_shares container_spec_memory_limit_bytes
	container_spec_memory_reservation_limit_bytes container_spec_memory_swap_limit_bytes
	container_start_time_seconds container_threads container_threads_max container_ulimits_soft`)

func TestMetrics(t *testing.T) {
	p := runPod(t, shared)
	c := p.start("exec sleep 1000", func(c *cri.ContainerConfig) {
		c.Linux.Resources = &cri.LinuxContainerResources{CpuPeriod: 100000, CpuQuota: 20000, CpuShares: 1024, MemoryLimitInBytes: 64 << 20, MemorySwapLimitInBytes: 64 << 20}
	})
	p.exec(c, "sh", "-c", "dd if=/dev/zero of=/file bs=1048576 count=3 oflag=direct")
	descriptors, err := shared.Runtime.ListMetricDescriptors(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	keys := map[string][]string{}
	for _, d := range descriptors {
		keys[d.GetName()] = d.GetLabelKeys()
	}
	values := map[string]uint64{} // sums over a metric's series: the container's, or else the pod's
	read := func() {
		t.Helper()
		all, err := shared.Runtime.ListPodSandboxMetrics(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		clear(values)
		for _, pod := range all {
			if pod.GetPodSandboxId() != p.id {
				continue
			}
			add := func(list []*cri.Metric, known map[string]bool) {
				for _, m := range list {
					if len(m.GetLabelValues()) != len(keys[m.GetName()]) {
						t.Errorf("%v has not the labels %v", m, keys[m.GetName()])
					}
					if !known[m.GetName()] {
						values[m.GetName()] += m.GetValue().GetValue()
					}
				}
			}
			of := map[string]bool{}
			for _, m := range pod.GetContainerMetrics() {
				add(m.GetMetrics(), nil)
			}
			for name := range values {
				of[name] = true
			}
			add(pod.GetMetrics(), of)
		}
	}
	eventually(t, time.Minute, "the guest's first figures are there", func() error {
		if read(); values["container_threads"] == 0 {
			return fmt.Errorf("metrics are %v", values)
		}
		return nil
	})
	for _, name := range cadvisorNames {
		if _, ok := values[name]; !ok || keys[name] == nil {
			t.Errorf("no %s (described with %v)", name, keys[name])
		}
	}
	for name, want := range map[string]uint64{
		"container_spec_cpu_quota": 20000, "container_spec_cpu_period": 100000, "container_spec_cpu_shares": 1024, "container_spec_memory_limit_bytes": 64 << 20,
		"container_processes": 1, "container_threads": 1,
	} {
		if values[name] != want {
			t.Errorf("%s is %d, want %d", name, values[name], want)
		}
	}
	for _, name := range []string{"container_file_descriptors", "container_memory_max_usage_bytes", "container_cpu_cfs_periods_total", "container_ulimits_soft", "container_fs_limit_bytes",
		"container_network_transmit_bytes_total", "crivm_pod_overhead_memory_bytes", "crivm_pod_guest_memory_bytes"} {
		if values[name] == 0 {
			t.Errorf("%s is 0", name)
		}
	}
	eventually(t, 40*time.Second, "writes of a disk show", func() error {
		read()
		if values["container_fs_writes_bytes_total"] < 3<<20 {
			return fmt.Errorf("%d bytes", values["container_fs_writes_bytes_total"])
		}
		return nil
	})
	t.Logf("overhead %d MiB, %d s of CPU time", values["crivm_pod_overhead_memory_bytes"]>>20, values["crivm_pod_overhead_cpu_seconds_total"])
}
