//go:build integration

package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// residentKiB is how much memory a process has.
func residentKiB(t *testing.T, pid int) int {
	t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(status)) {
		if fields := strings.Fields(line); len(fields) > 1 && fields[0] == "VmRSS:" {
			n, err := strconv.Atoi(fields[1])
			if err != nil {
				t.Fatal(err)
			}
			return n
		}
	}
	t.Fatalf("process %d has no memory", pid)
	return 0
}

// A guest that fills what it was given with names, or remembers all names of a directory of the host, costs the host a
// bounded amount: a copy's are in guest memory and go with the next change, an emptyDir's are on its disk, and of a shared
// directory virtiofsd holds one descriptor and a small record for each name that the guest remembers, in the pod's own cgroup.
func TestManyEntries(t *testing.T) {
	parallel(t)
	const shareNames, ownNames = 8_000, 15_000 // 20,000 and 100,000 behave alike and take minutes in software emulation
	p := runPod(t, shared, func(c *cri.PodSandboxConfig) { c.Linux.SecurityContext.Privileged = true })
	k := newKubelet(t, p)
	cm := k.volume("configmap", "cm")
	writeVolume(t, cm, map[string]string{"key": "one"})
	host := t.TempDir()
	mountTmpfs(t, host)
	for i := range shareNames {
		if err := os.WriteFile(filepath.Join(host, fmt.Sprint("name-", i)), nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	own := filepath.Join(k.dir, "volumes/kubernetes.io~empty-dir/data")
	if err := os.MkdirAll(own, 0o777); err != nil {
		t.Fatal(err)
	}
	id := p.start("sleep 1000", mounts(filecheck(t),
		&cri.Mount{ContainerPath: "/cm", HostPath: cm, Readonly: true}, &cri.Mount{ContainerPath: "/own", HostPath: own},
		&cri.Mount{ContainerPath: "/host", HostPath: host},
	), func(c *cri.ContainerConfig) { c.Linux.SecurityContext.Privileged = true })
	daemon := shared.PID()
	before := residentKiB(t, daemon)
	exec := func(want string, command ...string) {
		t.Helper()
		start := time.Now()
		stdout, stderr, err := shared.Runtime.ExecSync(testContext(t, 4*time.Minute), id, command, 4*time.Minute)
		if err != nil || strings.TrimSpace(string(stdout)) != want {
			t.Errorf("%q: %q %q (%v), want %q", command, stdout, stderr, err, want)
		}
		t.Logf("%q: %s", command, time.Since(start).Round(time.Millisecond))
	}
	exec(strconv.Itoa(shareNames), "sh", "-c", "ls -l /host | grep -c name-")
	servers := fileServers(t, p)
	if len(servers) == 0 {
		t.Fatal("no file server")
	}
	for _, pid := range servers {
		open, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
		if err != nil {
			t.Fatal(err)
		}
		kib := residentKiB(t, pid)
		t.Logf("file server %d: %d MiB, %d descriptors", pid, kib>>10, len(open))
		if kib > 128<<10 || len(open) > shareNames+1000 {
			t.Errorf("file server %d has %d KiB and %d descriptors for %d names", pid, kib, len(open), shareNames)
		}
	}
	exec(fmt.Sprint("entries ", ownNames), "/tools/filecheck", "entries", "/own", strconv.Itoa(ownNames))
	exec(fmt.Sprint("entries ", ownNames), "sh", "-c", fmt.Sprint("mount -o remount,rw,bind /cm && /tools/filecheck entries /cm ", ownNames))
	// Names that are left behind in the copy: the next change removes them.
	exec("", "sh", "-c", "i=0; while [ $i -lt 1000 ]; do : > /cm/name$i; i=$((i+1)); done")
	writeVolume(t, cm, map[string]string{"key": "two"})
	eventually(t, 2*time.Minute, "the copy is put right", func() error {
		out, _, err := shared.Runtime.ExecSync(t.Context(), id, []string{"sh", "-c", "cat /cm/key; ls /cm | wc -l"}, time.Minute)
		if string(out) != "two1\n" {
			return fmt.Errorf("there is %q (%w)", out, err)
		}
		return nil
	})
	if names, err := os.ReadDir(own); err != nil || len(names) != 1 {
		t.Errorf("on the host the emptyDir has %d names (%v), want its disk only", len(names), err)
	}
	if after := residentKiB(t, daemon); after > before+128<<10 {
		t.Errorf("the daemon's memory went from %d to %d KiB", before, after)
	}
}
