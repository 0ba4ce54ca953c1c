// Package node runs crivm as a node does: `crivm serve` with a state directory, CNI configuration and
// registries of its own, inside network, mount and IPC namespaces that take the part of the machine. Nothing of
// it reaches the machine itself, and what is left when it stops is found by CheckLeaks. It talks to crivm
// through its binary and its CRI socket only.
package node

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"syscall"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const (
	// isolated marks the process that Isolate has started.
	isolated = "CRIVM_NODE_ISOLATED"
	// buildMount is where VMMs, which run as users of their own, find the build directory.
	buildMount = "/run/build"
)

// Isolate runs the calling program again in network, mount and IPC namespaces of its own and exits with its
// status; inside them it prepares a node (private /run, loopback up, forwarding on) and returns the path by which every
// user reaches the build directory, wherever the checkout is. It needs root.
func Isolate(build string) (string, error) {
	if os.Getenv(isolated) != "" {
		return buildMount, prepare(build)
	}
	if os.Geteuid() != 0 {
		return "", errors.New("needs root: network namespaces, taps and mounts")
	}
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Env = append(os.Environ(), isolated+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWNS | unix.CLONE_NEWIPC}
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, unix.SIGINT, unix.SIGTERM)
	if err := cmd.Start(); err != nil {
		return "", fmt.Errorf("own namespaces: %w", err)
	}
	go func() {
		for s := range signals {
			if s == unix.SIGTERM { // the terminal sends SIGINT to both by itself
				cmd.Process.Signal(s)
			}
		}
	}()
	err := cmd.Wait()
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) && exit.ExitCode() > 0 {
		os.Exit(exit.ExitCode())
	}
	if err != nil {
		return "", fmt.Errorf("in own namespaces: %w", err)
	}
	os.Exit(0)
	return "", nil
}

func prepare(build string) error {
	build, err := filepath.Abs(build)
	if err != nil {
		return err
	}
	if err := unix.Mount("", "/", "", unix.MS_PRIVATE|unix.MS_REC, ""); err != nil {
		return fmt.Errorf("private mounts: %w", err)
	}
	if err := unix.Mount("tmpfs", "/run", "tmpfs", 0, "mode=755"); err != nil {
		return fmt.Errorf("private /run: %w", err)
	}
	if err := os.Mkdir(buildMount, 0o755); err != nil {
		return err
	}
	if err := unix.Mount(build, buildMount, "", unix.MS_BIND, ""); err != nil { // a home directory is often its owner's alone
		return fmt.Errorf("build directory %s: %w", build, err)
	}
	for _, sysctl := range []string{"net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding", "net/ipv4/conf/all/route_localnet"} {
		if err := os.WriteFile("/proc/sys/"+sysctl, []byte("1"), 0); err != nil {
			return fmt.Errorf("sysctl: %w", err)
		}
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("loopback: %w", err)
	}
	return netlink.LinkSetUp(lo)
}
