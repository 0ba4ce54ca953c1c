//go:build integration

package integration

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// attackScript is what root in the guest can try against the share. It makes its own mounts of the volumes
// writable first, so that only the host is in its way. It prints what succeeded and should not have.
const attackScript = `
ro=/ro rw=/rw
mount -o remount,rw,bind $ro || echo "cannot remount"
grep -q ' /ro rw,' /proc/self/mountinfo || echo "still read-only in the guest"
mkdir /all && mount -t virtiofs host /all || echo "cannot mount the share"
try() { "$@" 2>/dev/null && echo "SUCCEEDED: $*"; }
try sh -c "echo x > $ro/secret"
try sh -c "echo x >> $ro/secret"
try sh -c ": > $ro/new"
try mkdir $ro/dir
try rm -f $ro/secret
try mv $ro/secret $ro/other
try chmod 777 $ro/secret
try chown 1:1 $ro/secret
try ln $ro/secret $ro/hard
try ln $ro/secret $rw/hard
try ln -s x $ro/link
try touch -d 2001-01-01 $ro/secret
try mknod $rw/device b 254 0
try mknod $rw/null c 1 3
try cat $rw/escape
try cat $rw/../outside
try cat $rw/up/outside
ln -s /etc/hostname $rw/tohost && try grep -q HOSTMARK $rw/tohost
long=$(printf '%0300d' 0)
try touch $rw/$long
try cat $rw/$long/../readonly
/tools/filecheck race $rw/race 2000 | grep -v '^race ok$'
/tools/filecheck entries $rw 3000 | grep -v '^entries 3000$'
echo done`

// Root in the guest, with every capability and the share at hand, neither writes to what is read-only nor
// leaves the volumes.
func TestGuestRootAttacksShare(t *testing.T) {
	parallel(t)
	dir := t.TempDir()
	writeFile(t, filepath.Join(dir, "outside"), "HOSTMARK")
	writeFile(t, filepath.Join(dir, "ro/secret"), "kept")
	writeFile(t, filepath.Join(dir, "ro/readonly"), "")
	writeFile(t, filepath.Join(dir, "rw/writable"), "")
	if err := os.Mkdir(filepath.Join(dir, "rw/race"), 0o755); err != nil {
		t.Fatal(err)
	}
	for link, target := range map[string]string{"rw/escape": filepath.Join(dir, "outside"), "rw/up": ".."} {
		if err := os.Symlink(target, filepath.Join(dir, link)); err != nil {
			t.Fatal(err)
		}
	}
	p := runPod(t, shared, func(c *cri.PodSandboxConfig) { c.Linux.SecurityContext.Privileged = true })
	st, log := p.run(attackScript, mounts(
		&cri.Mount{ContainerPath: "/ro", HostPath: filepath.Join(dir, "ro"), Readonly: true},
		&cri.Mount{ContainerPath: "/rw", HostPath: filepath.Join(dir, "rw")}, filecheck(t),
	), func(c *cri.ContainerConfig) { c.Linux.SecurityContext.Privileged = true })
	if st.ExitCode != 0 || log != "done\n" {
		t.Errorf("root in the guest: %s (exit code %d)", log, st.ExitCode)
	}
	wantFile(t, filepath.Join(dir, "ro/secret"), "kept")
	wantFile(t, filepath.Join(dir, "outside"), "HOSTMARK")
	entries, err := os.ReadDir(filepath.Join(dir, "ro"))
	if err != nil || len(entries) != 2 {
		t.Errorf("read-only directory has %v (%v)", entries, err)
	}
}

// fileServers are the processes that serve a pod's volumes.
func fileServers(t *testing.T, p *pod) []int {
	t.Helper()
	lines, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	var pids []int
	for _, path := range lines {
		line, err := os.ReadFile(path)
		if err == nil && bytes.Contains(line, []byte("virtiofsd")) && bytes.Contains(line, []byte(p.id[:16])) {
			pid, _ := strconv.Atoi(strings.Split(path, "/")[2])
			pids = append(pids, pid)
		}
	}
	return pids
}

func wantDead(t *testing.T, p *pod, container string) {
	t.Helper()
	eventually(t, 30*time.Second, "the sandbox is NOTREADY", func() error {
		if s := p.status().State; s != cri.PodSandboxState_SANDBOX_NOTREADY {
			return fmt.Errorf("sandbox is %s", s)
		}
		return nil
	})
	if s := p.wait(container); s.ExitCode != 137 || !strings.Contains(s.Message, "virtiofsd") {
		t.Errorf("container of a pod without its file server: exit code %d, %q", s.ExitCode, s.Message)
	}
}

// One file server per pod, from the first volume that needs it, through restarts of the daemon. A pod that
// loses it dies; it does not hang.
func TestFileServerLife(t *testing.T) {
	host := t.TempDir()
	p := runPod(t, shared)
	p.start("sleep 1000")
	if pids := fileServers(t, p); len(pids) > 0 {
		t.Errorf("a pod without volumes has file servers %v", pids)
	}
	id := p.start("i=0; while :; do i=$((i+1)); echo $i > /v/count.new; mv /v/count.new /v/count; sleep 0.1; done", mounts(&cri.Mount{ContainerPath: "/v", HostPath: host}))
	counter := func() int {
		b, _ := os.ReadFile(filepath.Join(host, "count"))
		n, _ := strconv.Atoi(strings.TrimSpace(string(b)))
		return n
	}
	counts := func() {
		t.Helper()
		before := counter()
		eventually(t, 30*time.Second, "the container writes", func() error {
			if n := counter(); n <= before {
				return fmt.Errorf("counter is %d", n)
			}
			return nil
		})
	}
	counts()
	pids := fileServers(t, p)
	if len(pids) != 1 {
		t.Fatalf("file servers %v, want one", pids)
	}
	if err := shared.KillDaemon(); err != nil {
		t.Fatal(err)
	}
	counts()
	if err := shared.StartDaemon(testContext(t, 2*time.Minute)); err != nil {
		t.Fatal(err)
	}
	counts()
	other := t.TempDir()
	if st, log := p.run("echo other > /o/file; cat /v/count > /dev/null && echo ok", mounts(
		&cri.Mount{ContainerPath: "/o", HostPath: other}, &cri.Mount{ContainerPath: "/v", HostPath: host})); st.ExitCode != 0 || log != "ok\n" {
		t.Errorf("volumes of a container made after the restart: %q", log)
	}
	wantFile(t, filepath.Join(other, "file"), "other\n")
	if again := fileServers(t, p); len(again) != 1 || again[0] != pids[0] {
		t.Errorf("file servers after the restart %v, before it %v", again, pids)
	}
	if err := unix.Kill(pids[0], unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	wantDead(t, p, id)

	p = runPod(t, shared)
	id = p.start("sleep 1000", mounts(&cri.Mount{ContainerPath: "/v", HostPath: host}))
	if pids = fileServers(t, p); len(pids) != 1 {
		t.Fatalf("file servers %v, want one", pids)
	}
	if err := shared.KillDaemon(); err != nil {
		t.Fatal(err)
	}
	if err := unix.Kill(pids[0], unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if err := shared.StartDaemon(testContext(t, 2*time.Minute)); err != nil {
		t.Fatal(err)
	}
	wantDead(t, p, id)
}
