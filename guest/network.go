package guest

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/crivm/crivm/agentproto"
)

// network is one use of rtnetlink: one socket, and the names that have been looked up.
type network struct {
	*netlink.Handle
	indexes map[string]int
	pod     *podNamespaces // whose network namespace the handle is for; nil: the guest's
}

// applyNetwork sets interfaces, routes and neighbours up, in the pod's network namespace if it has one. It may be called
// again with the same values.
func applyNetwork(ctx context.Context, pod *podNamespaces, interfaces []*agentproto.Interface, routes []*agentproto.Route, neighbours []*agentproto.Neighbour) error {
	var handle *netlink.Handle
	err := pod.do(func() (err error) {
		handle, err = netlink.NewHandle(unix.NETLINK_ROUTE)
		return err
	})
	if err != nil {
		return fmt.Errorf("rtnetlink: %w", err)
	}
	defer handle.Close()
	n := network{handle, map[string]int{}, pod}
	if pod != nil {
		if err := n.fetch(ctx, interfaces); err != nil {
			return err
		}
	}
	for _, i := range interfaces {
		if err := n.applyInterface(ctx, i); err != nil {
			return fmt.Errorf("interface %s: %w", i.GetName(), err)
		}
	}
	routes = slices.Clone(routes)
	slices.SortStableFunc(routes, func(x, y *agentproto.Route) int { // gateways are reached over link routes
		return cmp.Compare(min(len(x.GetGateway()), 1), min(len(y.GetGateway()), 1))
	})
	for _, r := range routes {
		if err := n.applyRoute(r); err != nil {
			return fmt.Errorf("route %s: %w", r.GetDestination(), err)
		}
	}
	for _, nb := range neighbours {
		if err := n.applyNeighbour(nb); err != nil {
			return fmt.Errorf("neighbour %s: %w", nb.GetAddress(), err)
		}
	}
	return nil
}

func (n network) applyInterface(ctx context.Context, i *agentproto.Interface) error {
	link, err := n.findLink(ctx, i)
	if err != nil {
		return err
	}
	attrs := link.Attrs()
	mac, err := parseMAC(i.GetMac())
	if err != nil {
		return err
	}
	rename := i.GetName() != "" && attrs.Name != i.GetName()
	change := rename || mac != nil && attrs.HardwareAddr.String() != mac.String()
	if change && attrs.Flags&net.FlagUp != 0 {
		if err := n.LinkSetDown(link); err != nil {
			return fmt.Errorf("set down: %w", err)
		}
	}
	if mac != nil && attrs.HardwareAddr.String() != mac.String() {
		if err := n.LinkSetHardwareAddr(link, mac); err != nil {
			return fmt.Errorf("set MAC %s: %w", mac, err)
		}
	}
	if rename {
		if err := n.makeWay(i.GetName()); err != nil {
			return err
		}
		if err := n.LinkSetName(link, i.GetName()); err != nil {
			return fmt.Errorf("rename %s: %w", attrs.Name, err)
		}
	}
	if i.GetMtu() > 0 && attrs.MTU != int(i.GetMtu()) {
		if err := n.LinkSetMTU(link, int(i.GetMtu())); err != nil {
			return fmt.Errorf("set MTU %d: %w", i.GetMtu(), err)
		}
	}
	if err := n.LinkSetUp(link); err != nil {
		return fmt.Errorf("set up: %w", err)
	}
	n.indexes[cmp.Or(i.GetName(), attrs.Name)] = attrs.Index
	for _, a := range i.GetAddresses() {
		addr, err := netlink.ParseAddr(a)
		if err != nil {
			return fmt.Errorf("address %q: %w: %w", a, err, errdefs.ErrInvalidArgument)
		}
		if addr.IP.To4() == nil {
			addr.Flags = unix.IFA_F_NODAD // it is known to be ours, and waiting costs a second
		}
		if err := n.AddrReplace(link, addr); err != nil {
			return fmt.Errorf("add address %s: %w", a, err)
		}
	}
	return nil
}

// findLink waits for the NIC that the host means: it has the VMM's MAC or, if that was replaced by an
// earlier call, already the pod's.
func (n network) findLink(ctx context.Context, i *agentproto.Interface) (netlink.Link, error) {
	if i.GetMatchMac() == "" {
		link, err := n.LinkByName(i.GetName())
		if err != nil {
			return nil, fmt.Errorf("%w: %w", err, errdefs.ErrNotFound)
		}
		return link, nil
	}
	match, err := parseMAC(i.GetMatchMac())
	if err != nil {
		return nil, err
	}
	var found netlink.Link
	err = waitDevice(ctx, "net", func() (ok bool) {
		found, ok = n.matching(match, i)
		return ok
	})
	if err != nil {
		return nil, fmt.Errorf("no NIC with MAC %s: %w: %w", match, err, errdefs.ErrNotFound)
	}
	return found, nil
}

// matching looks for a NIC with the VMM's MAC, or with the pod's MAC and name.
func (n network) matching(match net.HardwareAddr, i *agentproto.Interface) (netlink.Link, bool) {
	links, err := n.LinkList()
	if err != nil {
		slog.Warn("list of NICs", "error", err)
	}
	for _, l := range links {
		attrs := l.Attrs()
		mac := attrs.HardwareAddr.String()
		if l.Type() == "device" && (mac == match.String() ||
			i.GetMac() != "" && strings.EqualFold(mac, i.GetMac()) && attrs.Name == i.GetName()) {
			return l, true
		}
	}
	return nil, false
}

// fetch moves the NICs that are meant into the pod's network namespace, unless they are there. Their names say nothing, so
// that none is in another's way there.
func (n network) fetch(ctx context.Context, interfaces []*agentproto.Interface) error {
	handle, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return fmt.Errorf("rtnetlink: %w", err)
	}
	defer handle.Close()
	guest := network{handle, map[string]int{}, nil}
	for _, i := range interfaces {
		if i.GetMatchMac() == "" {
			continue // by name: the loopback
		}
		match, err := parseMAC(i.GetMatchMac())
		if err != nil {
			return err
		}
		if _, ok := n.matching(match, i); ok {
			continue
		}
		link, err := guest.findLink(ctx, i)
		if err != nil {
			return fmt.Errorf("interface %s: %w", i.GetName(), err)
		}
		err = errors.Join(guest.LinkSetDown(link), guest.LinkSetName(link, "new"+strconv.Itoa(link.Attrs().Index)), guest.LinkSetNsFd(link, int(n.pod.net.Fd())))
		if err != nil {
			return fmt.Errorf("interface %s: move to the pod: %w", i.GetName(), err)
		}
	}
	return nil
}

// makeWay renames a NIC that has the name that another is to get.
func (n network) makeWay(name string) error {
	other, err := n.LinkByName(name)
	if err != nil {
		return nil
	}
	if err := n.LinkSetDown(other); err != nil {
		return fmt.Errorf("set %s down: %w", name, err)
	}
	if err := n.LinkSetName(other, "nic"+strconv.Itoa(other.Attrs().Index)); err != nil {
		return fmt.Errorf("rename %s: %w", name, err)
	}
	return nil
}

func (n network) applyRoute(r *agentproto.Route) error {
	_, dst, err := net.ParseCIDR(r.GetDestination())
	if err != nil {
		return fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	index, err := n.index(r.GetInterface())
	if err != nil {
		return err
	}
	route := &netlink.Route{
		LinkIndex: index, Dst: dst, MTU: int(r.GetMtu()), AdvMSS: int(r.GetAdvmss()),
		Priority: int(r.GetPriority()), Table: int(r.GetTable()), Scope: netlink.Scope(r.GetScope()),
	}
	if route.Gw, err = parseIP(r.GetGateway()); err != nil {
		return err
	}
	if route.Src, err = parseIP(r.GetSource()); err != nil {
		return err
	}
	if err := n.RouteReplace(route); err != nil {
		return fmt.Errorf("via %q on %s: %w", r.GetGateway(), r.GetInterface(), err)
	}
	return nil
}

func (n network) applyNeighbour(nb *agentproto.Neighbour) error {
	ip, err := parseIP(nb.GetAddress())
	if err != nil {
		return err
	}
	mac, err := parseMAC(nb.GetMac())
	if err != nil {
		return err
	}
	index, err := n.index(nb.GetInterface())
	if err != nil {
		return err
	}
	return n.NeighSet(&netlink.Neigh{LinkIndex: index, State: netlink.NUD_PERMANENT, IP: ip, HardwareAddr: mac})
}

// index finds an interface by name.
func (n network) index(name string) (int, error) {
	if index, ok := n.indexes[name]; ok {
		return index, nil
	}
	link, err := n.LinkByName(name)
	if err != nil {
		return 0, fmt.Errorf("interface %s: %w: %w", name, err, errdefs.ErrNotFound)
	}
	n.indexes[name] = link.Attrs().Index
	return link.Attrs().Index, nil
}

func parseMAC(s string) (net.HardwareAddr, error) {
	if s == "" {
		return nil, nil
	}
	mac, err := net.ParseMAC(s)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	return mac, nil
}

func parseIP(s string) (net.IP, error) {
	if s == "" {
		return nil, nil
	}
	ip := net.ParseIP(s)
	if ip == nil {
		return nil, fmt.Errorf("IP address %q: %w", s, errdefs.ErrInvalidArgument)
	}
	return ip, nil
}
