package cni

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/containernetworking/cni/libcni"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/vishvananda/netlink"
)

// Add runs the plugins' ADD on the prepared namespace of p and ties each interface they made to a tap:
// eth0 to the one from Prepare, others to new ones. When it fails the caller must call Del, as plugins may
// have done half of their work. An Add that has succeeded before returns what it did then.
//
// Errors are errdefs.ErrUnavailable when no network is configured or a plugin says to try again later
// (CNI error 11), context.DeadlineExceeded when plugins took longer than Config.AddTimeout.
func (n *Network) Add(ctx context.Context, p Pod) (Attachment, error) {
	if err := validID(p.ID); err != nil {
		return Attachment{}, err
	}
	unlock, err := n.pods.lock(ctx, p.ID)
	if err != nil {
		return Attachment{}, fmt.Errorf("network of %s: %w", p.ID, err)
	}
	defer unlock()
	rec, err := n.readRecord(p.ID)
	if err != nil {
		return Attachment{}, err
	}
	switch rec.Phase {
	case phaseAdded:
		return *rec.Attachment, nil
	case phaseAdding:
		return Attachment{}, fmt.Errorf("network of %s: an earlier ADD has failed and needs DEL first: %w", p.ID, errdefs.ErrFailedPrecondition)
	}
	path := n.netnsPath(p.ID)
	if !isNamespace(path) {
		return Attachment{}, fmt.Errorf("network namespace %s: %w", path, errdefs.ErrNotFound)
	}
	list, err := n.configuredNetwork()
	if err != nil {
		return Attachment{}, fmt.Errorf("network of %s: %w", p.ID, err)
	}
	rec.Phase, rec.Network, rec.Config = phaseAdding, list.Name, list.Bytes
	rec.Capabilities = wanted(list, capabilities(p))
	if rec.Args, err = cniArgs(p); err != nil {
		return Attachment{}, err
	}
	if err := n.writeRecord(rec); err != nil {
		return Attachment{}, err
	}

	ctx, cancel := context.WithTimeout(ctx, n.config.AddTimeout)
	defer cancel()
	result, err := n.libcni.AddNetworkList(ctx, list, n.runtimeConf(rec))
	if err != nil {
		return Attachment{}, fmt.Errorf("network of %s: ADD to network %q: %w", p.ID, list.Name, classify(ctx, err))
	}
	current, err := types100.NewResultFromResult(result)
	if err != nil {
		return Attachment{}, fmt.Errorf("network of %s: result of network %q: %s: %w", p.ID, list.Name, err.Error(), errdefs.ErrInternal)
	}
	att, err := n.attach(rec, current)
	if err != nil {
		return Attachment{}, fmt.Errorf("network of %s: %w", p.ID, err)
	}
	rec.Phase, rec.Attachment = phaseAdded, &att
	if err := n.writeRecord(rec); err != nil {
		return Attachment{}, err
	}
	return att, nil
}

// attach reads what plugins have made of the namespace and ties it to taps.
func (n *Network) attach(rec record, result *types100.Result) (Attachment, error) {
	path := n.netnsPath(rec.ID)
	var named []string
	for _, i := range result.Interfaces {
		if i.Sandbox != "" {
			named = append(named, i.Name)
		}
	}
	var att Attachment
	err := inNamespace(path, func(h *netlink.Handle) error {
		links, err := podLinks(h, named)
		if err != nil {
			return err
		}
		if att, err = inspect(h, links); err != nil {
			return err
		}
		for i, link := range links {
			att.Interfaces[i].Tap = "tap" + strconv.Itoa(i)
			wire, err := ensureTap(h, tap{
				name: att.Interfaces[i].Tap, uid: rec.TapUID, gid: rec.TapGID, mtu: att.Interfaces[i].MTU,
			})
			if err != nil {
				return err
			}
			if err := h.LinkSetUp(link); err != nil {
				return fmt.Errorf("%s: up: %w", link.Attrs().Name, err)
			}
			if err := n.tie(h, link, wire); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return Attachment{}, err
	}
	orderAddresses(&att, result)
	if len(att.IPs) == 0 {
		return Attachment{}, fmt.Errorf("plugins gave %s no address: %w", ifName, errdefs.ErrFailedPrecondition)
	}
	att.DNS = DNS{Servers: result.DNS.Nameservers, Searches: result.DNS.Search, Options: result.DNS.Options}
	return att, nil
}

// orderAddresses puts eth0's addresses into the order of the plugins' result, which says what the pod's
// primary address is; addresses that only the kernel knows come last.
func orderAddresses(att *Attachment, result *types100.Result) {
	place := map[netip.Addr]int{}
	for i, ip := range result.IPs {
		if addr := toAddr(ip.Address.IP); addr.IsValid() {
			place[addr] = i - len(result.IPs) // those not listed have 0
		}
	}
	eth0 := &att.Interfaces[0]
	slices.SortStableFunc(eth0.Addresses, func(a, b netip.Prefix) int { return place[a.Addr()] - place[b.Addr()] })
	att.IPs = nil
	for _, p := range eth0.Addresses {
		att.IPs = append(att.IPs, p.Addr())
	}
}

func (n *Network) runtimeConf(rec record) *libcni.RuntimeConf {
	rt := &libcni.RuntimeConf{
		ContainerID:    rec.ID,
		IfName:         ifName,
		Args:           rec.Args,
		CapabilityArgs: rec.Capabilities,
	}
	// DEL without a namespace is told so by an empty path (CNI 1.1 §2, DEL).
	if path := n.netnsPath(rec.ID); isNamespace(path) {
		rt.NetNS = path
	}
	return rt
}

// cniArgs are the CNI_ARGS that plugins know from other Kubernetes runtimes.
func cniArgs(p Pod) ([][2]string, error) {
	args := [][2]string{
		{"IgnoreUnknown", "1"},
		{"K8S_POD_NAMESPACE", p.Namespace},
		{"K8S_POD_NAME", p.Name},
		{"K8S_POD_INFRA_CONTAINER_ID", p.ID},
		{"K8S_POD_UID", p.UID},
	}
	for _, arg := range args {
		if strings.ContainsAny(arg[1], ";=\x00") {
			return nil, fmt.Errorf("pod %s: %s %q cannot be passed to CNI plugins: %w", p.ID, arg[0], arg[1], errdefs.ErrInvalidArgument)
		}
	}
	return args, nil
}

type portMapArg struct {
	HostPort      int32  `json:"hostPort"`
	ContainerPort int32  `json:"containerPort"`
	Protocol      string `json:"protocol"`
	HostIP        string `json:"hostIP,omitempty"`
}

type bandwidthArg struct {
	IngressRate  int64 `json:"ingressRate,omitempty"`
	IngressBurst int64 `json:"ingressBurst,omitempty"`
	EgressRate   int64 `json:"egressRate,omitempty"`
	EgressBurst  int64 `json:"egressBurst,omitempty"`
}

type dnsArg struct {
	Servers  []string `json:"servers,omitempty"`
	Searches []string `json:"searches,omitempty"`
	Options  []string `json:"options,omitempty"`
}

// capabilities are the arguments named in CNI's conventions; libcni passes each to the plugins whose
// configuration declares it.
func capabilities(p Pod) map[string]any {
	caps := map[string]any{}
	var ports []portMapArg
	for _, m := range p.PortMappings {
		if m.HostPort == 0 {
			continue
		}
		protocol := strings.ToLower(m.Protocol)
		if protocol == "" {
			protocol = "tcp"
		}
		ports = append(ports, portMapArg{HostPort: m.HostPort, ContainerPort: m.ContainerPort, Protocol: protocol, HostIP: m.HostIP})
	}
	if len(ports) > 0 {
		caps["portMappings"] = ports
	}
	if p.IngressBandwidth > 0 || p.EgressBandwidth > 0 {
		caps["bandwidth"] = bandwidthArg{
			IngressRate: p.IngressBandwidth, IngressBurst: burst(p.IngressBandwidth),
			EgressRate: p.EgressBandwidth, EgressBurst: burst(p.EgressBandwidth),
		}
	}
	if len(p.DNS.Servers)+len(p.DNS.Searches)+len(p.DNS.Options) > 0 {
		caps["dns"] = dnsArg(p.DNS)
	}
	if p.CgroupParent != "" {
		caps["cgroupPath"] = p.CgroupParent
	}
	if p.Hostname != "" {
		caps["aliases"] = []string{p.Hostname}
	}
	if len(p.Annotations) > 0 {
		caps["io.kubernetes.cri.pod-annotations"] = p.Annotations
	}
	return caps
}

// wanted drops the capabilities that no plugin of list declares: they would only fill the records.
func wanted(list *libcni.NetworkConfigList, caps map[string]any) map[string]any {
	kept := map[string]any{}
	for _, plugin := range list.Plugins {
		for name, declared := range plugin.Network.Capabilities {
			if arg, ok := caps[name]; ok && declared {
				kept[name] = arg
			}
		}
	}
	return kept
}

// burst is the bucket size in bits for a rate in bits a second: 100 ms of it, but at least 1 MiB, so that
// segments of 64 KiB pass whole, and at most what the plugin takes.
func burst(rate int64) int64 {
	if rate <= 0 {
		return 0
	}
	return min(max(rate/10, 8<<20), 1<<31-1)
}
