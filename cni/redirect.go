package cni

import (
	"errors"
	"fmt"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// tie sends everything that arrives on a out of b and the other way round. Idempotent.
func (n *Network) tie(h *netlink.Handle, a, b netlink.Link) error {
	if err := n.redirect(h, a, b); err != nil {
		return fmt.Errorf("redirect %s to %s: %w", a.Attrs().Name, b.Attrs().Name, err)
	}
	if err := n.redirect(h, b, a); err != nil {
		return fmt.Errorf("redirect %s to %s: %w", b.Attrs().Name, a.Attrs().Name, err)
	}
	return nil
}

func (n *Network) redirect(h *netlink.Handle, from, to netlink.Link) error {
	qdisc := &netlink.Ingress{QdiscAttrs: netlink.QdiscAttrs{
		LinkIndex: from.Attrs().Index,
		Handle:    netlink.MakeHandle(0xffff, 0),
		Parent:    netlink.HANDLE_INGRESS,
	}}
	// EEXIST also for clsact, which a plugin may have put there; a filter at ffff:fff2 suits both.
	if err := h.QdiscAdd(qdisc); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("ingress qdisc: %w", err)
	}
	if done, err := redirects(h, from, to); err != nil || done {
		return err
	}
	attrs := netlink.FilterAttrs{
		LinkIndex: from.Attrs().Index,
		Parent:    netlink.HANDLE_MIN_INGRESS,
		Priority:  1,
		Protocol:  unix.ETH_P_ALL,
	}
	actions := []netlink.Action{netlink.NewMirredAction(to.Attrs().Index)}
	if !n.noMatchall.Load() {
		err := h.FilterAdd(&netlink.MatchAll{FilterAttrs: attrs, Actions: actions})
		if err == nil {
			return nil
		}
		// ENOENT is the kernel's word for a classifier that it does not have and cannot load.
		if !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("matchall filter: %w", err)
		}
		n.noMatchall.Store(true)
	}
	// Without a selector of its own this matches every packet.
	if err := h.FilterAdd(&netlink.U32{FilterAttrs: attrs, Actions: actions}); err != nil {
		return fmt.Errorf("u32 filter: %w", err)
	}
	return nil
}

// redirects tells whether from has a filter that redirects to to.
func redirects(h *netlink.Handle, from, to netlink.Link) (bool, error) {
	filters, err := h.FilterList(from, netlink.HANDLE_MIN_INGRESS)
	if err != nil {
		return false, fmt.Errorf("filters of %s: %w", from.Attrs().Name, err)
	}
	for _, filter := range filters {
		var actions []netlink.Action
		switch f := filter.(type) {
		case *netlink.MatchAll:
			actions = f.Actions
		case *netlink.U32:
			actions = f.Actions
		}
		for _, action := range actions {
			if m, ok := action.(*netlink.MirredAction); ok && m.Ifindex == to.Attrs().Index && m.MirredAction == netlink.TCA_EGRESS_REDIR {
				return true, nil
			}
		}
	}
	return false, nil
}

// checkRedirect is nil when both interfaces exist, are up and are tied together.
func checkRedirect(h *netlink.Handle, ifname, tapname string) error {
	var links [2]netlink.Link
	for i, name := range []string{ifname, tapname} {
		link, err := h.LinkByName(name)
		if errors.As(err, new(netlink.LinkNotFoundError)) {
			return fmt.Errorf("interface %s: %w", name, errdefs.ErrNotFound)
		}
		if err != nil {
			return fmt.Errorf("interface %s: %w", name, err)
		}
		if link.Attrs().RawFlags&unix.IFF_UP == 0 {
			return fmt.Errorf("interface %s is down: %w", name, errdefs.ErrFailedPrecondition)
		}
		links[i] = link
	}
	for i, from := range links {
		to := links[1-i]
		done, err := redirects(h, from, to)
		if err != nil {
			return err
		}
		if !done {
			return fmt.Errorf("%s is not redirected to %s: %w", from.Attrs().Name, to.Attrs().Name, errdefs.ErrFailedPrecondition)
		}
	}
	return nil
}
