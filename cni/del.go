package cni

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/containernetworking/cni/libcni"
	"github.com/vishvananda/netlink"
)

// Del runs the plugins' DEL, with the configuration and result that ADD had, and then removes taps and
// namespace. A missing namespace is no obstacle: plugins still return addresses and remove host rules.
// Where nothing is recorded of the pod DEL runs with the current configuration, if there is one. For a
// pod that was only prepared no plugin runs.
//
// Idempotent. When plugins fail the namespace and the record are kept for the next try.
func (n *Network) Del(ctx context.Context, p Pod) error {
	if err := validID(p.ID); err != nil {
		return err
	}
	unlock, err := n.pods.lock(ctx, p.ID)
	if err != nil {
		return fmt.Errorf("network of %s: %w", p.ID, err)
	}
	defer unlock()
	return n.delLocked(ctx, p)
}

func (n *Network) delLocked(ctx context.Context, p Pod) error {
	ctx, cancel := context.WithTimeout(ctx, n.config.DelTimeout)
	defer cancel()
	if err := n.delPlugins(ctx, p); err != nil {
		return err
	}
	path := n.netnsPath(p.ID)
	if isNamespace(path) {
		// The namespace lives on while a process is in it; its taps shall not.
		if err := inNamespace(path, removeTaps); err != nil {
			return fmt.Errorf("network namespace %s: %w", path, err)
		}
	}
	if err := removeNamespace(path); err != nil {
		return fmt.Errorf("network namespace %s: %w", path, err)
	}
	if err := n.removeRecord(p.ID); err != nil {
		return err
	}
	n.live.Delete(p.ID)
	return nil
}

// delPlugins runs DEL for everything that is recorded of p.
func (n *Network) delPlugins(ctx context.Context, p Pod) error {
	rec, err := n.readRecord(p.ID)
	switch {
	case err == nil && rec.Phase == phasePrepared:
		return nil
	case err == nil:
		list, err := parseConfiguration(rec.Config)
		if err != nil {
			return fmt.Errorf("network of %s: recorded configuration: %w", p.ID, err)
		}
		return n.delNetwork(ctx, list, rec)
	case !errdefs.IsNotFound(err):
		slog.WarnContext(ctx, "going on without the network's record", "sandbox", p.ID, "error", err)
	}

	cached, err := n.libcni.GetCachedAttachments(p.ID)
	if err != nil {
		return fmt.Errorf("network of %s: cached results: %w", p.ID, err)
	}
	var errs []error
	for _, c := range cached {
		list, err := parseConfiguration(c.Config)
		if err != nil {
			slog.WarnContext(ctx, "cached network configuration unusable", "sandbox", p.ID, "network", c.Network, "error", err)
			continue
		}
		errs = append(errs, n.delNetwork(ctx, list, record{ID: p.ID, Args: c.CniArgs, Capabilities: c.CapabilityArgs}))
	}
	if len(errs) > 0 {
		return errors.Join(errs...)
	}

	list, err := n.configuredNetwork()
	if err != nil {
		slog.WarnContext(ctx, "no DEL: nothing recorded and no network configured", "sandbox", p.ID, "error", err)
		return nil
	}
	rec = record{ID: p.ID, Capabilities: wanted(list, capabilities(p))}
	if rec.Args, err = cniArgs(p); err != nil {
		return err
	}
	return n.delNetwork(ctx, list, rec)
}

func (n *Network) delNetwork(ctx context.Context, list *libcni.NetworkConfigList, rec record) error {
	if err := n.libcni.DelNetworkList(ctx, list, n.runtimeConf(rec)); err != nil {
		return fmt.Errorf("network of %s: DEL from network %q: %w", rec.ID, list.Name, classify(ctx, err))
	}
	return nil
}

func removeTaps(h *netlink.Handle) error {
	links, err := dump(h.LinkList)
	if err != nil {
		return fmt.Errorf("interfaces: %w", err)
	}
	var errs []error
	for _, link := range links {
		if link.Type() != "tuntap" && link.Type() != "tun" || !strings.HasPrefix(link.Attrs().Name, "tap") {
			continue
		}
		if err := h.LinkDel(link); err != nil {
			errs = append(errs, fmt.Errorf("remove %s: %w", link.Attrs().Name, err))
		}
	}
	return errors.Join(errs...)
}
