//go:build integration

package rootdisk

import (
	"bufio"
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cavaliergopher/cpio"
	"golang.org/x/sys/unix"
	"pgregory.net/rapid"
)

// guestModules are what a Debian 12 cloud kernel needs to read a disk, in order.
var guestModules = []string{
	"drivers/virtio/virtio_ring", "drivers/virtio/virtio", "drivers/virtio/virtio_pci_modern_dev", "drivers/virtio/virtio_pci_legacy_dev",
	"drivers/virtio/virtio_pci", "drivers/block/virtio_blk", "lib/libcrc32c", "fs/erofs/erofs",
}

const guestDisks = 12

// TestMain runs the test, or is the guest's init in the VM that TestGuestKernel boots.
func TestMain(m *testing.M) {
	if os.Getpid() != 1 || os.Args[0] != "/init" {
		os.Exit(m.Run())
	}
	if err := guestInit(); err != nil {
		fmt.Println("init:", err)
	}
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
}

type panics struct{}

func (panics) Helper()                        {}
func (panics) Fatalf(format string, a ...any) { panic(fmt.Sprintf(format, a...)) }

func guestInit() error {
	for _, m := range guestModules {
		f, err := os.Open("/modules/" + filepath.Base(m) + ".ko")
		if err != nil {
			return err
		}
		if err := unix.FinitModule(int(f.Fd()), "", 0); err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("module %s: %w", m, err)
		}
		f.Close()
	}
	if err := errors.Join(os.Mkdir("/devices", 0o755), os.Mkdir("/mnt", 0o755), unix.Mount("dev", "/devices", "devtmpfs", 0, "")); err != nil {
		return err
	}
	out := bufio.NewWriter(os.Stdout)
	defer out.Flush()
	fmt.Fprintln(out) // the firmware leaves a line unfinished
	for i := range guestDisks {
		dev := fmt.Sprintf("/devices/vd%c", 'a'+i)
		for deadline := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
			if _, err := os.Stat(dev); err == nil || time.Now().After(deadline) {
				break
			}
		}
		if err := unix.Mount(dev, "/mnt", "erofs", unix.MS_RDONLY, ""); err != nil {
			return fmt.Errorf("mount %s: %w", dev, err)
		}
		for _, l := range readTree(panics{}, "/mnt") {
			fmt.Fprintf(out, "TREE %d %s\n", i, l)
		}
		if err := unix.Unmount("/mnt", 0); err != nil {
			return err
		}
	}
	fmt.Fprintln(out, "ALL READ")
	return nil
}

// TestGuestKernel has random disks read by the kernel that pods run, in a VM.
func TestGuestKernel(t *testing.T) {
	qemu, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		t.Skip("qemu-system-x86_64 is not installed (qemu-system-x86)")
	}
	kernels, _ := filepath.Glob("../../build/kernel/boot/vmlinuz-*")
	modules, _ := filepath.Glob("../../build/kernel/lib/modules/*/kernel")
	if len(kernels) != 1 || len(modules) != 1 {
		t.Skip("no guest kernel package is unpacked in build/kernel (make guest)")
	}
	if !static(t) {
		t.Skip("the test program is not static, so it cannot be the guest's init (CGO_ENABLED=0)")
	}
	dir := t.TempDir()
	var want []tree
	// In software: a few seconds here, while a /dev/kvm that opens may still not run a guest.
	args := []string{"-M", "q35", "-accel", "tcg", "-cpu", "max", "-m", "512", "-nographic", "-no-reboot", "-nodefaults", "-serial", "stdio",
		"-kernel", kernels[0], "-initrd", filepath.Join(dir, "initrd"), "-append", "console=ttyS0 loglevel=0 panic=-1"}
	for i := range guestDisks {
		layers := rapid.Custom(genLayers).Example(i)
		w := newTree()
		for _, l := range layers {
			w = w.apply(l)
		}
		want = append(want, w)
		disk := filepath.Join(dir, fmt.Sprint("disk", i))
		if err := buildTo(t, disk, layersOf(t, layers)); err != nil {
			t.Fatal(err)
		}
		args = append(args, "-drive", fmt.Sprintf("if=none,id=d%d,format=raw,readonly=on,file=%s", i, disk), "-device", fmt.Sprintf("virtio-blk-pci,drive=d%d", i))
	}
	writeInitrd(t, filepath.Join(dir, "initrd"), modules[0])
	ctx, cancel := context.WithTimeout(context.Background(), 4*time.Minute)
	defer cancel()
	out, err := exec.CommandContext(ctx, qemu, args...).CombinedOutput()
	text := strings.ReplaceAll(string(out), "\r\n", "\n")
	if err != nil || !strings.Contains(text, "\nALL READ\n") {
		t.Fatalf("VM: %v; the end of its console:\n%s", err, text[max(0, len(text)-3000):])
	}
	got := make([][]string, guestDisks)
	for _, l := range strings.Split(text, "\n") {
		var i int
		if rest, ok := strings.CutPrefix(l, "TREE "); ok {
			n, tail, _ := strings.Cut(rest, " ")
			if _, err := fmt.Sscan(n, &i); err != nil || i < 0 || i >= guestDisks {
				t.Fatalf("line %.200q", l)
			}
			got[i] = append(got[i], tail)
		}
	}
	lines := 0
	for i := range want {
		compare(t, got[i], want[i].describe())
		lines += len(got[i])
	}
	if lines < 5*guestDisks {
		t.Errorf("only %d files were compared", lines)
	}
}

// static tells whether this program needs no dynamic loader.
func static(t *testing.T) bool {
	t.Helper()
	f, err := elf.Open("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			return false
		}
	}
	return true
}

func writeInitrd(t *testing.T, path, modules string) {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	w := cpio.NewWriter(f)
	add := func(h cpio.Header, body []byte) {
		h.Size = int64(len(body))
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(body); err != nil {
			t.Fatal(err)
		}
	}
	add(cpio.Header{Name: "modules", Mode: cpio.TypeDir | 0o755}, nil)
	add(cpio.Header{Name: "dev", Mode: cpio.TypeDir | 0o755}, nil)
	add(cpio.Header{Name: "dev/console", Mode: cpio.TypeChar | 0o600, DeviceID: 5<<8 | 1}, nil)
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	add(cpio.Header{Name: "init", Mode: cpio.TypeReg | 0o755}, self)
	for _, m := range guestModules {
		b, err := os.ReadFile(filepath.Join(modules, m+".ko"))
		if err != nil {
			t.Fatal(err)
		}
		add(cpio.Header{Name: "modules/" + filepath.Base(m) + ".ko", Mode: cpio.TypeReg | 0o644}, b)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
}
