//go:build integration

package qemu

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/crivm/crivm/vmruntime"
	"github.com/crivm/crivm/vmruntime/vmcontract"
)

// guestDir holds vmlinux and initramfs, made by `make guest`.
func guestDir(t *testing.T) string {
	t.Helper()
	dir, err := filepath.Abs("../../build/guest")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range []string{"vmlinux", "initramfs"} {
		if _, err := os.Stat(filepath.Join(dir, f)); err != nil {
			t.Skipf("no guest image (make guest): %v", err)
		}
	}
	return dir
}

func template(t *testing.T) vmruntime.Spec {
	dir := guestDir(t)
	const mib = 1 << 20
	return vmruntime.Spec{
		Kernel: filepath.Join(dir, "vmlinux"), Initrd: filepath.Join(dir, "initramfs"),
		VCPUs: 1, MaxVCPUs: 1, MemoryBytes: 256 * mib, MaxMemoryBytes: 256 * mib,
	}
}

func TestContract(t *testing.T) {
	vmcontract.Run(t, vmcontract.Options{
		New: func(t *testing.T) (vmruntime.Driver, vmruntime.Spec) {
			return New(Config{}), template(t)
		},
		RealGuest:          true,
		NonsenseFailsStart: true,
	})
}
