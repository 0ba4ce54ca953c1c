//go:build integration

package guest

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/profiles/seccomp"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/crivm/crivm/agentproto"
)

// rehearsalRequest is as the host's.
func rehearsalRequest(t *testing.T, vm *testVM, args ...string) *agentproto.RehearseRequest {
	var spec specs.Spec
	text := vmSpec(t, nil, args...)
	if err := json.Unmarshal(text, &spec); err != nil {
		t.Fatal(err)
	}
	profile, err := seccomp.GetDefaultProfile(&spec)
	if err != nil {
		t.Fatal(err)
	}
	return &agentproto.RehearseRequest{
		Sandbox:   &agentproto.SetupSandboxRequest{Interfaces: []*agentproto.Interface{{MatchMac: vm.mac}}, ScratchSerial: "scratch", UnixNanos: time.Now().UnixNano(), Entropy: make([]byte, 32)},
		Container: &agentproto.CreateContainerRequest{Rootfs: &agentproto.Rootfs{ImageSerial: "rehearsal"}, OciSpec: vmSpec(t, func(s *specs.Spec) { s.Linux.Seccomp = profile }, args...), Stdio: &agentproto.Stdio{}},
	}
}

// guestView tells what a pod's guest shows of itself: its mounts, files outside of /proc and /sys, processes, cgroups, links,
// addresses of all families, routes of all tables, neighbours.
const guestView = `
cd /guest
echo == mounts; sed -E 's/^[0-9]+ [0-9]+ [0-9]+:[0-9]+ //' /proc/self/mountinfo | grep ' /guest' | sort
echo == files; find etc run tmp dev/shm dev/mqueue dev/pts newroot root -path run/crivm/containers/view/rootfs -prune -o -print 2>/dev/null | grep -v '^run/crivm/runtime/calls/' | sort
echo == cgroups; find sys/fs/cgroup -type d | sort
echo == processes; for p in proc/[0-9]*; do grep -hs '^Name:' $p/status; done | grep -v -E 'kworker|jbd2|ext4-rsv|ext4lazyinit|uniq|sort|grep|sh$' | sort | uniq -c
echo == network; ip link; ip addr; ip route show table all; ip -6 route show table all; ip neigh
grep . proc/sys/net/ipv6/conf/*/disable_ipv6
echo == sockets; cat proc/net/netlink | wc -l
echo == modules; cut -d ' ' -f 1 proc/modules | sort; ls lib/modules/*/kernel/drivers/net
echo == scratch; df -i run/crivm/scratch | awk 'NR > 1 { print $3 }'; find run/crivm/scratch 2>/dev/null | sort
`

// changing is what differs between guests that are alike: what QEMU's router has told of itself by then, and how old that is.
var changing = regexp.MustCompile(`.*(fe80::2|fec0:|valid_lft).*\n|expires \S+|tentative `)

// viewOf sets the guest up as a pod and looks around in it.
func viewOf(t *testing.T, vm *testVM) string {
	begin, busy := time.Now(), vm.busy(t)
	setup, err := vm.SetupSandbox(testContext(t), &agentproto.SetupSandboxRequest{
		SandboxId: "pod", Hostname: "pod-1", UnixNanos: time.Now().UnixNano(), Entropy: make([]byte, 32), ScratchSerial: "scratch", MachineId: strings.Repeat("0123", 8),
		Interfaces: []*agentproto.Interface{{MatchMac: vm.mac, Mac: "0a:58:0a:01:02:03", Name: "eth0", Addresses: []string{"10.1.2.3/24", "fd00::3/64"}}},
		Routes: []*agentproto.Route{
			{Destination: "0.0.0.0/0", Gateway: "10.1.2.1", Interface: "eth0"}, {Destination: "::/0", Gateway: "fd00::1", Interface: "eth0"},
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("set up: %v, CPU time %v; %v", time.Since(begin), vm.busy(t)-busy, setup.GetSteps())
	busy = vm.busy(t)
	first := &agentproto.CreateContainerRequest{ContainerId: "first", Rootfs: &agentproto.Rootfs{ImageSerial: "img-busybox"}, OciSpec: rehearsalRequest(t, vm, "sleep", "1000").GetContainer().GetOciSpec()}
	created, err := vm.CreateContainer(testContext(t), first)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("first container: CPU time %v; %v", vm.busy(t)-busy, created.GetSteps())
	if _, err := vm.DeleteContainer(testContext(t), &agentproto.DeleteContainerRequest{ContainerId: "first"}); err != nil {
		t.Fatal(err)
	}
	view, exit := vmRun(t, vm, &agentproto.CreateContainerRequest{ContainerId: "view"}, func(s *specs.Spec) {
		s.Mounts = append(s.Mounts, specs.Mount{Destination: "/guest", Source: "/", Type: "bind", Options: []string{"rbind", "ro"}})
		s.Linux.Resources.Devices = nil
	}, "sh", "-c", guestView)
	if exit.GetCode() != 0 || strings.Count(view, "\n") < 50 || strings.Contains(view, rehearsalID) {
		t.Errorf("exit %v\n%s", exit, view)
	}
	checkAgentMemory(t, vm)
	return changing.ReplaceAllString(view, "")
}

// mostAgentMemory is what the agent may hold resident in an idle pod, its program included, in KiB.
const mostAgentMemory = 12 << 10

// checkAgentMemory reads what the agent holds from its own files, as a container sees them.
func checkAgentMemory(t *testing.T, vm *testVM) {
	t.Helper()
	text, exit := vmRun(t, vm, &agentproto.CreateContainerRequest{ContainerId: "memory"}, func(s *specs.Spec) {
		s.Mounts = append(s.Mounts, specs.Mount{Destination: "/guest", Source: "/", Type: "bind", Options: []string{"rbind", "ro"}})
		for _, set := range []*[]string{&s.Process.Capabilities.Bounding, &s.Process.Capabilities.Effective, &s.Process.Capabilities.Permitted} {
			*set = append(*set, "CAP_SYS_PTRACE") // to read smaps_rollup
		}
	}, "grep", "-hE", "^(RssAnon|RssShmem|VmRSS|Pss|VmHWM):", "/guest/proc/1/status", "/guest/proc/1/smaps_rollup")
	figures := map[string]int{}
	for line := range strings.Lines(text) {
		var key string
		var kib int
		if n, _ := fmt.Sscanf(line, "%s %d kB", &key, &kib); n == 2 {
			figures[strings.TrimSuffix(key, ":")] = kib
		}
	}
	t.Logf("agent in KiB: %v", figures)
	if rss := figures["VmRSS"]; exit.GetCode() != 0 || rss == 0 || rss > mostAgentMemory {
		t.Errorf("the agent has %d KiB resident, at most %d are allowed (exit %v)\n%s", rss, mostAgentMemory, exit, text)
	}
}

// busy is the CPU time that QEMU has taken, which other work on the machine changes less than the time of day.
func (vm *testVM) busy(t *testing.T) (sum time.Duration) {
	t.Helper()
	threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", vm.qemu.Process.Pid))
	if err != nil || len(threads) == 0 {
		t.Fatalf("no threads of QEMU: %v", err)
	}
	for _, path := range threads {
		b, err := os.ReadFile(path)
		if err != nil {
			continue // it has ended
		}
		var ns int64
		if _, err := fmt.Sscan(string(b), &ns); err != nil {
			t.Fatalf("%s: %v", path, err)
		}
		sum += time.Duration(ns)
	}
	return sum
}

// settled waits until the agent has done what it does by itself after boot.
func settled(t *testing.T, vm *testVM) {
	t.Helper()
	ctx := testContext(t)
	for {
		hello, err := vm.Hello(ctx, &agentproto.HelloRequest{Version: agentproto.Version})
		if err != nil {
			t.Fatal(err)
		}
		if hello.GetOciRuntime() != "" { // the last that it does
			return
		}
		select {
		case <-ctx.Done():
			t.Fatal("the guest does not settle")
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// TestVMRehearsal: a guest that has rehearsed, or was about to when its pod came, is in nothing different from one that
// has not, and its NIC has sent nothing.
func TestVMRehearsal(t *testing.T) {
	plain := bootVM(t)
	settled(t, plain)
	want := viewOf(t, plain)
	compare := func(t *testing.T, got string) {
		t.Helper()
		if got == want {
			return
		}
		lines := map[string]int{}
		for l := range strings.Lines(want) {
			lines[l]--
		}
		for l := range strings.Lines(got) {
			lines[l]++
		}
		for l, n := range lines {
			if n != 0 {
				t.Errorf("%+d %s", n, l)
			}
		}
	}
	var took time.Duration
	t.Run("done", func(t *testing.T) {
		vm := bootVM(t)
		request := rehearsalRequest(t, vm, "rehearsal")
		for i := range 2 { // the second finds it done
			begin := time.Now()
			resp, err := vm.Rehearse(testContext(t), request)
			if err != nil {
				t.Fatal(err)
			}
			if i == 0 {
				took = time.Since(begin)
				t.Logf("rehearsal: %v %v", took, resp.GetSteps())
			}
		}
		settled(t, vm)
		if b, err := os.ReadFile(vm.frames); err != nil || len(b) != 24 { // the head of a pcap file
			t.Errorf("%d bytes of frames (%v)", len(b), err)
		}
		compare(t, viewOf(t, vm))
		if _, err := vm.Rehearse(testContext(t), request); !errdefs.IsFailedPrecondition(err) {
			t.Errorf("a pod rehearses: %v", err)
		}
	})
	t.Run("broken off", func(t *testing.T) {
		vm := bootVM(t)
		settled(t, vm)
		ended := make(chan error, 1)
		go func() {
			_, err := vm.Rehearse(testContext(t), rehearsalRequest(t, vm, "rehearsal"))
			ended <- err
		}()
		time.Sleep(took / 2) // anywhere in it will do, before or after it too
		view := viewOf(t, vm)
		if err := <-ended; err != nil && !errdefs.IsAborted(err) && !errdefs.IsFailedPrecondition(err) {
			t.Errorf("rehearsal: %v", err)
		} else {
			t.Logf("rehearsal: %v", err)
		}
		compare(t, view)
	})
}
