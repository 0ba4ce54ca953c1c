package cloudhypervisor

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"

	"github.com/crivm/crivm/vmruntime"
	"github.com/crivm/crivm/vmruntime/chclient"
	"github.com/crivm/crivm/vmruntime/vmtest"
)

func TestDisks(t *testing.T) {
	f := newFixture(t)
	v := f.start()
	ctx := f.ctx()
	a := vmruntime.Disk{Serial: "a", Path: file(t, "a"), ReadOnly: true}
	for range 2 {
		if err := v.AddDisk(ctx, a); err != nil {
			t.Fatal(err)
		}
	}
	if err := v.AddDisk(ctx, vmruntime.Disk{Serial: "a", Path: a.Path}); !errdefs.IsAlreadyExists(err) {
		t.Errorf("another with the same serial: %v", err)
	}
	if err := v.AddDisk(ctx, vmruntime.Disk{Serial: "b", Path: "/nonexistent"}); err == nil {
		t.Error("a disk without a file was added")
	}
	if err := v.AddDisk(ctx, vmruntime.Disk{Serial: "c,d", Path: a.Path}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("odd serial: %v", err)
	}
	info, err := v.client.Info(ctx)
	if err != nil || len(info.Config.Disks) != 2 || info.Config.Disks[1].Serial != "a" {
		t.Errorf("info %+v, %v", info.Config.Disks, err)
	}
	for range 2 {
		if err := v.RemoveDisk(ctx, "a"); err != nil {
			t.Fatal(err)
		}
	}
	if err := v.AddDisk(ctx, a); err != nil {
		t.Errorf("add again: %v", err)
	}
	// The lock on a removed disk is gone: another VM may write it.
	if err := v.RemoveDisk(ctx, "a"); err != nil {
		t.Fatal(err)
	}
	if err := v.AddDisk(ctx, vmruntime.Disk{Serial: "e", Path: a.Path}); err != nil {
		t.Errorf("write a removed disk: %v", err)
	}
}

func TestLandlockForbidsOtherDirectories(t *testing.T) { testLandlock(newFixture(t)) }

func testLandlock(f *fixture) {
	t := f.t
	if landlockABI() < minLandlock {
		t.Skipf("kernel has Landlock version %d", landlockABI())
	}
	all, own, shared, other := file(t, "all"), file(t, "own"), file(t, "shared"), file(t, "other")
	written := filepath.Join(filepath.Dir(shared), "written") // a file of its own: locks are not what is tested
	if err := os.WriteFile(written, make([]byte, 1<<20), 0o644); err != nil {
		t.Fatal(err)
	}
	c := f.driver.config
	c.Landlock, c.HotplugDirs, c.ReadDirs = "on", []string{filepath.Dir(all)}, []string{filepath.Dir(shared)}
	f.driver = f.newDriver(c)
	f.spec.HotplugDirs = []string{filepath.Dir(own)}
	v := f.start()
	for i, tc := range []struct {
		path     string
		readOnly bool
		ok       bool
	}{
		{all, false, true}, {own, false, true}, {shared, true, true}, {written, false, false},
		{other, true, false}, {other, false, false}, {consolePath(f.spec.Dir), true, false},
	} {
		err := v.AddDisk(f.ctx(), vmruntime.Disk{Serial: fmt.Sprint("d", i), Path: tc.path, ReadOnly: tc.readOnly})
		if (err == nil) != tc.ok {
			t.Errorf("disk %d %+v: %v", i, tc, err)
		}
	}
}

func TestGuestThatKeepsADevice(t *testing.T) {
	f := newFixture(t)
	v := f.start()
	d := vmruntime.Disk{Serial: "a", Path: file(t, "a")}
	if err := v.AddDisk(f.ctx(), d); err != nil {
		t.Fatal(err)
	}
	vmtest.Inject(t, f.spec.Dir, vmtest.Faults{RemovalDelay: 700})
	for range 2 { // the second finds it on its way, and does not ask again
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		if err := v.RemoveDisk(ctx, "a"); !errdefs.IsUnavailable(err) {
			t.Errorf("remove: %v", err)
		}
	}
	if err := v.AddDisk(f.ctx(), d); err != nil { // waits until the old one has gone
		t.Errorf("add again: %v", err)
	}
	vmtest.Inject(t, f.spec.Dir, vmtest.Faults{LoseRemovalEvent: true})
	start := time.Now()
	if err := v.RemoveDisk(f.ctx(), "a"); err != nil || time.Since(start) > 2*time.Second {
		t.Errorf("removal without event: %v after %v", err, time.Since(start))
	}
}

func TestSlotsRunOut(t *testing.T) {
	f := newFixture(t)
	v := f.start()
	path := file(t, "image")
	n := 0
	for ; n < 100; n++ {
		err := v.AddDisk(f.ctx(), vmruntime.Disk{Serial: fmt.Sprint("d", n), Path: path, ReadOnly: true})
		if errdefs.IsResourceExhausted(err) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	// Two segments less scratch, rng, balloon, pvpanic, vsock and virtio-mem.
	if n != 2*31-6 {
		t.Errorf("%d disks fit", n)
	}
	if err := v.RemoveDisk(f.ctx(), "d7"); err != nil {
		t.Fatal(err)
	}
	if err := v.AddDisk(f.ctx(), vmruntime.Disk{Serial: "last", Path: path, ReadOnly: true}); err != nil {
		t.Errorf("a freed slot: %v", err)
	}
}

func TestManyDisksAtBoot(t *testing.T) {
	f := newFixture(t)
	path := file(t, "image")
	for i := range 70 {
		f.spec.Disks = append(f.spec.Disks, vmruntime.Disk{Serial: fmt.Sprint("d", i), Path: path, ReadOnly: true})
	}
	v := f.start()
	info, err := v.client.Info(f.ctx())
	if err != nil || info.Config.Platform.NumPCISegments != 3 {
		t.Errorf("%+v, %v", info.Config.Platform, err)
	}
}

func TestShares(t *testing.T) {
	f := newFixture(t)
	socket := filepath.Join(f.spec.Dir, "fs.sock")
	s := vmruntime.Share{Tag: "data", Socket: socket}
	v := f.start()
	if err := v.AddShare(f.ctx(), s); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("no socket: %v", err)
	}
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if err := v.AddShare(f.ctx(), s); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("memory that is not shared: %v", err)
	}

	f.spec = newSpec(t)
	f.spec.SharedMemory = true
	v = f.start()
	for range 2 {
		if err := v.AddShare(f.ctx(), s); err != nil {
			t.Fatal(err)
		}
	}
	if err := v.AddShare(f.ctx(), vmruntime.Share{Tag: "data", Socket: f.spec.Kernel}); err == nil {
		t.Error("another share with the tag was added")
	}
	for range 2 {
		if err := v.RemoveShare(f.ctx(), "data"); err != nil {
			t.Error(err)
		}
	}
}

// tap makes a persistent tap in the test's own network namespace.
func tap(t *testing.T, name string) {
	t.Helper()
	link := &netlink.Tuntap{LinkAttrs: netlink.LinkAttrs{Name: name}, Mode: netlink.TUNTAP_MODE_TAP, Flags: netlink.TUNTAP_VNET_HDR | netlink.TUNTAP_NO_PI}
	if err := netlink.LinkAdd(link); err != nil {
		t.Skipf("cannot make a tap: %v", err)
	}
	for _, fd := range link.Fds {
		fd.Close()
	}
	t.Cleanup(func() { netlink.LinkDel(link) })
	if err := netlink.LinkSetUp(link); err != nil {
		t.Fatal(err)
	}
}

func TestNICs(t *testing.T) {
	f := newFixture(t)
	ns := newNetns(t)
	f.spec.Process.NetnsPath = ns.path
	ns.do(func() { tap(t, "tap0"); tap(t, "tap1") })
	f.spec.NICs = []vmruntime.NIC{{ID: "eth0", Tap: "tap0", MAC: "02:00:00:00:00:01", MTU: 1400}}
	v := f.start()
	ns.do(func() {
		if l, err := netlink.LinkByName("tap0"); err != nil || l.Attrs().MTU != 1400 {
			t.Errorf("tap0: %+v, %v", l, err)
		}
	})
	n := vmruntime.NIC{ID: "eth1", Tap: "tap1", MAC: "02:00:00:00:00:02"}
	for range 2 {
		if err := v.AddNIC(f.ctx(), n); err != nil {
			t.Fatal(err)
		}
	}
	if err := v.AddNIC(f.ctx(), vmruntime.NIC{ID: "eth1", Tap: "tap1", MAC: "02:00:00:00:00:03"}); !errdefs.IsAlreadyExists(err) {
		t.Errorf("another with the ID: %v", err)
	}
	if err := v.AddNIC(f.ctx(), vmruntime.NIC{ID: "eth2", Tap: "tap2", MAC: "02:00:00:00:00:03"}); err == nil {
		t.Error("a NIC without tap was added")
	}
	for range 2 {
		if err := v.RemoveNIC(f.ctx(), "eth1"); err != nil {
			t.Error(err)
		}
	}
}

func TestResize(t *testing.T) {
	f := newFixture(t)
	v := f.start()
	for _, want := range []vmruntime.Size{
		{VCPUs: 4, MemoryBytes: 512 << 20}, {VCPUs: 4, MemoryBytes: 512 << 20}, {VCPUs: 1, MemoryBytes: 128 << 20},
		{VCPUs: 2, MemoryBytes: 256 << 20}, // while the removal of vCPUs is pending
	} {
		if got, err := v.Resize(f.ctx(), want); err != nil || got != want {
			t.Errorf("resize to %+v: %+v, %v", want, got, err)
		}
	}
	if got, err := v.Resize(f.ctx(), vmruntime.Size{VCPUs: 2, MemoryBytes: 200<<20 + 1}); err != nil || got.MemoryBytes != 202<<20 {
		t.Errorf("odd size: %+v, %v", got, err)
	}
	for _, want := range []vmruntime.Size{
		{VCPUs: 5, MemoryBytes: 256 << 20}, {VCPUs: -1, MemoryBytes: 256 << 20},
		{VCPUs: 1, MemoryBytes: 514 << 20}, {VCPUs: 1, MemoryBytes: 64 << 20},
	} {
		if _, err := v.Resize(f.ctx(), want); !errdefs.IsOutOfRange(err) {
			t.Errorf("resize to %+v: %v", want, err)
		}
	}
	if got, err := v.Resize(f.ctx(), vmruntime.Size{}); err != nil || got != (vmruntime.Size{VCPUs: 2, MemoryBytes: 202 << 20}) {
		t.Errorf("size as it is: %+v, %v", got, err)
	}
	vmtest.Inject(t, f.spec.Dir, vmtest.Faults{MemoryStuck: true})
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if got, err := v.Resize(ctx, vmruntime.Size{VCPUs: 2, MemoryBytes: 512 << 20}); err != nil || got.MemoryBytes != 202<<20 {
		t.Errorf("guest that plugs nothing: %+v, %v", got, err)
	}
}

func TestPauseAndResume(t *testing.T) {
	f := newFixture(t)
	v := f.start()
	dial(t, f, v)
	for range 2 {
		if err := v.Pause(f.ctx()); err != nil {
			t.Error(err)
		}
	}
	if info, err := v.client.Info(f.ctx()); err != nil || info.State != chclient.StatePaused {
		t.Errorf("%v, %v", info.State, err)
	}
	for range 2 {
		if err := v.Resume(f.ctx()); err != nil {
			t.Error(err)
		}
	}
	dial(t, f, v)
	vmtest.Inject(t, f.spec.Dir, vmtest.Faults{Fail: "vm.pause"})
	if err := v.Pause(f.ctx()); err == nil {
		t.Error("a refused pause is no error")
	}
}

func TestCallsEndWithTheVM(t *testing.T) {
	f := newFixture(t)
	v := f.start()
	vmtest.Inject(t, f.spec.Dir, vmtest.Faults{Hang: "vm.info"})
	got := make(chan error, 2)
	for range 2 { // one in the call, one waiting for its turn
		go func() { got <- v.AddDisk(f.ctx(), vmruntime.Disk{Serial: "a", Path: f.spec.Disks[0].Path}) }()
	}
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if err := v.RemoveDisk(ctx, "a"); !errdefs.IsDeadlineExceeded(err) && !os.IsTimeout(err) {
		t.Errorf("behind a hanging call: %v", err)
	}
	if err := v.Kill(f.ctx()); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		select {
		case err := <-got:
			if !errdefs.IsUnavailable(err) {
				t.Errorf("call on a VM that died: %v", err)
			}
		case <-time.After(5 * time.Second):
			t.Fatal("a call outlives its VM")
		}
	}
}

func TestFreeSegment(t *testing.T) {
	tree := func(bdfs ...string) map[string]chclient.DeviceNode {
		m := map[string]chclient.DeviceNode{"__serial": {ID: "__serial"}}
		for i, b := range bdfs {
			m[fmt.Sprint(i)] = chclient.DeviceNode{PCIBDF: b}
		}
		return m
	}
	var full []string
	for i := 1; i < 32; i++ {
		full = append(full, fmt.Sprintf("0000:00:%02x.0", i))
	}
	two := chclient.VMConfig{Platform: &chclient.PlatformConfig{NumPCISegments: 2}}
	for _, tc := range []struct {
		info chclient.VMInfo
		want int
		ok   bool
	}{
		{chclient.VMInfo{}, 0, true},
		{chclient.VMInfo{DeviceTree: tree("garbage", "", "ffff:00:01.0", "xyz:00:01.0")}, 0, true},
		{chclient.VMInfo{DeviceTree: tree(append(full[1:], "0000:00:00.0")...)}, 0, true},
		{chclient.VMInfo{DeviceTree: tree(full...)}, 0, false},
		{chclient.VMInfo{DeviceTree: tree(full...), Config: two}, 1, true},
	} {
		got, err := freeSegment(tc.info)
		if got != tc.want && tc.ok || (err == nil) != tc.ok {
			t.Errorf("%v: %d, %v", tc.info.DeviceTree, got, err)
		}
	}
}
