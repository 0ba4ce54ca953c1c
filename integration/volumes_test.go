//go:build integration

package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func mounts(m ...*cri.Mount) func(*cri.ContainerConfig) {
	return func(c *cri.ContainerConfig) { c.Mounts = append(c.Mounts, m...) }
}

func mountTmpfs(t *testing.T, path string) {
	t.Helper()
	if err := os.MkdirAll(path, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", path, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(path, unix.MNT_DETACH); err != nil {
			t.Errorf("unmount %s: %v", path, err)
		}
	})
}

func writeFile(t *testing.T, path, content string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

func wantFile(t *testing.T, path, content string) {
	t.Helper()
	if b, err := os.ReadFile(path); string(b) != content {
		t.Errorf("%s is %q (%v), want %q", path, b, err, content)
	}
}

// volumesScript looks at everything that a container does with volumes of the host, and prints what is not as on
// any node.
const volumesScript = `
[ "$(cat /rw/file)" = content ] || echo "FAIL read: $(cat /rw/file)"
echo written > /rw/new && mkdir /rw/dir && ln -s new /rw/link && ln /rw/new /rw/hard && mv /rw/dir /rw/moved || echo FAIL write
chown 1234:5678 /rw/new && chmod 640 /rw/new || echo FAIL chown
[ "$(stat -c %u:%g:%a /rw/owned)" = 42:43:600 ] || echo "FAIL owner: $(stat -c %u:%g:%a /rw/owned)"
echo more >> /log && [ "$(cat /log)" = "start
more" ] || echo "FAIL file: $(cat /log)"
[ "$(cat /linked/file)" = content ] || echo FAIL linked
echo in a directory that kubelet made > /made/new && echo in a file that kubelet made > /madefile || echo FAIL made
(echo x > /ro/new) 2>/dev/null && echo FAIL ro writable
(echo x > /ro/file) 2>/dev/null && echo FAIL ro file writable
(echo x > /ro/sub/fromro) 2>/dev/null || echo FAIL submount of ro not writable
(echo x > /rro/new) 2>/dev/null && echo FAIL rro writable
(echo x > /rro/sub/new) 2>/dev/null && echo FAIL submount of rro writable
[ "$(cat /rro/sub/inner)" = inner ] || echo FAIL submount of rro unreadable
dd if=/dev/zero of=/rw/large bs=64k count=64 2>/dev/null && [ "$(md5sum < /rw/large)" = "$(dd if=/dev/zero bs=64k count=64 2>/dev/null | md5sum)" ] || echo FAIL large
grep -q ' /ro-plain ro,' /proc/self/mountinfo || echo "FAIL plain ro not shown: $(grep ro-plain /proc/self/mountinfo)"
echo done`

// All kinds of mounts of host paths in one container, which a second one shares.
func TestHostVolumes(t *testing.T) {
	parallel(t)
	host := t.TempDir()
	mountTmpfs(t, host)
	mountTmpfs(t, filepath.Join(host, "sub"))
	for path, content := range map[string]string{"file": "content", "sub/inner": "inner", "term": "start\n", "plain/x": "", "owned": ""} {
		writeFile(t, filepath.Join(host, path), content)
	}
	if err := os.Chown(filepath.Join(host, "owned"), 42, 43); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(filepath.Join(host, "owned"), 0o600); err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(host, link); err != nil {
		t.Fatal(err)
	}
	// Of a hostPath's type the CRI knows nothing: kubelet looks whether the path is of the type, or makes it, as here. An empty
	// type, which is not looked at, is /rw.
	madeDir, madeFile := filepath.Join(host, "DirectoryOrCreate"), filepath.Join(host, "FileOrCreate")
	if err := os.Mkdir(madeDir, 0o755); err != nil {
		t.Fatal(err)
	}
	writeFile(t, madeFile, "")
	p := runPod(t, shared)
	start := time.Now()
	st, log := p.run(volumesScript, mounts(
		&cri.Mount{ContainerPath: "/rw", HostPath: host},
		&cri.Mount{ContainerPath: "/ro", HostPath: host, Readonly: true},
		&cri.Mount{ContainerPath: "/rro", HostPath: host, Readonly: true, RecursiveReadOnly: true},
		&cri.Mount{ContainerPath: "/ro-plain", HostPath: filepath.Join(host, "plain"), Readonly: true},
		&cri.Mount{ContainerPath: "/linked", HostPath: link, Readonly: true},
		&cri.Mount{ContainerPath: "/log", HostPath: filepath.Join(host, "term")},
		&cri.Mount{ContainerPath: "/made", HostPath: madeDir}, &cri.Mount{ContainerPath: "/madefile", HostPath: madeFile},
	))
	t.Logf("first container with volumes: %s", time.Since(start))
	if st.ExitCode != 0 || log != "done\n" {
		t.Errorf("container says %q, exit code %d", log, st.ExitCode)
	}
	wantFile(t, filepath.Join(host, "new"), "written\n")
	wantFile(t, filepath.Join(host, "term"), "start\nmore\n")
	wantFile(t, filepath.Join(host, "sub/fromro"), "x\n")
	wantFile(t, filepath.Join(host, "file"), "content")
	info, err := os.Stat(filepath.Join(host, "new"))
	if err != nil || info.Sys().(*syscall.Stat_t).Uid != 1234 || info.Mode().Perm() != 0o640 {
		t.Errorf("owner and mode that the container gave: %v (%v)", info, err)
	}
	wantFile(t, filepath.Join(madeDir, "new"), "in a directory that kubelet made\n")
	wantFile(t, madeFile, "in a file that kubelet made\n")
	if len(st.Mounts) != 8 || st.Mounts[0].HostPath != host || !st.Mounts[2].RecursiveReadOnly {
		t.Errorf("mounts in the status: %v", st.Mounts)
	}
	start = time.Now()
	writer := p.start("sleep 1000", mounts(&cri.Mount{ContainerPath: "/w", HostPath: host}))
	reader := p.start("sleep 1000", mounts(&cri.Mount{ContainerPath: "/r", HostPath: host, Readonly: true}))
	t.Logf("two more: %s", time.Since(start))
	for i := range 5 { // nothing is ever stale: neither what the host writes nor what another container does
		writeFile(t, filepath.Join(host, "counter"), fmt.Sprint("host ", i))
		if got := p.exec(reader, "cat", "/r/counter"); got != fmt.Sprint("host ", i) {
			t.Errorf("container reads %q", got)
		}
		p.exec(writer, "sh", "-c", fmt.Sprintf("echo -n guest %d > /w/counter", i))
		if got := p.exec(reader, "cat", "/r/counter"); got != fmt.Sprint("guest ", i) {
			t.Errorf("container reads %q", got)
		}
	}
	ctx := testContext(t, time.Minute)
	for _, id := range []string{writer, reader} {
		if err := p.n.Runtime.RemoveContainer(ctx, id); err != nil {
			t.Error(err)
		}
	}
	wantFile(t, filepath.Join(host, "counter"), "guest 4")
	// A volume comes back after its last user went.
	if _, log := p.run("cat /again/counter", mounts(&cri.Mount{ContainerPath: "/again", HostPath: host})); log != "guest 4" {
		t.Errorf("volume mounted again: %q", log)
	}
}

func TestMountPropagation(t *testing.T) {
	parallel(t)
	host := t.TempDir()
	mountTmpfs(t, host)
	if err := unix.Mount("", host, "", unix.MS_SHARED, ""); err != nil {
		t.Fatal(err)
	}
	later := filepath.Join(host, "later")
	if err := os.Mkdir(later, 0o755); err != nil {
		t.Fatal(err)
	}
	p := runPod(t, shared)
	id := p.start("sleep 1000", mounts(
		&cri.Mount{ContainerPath: "/private", HostPath: host},
		&cri.Mount{ContainerPath: "/slave", HostPath: host, Propagation: cri.MountPropagation_PROPAGATION_HOST_TO_CONTAINER},
	))
	if out := p.exec(id, "ls", "/private/later", "/slave/later"); strings.Contains(out, "file") {
		t.Errorf("before the mount: %q", out)
	}
	if err := unix.Mount("tmpfs", later, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	mounted := true
	defer func() {
		if mounted {
			unix.Unmount(later, unix.MNT_DETACH)
		}
	}()
	writeFile(t, filepath.Join(later, "file"), "late")
	if out := p.exec(id, "cat", "/slave/later/file"); out != "late" {
		t.Errorf("mounted later: %q", out)
	}
	if out := p.exec(id, "ls", "/private/later"); out != "" {
		t.Errorf("a private mount shows %q", out)
	}
	// Lazily: virtiofsd holds what the guest remembers.
	if err := unix.Unmount(later, unix.MNT_DETACH); err != nil {
		t.Errorf("unmount on the host while a guest sees it: %v", err)
	} else {
		mounted = false
	}
	if out := p.exec(id, "ls", "/slave/later"); out != "" {
		t.Errorf("after the unmount: %q", out)
	}
}

func TestVolumesRefused(t *testing.T) {
	parallel(t)
	dir := t.TempDir()
	socket := filepath.Join(dir, "socket")
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := unix.Bind(fd, &unix.SockaddrUnix{Name: socket}); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mkfifo(filepath.Join(dir, "fifo"), 0o644); err != nil {
		t.Fatal(err)
	}
	// The hostPath types CharDevice and BlockDevice, wherever they are.
	for name, kind := range map[string]uint32{"char": unix.S_IFCHR, "block": unix.S_IFBLK} {
		if err := unix.Mknod(filepath.Join(dir, name), kind|0o600, int(unix.Mkdev(1, 3))); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("/proc/sys", filepath.Join(dir, "proc")); err != nil {
		t.Fatal(err)
	}
	p := runPod(t, shared)
	for _, c := range []struct {
		mount *cri.Mount
		code  codes.Code
		says  string
	}{
		{&cri.Mount{HostPath: filepath.Join(dir, "missing")}, codes.InvalidArgument, "missing"},
		{&cri.Mount{HostPath: "/proc"}, codes.Unimplemented, "/proc"},
		{&cri.Mount{HostPath: "/sys/fs"}, codes.Unimplemented, "/sys"},
		{&cri.Mount{HostPath: "/dev/null"}, codes.Unimplemented, "/dev"},
		{&cri.Mount{HostPath: "/"}, codes.Unimplemented, "only the directories that are needed"},
		{&cri.Mount{HostPath: filepath.Join(dir, "proc")}, codes.Unimplemented, "/proc"},
		{&cri.Mount{HostPath: socket}, codes.Unimplemented, "is a socket"},
		{&cri.Mount{HostPath: filepath.Join(dir, "fifo")}, codes.Unimplemented, "fifo"},
		{&cri.Mount{HostPath: filepath.Join(dir, "char")}, codes.Unimplemented, "device"},
		{&cri.Mount{HostPath: filepath.Join(dir, "block")}, codes.Unimplemented, "device"},
		{&cri.Mount{HostPath: dir, Propagation: cri.MountPropagation_PROPAGATION_BIDIRECTIONAL}, codes.Unimplemented, "BIDIRECTIONAL"},
		{&cri.Mount{HostPath: dir, RecursiveReadOnly: true}, codes.InvalidArgument, "needs readonly"},
		{&cri.Mount{HostPath: dir, RecursiveReadOnly: true, Readonly: true, Propagation: cri.MountPropagation_PROPAGATION_HOST_TO_CONTAINER}, codes.InvalidArgument, "needs propagation PRIVATE"},
		{&cri.Mount{HostPath: dir, RecursiveReadOnly: true, Readonly: true, Propagation: cri.MountPropagation_PROPAGATION_BIDIRECTIONAL}, codes.InvalidArgument, "needs propagation PRIVATE"},
	} {
		c.mount.ContainerPath = "/v"
		_, err := p.create("true", mounts(c.mount))
		if status.Code(err) != c.code || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%v: error is %v, want %s and %q", c.mount, err, c.code, c.says)
		}
	}
}
