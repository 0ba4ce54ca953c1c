package main

import (
	"errors"
	"fmt"
	"os"
	"runtime"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/crivm/crivm/cni"
	"github.com/crivm/crivm/conf"
)

// checkNetwork tells whether the kernel can connect a VM and whether the pod network is configured.
func checkNetwork(config conf.CNI) []finding {
	return []finding{checkRedirect(), checkCNI(config)}
}

// checkRedirect really makes two taps in a network namespace of its own and redirects one to the other, as
// is done for each pod. Nothing of it remains.
func checkRedirect() finding {
	const name = "tap and redirect"
	classifier, err := tryRedirect()
	switch {
	case err == nil && classifier == "u32":
		return ok(name, "work, by the u32 classifier (the kernel lacks matchall, which is a little faster)")
	case err == nil:
		return ok(name, "work, by the %s classifier", classifier)
	case errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENODEV):
		return fail(name, "load the kernel modules tun, sch_ingress, cls_matchall (or cls_u32) and act_mirred", "%v", err)
	case errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES):
		return fail(name, "run as root, with CAP_NET_ADMIN and CAP_SYS_ADMIN", "%v", err)
	}
	return fail(name, "see which of these the kernel lacks: network namespaces, tun, sch_ingress, act_mirred", "%v", err)
}

// tryRedirect returns the classifier that worked.
func tryRedirect() (classifier string, err error) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread()
		home, openErr := os.Open("/proc/thread-self/ns/net")
		if openErr != nil {
			err = openErr
			return
		}
		defer home.Close()
		if err = unix.Unshare(unix.CLONE_NEWNET); err != nil {
			err = fmt.Errorf("new network namespace: %w", err)
			return
		}
		classifier, err = redirectBetweenTaps()
		// A thread that cannot go back stays locked, so that nothing else ever runs on it.
		if back := unix.Setns(int(home.Fd()), unix.CLONE_NEWNET); back == nil {
			runtime.UnlockOSThread()
		}
	}()
	<-done
	return classifier, err
}

// redirectBetweenTaps works in the network namespace of the calling thread.
func redirectBetweenTaps() (string, error) {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return "", fmt.Errorf("netlink: %w", err)
	}
	defer h.Close()
	var links [2]netlink.Link
	for i, name := range []string{"check0", "check1"} {
		tap, err := openTap(name)
		if err != nil {
			return "", err
		}
		defer tap.Close()
		if links[i], err = h.LinkByName(name); err != nil {
			return "", fmt.Errorf("tap: %w", err)
		}
		if err := h.LinkSetUp(links[i]); err != nil {
			return "", fmt.Errorf("tap: up: %w", err)
		}
	}
	err = h.QdiscAdd(&netlink.Ingress{QdiscAttrs: netlink.QdiscAttrs{
		LinkIndex: links[0].Attrs().Index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_INGRESS,
	}})
	if err != nil {
		return "", fmt.Errorf("ingress qdisc: %w", err)
	}
	attrs := netlink.FilterAttrs{LinkIndex: links[0].Attrs().Index, Parent: netlink.HANDLE_MIN_INGRESS, Priority: 1, Protocol: unix.ETH_P_ALL}
	actions := []netlink.Action{netlink.NewMirredAction(links[1].Attrs().Index)}
	matchall := h.FilterAdd(&netlink.MatchAll{FilterAttrs: attrs, Actions: actions})
	if matchall == nil {
		return "matchall", nil
	}
	if u32 := h.FilterAdd(&netlink.U32{FilterAttrs: attrs, Actions: actions}); u32 != nil {
		return "", fmt.Errorf("redirect: matchall filter: %w; u32 filter: %w", matchall, u32)
	}
	return "u32", nil
}

// openTap makes a tap that lives as long as the file.
func openTap(name string) (*os.File, error) {
	f, err := os.OpenFile("/dev/net/tun", os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	request, err := unix.NewIfreq(name)
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	request.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	if err := unix.IoctlIfreq(int(f.Fd()), unix.TUNSETIFF, request); err != nil {
		return nil, errors.Join(fmt.Errorf("/dev/net/tun: TUNSETIFF: %w", err), f.Close())
	}
	return f, nil
}

// checkCNI asks the network as the daemon would. What that writes goes to a directory that is removed.
func checkCNI(config conf.CNI) finding {
	const name = "CNI"
	// The daemon serves meanwhile and answers NetworkReady=false, as kubelet expects until a network is installed.
	const advice = "install a pod network: its configuration and its plugins"
	if _, err := os.Stat(config.ConfDir); err != nil {
		return warning(name, advice, "no pod network: %v", err)
	}
	scratch, err := os.MkdirTemp("", "crivm-check-")
	if err != nil {
		return fail(name, "", "%v", err)
	}
	defer os.RemoveAll(scratch)
	network, err := cni.New(cni.Config{ConfDir: config.ConfDir, BinDirs: config.BinDirs, CacheDir: scratch + "/cache", NetnsDir: scratch + "/netns"})
	if err != nil {
		return fail(name, advice, "%v", err)
	}
	defer network.Close()
	if err := network.Status(); err != nil {
		return warning(name, advice, "no pod network: %v", err)
	}
	return ok(name, "configuration of %s, plugins found", config.ConfDir)
}
