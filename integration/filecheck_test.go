//go:build integration

package integration

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// filecheck builds the program that looks at file systems and returns it as a volume.
func filecheck(t *testing.T) *cri.Mount {
	t.Helper()
	dir := t.TempDir()
	build := exec.CommandContext(t.Context(), "go", "build", "-o", filepath.Join(dir, "filecheck"), "./cmd/filecheck")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("building filecheck: %v: %s", err, out)
	}
	return &cri.Mount{ContainerPath: "/tools", HostPath: dir, Readonly: true}
}

// knownDifferences are what a volume shared with the host does not do as a local file system does: docs/volumes.md lists
// them. An emptyDir on a disk has none.
var knownDifferences = map[string]map[string]string{
	"/empty": {},
	"/var":   {"tmpfile": "operation not supported"}, // overlayfs before Linux 6.3
	"/host": {
		"mmap-shared": "no such device",
		"device-node": "operation not permitted",
		"xattr":       "operation not supported",
		"acl":         "operation not supported",
		"tmpfile":     "operation not supported",
	},
}

// What POSIX and Linux promise, on each kind of file system that a container can have.
func TestFilesystemPromises(t *testing.T) {
	parallel(t)
	tools, k := filecheck(t), newKubeletPod(t)
	empty, host := k.empty("data", 0), t.TempDir()
	p := k.run(0)
	id := p.start("for d in /empty /var /host; do echo $d; /tools/filecheck posix $d; done; echo done", mounts(tools,
		&cri.Mount{ContainerPath: "/empty", HostPath: empty}, &cri.Mount{ContainerPath: "/host", HostPath: host}))
	log := ""
	eventually(t, 3*time.Minute, "all is tried", func() error {
		if log = p.logText(id); !strings.HasSuffix(log, "done\n") {
			return fmt.Errorf("the last lines are %q", log[max(0, len(log)-200):])
		}
		return nil
	})
	at, passed := "", map[string]int{}
	left := map[string]map[string]string{}
	for line := range strings.Lines(log) {
		line = strings.TrimSpace(line)
		name, why, differs := strings.Cut(line, " differs: ")
		switch {
		case strings.HasPrefix(line, "/"):
			at, left[line] = line, map[string]string{}
			for name, why := range knownDifferences[line] {
				left[line][name] = why
			}
		case differs && left[at][name] != "" && strings.Contains(why, left[at][name]):
			delete(left[at], name)
		case differs:
			t.Errorf("%s: %s", at, line)
		default:
			passed[at]++
		}
	}
	for dir, rest := range left {
		for name := range rest {
			t.Errorf("%s: %s is as it should be now: take it off the list and out of docs/volumes.md", dir, name)
		}
		t.Logf("%s: %d checks pass, %d differ as is known", dir, passed[dir], len(knownDifferences[dir]))
	}
}

// Data stays what was written while the daemon is killed and comes back in the middle.
func TestDataThroughDaemonKill(t *testing.T) {
	tools, k := filecheck(t), newKubeletPod(t)
	empty, host := k.empty("data", 0), t.TempDir()
	p := k.run(0)
	volumes := mounts(tools, &cri.Mount{ContainerPath: "/empty", HostPath: empty}, &cri.Mount{ContainerPath: "/host", HostPath: host})
	var ids []string
	for _, dir := range []string{"/empty", "/host"} {
		ids = append(ids, p.start("/tools/filecheck data "+dir+" 42 1500", volumes))
	}
	for _, id := range ids {
		eventually(t, time.Minute, "it is under way", func() error {
			if !strings.Contains(p.logText(id), "under way") {
				return os.ErrNotExist
			}
			return nil
		})
	}
	if err := shared.KillDaemon(); err != nil {
		t.Fatal(err)
	}
	if err := shared.StartDaemon(testContext(t, 2*time.Minute)); err != nil {
		t.Fatal(err)
	}
	for _, id := range ids {
		if st := p.wait(id); st.ExitCode != 0 || !strings.Contains(p.logText(id), "data ok") {
			t.Errorf("exit code %d: %s", st.ExitCode, p.logText(id))
		}
	}
}
