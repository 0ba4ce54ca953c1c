//go:build integration

package agentproto

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cavaliergopher/cpio"
	"golang.org/x/sys/unix"
)

// The test binary is its own guest: as process 1 of a VM it serves the serial port.
func init() {
	if os.Getpid() == 1 && os.Getenv("SERIALTEST") == "guest" {
		fmt.Println("guest ended:", runSerialGuest())
		unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART)
	}
}

// runSerialGuest loads the port's driver and serves streams as the unit tests do.
func runSerialGuest() error {
	for target, fstype := range map[string]string{"/dev": "devtmpfs", "/sys": "sysfs"} {
		os.MkdirAll(target, 0o755)
		if err := unix.Mount(fstype, target, fstype, 0, ""); err != nil && err != unix.EBUSY {
			return fmt.Errorf("mount %s: %w", target, err)
		}
	}
	var m Manifest
	b, err := os.ReadFile(ManifestPath)
	if err == nil {
		err = json.Unmarshal(b, &m)
	}
	if err != nil {
		return err
	}
	for _, name := range []string{"virtio_pci", "virtio_console"} {
		if err := loadModule(m, name); err != nil {
			return err
		}
	}
	device := ""
	for device == "" {
		time.Sleep(10 * time.Millisecond)
		names, _ := filepath.Glob("/sys/class/virtio-ports/*/name")
		for _, name := range names {
			if b, _ := os.ReadFile(name); strings.TrimSpace(string(b)) == SerialPortName {
				device = "/dev/" + filepath.Base(filepath.Dir(name))
			}
		}
	}
	port, err := os.OpenFile(device, os.O_RDWR|unix.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	l := ServeSerial(port)
	for {
		conn, err := l.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer conn.Close()
			serveSerialStream(conn, func(format string, args ...any) { fmt.Printf("FAILED: "+format+"\n", args...) })
		}()
	}
}

func loadModule(m Manifest, name string) error {
	mod, ok := m.Modules[name]
	if !ok {
		return nil // built in
	}
	for _, dep := range mod.Deps {
		if err := loadModule(m, dep); err != nil {
			return err
		}
	}
	f, err := os.Open(mod.Path)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.FinitModule(int(f.Fd()), "", 0); err != nil && err != unix.EEXIST {
		return fmt.Errorf("module %s: %w", name, err)
	}
	return nil
}

// bootSerialGuest starts QEMU with this program as its init and returns the path of the port's socket.
func bootSerialGuest(t *testing.T) string {
	t.Helper()
	if _, err := exec.LookPath("qemu-system-x86_64"); err != nil {
		t.Skipf("no VM: %v", err)
	}
	base, err := os.ReadFile("../build/guest/initramfs")
	if err != nil {
		t.Skipf("no VM: %v (make guest)", err)
	}
	dir := t.TempDir()
	init := filepath.Join(dir, "init")
	build := exec.Command("go", "test", "-c", "-tags", "integration", "-ldflags=-s -w", "-o", init, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build the guest's init: %v\n%s", err, out)
	}
	program, err := os.ReadFile(init)
	if err != nil {
		t.Fatal(err)
	}
	initramfs := bytes.NewBuffer(slices.Clone(base))
	w := cpio.NewWriter(initramfs)
	if err := w.WriteHeader(&cpio.Header{Name: "serialtest", Mode: cpio.TypeReg | 0o755, Size: int64(len(program))}); err != nil {
		t.Fatal(err)
	}
	w.Write(program)
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "initramfs"), initramfs.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	socket, console := filepath.Join(dir, "agent.sock"), filepath.Join(dir, "console")
	qemu := exec.Command("qemu-system-x86_64", "-nodefaults", "-no-user-config", "-nographic", "-no-reboot",
		"-M", "q35", "-accel", "tcg", "-m", "384M", "-bios", "qboot.rom",
		"-kernel", "../build/guest/vmlinux", "-initrd", filepath.Join(dir, "initramfs"),
		"-append", "console=ttyS0 quiet panic=-1 reboot=t tsc_early_khz=2000000 cryptomgr.notests no_timer_check "+
			"nokaslr mitigations=off rdinit=/serialtest SERIALTEST=guest",
		"-serial", "file:"+console, "-device", "virtio-serial-pci",
		"-chardev", "socket,id=agent,path="+socket+",server=on,wait=off",
		"-device", "virtserialport,chardev=agent,name="+SerialPortName)
	var stderr bytes.Buffer
	qemu.Stderr = &stderr
	if err := qemu.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		qemu.Process.Kill()
		qemu.Wait()
		b, _ := os.ReadFile(console)
		if bytes.Contains(b, []byte("FAILED")) {
			t.Error("the guest saw bytes that no host sent")
		}
		if t.Failed() {
			t.Logf("QEMU: %s\nconsole: %s", stderr.String(), b)
		}
	})
	return socket
}

// TestSerialQEMU reconnects 150 times in the middle of traffic over a real virtio-serial port.
func TestSerialQEMU(t *testing.T) {
	socket := bootSerialGuest(t)
	dial := func() *SerialMux {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute) // the first one waits for the boot
		defer cancel()
		for {
			m, err := OpenSerial(ctx, socket)
			if err == nil {
				return m
			}
			if !errors.Is(err, unix.ENOENT) { // until QEMU has made the socket
				t.Fatal(err)
			}
			time.Sleep(10 * time.Millisecond)
		}
	}
	m := dial()
	measure := func(name string, size int, move func(conn net.Conn, buf []byte) error, kind byte) {
		conn := openSerialStream(t, m, kind)
		defer conn.Close()
		buf := make([]byte, 32<<10)
		begin := time.Now()
		for range size / len(buf) {
			if err := move(conn, buf); err != nil {
				t.Fatalf("%s: %v", name, err)
			}
		}
		t.Logf("%s: %.1f MB/s", name, float64(size)/1e6/time.Since(begin).Seconds())
	}
	measure("guest to host", 32<<20, func(c net.Conn, b []byte) error { _, err := io.ReadFull(c, b); return err }, 'f')
	at := 0
	measure("host to guest", 32<<20, func(c net.Conn, b []byte) error {
		fillPattern(b, at)
		at += len(b)
		_, err := c.Write(b)
		return err
	}, 's')
	m.Close()

	var took []time.Duration
	for round := range 150 {
		begin := time.Now()
		m := dial()
		echo := openSerialStream(t, m, 'e')
		var b [1]byte
		echo.Write(b[:])
		if _, err := io.ReadFull(echo, b[:]); err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
		took = append(took, time.Since(begin))
		stop := serialTraffic(t, m)
		m.Close()
		stop()
	}
	slices.Sort(took)
	t.Logf("reconnect to first answer: min %v, median %v, p95 %v, max %v",
		took[0], took[len(took)/2], took[len(took)*95/100], took[len(took)-1])
}
