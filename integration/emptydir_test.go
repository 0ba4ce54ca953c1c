//go:build integration

package integration

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// kubeletPod lays a pod's directory out as kubelet does: closed to everybody but root.
type kubeletPod struct {
	t   *testing.T
	uid string
	dir string
}

func newKubeletPod(t *testing.T) *kubeletPod {
	t.Helper()
	root := filepath.Join(t.TempDir(), "kubelet")
	uid := fmt.Sprintf("%08x-volumes-%d", time.Now().UnixNano()&0xffffffff, podCount.Add(1))
	k := &kubeletPod{t, uid, filepath.Join(root, "pods", uid)}
	if err := os.MkdirAll(k.dir, 0o750); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(root, 0o700); err != nil {
		t.Fatal(err)
	}
	return k
}

// run starts a sandbox of the pod.
func (k *kubeletPod) run(attempt uint32, change ...func(*cri.PodSandboxConfig)) *pod {
	k.t.Helper()
	return runPod(k.t, shared, append(change, func(c *cri.PodSandboxConfig) { c.Metadata.Uid, c.Metadata.Attempt = k.uid, attempt })...)
}

// volume is the directory of a volume of a plugin.
func (k *kubeletPod) volume(plugin, name string) string {
	return filepath.Join(k.dir, "volumes/kubernetes.io~"+plugin, name)
}

// empty makes an empty directory as kubelet does, and for a pod with an fsGroup changes it as kubelet does.
func (k *kubeletPod) empty(name string, fsGroup int) string {
	k.t.Helper()
	dir := k.volume("empty-dir", name)
	if err := os.MkdirAll(dir, 0o750); err != nil {
		k.t.Fatal(err)
	}
	mode := uint32(0o777)
	if fsGroup != 0 {
		mode = 0o2777
		if err := os.Chown(dir, -1, fsGroup); err != nil {
			k.t.Fatal(err)
		}
	}
	if err := unix.Chmod(dir, mode); err != nil {
		k.t.Fatal(err)
	}
	return dir
}

// memory makes an empty directory of medium Memory.
func (k *kubeletPod) memory(name, options string) string {
	k.t.Helper()
	dir := k.empty(name, 0)
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, options); err != nil {
		k.t.Fatal(err)
	}
	k.t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			k.t.Errorf("unmount %s: %v", dir, err)
		}
	})
	return dir
}

// subPath makes a directory in a volume, if it is not there, and binds it to where kubelet hands it to the runtime.
func (k *kubeletPod) subPath(volume, name, sub string) string {
	k.t.Helper()
	from, to := filepath.Join(volume, sub), filepath.Join(k.dir, "volume-subpaths", name, "main", fmt.Sprint(podCount.Add(1)))
	for _, dir := range []string{from, to} {
		if err := os.MkdirAll(dir, 0o750); err != nil {
			k.t.Fatal(err)
		}
	}
	if err := unix.Mount(from, to, "", unix.MS_BIND, ""); err != nil {
		k.t.Fatal(err)
	}
	k.t.Cleanup(func() {
		if err := unix.Unmount(to, unix.MNT_DETACH); err != nil {
			k.t.Errorf("unmount %s: %v", to, err)
		}
	})
	return to
}

// usage is what kubelet counts of a directory: blocks of all files.
func usage(t *testing.T, dir string) int64 {
	t.Helper()
	total := int64(0)
	err := filepath.WalkDir(dir, func(path string, _ os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := os.Lstat(path)
		if err == nil {
			total += info.Sys().(*syscall.Stat_t).Blocks * 512
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return total
}

const emptyDirScript = `
[ "$(stat -c %a:%u:%g /data)" = 2777:0:2000 ] || echo "FAIL attributes: $(stat -c %a:%u:%g /data)"
grep ' /data ' /proc/self/mounts | grep -q ' ext4 ' || echo "FAIL data: $(grep ' /data ' /proc/self/mounts)"
grep ' /mem ' /proc/self/mounts | grep -q ' tmpfs ' || echo "FAIL mem: $(grep ' /mem ' /proc/self/mounts)"
[ "$(ls -A /data)" = sub ] || echo "FAIL not empty: $(ls -A /data)"
[ "$(stat -c %g /data/sub)" = 2000 ] || echo "FAIL group of sub path: $(stat -c %g /data/sub)"
echo first > /data/file && chown 7:8 /data/file && echo deep > /sub/file || echo FAIL write
[ "$(cat /data/sub/path/file)" = deep ] || echo FAIL sub path
(echo x > /readonly/new) 2>/dev/null && echo FAIL ro writable
[ "$(cat /readonly/file)" = first ] || echo FAIL ro
[ "$(stat -c %a:%u:%g /mem)" = 1777:0:55 ] || echo "FAIL attributes of mem: $(stat -c %a:%u:%g /mem)"
dd if=/dev/zero of=/mem/big bs=64k count=500 2>&1 | grep -q 'No space' || echo FAIL limit of mem
[ "$(stat -c %s /mem/big)" -le 8388608 ] || echo FAIL size of mem
rm /mem/big; echo inmem > /mem/sub/file; [ "$(cat /memsub/file)" = inmem ] || echo FAIL sub path of mem
echo done`

// Empty directories as kubelet makes them, through containers, a restart of the daemon and one of the sandbox.
func TestEmptyDirs(t *testing.T) {
	parallel(t)
	k := newKubeletPod(t)
	data, mem, used := k.empty("data", 2000), k.memory("mem", "size=8m,mode=1777,gid=55"), k.empty("used", 0)
	if err := os.Mkdir(filepath.Join(data, "sub"), 0o2750); err != nil {
		t.Fatal(err)
	}
	sub, memSub := k.subPath(data, "data", "sub/path"), k.subPath(mem, "mem", "sub")
	writeFile(t, filepath.Join(used, "init"), "by the host")
	p := k.run(0)
	start := time.Now()
	all := mounts(
		&cri.Mount{ContainerPath: "/data", HostPath: data}, &cri.Mount{ContainerPath: "/mem", HostPath: mem},
		&cri.Mount{ContainerPath: "/sub", HostPath: sub}, &cri.Mount{ContainerPath: "/memsub", HostPath: memSub},
		&cri.Mount{ContainerPath: "/readonly", HostPath: data, Readonly: true, RecursiveReadOnly: true},
	)
	st, log := p.run(emptyDirScript, all)
	t.Logf("first container: %s, disk takes %d KiB", time.Since(start), usage(t, data)>>10)
	if st.ExitCode != 0 || log != "done\n" {
		t.Errorf("container says %q, exit code %d", log, st.ExitCode)
	}
	if pids := fileServers(t, p); len(pids) > 0 {
		t.Errorf("a pod with nothing but empty directories has file servers %v", pids)
	}
	if _, err := os.Stat(filepath.Join(mem, "sub/file")); err == nil {
		t.Error("what is in memory of the guest is on the host")
	}
	// Another container of the pod, and what the directory had on the host before.
	other := p.start("sleep 1000", all, mounts(&cri.Mount{ContainerPath: "/used", HostPath: used}))
	if out := p.exec(other, "sh", "-c", "cat /data/file /mem/sub/file /used/init; stat -c %u:%g /data/file"); out != "first\ninmem\nby the host7:8\n" {
		t.Errorf("another container sees %q", out)
	}
	// A later container mounts what an earlier one made, a file too: kubelet has made a directory for it on the host.
	p.exec(other, "sh", "-c", "mkdir -p /data/conf; echo made > /data/conf/app")
	file := k.subPath(data, "data", "conf/app")
	if st, log := p.run("cat /app; echo more >> /app", mounts(&cri.Mount{ContainerPath: "/app", HostPath: file})); log != "made\n" || st.ExitCode != 0 {
		t.Errorf("sub path that is a file in the guest: %q, exit code %d", log, st.ExitCode)
	}
	// A symbolic link in a sub path leads nowhere but within the volume.
	p.exec(other, "sh", "-c", "ln -s / /data/escape; mkdir /data/etc; echo mine > /data/etc/hostname")
	escape := k.subPath(data, "data", "escape/etc")
	if _, log := p.run("cat /e/hostname", mounts(&cri.Mount{ContainerPath: "/e", HostPath: escape})); log != "mine\n" {
		t.Errorf("sub path through a symbolic link: %q", log)
	}
	// Space comes back.
	before := usage(t, data)
	p.exec(other, "sh", "-c", "dd if=/dev/zero of=/data/big bs=1M count=48 2>/dev/null; sync")
	if now := usage(t, data); now < before+40<<20 {
		t.Errorf("48 MiB written, usage on the host went from %d to %d", before, now)
	}
	p.exec(other, "sh", "-c", "rm /data/big; sync")
	eventually(t, 2*time.Minute, "deleted files free space on the host", func() error {
		if now := usage(t, data); now > before+8<<20 {
			return fmt.Errorf("usage is %d, was %d", now, before)
		}
		return nil
	})
	p.exec(other, "sh", "-c", "echo unsynced > /data/last")
	ctx := testContext(t, 4*time.Minute)
	if err := p.n.Runtime.StopPodSandbox(ctx, p.id); err != nil {
		t.Fatal(err)
	}
	// The next sandbox of the pod.
	p = k.run(1)
	if st, log := p.run("cat /data/last /data/conf/app /s/file; ls -A /mem /data", mounts(
		&cri.Mount{ContainerPath: "/data", HostPath: data}, &cri.Mount{ContainerPath: "/mem", HostPath: mem}, &cri.Mount{ContainerPath: "/s", HostPath: sub})); st.ExitCode != 0 || !strings.HasPrefix(log, "unsynced\nmade\nmore\ndeep\n") {
		t.Errorf("the next sandbox sees %q", log)
	}
	if err := p.n.Runtime.StopPodSandbox(ctx, p.id); err != nil {
		t.Fatal(err)
	}
	// A damaged disk is reported and left alone.
	image := filepath.Join(data, ".crivm-disk")
	f, err := os.OpenFile(image, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	damage := bytes.Repeat([]byte{0x5a}, 1024)
	if _, err := f.WriteAt(damage, 1024); err != nil {
		t.Fatal(err)
	}
	p = k.run(2)
	if _, err := p.create("true", mounts(&cri.Mount{ContainerPath: "/data", HostPath: data})); err == nil || !strings.Contains(err.Error(), "damaged") {
		t.Errorf("container with a damaged emptyDir: %v", err)
	}
	found := make([]byte, len(damage))
	if _, err := f.ReadAt(found, 1024); err != nil || !bytes.Equal(found, damage) {
		t.Errorf("the damaged disk was written to (%v)", err)
	}
}

// Only a pod's own empty directories are disks, and only files that crivm can have made are taken for them.
func TestEmptyDirOfAnotherPod(t *testing.T) {
	parallel(t)
	mine, other := newKubeletPod(t), newKubeletPod(t)
	dir := other.empty("data", 0)
	writeFile(t, filepath.Join(dir, ".crivm-disk"), "not mine")
	p := mine.run(0)
	// A hostPath to the directory of another pod is a hostPath.
	if _, log := p.run("cat /v/.crivm-disk", mounts(&cri.Mount{ContainerPath: "/v", HostPath: dir})); log != "not mine" {
		t.Errorf("hostPath to an emptyDir of another pod: %q", log)
	}
	// What lies under the disk's name and is none is not touched.
	own := mine.empty("own", 0)
	if err := os.Symlink(filepath.Join(dir, ".crivm-disk"), filepath.Join(own, ".crivm-disk")); err != nil {
		t.Fatal(err)
	}
	if _, err := p.create("true", mounts(&cri.Mount{ContainerPath: "/v", HostPath: own})); err == nil {
		t.Error("a symbolic link in the place of a disk was followed")
	}
	wantFile(t, filepath.Join(dir, ".crivm-disk"), "not mine")
}

// diskAttack is what root in the guest can do to the disk of an emptyDir: it is the guest's to destroy, up to its end.
const diskAttack = `
try() { "$@" 2>/dev/null && echo "SUCCEEDED: $*"; }
device=$(sed -n 's,^/dev/\(vd[a-z]*\) /empty ext4.*,\1,p' /proc/self/mounts)
[ -n "$device" ] && mknod /disk b $(tr : ' ' < /sys/class/block/$device/dev) || echo "no disk: $(grep empty /proc/self/mounts)"
size=$(($(cat /sys/class/block/$device/size) / 2048))
[ $size = 65536 ] || echo "the disk has $size MiB"
try dd if=/dev/zero of=/disk bs=1M seek=$size count=1
try dd if=/dev/zero of=/disk bs=1M seek=1000000 count=1
try ln /empty/file /var/hard
try cat /empty/../outside
for i in $(seq 200); do ln -s /etc /empty/$i; done
dd if=/dev/urandom of=/disk bs=64k count=64 conv=notrunc 2>/dev/null || echo "cannot write to the disk"
sync
echo done`

// A guest can ruin the disk of its emptyDir and nothing else: not the host, not the daemon, not the stop of its pod.
func TestGuestRootAttacksEmptyDir(t *testing.T) {
	parallel(t)
	k := newKubeletPod(t)
	dir, other := k.empty("data", 0), k.empty("options", 0)
	writeFile(t, filepath.Join(filepath.Dir(dir), "outside"), "HOSTMARK")
	privileged := func(c *cri.PodSandboxConfig) { c.Linux.SecurityContext.Privileged = true }
	p := k.run(0, privileged)
	// Mount options first, in a container that has no way around them.
	options := []string{"noexec", "nosuid", "nodev"}
	st, log := p.run("for d in /e /h; do cp /bin/busybox $d/sh; $d/sh true 2>/dev/null && echo $d FAIL runs; grep \" $d \" /proc/self/mounts | grep -q nosuid,nodev,noexec || grep \" $d \" /proc/self/mounts; done; echo done", mounts(
		&cri.Mount{ContainerPath: "/e", HostPath: other, MountOptions: options}, &cri.Mount{ContainerPath: "/h", HostPath: t.TempDir(), MountOptions: options}))
	if st.ExitCode != 0 || log != "done\n" {
		t.Errorf("mount options: %q", log)
	}
	st, log = p.run("echo x > /empty/file"+diskAttack, mounts(&cri.Mount{ContainerPath: "/empty", HostPath: dir}),
		func(c *cri.ContainerConfig) { c.Linux.SecurityContext.Privileged = true })
	if st.ExitCode != 0 || log != "done\n" {
		t.Errorf("root in the guest: %s (exit code %d)", log, st.ExitCode)
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 1 || entries[0].Name() != ".crivm-disk" {
		t.Errorf("on the host the directory has %v (%v)", entries, err)
	}
	if info, err := os.Stat(filepath.Join(dir, ".crivm-disk")); err != nil || info.Size() != 64<<30 {
		t.Errorf("the disk is %v (%v)", info, err)
	}
	wantFile(t, filepath.Join(filepath.Dir(dir), "outside"), "HOSTMARK")
	if err := p.n.Runtime.StopPodSandbox(testContext(t, 2*time.Minute), p.id); err != nil {
		t.Fatal(err)
	}
	p = k.run(1, privileged)
	if _, err := p.create("true", mounts(&cri.Mount{ContainerPath: "/empty", HostPath: dir})); err == nil || !strings.Contains(err.Error(), "damaged") {
		t.Errorf("container with a ruined emptyDir: %v", err)
	}
	if st, _ := p.run("true"); st.ExitCode != 0 {
		t.Error("a container without it does not run")
	}
}
