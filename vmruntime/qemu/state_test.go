package qemu

import (
	"fmt"
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/crivm/crivm/vmruntime"
)

func TestStatePut(t *testing.T) {
	s := &state{Spec: vmruntime.Spec{Dir: t.TempDir()}, Devices: map[string]device{}}
	for i := range rootPorts {
		d, err := s.put(device{Disk: &vmruntime.Disk{Serial: fmt.Sprintf("d%d", i), Path: "/x"}})
		if err != nil || d.Port != i {
			t.Fatalf("disk %d on port %d, %v", i, d.Port, err)
		}
	}
	nic := device{NIC: &vmruntime.NIC{ID: "eth0", Tap: "tap0", MAC: "02:00:00:00:00:01"}}
	if _, err := s.put(nic); !errdefs.IsResourceExhausted(err) {
		t.Errorf("one device too many: %v", err)
	}
	if _, err := s.put(device{Disk: &vmruntime.Disk{Serial: "d3", Path: "/y"}}); !errdefs.IsAlreadyExists(err) {
		t.Errorf("id in use: %v", err)
	}
	delete(s.Devices, "disk-d7")
	if d, err := s.put(nic); err != nil || d.Port != 7 {
		t.Errorf("freed port is not used: %d, %v", d.Port, err)
	}
	if err := s.save(); err != nil {
		t.Fatal(err)
	}
	var loaded state
	if err := vmruntime.LoadState(s.Spec.Dir+"/"+stateName, &loaded); err != nil {
		t.Fatal(err)
	}
	for id, d := range s.Devices {
		if l := loaded.Devices[id]; l.Port != d.Port || l.id() != id || !l.same(d) {
			t.Errorf("%s: saved %+v, loaded %+v", id, d, l)
		}
	}
}

func TestDeviceValidate(t *testing.T) {
	disk := func(serial, path string) device { return device{Disk: &vmruntime.Disk{Serial: serial, Path: path}} }
	nic := func(id, mac string) device { return device{NIC: &vmruntime.NIC{ID: id, MAC: mac}} }
	share := func(tag, socket string) device { return device{Share: &vmruntime.Share{Tag: tag, Socket: socket}} }
	const mac = "02:00:00:00:00:01"
	for _, c := range []struct {
		name string
		d    device
		ok   bool
	}{
		{"disk", disk("img-0123456789abcdef", "/x"), true},
		{"long serial", disk(strings.Repeat("x", 21), "/x"), false},
		{"no serial", disk("", "/x"), false},
		{"serial with option syntax", disk("a,b=c", "/x"), false},
		{"serial with newline", disk("a\n", "/x"), false},
		{"relative path", disk("a", "x"), false},
		{"NIC", nic("eth0", mac), true},
		{"NIC without MAC", nic("eth0", ""), false},
		{"long MAC", nic("eth0", "02:00:00:00:00:01:02:03"), false},
		{"MAC with option syntax", nic("eth0", mac+",x=y"), false},
		{"NIC id", nic("eth0,fd=3", mac), false},
		{"share", share("share0", "/s"), true},
		{"long tag", share(strings.Repeat("x", 37), "/s"), false},
		{"relative socket", share("share0", "s"), false},
	} {
		if err := c.d.validate(); (err == nil) != c.ok || (err != nil && !errdefs.IsInvalidArgument(err)) {
			t.Errorf("%s: %v", c.name, err)
		}
	}
}

func TestArguments(t *testing.T) {
	spec := vmruntime.Spec{
		ID: "x", Dir: "/run/vm", Kernel: "/k,1", Initrd: "/i", Cmdline: "panic=7 a=b",
		VCPUs: 1, MaxVCPUs: 4, MemoryBytes: 256 << 20, MaxMemoryBytes: 300 << 20,
		Disks: []vmruntime.Disk{{Serial: "zero", Path: "/dev/zero", ReadOnly: true}, {Serial: "file", Path: "/etc/passwd"}},
		NICs:  []vmruntime.NIC{{ID: "eth0", Tap: "tap0", MAC: "02:00:00:00:00:01", MTU: 1400}},
	}
	text := func(spec vmruntime.Spec, accel string) string {
		t.Helper()
		s, err := newState(spec)
		if err != nil {
			t.Fatal(err)
		}
		args, err := New(Config{}).arguments(s, accel)
		if err != nil {
			t.Fatal(err)
		}
		return strings.Join(args, "\n")
	}
	for accel, wants := range map[string][]string{
		KVM: {"-accel\nkvm", "-cpu\nhost"},
		TCG: {"-accel\ntcg", "nokaslr"},
	} {
		got := text(spec, accel)
		for _, want := range append(wants,
			"-kernel\n/k,1\n", "panic=-1", "panic=7 a=b",
			"memory-backend-ram,id=ram,size=268435456",
			"size=256M,slots=1,maxmem=384M", "id=hotplug,size=134217728",
			"cpus=1,maxcpus=4",
			`"driver":"host_device","filename":"/dev/zero","read-only":true`,
			`"driver":"file","filename":"/etc/passwd","read-only":false`,
			`{"bus":"rp0","drive":"disk-zero","driver":"virtio-blk-pci","id":"disk-zero","rerror":"report","serial":"zero","werror":"report"}`,
			"tap,id=nic-eth0,fd=5", `"bus":"rp2"`, `"host_mtu":1400`,
			"name=crivm.agent", "crivm.transport=serial", "path=/run/vm/console",
			"-sandbox\non,",
		) {
			if !strings.Contains(got, want) {
				t.Errorf("%s: no %q in\n%s", accel, want, got)
			}
		}
	}
	if strings.Contains(text(spec, KVM), "mitigations=off") {
		t.Error("mitigations are off with hardware virtualisation")
	}
	spec.MaxMemoryBytes, spec.SharedMemory = spec.MemoryBytes, true
	got := text(spec, TCG)
	if !strings.Contains(got, "memory-backend-memfd,share=on,id=ram") || strings.Contains(got, "virtio-mem") {
		t.Errorf("shared memory without ceiling:\n%s", got)
	}
}
