package cloudhypervisor

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"

	"github.com/crivm/crivm/vmruntime"
	"github.com/crivm/crivm/vmruntime/chclient"
	"github.com/crivm/crivm/vmruntime/vmtest"
)

// newRealFixture has a real Cloud Hypervisor, from CRIVM_TEST_CLOUD_HYPERVISOR or PATH. It boots guests of a few
// instructions, which run wherever KVM can do anything at all.
func newRealFixture(t *testing.T, code ...byte) *fixture {
	t.Helper()
	name := os.Getenv("CRIVM_TEST_CLOUD_HYPERVISOR")
	if name == "" {
		name = "cloud-hypervisor"
	}
	path, err := exec.LookPath(name)
	if err != nil {
		t.Skipf("no real Cloud Hypervisor (CRIVM_TEST_CLOUD_HYPERVISOR or PATH): %v", err)
	}
	if os.Geteuid() != 0 {
		t.Skip("starting a VMM needs root (mount namespace)")
	}
	kvm, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err != nil {
		t.Skipf("the real VMM needs /dev/kvm: %v", err)
	}
	kvm.Close()
	f := &fixture{t: t, binary: path}
	c := Config{HotplugDirs: []string{os.TempDir()}}
	if dynamic(path) {
		t.Log("not the official static binary: seccomp only logs")
		c.Seccomp = "log"
	}
	f.driver = f.newDriver(c)
	f.spec = newSpec(t)
	if err := os.WriteFile(f.spec.Kernel, vmtest.TinyKernel(code...), 0o644); err != nil {
		t.Fatal(err)
	}
	return f
}

// out is code that writes a byte to an I/O port.
func out(port uint16, b byte) []byte {
	return []byte{0xba, byte(port), byte(port >> 8), 0, 0, 0xb0, b, 0xee} // mov edx, port; mov al, b; out dx, al
}

func TestRealRuns(t *testing.T) {
	var code []byte
	for _, b := range []byte("hello\r\n") {
		code = append(code, out(0x3f8, b)...)
	}
	f := newRealFixture(t, code...)
	t.Logf("%s, landlock %v", strings.Split(f.driver.version, "\n")[0], f.driver.landlock)
	ns := newNetns(t)
	f.spec.Process.NetnsPath = ns.path
	ns.do(func() { tap(t, "tap0"); tap(t, "tap1") })
	f.spec.NICs = []vmruntime.NIC{{ID: "eth0", Tap: "tap0", MAC: "02:00:00:00:00:01", MTU: 1400}}
	v := f.start()
	defer func() {
		if t.Failed() {
			b, _ := os.ReadFile(logPath(f.spec.Dir))
			t.Logf("%s", b)
		}
	}()
	eventually(t, "console", func() bool { return v.Console() == "hello" })

	info, err := v.client.Info(f.ctx())
	if err != nil {
		t.Fatal(err)
	}
	c := info.Config
	if info.State != chclient.StateRunning || c.CPUs.Nested || c.Disks[0].ImageType != chclient.ImageRaw ||
		c.Disks[0].Serial != "scratch" || c.Disks[0].BackingFiles || c.Console.Mode != chclient.ConsoleOff || !c.PVPanic ||
		c.Net[0].MAC != "02:00:00:00:00:01" || c.Net[0].Tap != "" || c.Memory.HotplugMethod != chclient.HotplugVirtioMem {
		t.Errorf("VM is %+v", info)
	}

	// The guest never lets a device go.
	a := vmruntime.Disk{Serial: "a", Path: file(t, "a"), ReadOnly: true}
	for range 2 {
		if err := v.AddDisk(f.ctx(), a); err != nil {
			t.Fatal(err)
		}
	}
	if err := v.AddDisk(f.ctx(), vmruntime.Disk{Serial: "a", Path: a.Path}); !errdefs.IsAlreadyExists(err) {
		t.Errorf("another with the serial: %v", err)
	}
	b := vmruntime.Disk{Serial: "b", Path: "/nonexistent", ReadOnly: true}
	if err := v.AddDisk(f.ctx(), b); err == nil {
		t.Error("a disk without a file was added")
	}
	b.Path = a.Path // nothing was left of the failed one
	if err := v.AddDisk(f.ctx(), b); err != nil {
		t.Error(err)
	}
	if err := v.AddNIC(f.ctx(), vmruntime.NIC{ID: "eth1", Tap: "tap1", MAC: "02:00:00:00:00:02"}); err != nil {
		t.Error(err)
	}
	ns.do(func() {
		if l, err := netlink.LinkByName("tap0"); err != nil || l.Attrs().MTU != 1400 {
			t.Errorf("tap0: %+v, %v", l, err)
		}
	})
	for i := range 100 {
		err := v.AddDisk(f.ctx(), vmruntime.Disk{Serial: fmt.Sprint("n", i), Path: a.Path, ReadOnly: true})
		if errdefs.IsResourceExhausted(err) {
			if i != 2*31-10 {
				t.Errorf("%d more disks fit", i)
			}
			break
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, do := range []func() error{
		func() error { return v.Pause(f.ctx()) }, func() error { return v.Pause(f.ctx()) },
		func() error { return v.Resume(f.ctx()) }, func() error { return v.Resume(f.ctx()) },
	} {
		if err := do(); err != nil {
			t.Error(err)
		}
	}
	if got, err := v.Resize(f.ctx(), vmruntime.Size{VCPUs: 2}); err != nil || got.VCPUs != 2 || got.MemoryBytes != f.spec.MemoryBytes {
		t.Errorf("resize: %+v, %v", got, err)
	}

	// A later daemon finds all this.
	again, err := f.driver.Reattach(f.ctx(), f.spec.ID, f.spec.Dir)
	if err != nil {
		t.Fatal(err)
	}
	f.killLater(again)
	if err := again.AddDisk(f.ctx(), a); err != nil {
		t.Errorf("disk that is there: %v", err)
	}
	if err := again.Kill(f.ctx()); err != nil {
		t.Error(err)
	}
	f.died(v)
	wantFiles(t, f.spec.Dir, "console.log", "vmm.log")
}

func TestRealLandlock(t *testing.T) { testLandlock(newRealFixture(t)) }

func TestRealEnds(t *testing.T) {
	for name, tc := range map[string]struct {
		code   []byte
		reason string
	}{
		"reset by the keyboard controller": {out(0x64, 0xfe), "guest rebooted"},
		"power-off":                        {out(0x600, 0x34), "guest powered off"},
		"triple fault":                     {[]byte{0x0f, 0x0b}, "guest rebooted"}, // ud2 without handlers
	} {
		t.Run(name, func(t *testing.T) {
			f := newRealFixture(t, tc.code...)
			v := f.start()
			if e := f.died(v); e.Reason != tc.reason {
				t.Errorf("exit %+v", e)
			}
		})
	}
}

func TestRealStartFailures(t *testing.T) {
	for name, tc := range map[string]struct {
		change func(*vmruntime.Spec)
		text   string
	}{
		"no kernel":   {func(s *vmruntime.Spec) { s.Kernel = "/nonexistent" }, "kernel"},
		"nonsense":    {func(s *vmruntime.Spec) { os.WriteFile(s.Kernel, []byte("nonsense"), 0o644) }, "kernel"},
		"no disk":     {func(s *vmruntime.Spec) { s.Disks[0].Path = "/nonexistent" }, "/nonexistent"},
		"no initrd":   {func(s *vmruntime.Spec) { s.Initrd = "/nonexistent" }, "initramfs"},
		"long append": {func(s *vmruntime.Spec) { s.Cmdline = strings.Repeat("x", 60000) }, "51200"},
	} {
		t.Run(name, func(t *testing.T) {
			f := newRealFixture(t)
			tc.change(&f.spec)
			v, err := f.driver.Start(f.ctx(), f.spec)
			if err == nil {
				f.killLater(v)
				t.Fatal("started")
			}
			if !strings.Contains(err.Error(), tc.text) {
				t.Errorf("error %v", err)
			}
			t.Log(err)
		})
	}
}

// TestRealUnprivileged runs the VMM as a user that owns nothing but its disk.
func TestRealUnprivileged(t *testing.T) {
	const uid = 54321
	f := newRealFixture(t)
	fi, err := os.Stat("/dev/kvm")
	if err != nil {
		t.Fatal(err)
	}
	if fi.Mode().Perm()&0o006 != 0o006 && len(deviceGroups()) == 0 {
		t.Skipf("/dev/kvm is %v of root's group: no unprivileged user can run a VM here", fi.Mode())
	}
	ns := newNetns(t)
	f.spec.Process = vmruntime.ProcessSpec{NetnsPath: ns.path, UID: uid, GID: uid}
	ns.do(func() { tap(t, "tap0"); tap(t, "tap1") })
	f.spec.NICs = []vmruntime.NIC{{ID: "eth0", Tap: "tap0", MAC: "02:00:00:00:00:01"}}
	// t.TempDir is root's alone.
	inDir := func(name string, mode os.FileMode, content []byte) string {
		path := filepath.Join(f.spec.Dir, name)
		if err := os.WriteFile(path, content, mode); err != nil {
			t.Fatal(err)
		}
		return path
	}
	f.spec.Kernel = inDir("kernel", 0o644, vmtest.TinyKernel(out(0x3f8, 'x')...))
	f.spec.Disks[0].Path = inDir("scratch", 0o600, make([]byte, 1<<20))
	if err := os.Chown(f.spec.Disks[0].Path, uid, uid); err != nil {
		t.Fatal(err)
	}
	v := f.start()
	eventually(t, "console", func() bool { return v.Console() == "x" })
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", v.PID()))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"Uid:\t54321\t54321\t54321\t54321", "CapEff:\t0000000000000000", "NoNewPrivs:\t1"} {
		if !strings.Contains(string(status), want) {
			t.Errorf("VMM's status lacks %q", want)
		}
	}
	if err := v.AddNIC(f.ctx(), vmruntime.NIC{ID: "eth1", Tap: "tap1", MAC: "02:00:00:00:00:02"}); err != nil {
		t.Error(err)
	}
	if err := v.AddDisk(f.ctx(), vmruntime.Disk{Serial: "a", Path: inDir("a", 0o644, make([]byte, 1<<20)), ReadOnly: true}); err != nil {
		t.Error(err)
	}
	secret := inDir("secret", 0o600, make([]byte, 1<<20))
	if err := v.AddDisk(f.ctx(), vmruntime.Disk{Serial: "b", Path: secret, ReadOnly: true}); err == nil {
		t.Error("the VMM opened a file of root's")
	}
	// What the daemon trusts is out of the VMM's reach.
	entries, err := os.ReadDir(f.spec.Dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		info, err := e.Info()
		if err != nil {
			t.Fatal(err)
		}
		owned := info.Sys().(*syscall.Stat_t).Uid == uid
		if want := e.Name() == "run" || e.Name() == "events" || e.Name() == "scratch"; owned != want {
			t.Errorf("%s belongs to the VMM: %v", e.Name(), owned)
		}
	}
}
