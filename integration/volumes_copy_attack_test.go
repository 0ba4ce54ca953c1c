//go:build integration

package integration

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// spoilCopies is what root in the guest can do to what it was given: it makes its copies writable and fills them with
// what might lead somebody astray who walks or writes them, and its termination log with more than anybody wants.
const spoilCopies = `
mount -o remount,rw,bind /cm && mount -o remount,rw,bind /secret || echo cannot remount
rm -rf /cm/key /cm/dir /cm/..data
ln -s /etc/passwd /cm/key && ln -s / /cm/dir && mkdir -p /cm/..data/x && mkfifo /cm/fifo && ln -s .. /cm/up
stamped=$(ls -d /cm/..2026*) && rm -rf $stamped && ln -s / $stamped
i=0; while [ $i -lt 5000 ]; do : > /cm/name$i; i=$((i+1)); done; : > /cm/$(printf '%0255d' 0)
cp /secret/password /cm/stolen && echo changed > /secret/password
rm -rf /secret/..2026*
head -c 5000000 /dev/zero >> /etc/hosts
rm -f /dev/termination-log; mv /dev/termination-log /dev/other; ln -sf /etc/passwd /dev/termination-log
head -c 30000000 /dev/zero > /dev/termination-log
echo spoilt
exec sleep 1000`

// hostTree lists a directory of the host: names, modes, owners, sizes, targets and content.
func hostTree(t *testing.T, dir string) string {
	t.Helper()
	var out strings.Builder
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		fmt.Fprintf(&out, "%s %o %d:%d %d", strings.TrimPrefix(path, dir), st.Mode, st.Uid, st.Gid, st.Nlink)
		switch d.Type() {
		case fs.ModeSymlink:
			target, _ := os.Readlink(path)
			out.WriteString(" " + target)
		case 0:
			content, _ := os.ReadFile(path)
			fmt.Fprintf(&out, " %.1000q", content)
		}
		out.WriteString("\n")
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out.String()
}

// Root in the guest changes nothing on the host through copies and termination logs, and harms nobody but itself: the next
// change on the host puts its copy right.
func TestGuestRootSpoilsCopies(t *testing.T) {
	parallel(t)
	p := runPod(t, shared, func(c *cri.PodSandboxConfig) { c.Linux.SecurityContext.Privileged = true })
	k := newKubelet(t, p)
	cm, secret := k.volume("configmap", "cm"), k.volume("secret", "s")
	writeVolume(t, cm, map[string]string{"key": "one", "dir/key": "deep"})
	writeVolume(t, secret, map[string]string{"password": "secret"})
	var log string
	id := p.start(spoilCopies, k.ordinary(&log), mounts(
		&cri.Mount{ContainerPath: "/cm", HostPath: cm, Readonly: true}, &cri.Mount{ContainerPath: "/secret", HostPath: secret, Readonly: true},
	), func(c *cri.ContainerConfig) { c.Linux.SecurityContext.Privileged = true })
	before := hostTree(t, k.dir)
	p.says(id, "spoilt")
	if strings.Contains(p.logText(id), "cannot remount") {
		t.Error("root in the guest cannot even try")
	}
	if after := hostTree(t, k.dir); after != before {
		t.Errorf("on the host there was\n%s\nand is\n%s", before, after)
	}
	writeVolume(t, cm, map[string]string{"key": "two", "dir/key": "deeper"})
	writeVolume(t, secret, map[string]string{"password": "another"})
	before = hostTree(t, k.dir)
	eventually(t, time.Minute, "the copies are put right", func() error {
		out, _, err := shared.Runtime.ExecSync(t.Context(), id, []string{"sh", "-c", "cat /cm/key /cm/dir/key /secret/password; ls /cm | wc -l"}, 30*time.Second)
		if string(out) != "twodeeperanother2\n" {
			return fmt.Errorf("there is %q (%w)", out, err)
		}
		return nil
	})
	if err := shared.Runtime.StopContainer(testContext(t, time.Minute), id, 0); err != nil {
		t.Error(err)
	}
	p.wait(id)
	info, err := os.Lstat(log)
	if err != nil || !info.Mode().IsRegular() || info.Size() != 16<<10 {
		t.Errorf("termination log is %v (%v)", info, err)
	}
	if err := os.Truncate(log, 0); err != nil {
		t.Fatal(err)
	}
	if after := hostTree(t, k.dir); after != before {
		t.Errorf("on the host there was\n%s\nand is\n%s", before, after)
	}
	if pids := fileServers(t, p); len(pids) > 0 {
		t.Errorf("file servers %v", pids)
	}
}
