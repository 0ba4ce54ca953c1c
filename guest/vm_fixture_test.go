//go:build integration

package guest

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/crivm/crivm/agentproto"
	"github.com/crivm/crivm/guest/image"
)

// bootTimeout is generous: software emulation on a busy machine.
const bootTimeout = 3 * time.Minute

// testVM is a guest in QEMU, reached over virtio-serial, with an image disk "img-busybox", the same once more as "rehearsal",
// a scratch disk "scratch" and a NIC without a peer.
type testVM struct {
	*agentproto.Client
	mux     *agentproto.SerialMux
	qemu    *exec.Cmd
	exited  chan struct{}
	console string
	mac     string
	frames  string        // file of what the NIC has sent and received, as pcap(5)
	booted  time.Duration // exec of QEMU to the agent's hello
}

// bootVM builds a guest image with the agent of this tree and boots it.
func bootVM(t *testing.T) *testVM {
	t.Helper()
	for _, program := range []string{"qemu-system-x86_64", "crun", "mkfs.erofs", "mke2fs", "busybox"} {
		if _, err := exec.LookPath(program); err != nil {
			t.Skipf("no VM: %v", err)
		}
	}
	kernels, _ := filepath.Glob("../build/kernel/boot/vmlinuz-*")
	if len(kernels) == 0 {
		t.Skip("no VM: no guest kernel in build/kernel (make guest)")
	}
	dir, err := os.MkdirTemp("/tmp", "crivm-guestvm")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	at := func(name string) string { return filepath.Join(dir, name) }

	build := exec.Command("go", "build", "-ldflags=-s -w", "-o", at("agent"), "../cmd/crivm-agent")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	must(t, build)
	if _, err := image.Build(t.Context(), image.Options{Kernel: kernels[0], Agent: at("agent"), Output: dir}); err != nil {
		t.Fatal(err)
	}
	makeBusybox(t, at("rootfs"))
	must(t, exec.Command("mkfs.erofs", "-U", "00000000-0000-0000-0000-000000000001", at("image.erofs"), at("rootfs")))
	must(t, exec.Command("mke2fs", "-q", "-t", "ext4", "-E", "nodiscard", at("scratch.ext4"), "256M"))

	vm := &testVM{console: at("console"), frames: at("frames"), mac: "52:54:00:00:00:01", exited: make(chan struct{})}
	vm.qemu = exec.Command("qemu-system-x86_64", "-nodefaults", "-no-user-config", "-nographic", "-no-reboot",
		"-M", "q35", "-accel", "tcg", "-m", "512M", "-smp", "1", "-bios", "qboot.rom",
		"-kernel", at(image.KernelFile), "-initrd", at(image.InitramfsFile),
		// Without norandmaps the emulator translates every program anew each time it starts: 3 to 4 times slower.
		"-append", "console=ttyS0 quiet panic=-1 reboot=t tsc_early_khz=2000000 cryptomgr.notests no_timer_check nokaslr norandmaps mitigations=off "+
			"audit=0 apparmor=0 "+agentproto.TransportParameter+"="+agentproto.TransportSerial,
		"-serial", "file:"+vm.console,
		"-device", "virtio-serial-pci", "-chardev", "socket,id=agent,path="+at("agent.sock")+",server=on,wait=off",
		"-device", "virtserialport,chardev=agent,name="+agentproto.SerialPortName,
		"-drive", "if=none,id=image,format=raw,readonly=on,file="+at("image.erofs"),
		"-device", "virtio-blk-pci,drive=image,serial=img-busybox",
		"-drive", "if=none,id=rehearsal,format=raw,readonly=on,file="+at("image.erofs"),
		"-device", "virtio-blk-pci,drive=rehearsal,serial=rehearsal",
		"-drive", "if=none,id=scratch,format=raw,discard=unmap,file="+at("scratch.ext4"),
		"-device", "virtio-blk-pci,drive=scratch,serial=scratch",
		"-netdev", "user,id=net,restrict=on", "-device", "virtio-net-pci,netdev=net,mac="+vm.mac,
		"-object", "filter-dump,id=frames,netdev=net,file="+vm.frames)
	var stderr bytes.Buffer
	vm.qemu.Stderr = &stderr
	begin := time.Now()
	if err := vm.qemu.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		vm.qemu.Wait()
		close(vm.exited)
	}()
	t.Cleanup(func() {
		vm.qemu.Process.Kill()
		<-vm.exited
		if t.Failed() || os.Getenv("SHOW") != "" {
			b, _ := os.ReadFile(vm.console)
			t.Logf("QEMU: %s\nconsole:\n%s", stderr.String(), b)
		}
	})
	ctx, cancel := context.WithTimeout(t.Context(), bootTimeout)
	defer cancel()
	for vm.mux == nil { // until QEMU has made the socket
		conn, err := net.Dial("unix", at("agent.sock"))
		if err == nil {
			if vm.mux, err = agentproto.DialSerial(ctx, conn); err != nil {
				t.Fatal(err)
			}
			break
		}
		select {
		case <-vm.exited:
			t.Fatalf("QEMU ended: %s", stderr.String())
		case <-time.After(10 * time.Millisecond):
		}
	}
	t.Cleanup(func() { vm.mux.Close() })
	if vm.Client, err = agentproto.Connect(ctx, vm.mux); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { vm.Client.Close() })
	vm.booted = time.Since(begin)
	return vm
}

// makeBusybox makes a root file system of the machine's busybox with the libraries that it needs.
func makeBusybox(t *testing.T, root string) {
	t.Helper()
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		t.Fatal(err)
	}
	script := fmt.Sprintf(`set -e
mkdir -p %[1]s/bin %[1]s/etc %[1]s/proc %[1]s/sys %[1]s/dev %[1]s/tmp %[1]s/root %[1]s/home/app
cp -L %[2]s %[1]s/bin/busybox
for l in $(ldd %[2]s 2>/dev/null | grep -o '/[^ ]*'); do mkdir -p %[1]s$(dirname $l); cp -L $l %[1]s$l; done
for a in $(%[2]s --list); do [ $a = busybox ] || ln -s busybox %[1]s/bin/$a; done
printf 'root:x:0:0:root:/root:/bin/sh\napp:x:1000:1001:app:/home/app:/bin/sh\n' > %[1]s/etc/passwd
printf 'root:x:0:\napp:x:1001:\nextra:x:50000:app\n' > %[1]s/etc/group
printf garbage > %[1]s/bin/notexec
chmod 1777 %[1]s/tmp`, root, busybox)
	must(t, exec.Command("sh", "-c", script))
}

func must(t *testing.T, cmd *exec.Cmd) {
	t.Helper()
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", strings.Join(cmd.Args, " "), err, out)
	}
}

// denyDevices leaves a container the devices that every runtime allows.
var denyDevices = []specs.LinuxDeviceCgroup{{Allow: false, Access: "rwm"}}

// vmSpec is a spec as the host would send it for an ordinary container.
func vmSpec(t *testing.T, change func(*specs.Spec), args ...string) []byte {
	t.Helper()
	caps := []string{"CAP_CHOWN", "CAP_KILL", "CAP_SETUID", "CAP_SETGID", "CAP_NET_BIND_SERVICE"}
	s := &specs.Spec{
		Version: "1.0.2",
		Process: &specs.Process{
			Args: args, Cwd: "/", Env: []string{"PATH=/usr/bin:/bin"}, NoNewPrivileges: true,
			Capabilities: &specs.LinuxCapabilities{Bounding: caps, Effective: caps, Permitted: caps},
		},
		Mounts: []specs.Mount{
			{Destination: "/proc", Type: "proc", Source: "proc", Options: []string{"nosuid", "noexec", "nodev"}},
			{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "strictatime", "mode=755", "size=65536k"}},
			{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"}},
			{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: []string{"nosuid", "noexec", "nodev", "ro"}},
			{Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup", Options: []string{"nosuid", "noexec", "nodev", "relatime", "ro"}},
		},
		Linux: &specs.Linux{
			Resources:  &specs.LinuxResources{Devices: denyDevices},
			Namespaces: []specs.LinuxNamespace{{Type: specs.MountNamespace}, {Type: specs.PIDNamespace}, {Type: specs.CgroupNamespace}},
		},
	}
	if change != nil {
		change(s)
	}
	b, err := json.Marshal(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}
