package vmcontract

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/crivm/crivm/vmruntime"
)

// testUser owns nothing on any machine.
const testUser = 54321

// own gives a file to the VMM's user.
func own(t *testing.T, path string) {
	t.Helper()
	if err := os.Chown(path, testUser, testUser); err != nil {
		t.Fatal(err)
	}
}

// readable is a copy of a file that every user can read, whatever directory the original is in.
func readable(t *testing.T, from, to string) string {
	t.Helper()
	in, err := os.Open(from)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o444)
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	if _, err := io.Copy(out, in); err != nil {
		t.Fatal(err)
	}
	return to
}

// testUnprivileged runs a VMM as a user without any rights: in a directory of root's, with disks of its own.
func (s *suite) testUnprivileged(t *testing.T) {
	driver, spec := s.spec(t)
	netns := testNetns(t)
	makeTap(t, netns, "tap0", "192.0.2.1/24")
	spec.Process.NetnsPath = netns
	spec.Process.UID, spec.Process.GID = testUser, testUser
	spec.NICs = []vmruntime.NIC{{ID: "eth0", Tap: "tap0", MAC: "02:00:00:00:00:10"}}
	spec.Kernel = readable(t, spec.Kernel, filepath.Join(spec.Dir, "test-kernel"))
	spec.Initrd = readable(t, spec.Initrd, filepath.Join(spec.Dir, "test-initrd"))
	secret := plainDisk(t, spec.Dir, "secret")
	if err := os.Chmod(secret.Path, 0o600); err != nil {
		t.Fatal(err)
	}
	private := plainDisk(t, spec.Dir, "private")
	private.ReadOnly = false
	own(t, private.Path)
	spec.Disks = []vmruntime.Disk{private}

	vm := s.start(t, driver, spec)
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", vm.PID()))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		fmt.Sprintf("Uid:\t%[1]d\t%[1]d\t%[1]d\t%[1]d", testUser), fmt.Sprintf("Gid:\t%[1]d\t%[1]d\t%[1]d\t%[1]d", testUser),
		"NoNewPrivs:\t1", "CapPrm:\t0000000000000000", "CapEff:\t0000000000000000",
	} {
		if !strings.Contains(string(status), want) {
			t.Errorf("VMM's status lacks %q", want)
		}
	}
	// Each thread has its own filter, the vCPUs' count.
	filtered := 0
	threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", vm.PID()))
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range threads {
		b, err := os.ReadFile(p)
		if err == nil && strings.Contains(string(b), "Seccomp:\t2") {
			filtered++
		}
	}
	if filtered == 0 {
		t.Error("no thread of the VMM has a seccomp filter")
	}
	s.connect(t, vm)
	if err := vm.AddDisk(t.Context(), secret); err == nil {
		t.Error("the VMM opened a file of root's")
	}
	disk := plainDisk(t, spec.Dir, "later")
	own(t, disk.Path)
	if err := vm.AddDisk(t.Context(), disk); err != nil {
		t.Error(err)
	}
	if err := vm.RemoveDisk(t.Context(), disk.Serial); err != nil {
		t.Error(err)
	}
	s.checkBlockDevice(t, vm, true)
	kill(t, vm)
	nothingLeft(t, spec)
}
