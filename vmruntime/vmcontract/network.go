package vmcontract

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/crivm/crivm/agentproto"
	"github.com/crivm/crivm/vmruntime"
)

// testNetns returns the path of a network namespace that lives as long as the test.
func testNetns(t *testing.T) string {
	t.Helper()
	cmd := exec.Command("/usr/bin/sleep", "600")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	return fmt.Sprintf("/proc/%d/ns/net", cmd.Process.Pid)
}

// inNetns runs f in a network namespace, on a thread of its own.
func inNetns(t *testing.T, path string, f func() error) error {
	t.Helper()
	result := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // and never unlocked
		fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err == nil {
			defer unix.Close(fd)
			err = unix.Setns(fd, unix.CLONE_NEWNET)
		}
		if err == nil {
			err = f()
		}
		result <- err
	}()
	return <-result
}

// makeTap makes a tap that is up and has an address.
func makeTap(t *testing.T, netns, name, cidr string) {
	t.Helper()
	err := inNetns(t, netns, func() error {
		tap := &netlink.Tuntap{
			LinkAttrs: netlink.LinkAttrs{Name: name}, Mode: netlink.TUNTAP_MODE_TAP,
			Flags: netlink.TUNTAP_NO_PI | netlink.TUNTAP_VNET_HDR, Queues: 1,
		}
		tap.Flags |= netlink.TUNTAP_ONE_QUEUE
		if err := netlink.LinkAdd(tap); err != nil {
			return err
		}
		for _, f := range tap.Fds {
			f.Close()
		}
		link, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		addr, err := netlink.ParseAddr(cidr)
		if err != nil {
			return err
		}
		if err := netlink.AddrAdd(link, addr); err != nil {
			return err
		}
		return netlink.LinkSetUp(link)
	})
	if err != nil {
		t.Fatalf("tap %s: %v", name, err)
	}
}

// reaches sends a datagram to a closed port until the guest refuses it.
func reaches(t *testing.T, netns, address string) error {
	return inNetns(t, netns, func() error {
		c, err := net.Dial("udp", address)
		if err != nil {
			return err
		}
		defer c.Close()
		buf := make([]byte, 1)
		for limit := time.Now().Add(20 * time.Second); time.Now().Before(limit); {
			if _, err = c.Write([]byte("x")); err == nil {
				_ = c.SetReadDeadline(time.Now().Add(200 * time.Millisecond))
				_, err = c.Read(buf)
			}
			if errors.Is(err, syscall.ECONNREFUSED) {
				return nil
			}
		}
		return fmt.Errorf("no answer from %s: %w", address, err)
	})
}

func (s *suite) testNetwork(t *testing.T) {
	driver, spec := s.spec(t)
	netns := testNetns(t)
	makeTap(t, netns, "tap0", "192.0.2.1/24")
	makeTap(t, netns, "tap1", "198.51.100.1/24")
	spec.Process.NetnsPath = netns
	spec.NICs = []vmruntime.NIC{{ID: "eth0", Tap: "tap0", MAC: "02:00:00:00:00:10"}}
	vm := s.start(t, driver, spec)
	agent := s.connect(t, vm)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	_, err := agent.SetupSandbox(ctx, &agentproto.SetupSandboxRequest{
		SandboxId: "contract", Hostname: "contract", UnixNanos: time.Now().UnixNano(),
		Entropy: make([]byte, 32), MachineId: strings.Repeat("0", 32),
		Interfaces: []*agentproto.Interface{{
			MatchMac: "02:00:00:00:00:10", Mac: "02:00:00:00:00:20", Name: "eth0", Mtu: 1400, Addresses: []string{"192.0.2.2/24"},
		}},
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := reaches(t, netns, "192.0.2.2:9"); err != nil {
		t.Errorf("boot NIC: %v", err)
	}
	second := vmruntime.NIC{ID: "eth1", Tap: "tap1", MAC: "02:00:00:00:00:11"}
	for range 2 { // idempotent
		if err := vm.AddNIC(ctx, second); err != nil {
			t.Fatal(err)
		}
	}
	_, err = agent.UpdateInterfaces(ctx, &agentproto.UpdateInterfacesRequest{Interfaces: []*agentproto.Interface{{
		MatchMac: "02:00:00:00:00:11", Name: "eth1", Addresses: []string{"198.51.100.2/24"},
	}}})
	if err != nil {
		t.Errorf("second NIC: %v", err)
	}
	if err := reaches(t, netns, "198.51.100.2:9"); err != nil {
		t.Errorf("second NIC: %v", err)
	}
	if err := vm.AddNIC(ctx, vmruntime.NIC{ID: "eth2", Tap: "no-such-tap", MAC: "02:00:00:00:00:12"}); err == nil {
		t.Error("a NIC without a tap was added")
	}
	for range 2 {
		if err := vm.RemoveNIC(ctx, "eth1"); err != nil {
			t.Fatal(err)
		}
	}
	// The tap is free again.
	if err := vm.AddNIC(ctx, second); err != nil {
		t.Errorf("add again: %v", err)
	}
}

func (s *suite) testShare(t *testing.T) {
	binary := ""
	for _, p := range []string{"/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd"} {
		if _, err := os.Stat(p); err == nil {
			binary = p
			break
		}
	}
	if binary == "" {
		t.Skip("no virtiofsd on this machine")
	}
	driver, spec := s.spec(t)
	spec.SharedMemory = true
	shared := t.TempDir()
	vm := s.start(t, driver, spec)
	s.connect(t, vm)
	for round := range 2 {
		socket := filepath.Join(spec.Dir, fmt.Sprintf("test-fs%d", round))
		cmd := exec.Command(binary, "--socket-path="+socket, "-o", "source="+shared, "-o", "cache=none", "-o", "sandbox=chroot")
		cmd.Stderr = os.Stderr
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		ended := make(chan error, 1)
		go func() { ended <- cmd.Wait() }()
		defer func() { _ = cmd.Process.Kill() }()
		for limit := time.Now().Add(10 * time.Second); ; time.Sleep(5 * time.Millisecond) {
			if _, err := os.Stat(socket); err == nil {
				break
			}
			if time.Now().After(limit) {
				t.Fatal("virtiofsd does not listen")
			}
		}
		share := vmruntime.Share{Tag: "share", Socket: socket}
		for range 2 {
			if err := vm.AddShare(t.Context(), share); err != nil {
				t.Fatal(err)
			}
		}
		for range 2 {
			if err := vm.RemoveShare(t.Context(), share.Tag); err != nil {
				t.Fatal(err)
			}
		}
		select {
		case <-ended:
		case <-time.After(10 * time.Second):
			t.Error("virtiofsd is still connected")
		}
	}
	if err := vm.AddShare(t.Context(), vmruntime.Share{Tag: "gone", Socket: filepath.Join(spec.Dir, "no-such")}); err == nil {
		t.Error("a share that nobody serves was added")
	}
}
