package cni

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/version"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// fakePlugins stands where plugin processes would: it notes each call and lets a test act in its place.
type fakePlugins struct {
	version.PluginDecoder
	mu    sync.Mutex
	calls []call
	// act answers a call; the default makes eth0 a veth with 10.0.0.2/24 and answers everything well.
	act func(ctx context.Context, c call) (string, error)
}

type call struct {
	verb, id, netns, ifname, plugin string
	args                            string
	conf                            map[string]any
}

func (f *fakePlugins) FindInPath(plugin string, paths []string) (string, error) {
	if plugin == "absent" {
		return "", fmt.Errorf("failed to find plugin %q in path %s", plugin, paths)
	}
	return filepath.Join(paths[0], plugin), nil
}

func (f *fakePlugins) ExecPlugin(ctx context.Context, path string, stdin []byte, environ []string) ([]byte, error) {
	env := map[string]string{}
	for _, e := range environ {
		key, value, _ := strings.Cut(e, "=")
		env[key] = value
	}
	c := call{
		verb: env["CNI_COMMAND"], id: env["CNI_CONTAINERID"], netns: env["CNI_NETNS"], ifname: env["CNI_IFNAME"],
		plugin: filepath.Base(path), args: env["CNI_ARGS"],
	}
	if err := json.Unmarshal(stdin, &c.conf); err != nil {
		return nil, err
	}
	f.mu.Lock()
	f.calls = append(f.calls, c)
	act := f.act
	f.mu.Unlock()
	if act == nil {
		act = func(_ context.Context, c call) (string, error) { return plainAnswer(c) }
	}
	out, err := act(ctx, c)
	return []byte(out), err
}

func (f *fakePlugins) take() []call {
	f.mu.Lock()
	defer f.mu.Unlock()
	calls := f.calls
	f.calls = nil
	return calls
}

func (f *fakePlugins) answer(act func(ctx context.Context, c call) (string, error)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.act = act
}

func plainAnswer(c call) (string, error) {
	if c.verb != "ADD" {
		return "", nil
	}
	err := inNamespace(c.netns, func(h *netlink.Handle) error {
		return addVeth(h, "eth0", 1500, "10.0.0.2/24")
	})
	return `{"cniVersion":"1.0.0","interfaces":[{"name":"eth0","sandbox":"x"}],"ips":[{"interface":0,"address":"10.0.0.2/24"}]}`, err
}

// addVeth makes an interface of which the other end is in the same namespace.
func addVeth(h *netlink.Handle, name string, mtu int, addresses ...string) error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU = name, mtu
	veth := &netlink.Veth{LinkAttrs: attrs, PeerName: "p" + name}
	if err := h.LinkAdd(veth); err != nil {
		return err
	}
	if err := h.LinkSetUp(veth); err != nil {
		return err
	}
	for _, a := range addresses {
		addr, err := netlink.ParseAddr(a)
		if err != nil {
			return err
		}
		addr.Flags = unix.IFA_F_NODAD
		if err := h.AddrAdd(veth, addr); err != nil {
			return err
		}
	}
	return nil
}

const oneplugin = `{"cniVersion":"1.0.0","name":"fake","plugins":[{"type":"one","capabilities":{"portMappings":true,"bandwidth":true,"dns":true,"cgroupPath":true,"aliases":true,"io.kubernetes.cri.pod-annotations":true}}]}`

func verbs(calls []call) (all []string) {
	for _, c := range calls {
		all = append(all, c.verb+" "+c.plugin)
	}
	return all
}

func TestWhatPluginsAreTold(t *testing.T) {
	needRoot(t)
	fake := &fakePlugins{}
	n := testNetwork(t, oneplugin, "/plugins", fake)
	p := Pod{
		ID: "told", Name: "web-0", Namespace: "shop", UID: "1-2-3", CgroupParent: "/kubepods/pod1", Hostname: "web",
		PortMappings: []PortMapping{
			{Protocol: "UDP", ContainerPort: 53, HostPort: 5353, HostIP: "127.0.0.1"},
			{ContainerPort: 80}, // no host port: not for plugins
			{ContainerPort: 443, HostPort: 8443},
		},
		DNS:              DNS{Servers: []string{"10.96.0.10"}, Searches: []string{"svc"}, Options: []string{"ndots:5"}},
		IngressBandwidth: 1e9, EgressBandwidth: 1e6,
		Annotations: map[string]string{"team": "a"},
	}
	mustAdd(t, n, p)
	mustDel(t, n, p)
	calls := fake.take()
	if got := verbs(calls); !reflect.DeepEqual(got, []string{"ADD one", "DEL one"}) {
		t.Fatalf("calls %v", got)
	}
	want := `{"aliases":["web"],"bandwidth":{"egressBurst":8388608,"egressRate":1000000,"ingressBurst":100000000,"ingressRate":1000000000},` +
		`"cgroupPath":"/kubepods/pod1","dns":{"options":["ndots:5"],"searches":["svc"],"servers":["10.96.0.10"]},` +
		`"io.kubernetes.cri.pod-annotations":{"team":"a"},` +
		`"portMappings":[{"containerPort":53,"hostIP":"127.0.0.1","hostPort":5353,"protocol":"udp"},{"containerPort":443,"hostPort":8443,"protocol":"tcp"}]}`
	for _, c := range calls {
		got, err := json.Marshal(c.conf["runtimeConfig"])
		if err != nil || string(got) != want {
			t.Errorf("%s: capabilities\n%s\nwant\n%s", c.verb, got, want)
		}
		if c.args != "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0;K8S_POD_INFRA_CONTAINER_ID=told;K8S_POD_UID=1-2-3" {
			t.Errorf("%s: CNI_ARGS %s", c.verb, c.args)
		}
		if c.id != "told" || c.ifname != "eth0" || c.netns != n.netnsPath("told") {
			t.Errorf("%s: %+v", c.verb, c)
		}
	}
	if calls[1].conf["prevResult"] == nil {
		t.Error("DEL without the result of ADD")
	}
	if _, err := n.Add(t.Context(), Pod{ID: "told"}); !errdefs.IsNotFound(err) {
		t.Errorf("ADD without Prepare: %v", err)
	}
	mustPrepare(t, n, "forged")
	if _, err := n.Add(t.Context(), Pod{ID: "forged", Name: "a;K8S_POD_NAME=b"}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("forged CNI_ARGS: %v", err)
	}
	mustDel(t, n, Pod{ID: "forged"})
}

// A pod as calico, AWS and multus make it: link-local gateway behind a link route, a fixed neighbour, an
// onlink gateway, a peer address, a second interface that is not in the result, and things to leave out.
func TestInspectReadsWhatResultsDoNotSay(t *testing.T) {
	needRoot(t)
	fake := &fakePlugins{}
	fake.act = func(_ context.Context, c call) (string, error) {
		if c.verb != "ADD" {
			return "", nil
		}
		err := inNamespace(c.netns, func(h *netlink.Handle) error {
			if err := errors.Join(
				addVeth(h, "net1", 9000, "192.168.7.2/24"),
				addVeth(h, "eth0", 1430, "10.1.0.9/32", "fd00::9/128", "10.1.0.5/32", "172.16.0.2/24"),
				h.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "br0"}}),
			); err != nil {
				return err
			}
			eth0, err := h.LinkByName("eth0")
			if err != nil {
				return err
			}
			dst := func(s string) *net.IPNet { return ipNet(netip.MustParsePrefix(s)) }
			gw := net.ParseIP("169.254.1.1")
			for _, r := range []netlink.Route{
				{Dst: dst("169.254.1.1/32"), Scope: netlink.SCOPE_LINK},
				{Dst: dst("0.0.0.0/0"), Gw: gw, MTU: 1400, AdvMSS: 1360, Src: net.ParseIP("10.1.0.9")},
				{Dst: dst("10.5.0.0/16"), Gw: net.ParseIP("10.9.9.9"), Flags: int(netlink.FLAG_ONLINK), Priority: 77},
				{Dst: dst("::/0"), Gw: net.ParseIP("fe80::1"), Priority: 1024},
				{Dst: dst("10.66.0.0/16"), Gw: gw, Table: 66},
				{Dst: dst("10.13.0.0/16"), Type: unix.RTN_BLACKHOLE},
			} {
				r.LinkIndex = eth0.Attrs().Index
				if r.Type == unix.RTN_BLACKHOLE {
					r.LinkIndex = 0
				}
				if err := h.RouteAdd(&r); err != nil {
					return fmt.Errorf("%v: %w", r.Dst, err)
				}
			}
			if err := h.RouteDel(&netlink.Route{LinkIndex: eth0.Attrs().Index, Dst: dst("172.16.0.0/24"), Scope: netlink.SCOPE_LINK}); err != nil {
				return err
			}
			mac, _ := net.ParseMAC("ee:ee:ee:ee:ee:ee")
			return h.NeighAdd(&netlink.Neigh{LinkIndex: eth0.Attrs().Index, IP: gw, HardwareAddr: mac, State: unix.NUD_PERMANENT})
		})
		return `{"cniVersion":"1.0.0","interfaces":[{"name":"eth0","sandbox":"x"}],"dns":{"nameservers":["1.2.3.4"]},
		 "ips":[{"interface":0,"address":"fd00::9/128"},{"interface":0,"address":"10.1.0.5/32"}]}`, err
	}
	n := testNetwork(t, oneplugin, "/plugins", fake)
	p := Pod{ID: "odd"}
	att := mustAdd(t, n, p)

	// The veth's other ends, which real plugins would not leave in the pod, come last.
	var names []string
	for _, i := range att.Interfaces {
		names = append(names, i.Name+"="+i.Tap)
	}
	if len(names) < 2 || names[0] != "eth0=tap0" || names[1] != "net1=tap1" && names[1] != "pnet1=tap1" {
		t.Errorf("interfaces %v", names)
	}
	if strings.Contains(strings.Join(names, " "), "br0") {
		t.Errorf("the bridge was taken for a way out: %v", names)
	}
	if got := fmt.Sprint(att.Interfaces[0].Addresses); got != "[fd00::9/128 10.1.0.5/32 10.1.0.9/32 172.16.0.2/32]" {
		t.Errorf("addresses %s", got)
	}
	if got := fmt.Sprint(att.IPs); got != "[fd00::9 10.1.0.5 10.1.0.9 172.16.0.2]" {
		t.Errorf("IPs %s", got)
	}
	var routes []string
	for _, r := range att.Routes {
		if r.Interface == "eth0" {
			routes = append(routes, fmt.Sprintf("%s via %v src %v mtu %d mss %d prio %d table %d scope %d", r.Destination, r.Gateway, r.Source, r.MTU, r.AdvMSS, r.Priority, r.Table, r.Scope))
		}
	}
	none := netip.Addr{}.String()
	want := []string{
		"10.9.9.9/32 via " + none + " src " + none + " mtu 0 mss 0 prio 0 table 0 scope 253",
		"169.254.1.1/32 via " + none + " src " + none + " mtu 0 mss 0 prio 0 table 0 scope 253",
		"10.5.0.0/16 via 10.9.9.9 src " + none + " mtu 0 mss 0 prio 77 table 0 scope 0",
		"10.66.0.0/16 via 169.254.1.1 src " + none + " mtu 0 mss 0 prio 0 table 66 scope 0",
		"0.0.0.0/0 via 169.254.1.1 src 10.1.0.9 mtu 1400 mss 1360 prio 0 table 0 scope 0",
		"::/0 via fe80::1 src " + none + " mtu 0 mss 0 prio 1024 table 0 scope 0",
	}
	if !reflect.DeepEqual(routes, want) {
		t.Errorf("routes\n%s\nwant\n%s", strings.Join(routes, "\n"), strings.Join(want, "\n"))
	}
	if len(att.Neighbours) != 1 || att.Neighbours[0] != (Neighbour{netip.MustParseAddr("169.254.1.1"), "ee:ee:ee:ee:ee:ee", "eth0"}) {
		t.Errorf("neighbours %+v", att.Neighbours)
	}
	if !reflect.DeepEqual(att.DNS, DNS{Servers: []string{"1.2.3.4"}}) {
		t.Errorf("DNS %+v", att.DNS)
	}
	err := inNamespace(n.netnsPath(p.ID), func(h *netlink.Handle) error {
		for _, i := range att.Interfaces {
			link, err := h.LinkByName(i.Tap)
			if err != nil {
				return err
			}
			if link.Attrs().MTU != i.MTU {
				t.Errorf("MTU %d of %s, %d of %s", link.Attrs().MTU, i.Tap, i.MTU, i.Name)
			}
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	startGuest(t, n, p.ID, att) // a kernel takes these routes in this order
	mustDel(t, n, p)
}

func TestAddErrors(t *testing.T) {
	needRoot(t)
	fail := func(code uint) func(context.Context, call) (string, error) {
		return func(_ context.Context, c call) (string, error) {
			if c.verb == "ADD" {
				return "", types.NewError(code, "no luck", "")
			}
			return "", nil
		}
	}
	nothing := func(_ context.Context, c call) (string, error) { return `{"cniVersion":"1.0.0"}`, nil }
	tests := []struct {
		name string
		conf string
		act  func(context.Context, call) (string, error)
		is   func(error) bool
		says string
		dels bool // DEL must reach the plugin
	}{
		{"try again later", oneplugin, fail(11), errdefs.IsUnavailable, "no luck", true},
		{"bad configuration", oneplugin, fail(7), errdefs.IsFailedPrecondition, "no luck", true},
		{"other code", oneplugin, fail(100), errdefs.IsInternal, "no luck", true},
		{"no eth0", oneplugin, nothing, errdefs.IsFailedPrecondition, "no interface eth0", true},
		{"garbage", oneplugin, func(context.Context, call) (string, error) { return "{", nil }, errdefs.IsInternal, `network "fake"`, true},
		{"no address", oneplugin, func(_ context.Context, c call) (string, error) {
			if c.verb != "ADD" {
				return "", nil
			}
			return `{"cniVersion":"1.0.0"}`, inNamespace(c.netns, func(h *netlink.Handle) error { return addVeth(h, "eth0", 1500) })
		}, errdefs.IsFailedPrecondition, "no address", true},
		{"plugin missing", `{"cniVersion":"1.0.0","name":"fake","plugins":[{"type":"absent"}]}`, nil, errdefs.IsFailedPrecondition, "absent", false},
		{"no configuration", "", nil, errdefs.IsUnavailable, "net.d", false},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			fake := &fakePlugins{act: test.act}
			n := testNetwork(t, test.conf, "/plugins", fake)
			p := Pod{ID: "failing"}
			mustPrepare(t, n, p.ID)
			_, err := n.Add(t.Context(), p)
			if err == nil || !test.is(err) || !strings.Contains(err.Error(), test.says) || !strings.Contains(err.Error(), "failing") {
				t.Fatalf("ADD: %v", err)
			}
			fake.take()
			fake.answer(nil)
			if test.name == "plugin missing" {
				// Not DEL's fault, but the lease may exist: kubelet must be told to try again.
				if err := n.Del(t.Context(), p); !errdefs.IsFailedPrecondition(err) {
					t.Errorf("DEL: %v", err)
				}
				rec, err := n.readRecord(p.ID)
				if err != nil {
					t.Fatal(err)
				}
				rec.Config = []byte(oneplugin) // installed at last
				if err := n.writeRecord(rec); err != nil {
					t.Fatal(err)
				}
			} else if test.dels {
				if _, err := n.Add(t.Context(), p); !errdefs.IsFailedPrecondition(err) {
					t.Errorf("ADD after a failed one: %v", err)
				}
			}
			mustDel(t, n, p)
			if calls := fake.take(); test.dels && (len(calls) != 1 || calls[0].verb != "DEL" || calls[0].netns == "") {
				t.Errorf("calls %+v", calls)
			}
		})
	}
}

// DEL must be told what ADD was told, whatever became of files since.
func TestDelUsesWhatAddUsed(t *testing.T) {
	needRoot(t)
	const other = `{"cniVersion":"1.0.0","name":"other","plugins":[{"type":"two"}]}`
	tests := []struct {
		name    string
		failAdd bool
		lose    func(t *testing.T, n *Network) // after ADD
		plugin  string
		netns   bool
		result  bool
	}{
		{"configuration changed", false, nil, "one", true, true},
		{"configuration changed after a failed ADD", true, nil, "one", true, false},
		{"namespace gone", false, func(t *testing.T, n *Network) {
			if err := removeNamespace(n.netnsPath("pod")); err != nil {
				t.Fatal(err)
			}
		}, "one", false, true},
		{"record lost", false, func(t *testing.T, n *Network) {
			if err := n.removeRecord("pod"); err != nil {
				t.Fatal(err)
			}
		}, "one", true, true},
		{"record broken", false, func(t *testing.T, n *Network) {
			if err := os.WriteFile(n.recordPath("pod"), []byte(`{"ID":"po`), 0o600); err != nil {
				t.Fatal(err)
			}
		}, "one", true, true},
		{"libcni's cache lost", false, func(t *testing.T, n *Network) {
			if err := os.RemoveAll(filepath.Join(n.config.CacheDir, "results")); err != nil {
				t.Fatal(err)
			}
		}, "one", true, false},
		{"all lost", false, func(t *testing.T, n *Network) {
			if err := errors.Join(os.RemoveAll(filepath.Join(n.config.CacheDir, "results")), n.removeRecord("pod")); err != nil {
				t.Fatal(err)
			}
		}, "two", true, false}, // the best that is left
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			fake := &fakePlugins{}
			n := testNetwork(t, oneplugin, "/plugins", fake)
			p := Pod{ID: "pod", Name: "web"}
			mustPrepare(t, n, p.ID)
			if test.failAdd {
				fake.answer(func(context.Context, call) (string, error) { return "", errors.New("no") })
			}
			if _, err := n.Add(t.Context(), p); (err != nil) != test.failAdd {
				t.Fatal(err)
			}
			fake.take()
			fake.answer(nil)
			writeConf(t, n.config.ConfDir, "00-other.conflist", other)
			eventually(t, func() error {
				if list, err := n.configuredNetwork(); err != nil || list.Name != "other" {
					return fmt.Errorf("not reloaded: %v", err)
				}
				return nil
			})
			if test.lose != nil {
				test.lose(t, n)
			}
			mustDel(t, n, p)
			calls := fake.take()
			if len(calls) != 1 || calls[0].verb != "DEL" || calls[0].plugin != test.plugin ||
				(calls[0].netns != "") != test.netns || (calls[0].conf["prevResult"] != nil) != test.result {
				t.Errorf("calls %+v", calls)
			}
		})
	}
}

func TestFailedDelKeepsWhatTheNextNeeds(t *testing.T) {
	needRoot(t)
	fake := &fakePlugins{}
	n := testNetwork(t, oneplugin, "/plugins", fake)
	p := Pod{ID: "stuck"}
	mustAdd(t, n, p)
	fake.answer(func(context.Context, call) (string, error) { return "", types.NewError(11, "later", "") })
	if err := n.Del(t.Context(), p); !errdefs.IsUnavailable(err) {
		t.Errorf("DEL: %v", err)
	}
	if !isNamespace(n.netnsPath(p.ID)) {
		t.Error("namespace is gone")
	}
	fake.answer(nil)
	fake.take()
	mustDel(t, n, p)
	if calls := fake.take(); len(calls) != 1 || calls[0].netns == "" || calls[0].conf["prevResult"] == nil {
		t.Errorf("calls %+v", calls)
	}
}

// A hanging plugin, with a child that holds its pipe, ends with the time limit, both of them; meanwhile
// other pods and the configuration go on.
func TestHangingPlugin(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	pids := filepath.Join(dir, "pids")
	script := fmt.Sprintf(`#!/bin/sh
case "$CNI_CONTAINERID $CNI_COMMAND" in
"hung ADD") echo "stuck on purpose" >&2; sleep 300 & echo $$ $! > %[1]s.new; mv %[1]s.new %[1]s; wait;;
*ADD) exit 3;;
esac
`, pids)
	if err := os.WriteFile(filepath.Join(dir, "slow"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	n := testNetwork(t, `{"cniVersion":"1.0.0","name":"slow","plugins":[{"type":"slow"}]}`, dir, nil, func(c *Config) { c.AddTimeout = 2 * time.Second })
	mustPrepare(t, n, "hung")
	mustPrepare(t, n, "other")
	type outcome struct {
		err  error
		took time.Duration
	}
	hung := make(chan outcome, 1)
	go func() {
		start := time.Now()
		_, err := n.Add(context.Background(), Pod{ID: "hung"})
		hung <- outcome{err, time.Since(start)}
	}()
	eventually(t, func() error { _, err := os.Stat(pids); return err })

	short, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := n.Del(short, Pod{ID: "hung"}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("DEL beside ADD of the same pod: %v", err)
	}
	if _, err := n.Add(t.Context(), Pod{ID: "other"}); !errdefs.IsInternal(err) || !strings.Contains(err.Error(), "exit status 3") {
		t.Errorf("another pod's ADD: %v", err)
	}
	if err := n.Del(t.Context(), Pod{ID: "other"}); err != nil {
		t.Errorf("another pod's DEL: %v", err)
	}
	writeConf(t, n.config.ConfDir, "00-first.conflist", `{"cniVersion":"1.0.0","name":"first","plugins":[{"type":"slow"}]}`)
	eventually(t, func() error {
		if list, err := n.configuredNetwork(); err != nil || list.Name != "first" {
			return fmt.Errorf("not reloaded: %v", err)
		}
		return nil
	})
	select {
	case o := <-hung:
		t.Fatalf("ADD did not hang while the rest went on, the test proves nothing: %v", o.err)
	default:
	}
	o := <-hung
	if !errors.Is(o.err, context.DeadlineExceeded) || !strings.Contains(o.err.Error(), "stuck on purpose") {
		t.Errorf("ADD: %v", o.err)
	}
	if o.took > 5*time.Second {
		t.Errorf("ADD took %v, limit 2s", o.took)
	}
	data, err := os.ReadFile(pids)
	if err != nil {
		t.Fatal(err)
	}
	for _, pid := range strings.Fields(string(data)) {
		eventually(t, func() error {
			out, err := os.ReadFile("/proc/" + pid + "/stat")
			if err == nil && !strings.Contains(string(out), ") Z ") {
				return fmt.Errorf("process of the plugin still runs: %s", out)
			}
			return nil
		})
	}
	mustDel(t, n, Pod{ID: "hung"})
}

func TestPluginProcess(t *testing.T) {
	dir := t.TempDir()
	tests := []struct {
		name, script string
		out, says    string
	}{
		{"result", `cat; echo noise >&2`, `in`, ""},
		{"CNI error", `echo '{"code":11,"msg":"pool empty","details":"try"}'; exit 1`, "", "pool empty; try"},
		{"no CNI error", `echo oops; echo cause >&2; exit 2`, "", `cause`},
		{"too much", `head -c 5000000 /dev/zero`, "", "more than"},
		{"left a child", `echo done; sleep 60 & echo $! > ` + dir + `/child`, "done\n", ""},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			path := filepath.Join(dir, "plugin")
			if err := os.WriteFile(path, []byte("#!/bin/sh\n"+test.script+"\n"), 0o755); err != nil {
				t.Fatal(err)
			}
			out, err := (&pluginExec{}).ExecPlugin(t.Context(), path, []byte("in"), os.Environ())
			if string(out) != test.out || (err == nil) != (test.says == "") || err != nil && !strings.Contains(err.Error(), test.says) {
				t.Errorf("%.100q, %v", out, err)
			}
		})
	}
	if pid, err := os.ReadFile(dir + "/child"); err == nil {
		if err := exec.Command("kill", strings.TrimSpace(string(pid))).Run(); err != nil {
			t.Error(err)
		}
	}
}

func TestGC(t *testing.T) {
	needRoot(t)
	fake := &fakePlugins{}
	conf := strings.Replace(oneplugin, `"1.0.0"`, `"1.1.0"`, 1)
	shared := t.TempDir()
	change := func(c *Config) {
		c.CacheDir, c.NetnsDir, c.ConfDir = filepath.Join(shared, "cache"), filepath.Join(shared, "netns"), filepath.Join(shared, "net.d")
	}
	later := testNetwork(t, conf, "/plugins", fake, change) // the daemon after a restart; also checks for leaks last
	earlier := testNetwork(t, conf, "/plugins", fake, change, func(c *Config) { c.ConfDir = filepath.Join(shared, "net.d") })
	t.Cleanup(func() {
		for _, id := range []string{"kept", "fresh"} {
			if err := later.Del(context.Background(), Pod{ID: id}); err != nil {
				t.Error(err)
			}
		}
	})
	for _, id := range []string{"kept", "gone", "lost-record", "lost-netns"} {
		mustAdd(t, earlier, Pod{ID: id})
	}
	mustPrepare(t, earlier, "slot")
	if err := errors.Join(earlier.removeRecord("lost-record"), removeNamespace(earlier.netnsPath("lost-netns")),
		os.WriteFile(earlier.netnsPath("leftover"), nil, 0o444),
		os.WriteFile(earlier.newPath("half"), []byte("{"), 0o600), // a daemon was killed as it wrote
		os.WriteFile(filepath.Join(shared, "netns", "foreign"), nil, 0o444)); err != nil {
		t.Fatal(err)
	}
	mustPrepare(t, later, "fresh")
	fake.take()
	fake.answer(func(_ context.Context, c call) (string, error) {
		if c.verb == "GC" {
			return "", types.NewError(types.ErrIncompatibleCNIVersion, "plugin version does not allow GC", "")
		}
		return "", nil
	})
	if err := later.GC(t.Context(), []string{"kept"}); err != nil {
		t.Fatal(err)
	}
	dels := map[string]int{}
	for _, c := range fake.take() {
		switch c.verb {
		case "DEL":
			dels[c.id]++
		case "GC":
			got, err := json.Marshal(c.conf["cni.dev/valid-attachments"])
			if err != nil || string(got) != `[{"containerID":"fresh","ifname":"eth0"},{"containerID":"kept","ifname":"eth0"}]` {
				t.Errorf("valid attachments %s", got)
			}
			dels["verb GC"]++
		}
	}
	// Of "leftover" and "half" nothing is known, so the current network's DEL is the best guess.
	if want := map[string]int{"gone": 1, "lost-record": 1, "lost-netns": 1, "leftover": 1, "half": 1, "verb GC": 1}; !reflect.DeepEqual(dels, want) {
		t.Errorf("DEL %v, want %v", dels, want)
	}
	for dir, want := range map[string][]string{"netns": {"crivm-fresh", "crivm-kept", "foreign"}, "cache/pods": {"fresh.json", "kept.json"}} {
		entries, err := os.ReadDir(filepath.Join(shared, dir))
		if err != nil {
			t.Fatal(err)
		}
		var names []string
		for _, e := range entries {
			names = append(names, e.Name())
		}
		if !reflect.DeepEqual(names, want) {
			t.Errorf("%s holds %v", dir, names)
		}
	}
	if err := later.Check(t.Context(), "kept"); err != nil {
		t.Errorf("the kept pod: %v", err)
	}
	fake.answer(func(context.Context, call) (string, error) { return "", types.NewError(100, "broken", "") })
	if err := later.GC(t.Context(), []string{"kept"}); err == nil || !strings.Contains(err.Error(), "broken") {
		t.Errorf("GC with a failing plugin: %v", err)
	}
	fake.answer(nil)
	if err := os.Remove(filepath.Join(shared, "netns", "foreign")); err != nil {
		t.Fatal(err)
	}
}
