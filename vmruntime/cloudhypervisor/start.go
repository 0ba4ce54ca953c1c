package cloudhypervisor

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"

	"github.com/crivm/crivm/vmruntime"
	"github.com/crivm/crivm/vmruntime/chclient"
)

// cleanupTimeout bounds what is undone after the caller's context has ended.
const cleanupTimeout = 15 * time.Second

// Start implements vmruntime.Driver.
func (d *Driver) Start(ctx context.Context, s vmruntime.Spec) (_ vmruntime.VM, retErr error) {
	if err := checkSpec(s); err != nil {
		return nil, fmt.Errorf("VM %s: %w", s.ID, err)
	}
	k, err := prepare(s.Dir, s.Process)
	if err != nil {
		return nil, fmt.Errorf("VM %s: %w", s.ID, err)
	}
	p, err := vmruntime.Launch(ctx, vmruntime.LaunchSpec{
		Dir:  s.Dir,
		Path: d.config.Binary,
		Args: []string{
			"--api-socket", "fd=3",
			"--event-monitor", "path=" + eventsPath(s.Dir),
			"--seccomp", d.config.Seccomp,
		},
		ExtraFiles: []*os.File{k.api, k.fifo},
		Process:    s.Process,
		Mounts:     func() error { return vmruntime.MountDevices(s.Dir) },
		Groups:     deviceGroups(),
	})
	k.closeInherited()
	if err != nil {
		k.events.Close()
		k.ready.Close()
		return nil, errors.Join(fmt.Errorf("VM %s: %w", s.ID, err), removeFiles(s.Dir))
	}
	v := newVM(s.ID, s.Dir, p)
	v.awaitReady(k.ready)
	defer func() {
		if retErr != nil {
			retErr = v.abandon(ctx, retErr)
		}
	}()
	console, err := d.boot(ctx, v, s)
	v.watch(k.events, false, console)
	if err != nil {
		return nil, fmt.Errorf("VM %s: %w", s.ID, err)
	}
	return v, nil
}

// boot does everything between an empty VMM and a running guest. The console is returned in any case, for what
// the guest may have said before an error.
func (d *Driver) boot(ctx context.Context, v *vm, s vmruntime.Spec) (*console, error) {
	ping, err := v.client.Ping(ctx)
	if err != nil {
		return nil, err
	}
	// The program may have been replaced since New.
	if err := chclient.CheckVersion(ping.BuildVersion); err != nil {
		return nil, err
	}
	if err := v.client.Create(ctx, d.vmConfig(s)); err != nil {
		return nil, err
	}
	console, err := v.openConsole(ctx, false)
	if err != nil {
		return nil, err
	}
	for i, n := range s.NICs {
		if err := v.addNIC(ctx, s.Process.NetnsPath, n, segmentAtBoot(len(s.Disks)+i)); err != nil {
			return console, err
		}
	}
	return console, v.client.Boot(ctx)
}

// addNIC hands an open tap to the VMM, which then needs no privilege for it.
func (v *vm) addNIC(ctx context.Context, netnsPath string, n vmruntime.NIC, segment int) error {
	if n.MTU > 0 {
		// The VMM reads the tap's MTU and tells the guest.
		if err := setMTU(netnsPath, n.Tap, n.MTU); err != nil {
			return fmt.Errorf("NIC %s: MTU: %w", n.ID, err)
		}
	}
	tap, err := vmruntime.OpenTap(netnsPath, n.Tap)
	if err != nil {
		return fmt.Errorf("NIC %s: %w", n.ID, err)
	}
	defer tap.Close()
	_, err = v.client.AddNet(ctx, netConfig(n, segment), tap)
	return err
}

func setMTU(netnsPath, name string, mtu int) error {
	h, err := handleAt(netnsPath)
	if err != nil {
		return err
	}
	defer h.Close()
	link, err := h.LinkByName(name)
	if err != nil || link.Attrs().MTU == mtu {
		return err
	}
	return h.LinkSetMTU(link, mtu)
}

func handleAt(netnsPath string) (*netlink.Handle, error) {
	if netnsPath == "" {
		return netlink.NewHandle()
	}
	ns, err := netns.GetFromPath(netnsPath)
	if err != nil {
		return nil, err
	}
	defer ns.Close()
	return netlink.NewHandleAt(ns)
}

// abandon ends a VM that did not start and tells what it said last.
func (v *vm) abandon(ctx context.Context, err error) error {
	exited := false
	select {
	case <-v.proc.Done():
		exited = true
	case <-time.After(exitGrace): // a broken connection is noticed a moment before the end of the process
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupTimeout)
	defer cancel()
	killErr := v.Kill(ctx)
	if exited && killErr == nil {
		err = fmt.Errorf("%s: %w", v.Exit().Reason, err)
	}
	if last := lastLines(vmruntime.TailFile(logPath(v.dir))); last != "" {
		err = fmt.Errorf("%w; VMM log: %s", err, last)
	}
	if last := lastLines(v.Console()); last != "" {
		err = fmt.Errorf("%w; console: %s", err, last)
	}
	return errors.Join(err, killErr)
}

// lastLines makes one line of the last few.
func lastLines(s string) string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	return strings.TrimSpace(strings.Join(lines[max(0, len(lines)-5):], " | "))
}
