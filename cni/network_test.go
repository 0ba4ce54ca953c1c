package cni

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// bridgeConf is a dual-stack network as nodes have it. data is where host-local keeps its leases.
func bridgeConf(data string) string {
	return fmt.Sprintf(`{"cniVersion":"1.0.0","name":"testnet","plugins":[
	 {"type":"bridge","bridge":"ctest0","isGateway":true,"ipMasq":true,"hairpinMode":true,"mtu":1450,
	  "ipam":{"type":"host-local","dataDir":%q,
	   "ranges":[[{"subnet":"10.88.0.0/16"}],[{"subnet":"fd00:88::/64"}]],
	   "routes":[{"dst":"0.0.0.0/0"},{"dst":"::/0"}]}},
	 {"type":"portmap","capabilities":{"portMappings":true},"snat":true}]}`, data)
}

func leases(t *testing.T, data, network string) (ips []string) {
	t.Helper()
	entries, err := os.ReadDir(filepath.Join(data, network))
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if e.Name() != "lock" && !strings.HasPrefix(e.Name(), "last_reserved_ip") {
			ips = append(ips, e.Name())
		}
	}
	return ips
}

func firewall(t *testing.T) string {
	t.Helper()
	var all []string
	for _, tool := range []string{"iptables-save", "ip6tables-save"} {
		out, err := exec.Command(tool).Output()
		if err != nil {
			t.Fatalf("%s: %v", tool, err)
		}
		all = append(all, string(out))
	}
	return strings.Join(all, "")
}

// awaitAddresses waits until the node may use all of its addresses: until duplicate address detection is
// over it connects from link-local ones, which are not answered.
func awaitAddresses(t *testing.T) {
	t.Helper()
	eventually(t, func() error {
		addrs, err := netlink.AddrList(nil, unix.AF_INET6)
		for _, a := range addrs {
			if a.Flags&unix.IFA_F_TENTATIVE != 0 {
				err = fmt.Errorf("address %s is tentative", a.IPNet)
			}
		}
		return err
	})
}

func mustPrepare(t *testing.T, n *Network, id string) Slot {
	t.Helper()
	slot, err := n.Prepare(t.Context(), id, 0, 0)
	if err != nil {
		t.Fatal(err)
	}
	return slot
}

func mustAdd(t *testing.T, n *Network, p Pod) Attachment {
	t.Helper()
	mustPrepare(t, n, p.ID)
	att, err := n.Add(t.Context(), p)
	if err != nil {
		t.Fatal(err)
	}
	return att
}

func mustDel(t *testing.T, n *Network, p Pod) {
	t.Helper()
	if err := n.Del(t.Context(), p); err != nil {
		t.Fatal(err)
	}
}

// The way of a packet, with the plugins every node has: node to pod, pod to node, by pod address and by
// host port, IPv4 and IPv6; and that DEL takes everything back.
func TestBridgeCarriesTraffic(t *testing.T) {
	bin := pluginDir(t, "bridge", "host-local", "portmap")
	data := t.TempDir()
	n := testNetwork(t, bridgeConf(data), bin, nil)
	if err := n.Status(); err != nil {
		t.Fatal(err)
	}
	p := Pod{ID: "traffic", Name: "web", Namespace: "default", UID: "u-1", PortMappings: []PortMapping{
		{Protocol: "TCP", ContainerPort: 8080, HostPort: 18080}, {ContainerPort: 9090},
	}}
	slot := mustPrepare(t, n, p.ID)
	if slot.Tap != "tap0" || !isNamespace(slot.NetnsPath) || filepath.Base(slot.NetnsPath) != "crivm-traffic" {
		t.Fatalf("slot %+v", slot)
	}
	att, err := n.Add(t.Context(), p)
	if err != nil {
		t.Fatal(err)
	}
	if len(att.Interfaces) != 1 || att.Interfaces[0].Name != "eth0" || att.Interfaces[0].MTU != 1450 || att.Interfaces[0].Tap != "tap0" {
		t.Fatalf("interfaces %+v", att.Interfaces)
	}
	if len(att.IPs) != 2 || !att.IPs[0].Is4() || !att.IPs[1].Is6() || att.Interfaces[0].Addresses[0].Bits() != 16 {
		t.Fatalf("addresses %v of %+v", att.IPs, att.Interfaces)
	}
	data4, err := json.Marshal(att)
	if err != nil {
		t.Fatal(err)
	}
	var again Attachment
	if err := json.Unmarshal(data4, &again); err != nil || !reflect.DeepEqual(att, again) {
		t.Fatalf("JSON changes the attachment: %v\n%+v\n%+v", err, att, again)
	}

	// Nobody answers for the pod while the guest does not.
	if said, err := hear("", netip.AddrPortFrom(att.IPs[0], 8080)); err == nil {
		t.Fatalf("%q from a pod without a guest", said)
	}
	g := startGuest(t, n, p.ID, att)
	awaitAddresses(t)
	gateway := map[bool]netip.Addr{}
	for _, r := range att.Routes {
		if r.Destination.Bits() == 0 {
			gateway[r.Gateway.Is4()] = r.Gateway
		}
	}
	if len(gateway) != 2 {
		t.Fatalf("default routes in %+v", att.Routes)
	}
	for _, ip := range att.IPs {
		g.serve("tcp", netip.AddrPortFrom(ip, 8080), "guest here,")
		said, err := hear("", netip.AddrPortFrom(ip, 8080))
		if err != nil || !strings.HasPrefix(said, "guest here,") {
			t.Errorf("node to %s: %q, %v", ip, said, err)
		}
		said, err = hear("", netip.AddrPortFrom(gateway[ip.Is4()], 18080))
		if err != nil || !strings.HasPrefix(said, "guest here,") {
			t.Errorf("host port for %s: %q, %v", ip, said, err)
		}
		node := &guest{t: t, path: "/proc/self/ns/net"} // the node itself as a server
		node.serve("tcp", netip.AddrPortFrom(gateway[ip.Is4()], 7070), "node here,")
		said, err = hear(g.path, netip.AddrPortFrom(gateway[ip.Is4()], 7070))
		if err != nil || !strings.HasPrefix(said, "node here,") || !strings.Contains(said, ip.String()) {
			t.Errorf("pod %s to node: %q, %v", ip, said, err)
		}
	}
	said, err := hear("", netip.MustParseAddrPort("127.0.0.1:18080"))
	if err != nil || !strings.HasPrefix(said, "guest here,") {
		t.Errorf("host port on the loopback address: %q, %v", said, err)
	}

	if err := n.Check(t.Context(), p.ID); err != nil {
		t.Errorf("CHECK: %v", err)
	}
	if rules := firewall(t); !strings.Contains(rules, p.ID) {
		t.Fatalf("no rule names the pod, so the test below proves nothing:\n%s", rules)
	}
	mustDel(t, n, p)
	if rules := firewall(t); strings.Contains(rules, p.ID) || strings.Contains(rules, att.IPs[0].String()) {
		t.Errorf("rules left behind:\n%s", rules)
	}
	if ips := leases(t, data, "testnet"); len(ips) > 0 {
		t.Errorf("leases left behind: %v", ips)
	}
	if _, err := os.Stat(slot.NetnsPath); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%s: %v", slot.NetnsPath, err)
	}
}

// ptp removes the route to the subnet and has a link route to the gateway instead.
func TestPtpRoutesReachTheGuest(t *testing.T) {
	bin := pluginDir(t, "ptp", "host-local")
	conf := fmt.Sprintf(`{"cniVersion":"1.0.0","name":"p2p","plugins":[{"type":"ptp","ipMasq":true,"mtu":1400,
	 "ipam":{"type":"host-local","dataDir":%q,"ranges":[[{"subnet":"10.99.0.0/24"}],[{"subnet":"fd00:99::/64"}]],
	 "routes":[{"dst":"0.0.0.0/0"},{"dst":"::/0"}]}}]}`, t.TempDir())
	n := testNetwork(t, conf, bin, nil)
	p := Pod{ID: "ptp"}
	att := mustAdd(t, n, p)
	for _, a := range att.Interfaces[0].Addresses {
		if !a.IsSingleIP() {
			t.Errorf("address %s would bring back the route that ptp has removed", a)
		}
	}
	g := startGuest(t, n, p.ID, att)
	awaitAddresses(t)
	for _, ip := range att.IPs {
		g.serve("tcp", netip.AddrPortFrom(ip, 80), "guest here,")
		if said, err := hear("", netip.AddrPortFrom(ip, 80)); err != nil || said == "" {
			t.Errorf("node to %s: %q, %v; routes %+v", ip, said, err, att.Routes)
		}
	}
	mustDel(t, n, p)
}

func TestPrepareAddDelAreIdempotent(t *testing.T) {
	bin := pluginDir(t, "bridge", "host-local", "portmap")
	data := t.TempDir()
	n := testNetwork(t, bridgeConf(data), bin, nil)
	p := Pod{ID: "twice"}
	first := mustAdd(t, n, p)
	before := namespaceInode(t, n.netnsPath(p.ID))
	second := mustAdd(t, n, p)
	if !reflect.DeepEqual(first, second) {
		t.Errorf("second ADD made %+v of %+v", second, first)
	}
	if after := namespaceInode(t, n.netnsPath(p.ID)); after != before {
		t.Errorf("second Prepare made another namespace")
	}
	if ips := leases(t, data, "testnet"); len(ips) != 2 {
		t.Errorf("leases %v, want one for each family", ips)
	}
	if err := n.Check(t.Context(), p.ID); err != nil {
		t.Error(err)
	}
	mustDel(t, n, p)
	mustDel(t, n, p)
	mustDel(t, n, Pod{ID: "never-seen"})

	mustPrepare(t, n, "slot")
	mustDel(t, n, Pod{ID: "slot"})
	if got := mountLines(t, n.config.NetnsDir); got > 1 {
		t.Errorf("%d mounts at %s", got, n.config.NetnsDir)
	}
}

func namespaceInode(t *testing.T, path string) uint64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Ino
}

func TestPrepareRemakesATapOfOtherOwner(t *testing.T) {
	needRoot(t)
	n := testNetwork(t, "", t.TempDir(), nil)
	for _, owner := range []int{0, 1234, 1234, 5678} {
		slot, err := n.Prepare(t.Context(), "owned", owner, owner+1)
		if err != nil {
			t.Fatal(err)
		}
		err = inNamespace(slot.NetnsPath, func(h *netlink.Handle) error {
			link, err := h.LinkByName("tap0")
			if err != nil {
				return err
			}
			tun := link.(*netlink.Tuntap)
			if tun.Owner != uint32(owner) || tun.Group != uint32(owner+1) || tun.NonPersist || link.Attrs().RawFlags&unix.IFF_UP == 0 {
				t.Errorf("tap %+v", tun)
			}
			lo, err := h.LinkByName("lo")
			if err != nil {
				return err
			}
			if lo.Attrs().RawFlags&unix.IFF_UP == 0 {
				t.Error("lo is down")
			}
			addrs, err := h.AddrList(link, unix.AF_UNSPEC)
			if len(addrs) != 0 {
				t.Errorf("tap has addresses %v: the node's kernel talks to the guest", addrs)
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	mustDel(t, n, Pod{ID: "owned"})
}

// A namespace file that a reboot has left is used again, and Del copes with it.
func TestFileWithoutNamespace(t *testing.T) {
	needRoot(t)
	n := testNetwork(t, "", t.TempDir(), nil)
	slot := mustPrepare(t, n, "rebooted")
	if err := unix.Unmount(slot.NetnsPath, 0); err != nil {
		t.Fatal(err)
	}
	mustPrepare(t, n, "rebooted")
	if err := unix.Unmount(slot.NetnsPath, 0); err != nil {
		t.Fatal(err)
	}
	mustDel(t, n, Pod{ID: "rebooted"})
}

func TestNamespacesPropagate(t *testing.T) {
	needRoot(t)
	n := testNetwork(t, "", t.TempDir(), nil)
	mustPrepare(t, n, "one")
	at, shared, err := mountOf(n.config.NetnsDir)
	if err != nil || at != n.config.NetnsDir || !shared {
		t.Fatalf("namespaces lie on mount %s, shared %v, %v", at, shared, err)
	}
	mustPrepare(t, n, "two")
	if got := mountLines(t, n.config.NetnsDir); got != 3 { // the directory and two namespaces
		t.Errorf("%d mounts below %s, want 3", got, n.config.NetnsDir)
	}
	// A mount namespace that is a slave of ours sees the namespace go.
	holder := exec.Command("unshare", "--mount", "--propagation", "slave", "cat")
	stdin, err := holder.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := holder.Start(); err != nil {
		t.Fatal(err)
	}
	sees := func(id string) bool {
		data, err := os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", holder.Process.Pid))
		if err != nil {
			t.Fatal(err)
		}
		return strings.Contains(string(data), netnsPrefix+id+" ")
	}
	eventually(t, func() error {
		own, err := os.Readlink("/proc/self/ns/mnt")
		if err != nil {
			return err
		}
		if its, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/mnt", holder.Process.Pid)); err != nil || its == own {
			return fmt.Errorf("holder not in its mount namespace yet: %v", err)
		}
		return nil
	})
	mustPrepare(t, n, "three")
	if !sees("one") || !sees("three") {
		t.Error("the other mount namespace lacks a pod's namespace")
	}
	for _, id := range []string{"one", "two", "three"} {
		mustDel(t, n, Pod{ID: id})
		if sees(id) {
			t.Errorf("the other mount namespace still holds %s", id)
		}
	}
	stdin.Close()
	if err := holder.Wait(); err != nil {
		t.Error(err)
	}
}

func TestCheckFindsABrokenRedirect(t *testing.T) {
	bin := pluginDir(t, "bridge", "host-local", "portmap")
	n := testNetwork(t, bridgeConf(t.TempDir()), bin, nil)
	p := Pod{ID: "checked"}
	if err := n.Check(t.Context(), p.ID); !errdefs.IsNotFound(err) {
		t.Errorf("CHECK of an unknown pod: %v", err)
	}
	mustPrepare(t, n, p.ID)
	if err := n.Check(t.Context(), p.ID); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("CHECK before ADD: %v", err)
	}
	mustAdd(t, n, p)
	err := inNamespace(n.netnsPath(p.ID), func(h *netlink.Handle) error {
		eth0, err := h.LinkByName("eth0")
		if err != nil {
			return err
		}
		return h.QdiscDel(&netlink.Ingress{QdiscAttrs: netlink.QdiscAttrs{LinkIndex: eth0.Attrs().Index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_INGRESS}})
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := n.Check(t.Context(), p.ID); err == nil || !strings.Contains(err.Error(), "eth0 is not redirected") {
		t.Errorf("CHECK without redirect: %v", err)
	}
	mustDel(t, n, p)
}

// Twenty pods at once, each several times; no thread may stay in a pod's namespace.
func TestManyPodsAtOnce(t *testing.T) {
	bin := pluginDir(t, "bridge", "host-local", "portmap")
	data := t.TempDir()
	n := testNetwork(t, bridgeConf(data), bin, nil)
	var all sync.WaitGroup
	ips := map[netip.Addr]string{}
	var mu sync.Mutex
	for i := range 20 {
		all.Go(func() {
			p := Pod{ID: fmt.Sprintf("pod%d", i)}
			if _, err := n.Prepare(t.Context(), p.ID, i, i); err != nil {
				t.Error(err)
				return
			}
			att, err := n.Add(t.Context(), p)
			if err != nil {
				t.Error(err)
				return
			}
			mu.Lock()
			defer mu.Unlock()
			for _, ip := range att.IPs {
				if other := ips[ip]; other != "" {
					t.Errorf("%s has the address %s of %s", p.ID, ip, other)
				}
				ips[ip] = p.ID
			}
		})
	}
	all.Wait()
	checkThreads(t)
	for i := range 20 {
		all.Go(func() {
			if err := n.Del(context.Background(), Pod{ID: fmt.Sprintf("pod%d", i)}); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	if left := leases(t, data, "testnet"); len(left) > 0 || len(ips) != 40 {
		t.Errorf("%d addresses given, left behind: %v", len(ips), left)
	}
}

// A VMM without privileges may open the tap made for its uid and gid, and no other. The thread that has
// given up its privileges cannot go back to the node's namespace, so it must end.
// A main thread that is given up in a pod's namespace would hold that namespace for the daemon's life.
func TestMainThreadStaysAtHome(t *testing.T) {
	var seen atomic.Bool
	for range 2000 {
		var all sync.WaitGroup
		for range 4 {
			all.Go(func() {
				if unix.Gettid() == unix.Getpid() {
					seen.Store(true)
				}
				err := onOwnThread(func() error {
					if unix.Gettid() == unix.Getpid() {
						return errors.New("fn runs on the main thread")
					}
					return nil
				})
				if err != nil {
					t.Error(err)
				}
			})
		}
		all.Wait()
		if seen.Load() {
			return
		}
	}
	t.Skip("no goroutine was ever put on the main thread")
}

func TestTapIsForItsOwner(t *testing.T) {
	needRoot(t)
	n := testNetwork(t, "", t.TempDir(), nil)
	slot, err := n.Prepare(t.Context(), "owned", 1234, 1235)
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		uid, gid uintptr
		want     error
	}{{1234, 1235, nil}, {1234, 99, unix.EPERM}, {99, 1235, unix.EPERM}} {
		var opened error
		err := inNamespace(slot.NetnsPath, func(*netlink.Handle) error {
			// The device file may be root's alone, as where no udev runs; who attaches is what counts.
			fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
			if err != nil {
				return err
			}
			defer unix.Close(fd)
			// Raw system calls: they concern this thread alone.
			for _, call := range [][4]uintptr{
				{unix.SYS_SETGROUPS, 0, 0, 0},
				{unix.SYS_SETRESGID, test.gid, test.gid, test.gid},
				{unix.SYS_SETRESUID, test.uid, test.uid, test.uid},
			} {
				if _, _, errno := unix.RawSyscall(call[0], call[1], call[2], call[3]); errno != 0 {
					return errno
				}
			}
			request, err := unix.NewIfreq(slot.Tap)
			if err != nil {
				return err
			}
			request.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
			opened = unix.IoctlIfreq(fd, unix.TUNSETIFF, request)
			return nil
		})
		if err == nil || !strings.Contains(err.Error(), "return to the host") {
			t.Fatalf("the thread still has privileges, the test proves nothing: %v", err)
		}
		if !errors.Is(opened, test.want) {
			t.Errorf("uid %d, gid %d: %v, want %v", test.uid, test.gid, opened, test.want)
		}
	}
	home, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, func() error {
		tasks, err := filepath.Glob("/proc/self/task/*/ns/net")
		for _, task := range tasks {
			if ns, gone := os.Readlink(task); gone == nil && ns != home {
				err = fmt.Errorf("%s is still %s", task, ns)
			}
		}
		return err
	})
	mustDel(t, n, Pod{ID: "owned"})
}

// Whoever still holds a namespace does not hold its taps.
func TestDelRemovesTapsOfAHeldNamespace(t *testing.T) {
	needRoot(t)
	n := testNetwork(t, oneplugin, "/plugins", &fakePlugins{})
	p := Pod{ID: "held"}
	mustAdd(t, n, p)
	held, err := os.Open(n.netnsPath(p.ID))
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	mustDel(t, n, p)
	err = inNamespace(fmt.Sprintf("/proc/self/fd/%d", held.Fd()), func(h *netlink.Handle) error {
		links, err := h.LinkList()
		for _, l := range links {
			if l.Type() == "tuntap" {
				t.Errorf("tap %s is still there", l.Attrs().Name)
			}
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}
