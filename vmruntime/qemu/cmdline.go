package qemu

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/crivm/crivm/agentproto"
	"github.com/crivm/crivm/vmruntime"
)

// Files in a VM's directory besides the state and what vmruntime keeps there.
const (
	qmpName     = "qmp.sock"   // monitor; QEMU inherits the listening socket, so only root can connect
	agentName   = "agent.sock" // the agent's virtio-serial port, likewise
	consoleName = "console"    // fifos console.in and console.out, see console.go
)

// Descriptors that QEMU inherits, in the order of LaunchSpec.ExtraFiles; the taps follow.
const (
	qmpFD = 3 + iota
	agentFD
	firstTapFD
)

// hotplugMemory is the granularity of virtio-mem's region: Linux takes memory by blocks of this size.
const hotplugMemory = 128 << 20

// arguments is QEMU's command line. It depends on the spec and the ports alone.
func (d *Driver) arguments(s *state, accel string) ([]string, error) {
	spec := s.Spec
	args := []string{
		"-nodefaults", "-no-user-config", "-no-reboot", "-display", "none",
		// Nothing but the VMM's own work: no new programs, no change of user, no obsolete system calls.
		"-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
		"-name", "guest=crivm",
		"-machine", "q35,memory-backend=ram,graphics=off,vmport=off,i8042=off,smbus=off,sata=off",
		"-bios", d.config.Firmware,
		"-kernel", spec.Kernel, "-append", kernelCommandLine(spec, accel),
		"-smp", fmt.Sprintf("cpus=%d,maxcpus=%d", spec.VCPUs, spec.MaxVCPUs),
		"-chardev", "pipe,id=console,path=" + filepath.Join(spec.Dir, consoleName),
		"-serial", "chardev:console",
		"-chardev", fmt.Sprintf("socket,id=qmp,fd=%d,server=on,wait=off", qmpFD),
		"-mon", "chardev=qmp,mode=control",
		"-chardev", fmt.Sprintf("socket,id=agent,fd=%d,server=on,wait=off", agentFD),
		"-device", "virtio-serial-pci,id=serial,addr=0x10,disable-legacy=on,max_ports=2",
		"-device", "virtserialport,chardev=agent,name=" + agentproto.SerialPortName,
		"-object", "rng-builtin,id=rng",
		"-device", "virtio-rng-pci,rng=rng,addr=0x11,disable-legacy=on",
		"-device", "virtio-balloon-pci,id=balloon,addr=0x12,disable-legacy=on,free-page-reporting=on",
	}
	if spec.Initrd != "" {
		args = append(args, "-initrd", spec.Initrd)
	}
	if accel == KVM {
		args = append(args, "-accel", "kvm", "-cpu", "host")
	} else {
		// "max": images built for x86-64-v2 and v3 run. Without ERMS: where it is offered, kernels copy memory by
		// "rep movsb", which TCG emulates byte by byte; "rep movsq" makes pipes and logs more than twice as fast.
		args = append(args, "-accel", "tcg", "-cpu", "max,erms=off")
	}
	args = append(args, memory(spec)...)
	for p := range rootPorts {
		args = append(args, "-device", fmt.Sprintf("pcie-root-port,id=%s,chassis=%d,slot=%d,addr=0x%x.%x,multifunction=on",
			port(p), p+1, p+1, 2+p/8, p%8))
	}
	for i := range spec.Disks {
		dev := s.Devices[device{Disk: &spec.Disks[i]}.id()]
		back, err := blockNode(*dev.Disk)
		if err != nil {
			return nil, err
		}
		args = append(args, "-blockdev", jsonText(back), "-device", jsonText(frontend(dev)))
	}
	for i := range spec.NICs {
		dev := s.Devices[device{NIC: &spec.NICs[i]}.id()]
		args = append(args, "-netdev", fmt.Sprintf("tap,id=%s,fd=%d", dev.id(), firstTapFD+i), "-device", jsonText(frontend(dev)))
	}
	return args, nil
}

func port(n int) string { return "rp" + strconv.Itoa(n) }

// memory is the boot memory, and a virtio-mem device of what Resize may add.
func memory(spec vmruntime.Spec) []string {
	kind := "memory-backend-ram"
	if spec.SharedMemory {
		kind = "memory-backend-memfd,share=on"
	}
	more := hotpluggable(spec)
	args := []string{"-object", fmt.Sprintf("%s,id=ram,size=%d", kind, spec.MemoryBytes)}
	if more == 0 {
		return append(args, "-m", fmt.Sprintf("size=%dM", spec.MemoryBytes>>20))
	}
	return append(args,
		"-m", fmt.Sprintf("size=%dM,slots=1,maxmem=%dM", spec.MemoryBytes>>20, (spec.MemoryBytes+more)>>20),
		"-object", fmt.Sprintf("%s,id=hotplug,size=%d,reserve=off", kind, more),
		"-device", "virtio-mem-pci,id=mem,memdev=hotplug,addr=0x13,requested-size=0")
}

// hotpluggable is the size of the virtio-mem device, in bytes.
func hotpluggable(spec vmruntime.Spec) int64 {
	more := spec.MaxMemoryBytes - spec.MemoryBytes
	return (more + hotplugMemory - 1) / hotplugMemory * hotplugMemory
}

// kernelCommandLine is what this machine needs, and then what the spec says, which thereby wins.
func kernelCommandLine(spec vmruntime.Spec, accel string) string {
	args := []string{
		"console=ttyS0", "quiet",
		// A panic or a reboot ends the VM at once: the kernel resets, and QEMU exits for -no-reboot.
		"panic=-1", "reboot=t",
		"cryptomgr.notests",
		// Devices are plugged by ACPI here; the port services that PCI Express has for it and for errors would only
		// be set up for each of the root ports, which takes a tenth of a boot in software emulation.
		"pcie_ports=compat",
		// A kernel whose memory can grow beyond 4 GiB sets 64 MiB aside, and clears them, for devices that cannot reach all
		// of it. There are none: that was a quarter of a pod's memory.
		"swiotlb=noforce",
		agentproto.TransportParameter + "=" + agentproto.TransportSerial,
	}
	if accel != KVM {
		// What only costs time where every instruction is interpreted, and protects nothing there.
		// Without norandmaps every start of a program is at other addresses and is translated anew.
		args = append(args, "no_timer_check", "nokaslr", "norandmaps", "mitigations=off", "audit=0", "apparmor=0",
			"initcall_blacklist=init_kprobe_trace,load_system_certificate_list,trace_eval_init")
		if lpj := loopsPerJiffy(); spec.MaxVCPUs > 1 && lpj > 0 {
			// Else each further CPU calibrates its delay loop for seconds.
			args = append(args, "lpj="+strconv.Itoa(lpj))
		}
	}
	if spec.Cmdline != "" {
		args = append(args, spec.Cmdline)
	}
	return strings.Join(args, " ")
}

// loopsPerJiffy is the host's TSC rate, which software emulation hands through, for a kernel with 250
// jiffies a second; only the length of busy waits depends on it. 0 when unknown.
func loopsPerJiffy() int {
	b, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(b)) {
		name, value, _ := strings.Cut(line, ":")
		if strings.TrimSpace(name) == "cpu MHz" {
			mhz, err := strconv.ParseFloat(strings.TrimSpace(value), 64)
			if err != nil {
				return 0
			}
			return int(mhz * 1e6 / 250)
		}
	}
	return 0
}

// blockNode is the back end of a disk. The path of a block device is that of QEMU's own node.
func blockNode(d vmruntime.Disk) (map[string]any, error) {
	driver := "host_device"
	if d.Device == 0 {
		fi, err := os.Stat(d.Path)
		if err != nil {
			return nil, fmt.Errorf("disk %s: %w", d.Serial, err)
		}
		if fi.Mode()&os.ModeDevice == 0 {
			driver = "file"
		}
	}
	return map[string]any{
		"driver": "raw", "node-name": device{Disk: &d}.id(), "read-only": d.ReadOnly, "discard": "unmap",
		"file": map[string]any{
			"driver": driver, "filename": d.Path, "aio": "threads", "read-only": d.ReadOnly, "discard": "unmap",
		},
	}, nil
}

// frontend is the device as the guest sees it.
func frontend(d device) map[string]any {
	f := map[string]any{"id": d.id(), "bus": port(d.Port)}
	switch {
	case d.Disk != nil:
		f["driver"], f["drive"], f["serial"] = "virtio-blk-pci", d.id(), d.Disk.Serial
		// The guest is told of an error of the host's disk. QEMU's own way with a full one, to stop the VM, makes a
		// silent guest of it.
		f["werror"], f["rerror"] = "report", "report"
	case d.NIC != nil:
		f["driver"], f["netdev"], f["mac"], f["romfile"] = "virtio-net-pci", d.id(), d.NIC.MAC, ""
		if d.NIC.MTU > 0 {
			f["host_mtu"] = d.NIC.MTU
		}
	case d.Share != nil:
		f["driver"], f["chardev"], f["tag"] = "vhost-user-fs-pci", d.id(), d.Share.Tag
	}
	return f
}

// jsonText is a map of strings, numbers and such maps as JSON, without HTML escapes.
func jsonText(v any) string {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if err := e.Encode(v); err != nil {
		panic(err) // cannot happen for such values
	}
	return strings.TrimSpace(b.String())
}
