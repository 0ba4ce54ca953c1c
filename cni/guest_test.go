package cni

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// guest stands in for a VM: a namespace whose kernel has, on a tap of its own, what an Attachment says.
// Frames are carried by hand between that tap and the pod's, as a VMM does.
type guest struct {
	t    *testing.T
	path string
}

func startGuest(t *testing.T, n *Network, id string, att Attachment) *guest {
	t.Helper()
	g := &guest{t: t, path: filepath.Join(t.TempDir(), "guest")}
	if err := createNamespace(g.path); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := removeNamespace(g.path); err != nil {
			t.Error(err)
		}
	})
	for _, i := range att.Interfaces {
		vmm := openTap(t, n.netnsPath(id), i.Tap)
		wire := openTap(t, g.path, "w"+i.Name)
		var carrying sync.WaitGroup
		carrying.Go(func() { carry(vmm, wire) })
		carrying.Go(func() { carry(wire, vmm) })
		t.Cleanup(func() {
			vmm.Close()
			wire.Close()
			carrying.Wait()
		})
	}
	if err := inNamespace(g.path, func(h *netlink.Handle) error { return configureGuest(h, att) }); err != nil {
		t.Fatal(err)
	}
	return g
}

// configureGuest does what the agent does.
func configureGuest(h *netlink.Handle, att Attachment) error {
	lo, err := h.LinkByName("lo")
	if err != nil {
		return err
	}
	if err := h.LinkSetUp(lo); err != nil {
		return err
	}
	indexes := map[string]int{}
	for _, i := range att.Interfaces {
		link, err := h.LinkByName("w" + i.Name)
		if err != nil {
			return err
		}
		indexes[i.Name] = link.Attrs().Index
		mac, err := net.ParseMAC(i.MAC)
		if err != nil {
			return err
		}
		if err := errors.Join(h.LinkSetHardwareAddr(link, mac), h.LinkSetMTU(link, i.MTU), h.LinkSetUp(link)); err != nil {
			return fmt.Errorf("%s: %w", i.Name, err)
		}
		for _, p := range i.Addresses {
			if err := h.AddrAdd(link, &netlink.Addr{IPNet: ipNet(p), Flags: unix.IFA_F_NODAD}); err != nil {
				return fmt.Errorf("address %s: %w", p, err)
			}
		}
	}
	for _, r := range att.Routes {
		route := &netlink.Route{
			LinkIndex: indexes[r.Interface], Dst: ipNet(r.Destination), Scope: netlink.Scope(r.Scope),
			MTU: r.MTU, AdvMSS: r.AdvMSS, Priority: r.Priority, Table: r.Table,
		}
		if r.Gateway.IsValid() {
			route.Gw = r.Gateway.AsSlice()
		}
		if r.Source.IsValid() {
			route.Src = r.Source.AsSlice()
		}
		if err := h.RouteAdd(route); err != nil { // no replace: the list must fit together
			return fmt.Errorf("route %+v: %w", r, err)
		}
	}
	for _, e := range att.Neighbours {
		mac, err := net.ParseMAC(e.MAC)
		if err != nil {
			return err
		}
		if err := h.NeighSet(&netlink.Neigh{LinkIndex: indexes[e.Interface], IP: e.Address.AsSlice(), HardwareAddr: mac, State: unix.NUD_PERMANENT}); err != nil {
			return fmt.Errorf("neighbour %+v: %w", e, err)
		}
	}
	return nil
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// openTap opens (or makes) a tap in the namespace as a VMM does.
func openTap(t *testing.T, ns, name string) *os.File {
	t.Helper()
	var f *os.File
	err := inNamespace(ns, func(*netlink.Handle) error {
		fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
		if err != nil {
			return err
		}
		request, err := unix.NewIfreq(name)
		if err != nil {
			return err
		}
		request.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
		if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, request); err != nil {
			return errors.Join(err, unix.Close(fd))
		}
		f = os.NewFile(uintptr(fd), name)
		return nil
	})
	if err != nil {
		t.Fatalf("tap %s: %v", name, err)
	}
	return f
}

func carry(to, from *os.File) {
	frame := make([]byte, 1<<17)
	for {
		size, err := from.Read(frame)
		if err != nil {
			return // closed
		}
		if _, err := to.Write(frame[:size]); err != nil && !errors.Is(err, unix.EIO) { // EIO: that side is still down
			return
		}
	}
}

// serve answers on TCP port with greeting, in the guest, until the test ends.
func (g *guest) serve(network string, addr netip.AddrPort, greeting string) {
	g.t.Helper()
	var l net.Listener
	err := inNamespace(g.path, func(*netlink.Handle) (err error) {
		l, err = net.Listen(network, addr.String())
		return err
	})
	if err != nil {
		g.t.Fatal(err)
	}
	var serving sync.WaitGroup
	serving.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			fmt.Fprintf(c, "%s %s", greeting, c.RemoteAddr())
			c.Close()
		}
	})
	g.t.Cleanup(func() {
		l.Close()
		serving.Wait()
	})
}

// hear connects to addr from the namespace ns ("" is the node) and returns what is said there.
func hear(ns string, addr netip.AddrPort) (string, error) {
	var c net.Conn
	dial := func() (err error) {
		c, err = net.DialTimeout("tcp", addr.String(), 5*time.Second)
		return err
	}
	var err error
	if ns == "" {
		err = dial()
	} else {
		err = inNamespace(ns, func(*netlink.Handle) error { return dial() })
	}
	if err != nil {
		return "", err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
		return "", err
	}
	said, err := io.ReadAll(c)
	return string(said), err
}
