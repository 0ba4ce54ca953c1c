package cni

import (
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// dumpTries bounds how often a netlink dump is repeated that changed while it was read.
const dumpTries = 5

// dump repeats a netlink dump that was interrupted by a change, and is then incomplete.
func dump[T any](list func() ([]T, error)) (all []T, err error) {
	for range dumpTries {
		if all, err = list(); !errors.Is(err, nl.ErrDumpInterrupted) {
			break
		}
	}
	return all, err
}

// podLinks lists the interfaces to pass on to the guest: eth0 first, then others in the order in which
// they were made. Those count that the plugins reported (named), and, since a meta-plugin reports its main
// network only, every other Ethernet interface that is up and not part of another one.
func podLinks(h *netlink.Handle, named []string) ([]netlink.Link, error) {
	all, err := dump(h.LinkList)
	if err != nil {
		return nil, fmt.Errorf("interfaces: %w", err)
	}
	var links []netlink.Link
	for _, link := range all {
		a := link.Attrs()
		if a.Flags&net.FlagLoopback != 0 || link.Type() == "tuntap" || link.Type() == "tun" {
			continue
		}
		if a.EncapType != "ether" || len(a.HardwareAddr) != 6 {
			if slices.Contains(named, a.Name) || a.Name == ifName {
				return nil, fmt.Errorf("interface %s of kind %s is no Ethernet interface, which a VM needs: %w", a.Name, a.EncapType, errdefs.ErrNotImplemented)
			}
			continue
		}
		if !slices.Contains(named, a.Name) && a.Name != ifName {
			switch link.Type() {
			case "bridge", "ifb", "vrf": // they lead to others, not out of the pod
				continue
			}
			if a.RawFlags&unix.IFF_UP == 0 || a.MasterIndex != 0 {
				continue
			}
		}
		links = append(links, link)
	}
	slices.SortStableFunc(links, func(a, b netlink.Link) int {
		if first, second := a.Attrs().Name == ifName, b.Attrs().Name == ifName; first != second {
			if first {
				return -1
			}
			return 1
		}
		return a.Attrs().Index - b.Attrs().Index
	})
	if len(links) == 0 || links[0].Attrs().Name != ifName {
		return nil, fmt.Errorf("plugins made no interface %s: %w", ifName, errdefs.ErrFailedPrecondition)
	}
	return links, nil
}

// inspect reads what the kernel has for links, which is more than plugins tell in their results (ptp's
// and calico's link routes and fixed neighbours are not in them).
func inspect(h *netlink.Handle, links []netlink.Link) (Attachment, error) {
	var att Attachment
	routes, err := dump(func() ([]netlink.Route, error) {
		return h.RouteListFiltered(unix.AF_UNSPEC, &netlink.Route{Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_TABLE)
	})
	if err != nil {
		return Attachment{}, fmt.Errorf("routes: %w", err)
	}
	for _, link := range links {
		a := link.Attrs()
		i := Interface{Name: a.Name, MAC: a.HardwareAddr.String(), MTU: a.MTU}
		connected := map[netip.Prefix]bool{} // subnets the kernel has a route to
		for _, r := range routes {
			if r.LinkIndex == a.Index && r.Protocol == unix.RTPROT_KERNEL {
				connected[routeDestination(r)] = true
			}
		}
		addresses, err := dump(func() ([]netlink.Addr, error) { return h.AddrList(link, unix.AF_UNSPEC) })
		if err != nil {
			return Attachment{}, fmt.Errorf("addresses of %s: %w", a.Name, err)
		}
		subnets := map[netip.Prefix]bool{} // to which the guest's kernel makes a route by itself
		for _, address := range addresses {
			p, ok := toPrefix(address.IPNet)
			if !ok || p.Addr().IsLinkLocalUnicast() && p.Addr().Is6() { // the guest makes its own from the MAC
				continue
			}
			if !p.IsSingleIP() && !connected[p.Masked()] {
				p = netip.PrefixFrom(p.Addr(), p.Addr().BitLen())
			}
			subnets[p.Masked()] = true
			i.Addresses = append(i.Addresses, p)
		}
		att.Interfaces = append(att.Interfaces, i)
		for _, r := range routes {
			if r.LinkIndex == a.Index || len(r.MultiPath) > 0 && r.MultiPath[0].LinkIndex == a.Index {
				att.Routes = append(att.Routes, guestRoutes(r, a.Name, subnets)...)
			}
		}
		neighbours, err := fixedNeighbours(h, link)
		if err != nil {
			return Attachment{}, err
		}
		att.Neighbours = append(att.Neighbours, neighbours...)
	}
	// What is on the link comes before what lies behind it.
	slices.SortStableFunc(att.Routes, func(a, b Route) int {
		if a.Gateway.IsValid() != b.Gateway.IsValid() {
			if b.Gateway.IsValid() {
				return -1
			}
			return 1
		}
		return cmp.Or(b.Destination.Bits()-a.Destination.Bits(), a.Destination.Addr().Compare(b.Destination.Addr()))
	})
	return att, nil
}

// guestRoutes turns a route of the namespace into what the guest needs for it: nothing when its kernel
// makes the route by itself, and for a gateway declared "onlink" a route to that gateway too.
func guestRoutes(r netlink.Route, ifname string, subnets map[netip.Prefix]bool) []Route {
	if len(r.MultiPath) > 0 {
		slog.Warn("multipath route: the guest gets its first next hop only", "interface", ifname, "destination", r.Dst)
		r.Gw, r.Flags = r.MultiPath[0].Gw, r.MultiPath[0].Flags
	}
	dst := routeDestination(r)
	if r.Type != unix.RTN_UNICAST || r.Table == unix.RT_TABLE_LOCAL || !dst.IsValid() ||
		dst.Addr().IsMulticast() || dst.Addr().Is6() && dst.Addr().IsLinkLocalUnicast() {
		return nil
	}
	if r.Protocol == unix.RTPROT_RA || r.Protocol == unix.RTPROT_KERNEL && subnets[dst] {
		return nil
	}
	route := Route{
		Destination: dst, Gateway: toAddr(r.Gw), Interface: ifname, Source: toAddr(r.Src),
		MTU: r.MTU, AdvMSS: r.AdvMSS, Priority: r.Priority, Table: r.Table, Scope: int(r.Scope),
	}
	if route.Table == unix.RT_TABLE_MAIN {
		route.Table = 0
	}
	if via, ok := r.Via.(*netlink.Via); ok && !route.Gateway.IsValid() {
		route.Gateway = toAddr(via.Addr)
	}
	if r.Flags&int(netlink.FLAG_ONLINK) == 0 || !route.Gateway.IsValid() {
		return []Route{route}
	}
	return []Route{{
		Destination: netip.PrefixFrom(route.Gateway, route.Gateway.BitLen()), Interface: ifname,
		Table: route.Table, Scope: unix.RT_SCOPE_LINK,
	}, route}
}

func fixedNeighbours(h *netlink.Handle, link netlink.Link) ([]Neighbour, error) {
	list, err := dump(func() ([]netlink.Neigh, error) { return h.NeighList(link.Attrs().Index, unix.AF_UNSPEC) })
	if err != nil {
		return nil, fmt.Errorf("neighbours of %s: %w", link.Attrs().Name, err)
	}
	var fixed []Neighbour
	for _, entry := range list {
		addr := toAddr(entry.IP)
		if entry.State&unix.NUD_PERMANENT == 0 || !addr.IsValid() || len(entry.HardwareAddr) != 6 {
			continue
		}
		fixed = append(fixed, Neighbour{Address: addr, MAC: entry.HardwareAddr.String(), Interface: link.Attrs().Name})
	}
	return fixed, nil
}

// routeDestination is the zero Prefix for what is no IP route.
func routeDestination(r netlink.Route) netip.Prefix {
	if r.Dst != nil {
		p, _ := toPrefix(r.Dst)
		return p
	}
	switch r.Family {
	case unix.AF_INET:
		return netip.PrefixFrom(netip.IPv4Unspecified(), 0)
	case unix.AF_INET6:
		return netip.PrefixFrom(netip.IPv6Unspecified(), 0)
	}
	return netip.Prefix{}
}

func toAddr(ip net.IP) netip.Addr {
	a, _ := netip.AddrFromSlice(ip)
	return a.Unmap()
}

func toPrefix(n *net.IPNet) (netip.Prefix, bool) {
	if n == nil {
		return netip.Prefix{}, false
	}
	ones, bits := n.Mask.Size()
	addr := toAddr(n.IP)
	if !addr.IsValid() || addr.BitLen() != bits {
		return netip.Prefix{}, false
	}
	return netip.PrefixFrom(addr, ones), true
}
