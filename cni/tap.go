package cni

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// tap says what a VM's tap shall be like.
type tap struct {
	name     string
	uid, gid int // who may open it without CAP_NET_ADMIN
	mtu      int // 0 leaves it
}

// ensureTap makes the tap, or one that has other owners anew, and brings it up. It must run in the
// namespace that the tap shall be in.
func ensureTap(h *netlink.Handle, t tap) (netlink.Link, error) {
	link, err := h.LinkByName(t.name)
	switch {
	case errors.As(err, new(netlink.LinkNotFoundError)):
	case err != nil:
		return nil, fmt.Errorf("tap %s: %w", t.name, err)
	case !t.matches(link):
		if err := h.LinkDel(link); err != nil {
			return nil, fmt.Errorf("tap %s: remove one of other kind: %w", t.name, err)
		}
		link = nil
	}
	if link == nil {
		if err := t.create(); err != nil {
			return nil, fmt.Errorf("tap %s: %w", t.name, err)
		}
		if link, err = h.LinkByName(t.name); err != nil {
			return nil, fmt.Errorf("tap %s: %w", t.name, err)
		}
	}
	// The tap is a wire: the namespace's kernel shall not send router solicitations or multicast reports
	// into the guest.
	err = os.WriteFile("/proc/sys/net/ipv6/conf/"+t.name+"/disable_ipv6", []byte("1"), 0)
	if err != nil && !errors.Is(err, fs.ErrNotExist) { // missing in a kernel without IPv6
		return nil, fmt.Errorf("tap %s: %w", t.name, err)
	}
	if t.mtu > 0 && link.Attrs().MTU != t.mtu {
		if err := h.LinkSetMTU(link, t.mtu); err != nil {
			return nil, fmt.Errorf("tap %s: MTU %d: %w", t.name, t.mtu, err)
		}
	}
	if err := h.LinkSetUp(link); err != nil {
		return nil, fmt.Errorf("tap %s: up: %w", t.name, err)
	}
	return link, nil
}

// matches tells whether link is what create makes.
func (t tap) matches(link netlink.Link) bool {
	have, ok := link.(*netlink.Tuntap)
	return ok && have.Mode == netlink.TUNTAP_MODE_TAP && !have.NonPersist &&
		have.Flags&netlink.TUNTAP_VNET_HDR != 0 && have.Flags&netlink.TUNTAP_MULTI_QUEUE == 0 &&
		have.Owner == uint32(t.uid) && have.Group == uint32(t.gid)
}

func (t tap) create() error {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("/dev/net/tun: %w", err)
	}
	defer unix.Close(fd)
	request, err := unix.NewIfreq(t.name)
	if err != nil {
		return err
	}
	request.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, request); err != nil {
		return fmt.Errorf("TUNSETIFF: %w", err)
	}
	if err := unix.IoctlSetInt(fd, unix.TUNSETOWNER, t.uid); err != nil {
		return fmt.Errorf("TUNSETOWNER %d: %w", t.uid, err)
	}
	if err := unix.IoctlSetInt(fd, unix.TUNSETGROUP, t.gid); err != nil {
		return fmt.Errorf("TUNSETGROUP %d: %w", t.gid, err)
	}
	// Last, so that a tap only stays when it is complete.
	if err := unix.IoctlSetInt(fd, unix.TUNSETPERSIST, 1); err != nil {
		return fmt.Errorf("TUNSETPERSIST: %w", err)
	}
	return nil
}
