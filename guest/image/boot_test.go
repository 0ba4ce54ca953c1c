//go:build integration

package image

import (
	"bytes"
	"context"
	"debug/elf"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/crivm/crivm/agentproto"
)

// initSource is an agent that says which kernel it runs on, starts the OCI runtime and powers off.
const initSource = `package main

import (
	"fmt"
	"os/exec"
	"syscall"
)

func main() {
	var u syscall.Utsname
	syscall.Uname(&u)
	release := ""
	for _, c := range u.Release {
		if c == 0 {
			break
		}
		release += string(rune(c))
	}
	syscall.Mount("dev", "/dev", "devtmpfs", 0, "")
	syscall.Mount("proc", "/proc", "proc", 0, "")
	out, err := exec.Command("/usr/bin/crun", "--version").CombinedOutput()
	fmt.Printf("guest %s says %q, %v\n", release, out, err)
	syscall.Sync()
	syscall.Reboot(syscall.LINUX_REBOOT_CMD_POWER_OFF)
}
`

// realInputs gives the distribution's kernel and OCI runtime, and the agent above.
func realInputs(t *testing.T) Options {
	t.Helper()
	kernels, err := filepath.Glob("../../build/kernel/boot/vmlinuz-*")
	if err != nil {
		t.Fatal(err)
	}
	if len(kernels) == 0 {
		t.Skip("no guest kernel in build/kernel: run make guest")
	}
	crun, err := exec.LookPath("crun")
	if err != nil {
		t.Skip("no crun in PATH: install the package crun")
	}
	dir := t.TempDir()
	source := writeFile(t, []byte(initSource), dir, "main.go")
	build := exec.Command("go", "build", "-ldflags=-s -w", "-o", filepath.Join(dir, "init"), source)
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return Options{Kernel: kernels[0], OCIRuntime: crun, Agent: filepath.Join(dir, "init"), Output: filepath.Join(dir, "out")}
}

// TestDistributionKernel checks the image of a real kernel for completeness.
func TestDistributionKernel(t *testing.T) {
	o := realInputs(t)
	d, err := Build(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	vmlinux, err := os.ReadFile(filepath.Join(o.Output, KernelFile))
	if err != nil {
		t.Fatal(err)
	}
	if err := checkPVH(vmlinux); err != nil {
		t.Error(err)
	}
	if got := bannerRelease(vmlinux); got != d.Kernel || !strings.HasSuffix(o.Kernel, got) {
		t.Errorf("release %q in the kernel, %q in the manifest, of %s", got, d.Kernel, o.Kernel)
	}
	for _, name := range []string{"virtio_pci", "virtio_blk", "virtio_net", "virtio_console", "vmw_vsock_virtio_transport",
		"virtio_balloon", "virtio_mem", "overlay", "erofs", "virtiofs", "bridge", "iptable_nat", "nft_chain_nat"} {
		if _, ok := d.Modules[name]; !ok {
			t.Errorf("module %s is missing", name)
		}
	}
	raw, err := os.ReadFile(filepath.Join(o.Output, InitramfsFile))
	if err != nil {
		t.Fatal(err)
	}
	_, files := readArchive(t, raw)
	byName := map[string]bool{}
	for name := range files {
		byName[path.Base(name)] = true
	}
	for name, content := range files {
		file, err := elf.NewFile(bytes.NewReader(content))
		if err != nil || file.Type == elf.ET_REL {
			continue // no program and no library
		}
		needed, err := file.ImportedLibraries()
		if err != nil {
			t.Fatal(err)
		}
		for _, soname := range needed {
			if !byName[soname] {
				t.Errorf("%s needs %s, which is not in the image", name, soname)
			}
		}
	}
	if files[d.OCIRuntime] == nil || files[agentproto.ManifestPath] == nil {
		t.Error("OCI runtime or manifest is missing")
	}
}

// TestBootEveryCompression lets the kernel itself unpack what compress made, and ld.so load the runtime.
func TestBootEveryCompression(t *testing.T) {
	qemu, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		t.Skipf("no VM: %v", err)
	}
	o := realInputs(t)
	for _, o.Compression = range []string{"none", "lz4", "zstd"} {
		t.Run(o.Compression, func(t *testing.T) {
			d, err := Build(t.Context(), o)
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
			defer cancel()
			out, err := exec.CommandContext(ctx, qemu, "-nodefaults", "-no-user-config", "-nographic", "-no-reboot",
				"-M", "q35", "-accel", "tcg", "-m", "256M", "-bios", "qboot.rom",
				"-kernel", filepath.Join(o.Output, KernelFile), "-initrd", filepath.Join(o.Output, InitramfsFile),
				"-append", "console=ttyS0 quiet panic=-1 reboot=t cryptomgr.notests nokaslr mitigations=off",
				"-serial", "stdio").CombinedOutput()
			if err != nil {
				t.Fatalf("QEMU: %v\n%s", err, out)
			}
			if want := "guest " + d.Kernel + ` says "crun version `; !strings.Contains(string(out), want) || !strings.Contains(string(out), `", <nil>`) {
				t.Errorf("console\n%s\nwant %q", out, want)
			}
		})
	}
}
