//go:build integration

package integration

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crivm/crivm/integration/node"
)

// poolState is what Status tells of a node's pool.
type poolState struct {
	Ready, Booting int
	Hits, Booted   int
	Misses         map[string]int
	Dropped        map[string]int
	LastFailure    string
}

func poolOf(t *testing.T, n *node.Node) poolState {
	t.Helper()
	resp, err := n.Runtime.Status(t.Context(), true)
	if err != nil {
		t.Fatal(err)
	}
	var pools []poolState
	if err := json.Unmarshal([]byte(resp.GetInfo()["pools"]), &pools); err != nil || len(pools) > 1 {
		t.Fatalf("pools are %q (%v)", resp.GetInfo()["pools"], err)
	}
	if len(pools) == 0 {
		return poolState{}
	}
	return pools[0]
}

func awaitSlots(t *testing.T, n *node.Node, count int) poolState {
	t.Helper()
	var p poolState
	eventually(t, 8*time.Minute, fmt.Sprintf("%d slots are ready", count), func() error {
		if p = poolOf(t, n); p.Ready != count || p.Booting != 0 {
			return fmt.Errorf("pool is %+v", p)
		}
		return nil
	})
	return p
}

// setPool gives the shared node a pool of this size, 0 for none, and restarts its daemon. Slots boot as fast as anything
// else, for the test's sake.
func setPool(ctx context.Context, n *node.Node, size int) error {
	path := filepath.Join(n.Dir, "conf.d/60-pool.toml")
	err := os.WriteFile(path, fmt.Appendf(nil, "[vm]\npool_size = %d\n[pool]\ncpu_weight = 100\n", size), 0o644)
	if size == 0 {
		err = os.Remove(path)
	}
	return errors.Join(err, n.KillDaemon(), n.StartDaemon(ctx))
}

// runTimed is a pod, and how long RunPodSandbox took.
func runTimed(t *testing.T, change ...func(*cri.PodSandboxConfig)) (*pod, time.Duration) {
	t.Helper()
	start := time.Now()
	p := runPod(t, shared, change...)
	return p, time.Since(start)
}

// identity is what must differ from pod to pod, and the clock.
type identity struct {
	bootID, random, mac, hostname, ip string
	pid                               int
}

func (p *pod) identity() identity {
	p.t.Helper()
	c := p.start("exec sleep 1000")
	var id identity
	out := strings.Fields(p.exec(c, "sh", "-c", "cat /proc/sys/kernel/random/boot_id; head -c 16 /dev/urandom | od -An -tx1 | tr -d ' '; cat /sys/class/net/eth0/address; hostname; date +%s"))
	if len(out) != 5 {
		p.t.Fatalf("the pod says %q", out)
	}
	id.bootID, id.random, id.mac, id.hostname = out[0], out[1], out[2], out[3]
	if clock, err := strconv.ParseInt(out[4], 10, 64); err != nil || time.Since(time.Unix(clock, 0)).Abs() > 30*time.Second {
		p.t.Errorf("the pod's clock says %s, here it is %d", out[4], time.Now().Unix())
	}
	resp, err := p.n.Runtime.PodSandboxStatus(p.t.Context(), p.id, true)
	if err != nil {
		p.t.Fatal(err)
	}
	var info struct {
		PID     int
		Slot    map[string]any
		Network struct{ Interfaces []struct{ MAC string } }
	}
	if err := json.Unmarshal([]byte(resp.Info["info"]), &info); err != nil {
		p.t.Fatal(err)
	}
	if info.Slot == nil {
		p.t.Error("the pod does not say that it is from the pool")
	}
	if id.mac != info.Network.Interfaces[0].MAC {
		p.t.Errorf("MAC is %s, that of eth0 %s", id.mac, info.Network.Interfaces[0].MAC)
	}
	cgroup, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", info.PID))
	if err != nil {
		p.t.Fatal(err)
	}
	for line := range strings.Lines(string(cgroup)) {
		if !strings.HasSuffix(strings.TrimSpace(line), node.CgroupParent+"/crivm-"+p.id) {
			p.t.Errorf("the VMM is in cgroup %q", line)
		}
	}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", info.PID))
	if err != nil {
		p.t.Fatal(err)
	}
	for line := range strings.Lines(string(status)) {
		if strings.HasPrefix(line, "RssAnon") || strings.HasPrefix(line, "RssShmem") {
			p.t.Log("VMM with one container: ", strings.TrimSpace(line))
		}
	}
	id.ip, id.pid = resp.Status.Network.Ip, info.PID
	return id
}

// TestWarmPool: pods take slots and are like any pod, and like no other pod; slots outlive the daemon, and are gone when
// the pool is turned off.
func TestWarmPool(t *testing.T) {
	cold, coldTook := runTimed(t)
	if err := setPool(testContext(t, 2*time.Minute), shared, 2); err != nil {
		t.Fatal(err)
	}
	off := false
	turnOff := func() {
		if off {
			return
		}
		off = true
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
		defer cancel()
		if err := setPool(ctx, shared, 0); err != nil {
			t.Error(err)
		}
	}
	t.Cleanup(turnOff)
	awaitSlots(t, shared, 2)

	first, firstTook := runTimed(t, inUserNamespace) // its network is another namespace of the guest
	second, secondTook := runTimed(t)
	t.Logf("RunPodSandbox: cold %v, warm %v and %v", coldTook.Round(time.Millisecond), firstTook.Round(time.Millisecond), secondTook.Round(time.Millisecond))
	if p := poolOf(t, shared); p.Hits != 2 || len(p.Misses) > 0 {
		t.Fatalf("pool is %+v", p)
	}
	if min(firstTook, secondTook) >= coldTook {
		t.Errorf("a pod from the pool took %v and %v, one that booted %v", firstTook, secondTook, coldTook)
	}
	a, b := first.identity(), second.identity()
	if a.bootID == b.bootID || a.random == b.random || a.mac == b.mac || a.hostname == b.hostname || a.ip == b.ip || a.pid == b.pid {
		t.Errorf("two pods from the pool have something in common: %+v and %+v", a, b)
	}
	if a.hostname != first.config.Hostname {
		t.Errorf("hostname is %s, want %s", a.hostname, first.config.Hostname)
	}
	c := first.start("mkdir /www; echo hello > /www/index.html; exec httpd -f -p '[::]:80' -h /www")
	eventually(t, 30*time.Second, "a pod from the pool reaches one that booted", func() error {
		_, stderr, err := shared.Runtime.ExecSync(t.Context(), c, []string{"ping", "-c", "1", "-W", "5", cold.status().Network.Ip}, 20*time.Second)
		if err != nil {
			return fmt.Errorf("%w: %s", err, stderr)
		}
		return nil
	})
	eventually(t, 30*time.Second, "the node reaches a pod from the pool", func() error {
		conn, err := net.DialTimeout("tcp", net.JoinHostPort(a.ip, "80"), 2*time.Second)
		if err == nil {
			conn.Close()
		}
		return err
	})

	// Slots outlive a daemon that is killed, and so do pods that took some.
	before := awaitSlots(t, shared, 2)
	if err := errors.Join(shared.KillDaemon(), shared.StartDaemon(testContext(t, 2*time.Minute))); err != nil {
		t.Fatal(err)
	}
	after := awaitSlots(t, shared, 2)
	if after.Booted != 0 || len(after.Dropped) > 0 {
		t.Errorf("pool was %+v, is %+v after a restart", before, after)
	}
	if out := first.exec(c, "echo", "alive"); out != "alive\n" {
		t.Errorf("exec after a restart says %q", out)
	}

	// A pod that asks for more than a slot has grows it.
	big, bigTook := runTimed(t, func(c *cri.PodSandboxConfig) {
		c.Linux.Resources = &cri.LinuxContainerResources{MemoryLimitInBytes: 300 * mib}
	})
	t.Logf("RunPodSandbox of a pod that grows the slot: %v", bigTook.Round(time.Millisecond))
	if _, memory := big.guestSize(big.start("exec sleep 1000")); memory < 340*mib {
		t.Errorf("the guest of a pod with a limit of 300 MiB has %d", memory)
	}
	if p := poolOf(t, shared); p.Hits != 1 {
		t.Errorf("pool is %+v", p)
	}

	if log, err := os.ReadFile(shared.LogPath()); err == nil { // where the time went
		for line := range strings.Lines(string(log)) {
			if _, steps, ok := strings.Cut(line, " warm=true "); ok {
				t.Log(strings.TrimSpace(steps))
			}
			if strings.Contains(line, "rehearse any more") {
				t.Error(line)
			} else if strings.Contains(line, "rehears") {
				t.Log(strings.TrimSpace(line))
			}
		}
	}

	turnOff()
	if p := poolOf(t, shared); p.Ready+p.Booting > 0 {
		t.Errorf("pool is %+v", p)
	}
	for _, p := range []*pod{cold, first, second, big} {
		p.remove()
	}
	if err := shared.CheckLeaks(t.Context()); err != nil {
		t.Error(err)
	}
}
