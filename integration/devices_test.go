//go:build integration

package integration

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// loopDevice is a block device on a file. It goes with its last user, this process included.
func loopDevice(t *testing.T, size int64) (device *os.File, grow func(int64)) {
	t.Helper()
	if _, err := os.Stat("/dev/loop-control"); err != nil {
		t.Skipf("this machine has no loop devices: %v", err)
	}
	file := filepath.Join(t.TempDir(), "disk")
	if err := errors.Join(os.WriteFile(file, nil, 0o600), os.Truncate(file, size)); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("losetup", "--find", "--show", file).Output()
	if err != nil {
		t.Fatalf("losetup: %v: %s", err, out)
	}
	name := strings.TrimSpace(string(out))
	device, err = os.OpenFile(name, os.O_RDWR, 0)
	if detach := exec.Command("losetup", "--detach", name).Run(); err != nil || detach != nil { // while it is open: at the last close
		t.Fatal(err, detach)
	}
	t.Cleanup(func() {
		device.Close()
		eventually(t, 20*time.Second, "nobody has the loop device", func() error {
			if backing, err := os.ReadFile("/sys/block/" + filepath.Base(name) + "/loop/backing_file"); err == nil && strings.TrimSpace(string(backing)) == file {
				return errors.New("it is attached")
			}
			return nil
		})
	})
	return device, func(size int64) {
		t.Helper()
		if err := errors.Join(os.Truncate(file, size), unix.IoctlSetInt(int(device.Fd()), unix.LOOP_SET_CAPACITY, 0)); err != nil {
			t.Fatalf("growing the loop device: %v", err)
		}
	}
}

// wantOnDevice looks at the device as the host has it.
func wantOnDevice(t *testing.T, device *os.File, offset int64, want string) {
	t.Helper()
	if err := unix.IoctlSetInt(int(device.Fd()), unix.BLKFLSBUF, 0); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(want))
	if _, err := device.ReadAt(got, offset); err != nil || !bytes.Equal(got, []byte(want)) {
		t.Errorf("on the device is %q (%v), want %q", got, err, want)
	}
}

func device(host, permissions string) func(*cri.ContainerConfig) {
	return func(c *cri.ContainerConfig) {
		c.Devices = append(c.Devices, &cri.Device{HostPath: host, ContainerPath: "/dev/xvda", Permissions: permissions})
	}
}

const sizeInGuest = `cat /sys/dev/block/$(printf %d:%d 0x$(stat -c %t /dev/xvda) 0x$(stat -c %T /dev/xvda))/size`

// A block device as kubelet gives it for a volumeDevice: a symbolic link to the host's device.
func TestBlockDevice(t *testing.T) {
	parallel(t)
	disk, grow := loopDevice(t, 16<<20)
	link := filepath.Join(t.TempDir(), "volumeDevice")
	if err := os.Symlink(disk.Name(), link); err != nil {
		t.Fatal(err)
	}
	p := runPod(t, shared)
	start := time.Now()
	writer := p.start("exec sleep 1000", device(link, "mrw"))
	t.Logf("container with a block device: %s", time.Since(start))
	p.exec(writer, "sh", "-c", "echo hello | dd of=/dev/xvda conv=fsync 2>/dev/null")
	wantOnDevice(t, disk, 0, "hello\n")

	// Another container of the pod has the same disk, and may only read.
	reader := p.start("exec sleep 1000", device(disk.Name(), "r"))
	number := func(id string) string { return p.exec(id, "stat", "-c", "%F %t:%T %a %u", "/dev/xvda") }
	if a, b := number(writer), number(reader); a != b || !strings.HasPrefix(a, "block special file ") {
		t.Errorf("two containers have the devices %q and %q", a, b)
	}
	if got := p.exec(reader, "sh", "-c", "head -c 5 /dev/xvda; (echo broken > /dev/xvda) 2>/dev/null && echo WRITTEN; true"); got != "hello" {
		t.Errorf("a reader has %q", got)
	}
	if _, out := p.run("[ -e /dev/xvda ] && echo there; mknod /tmp/x b $(cat /sys/block/vdc/dev | tr : ' ') && head -c 5 /tmp/x; true"); strings.Contains(out, "hello") || strings.Contains(out, "there") {
		t.Errorf("a container without the device has %q", out)
	}

	// crictl's way.
	files := t.TempDir()
	for name, v := range map[string]any{"pod.json": p.config, "container.json": map[string]any{
		"metadata": map[string]string{"name": "crictl"}, "image": map[string]string{"image": busybox}, "command": []string{"sleep", "1000"}, "log_path": "crictl.log",
		"devices": []map[string]string{{"host_path": link, "container_path": "/dev/mine", "permissions": "rw"}},
	}} {
		text, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		writeFile(t, filepath.Join(files, name), string(text))
	}
	made, err := shared.Crictl(testContext(t, time.Minute), "create", p.id, filepath.Join(files, "container.json"), filepath.Join(files, "pod.json"))
	made = strings.TrimSpace(made)
	if err == nil {
		_, err = shared.Crictl(testContext(t, time.Minute), "start", made)
	}
	if err != nil {
		t.Fatalf("crictl: %v", err)
	}
	if got := p.exec(made, "head", "-c", "5", "/dev/mine"); got != "hello" {
		t.Errorf("a container of crictl has %q", got)
	}

	// A resize of the host's device is seen without anybody asking for it, and after a restart of the daemon too.
	wantSize := func(id string, bytes int64) {
		t.Helper()
		start := time.Now()
		eventually(t, 30*time.Second, "size in the guest", func() error {
			if got := strings.TrimSpace(p.exec(id, "sh", "-c", sizeInGuest)); got != fmt.Sprint(bytes/512) {
				return fmt.Errorf("%s sectors, want %d", got, bytes/512)
			}
			return nil
		})
		t.Logf("%d bytes seen after %s", bytes, time.Since(start))
	}
	wantSize(writer, 16<<20)
	grow(24 << 20)
	wantSize(writer, 24<<20)
	p.exec(writer, "sh", "-c", "echo beyond | dd of=/dev/xvda bs=1M seek=20 conv=fsync 2>/dev/null")
	wantOnDevice(t, disk, 20<<20, "beyond\n")

	// The last user's end unplugs it.
	for _, id := range []string{writer, reader, made} {
		if err := shared.Runtime.RemoveContainer(testContext(t, time.Minute), id); err != nil {
			t.Fatal(err)
		}
	}
	if _, out := p.run("cat /sys/block/vd*/serial"); strings.Contains(out, "blk-") {
		t.Errorf("disks after the last user are %q", out)
	}

	// What was written and never synchronised is on the device when the pod has been stopped, as on any node.
	last := p.start("exec 3<>/dev/xvda; echo unsynced >&3; exec sleep 1000", device(link, "rw"))
	eventually(t, 30*time.Second, "the container writes", func() error {
		if got := p.exec(last, "head", "-c", "8", "/dev/xvda"); got != "unsynced" {
			return fmt.Errorf("the device has %q", got)
		}
		return nil
	})
	if err := shared.Runtime.StopPodSandbox(testContext(t, 2*time.Minute), p.id); err != nil {
		t.Fatal(err)
	}
	wantOnDevice(t, disk, 0, "unsynced\n")
}

// Read-only holds against root of the guest; and a privileged container has the device that it asks for.
func TestBlockDeviceReadOnly(t *testing.T) {
	parallel(t)
	disk, _ := loopDevice(t, 16<<20)
	if _, err := disk.WriteAt([]byte("kept\n"), 0); err != nil {
		t.Fatal(err)
	}
	p := runPod(t, shared, func(c *cri.PodSandboxConfig) { c.Linux.SecurityContext.Privileged = true })
	privileged := func(c *cri.ContainerConfig) { c.Linux.SecurityContext.Privileged = true }
	st, out := p.run(`head -c 4 /dev/xvda
mknod /tmp/x b $((0x$(stat -c %t /dev/xvda))) $((0x$(stat -c %T /dev/xvda)))
for f in /dev/xvda /tmp/x; do (echo broken > $f) 2>/dev/null && echo " $f WRITTEN"; done
cat /sys/dev/block/$(printf %d:%d 0x$(stat -c %t /dev/xvda) 0x$(stat -c %T /dev/xvda))/ro`, privileged, device(disk.Name(), "rm"))
	if st.ExitCode != 0 || out != "kept1\n" {
		t.Errorf("a privileged container says %q (exit code %d)", out, st.ExitCode)
	}
	wantOnDevice(t, disk, 0, "kept\n")
	_, err := p.create("true", device(disk.Name(), "rw"))
	wantError(t, err, codes.FailedPrecondition, "permissions")
}
