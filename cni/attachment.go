package cni

import (
	"net/netip"
)

// Pod is what plugins are told of a pod.
type Pod struct {
	ID           string // as given to Prepare; the CNI container ID
	Name         string
	Namespace    string
	UID          string
	CgroupParent string
	Hostname     string
	PortMappings []PortMapping
	DNS          DNS
	Annotations  map[string]string // passed as containerd does, for plugins that declare that capability

	// Rates in bits a second, 0 for no limit. Ingress is traffic into the pod.
	IngressBandwidth, EgressBandwidth int64
}

// PortMapping asks for a port of the node. Those with HostPort 0 are not passed on.
type PortMapping struct {
	Protocol                string // TCP, UDP or SCTP in any case; "" is TCP
	ContainerPort, HostPort int32
	HostIP                  string // "" is every address of the node
}

// DNS is a resolver configuration.
type DNS struct {
	Servers  []string `json:",omitempty"`
	Searches []string `json:",omitempty"`
	Options  []string `json:",omitempty"`
}

// Attachment is a pod's network as the guest shall have it. It is made for keeping as JSON.
type Attachment struct {
	Interfaces []Interface  // [0] is eth0
	Routes     []Route      `json:",omitempty"` // in the order to add them in: gateways are reachable by earlier ones
	Neighbours []Neighbour  `json:",omitempty"` // permanent ones
	DNS        DNS          // what plugins said; usually nothing
	IPs        []netip.Addr // of eth0, in the order of the plugins' result; the first is the pod's primary one
}

// Interface of the guest, and the tap that carries it.
type Interface struct {
	Name string
	Tap  string
	MAC  string
	MTU  int
	// Addresses have a full-length prefix where the plugin has removed the route to the subnet, as ptp
	// does: the guest's kernel must not bring it back.
	Addresses []netip.Prefix
}

// Route of the guest. Routes that a kernel makes by itself for an address are not listed.
type Route struct {
	Destination netip.Prefix
	Gateway     netip.Addr `json:",omitzero"` // invalid for a route to what is on the link
	Interface   string
	Source      netip.Addr `json:",omitzero"`
	MTU, AdvMSS int        `json:",omitempty"`
	Priority    int        `json:",omitempty"` // metric
	Table       int        `json:",omitempty"` // 0 is the main table
	Scope       int        `json:",omitempty"` // as in rtnetlink(7): 0 universe, 253 link
}

// Neighbour is a fixed ARP or ND entry.
type Neighbour struct {
	Address   netip.Addr
	MAC       string
	Interface string
}
