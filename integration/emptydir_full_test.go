//go:build integration

package integration

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// fillFileSystem writes a file until no space is left.
func fillFileSystem(t *testing.T, path string) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, size := range []int{1 << 20, 4 << 10} { // to the last block
		for block := make([]byte, size); err == nil; {
			_, err = f.Write(block)
		}
		if !errors.Is(err, unix.ENOSPC) {
			t.Fatal(err)
		}
		err = nil
	}
}

// An emptyDir whose host's disk was full is told of it, keeps what was synced before, and can be written again by the next
// container of the same pod.
func TestEmptyDirOnFullHost(t *testing.T) {
	parallel(t)
	k := newKubeletPod(t)
	if err := unix.Mount("tmpfs", k.dir, "tmpfs", 0, "size=48m,mode=750"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(k.dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	dir, sub := k.empty("data", 0), ""
	if err := os.MkdirAll(filepath.Join(dir, "part"), 0o750); err != nil {
		t.Fatal(err)
	}
	sub = k.subPath(dir, "data", "part")
	p := k.run(0)
	ms := mounts(&cri.Mount{ContainerPath: "/data", HostPath: dir}, &cri.Mount{ContainerPath: "/part", HostPath: sub})
	if st, log := p.run("echo kept > /data/kept; echo part > /part/kept; sync; echo done", ms); st.ExitCode != 0 || log != "done\n" {
		t.Fatalf("container says %q, exit code %d", log, st.ExitCode)
	}
	filler := filepath.Join(k.dir, "filler")
	fillFileSystem(t, filler)
	// It is told, and goes on until the file system cannot even write its journal.
	const write = `dd if=/dev/zero of=/data/big bs=64k count=640 conv=fsync 2>/dev/null && echo unnoticed
i=0; while [ $i -lt 1000 ]; do touch /data/$i 2>/dev/null || break; sync; i=$((i+1)); done
touch /data/last 2>&1 | grep -o "Read-only file system"; exit 7`
	st, log := p.run(write, ms)
	if st.ExitCode != 7 || strings.Contains(log, "unnoticed") {
		t.Errorf("writing to a full disk: %q, exit code %d", log, st.ExitCode)
	}
	t.Logf("after writing to a full disk: %q", log)
	if id, err := p.create("true", ms); err == nil {
		if err := p.n.Runtime.RemoveContainer(testContext(t, time.Minute), id); err != nil {
			t.Error(err)
		}
	} else if strings.Contains(err.Error(), "damaged") {
		t.Errorf("an emptyDir of a full host counts as damaged: %v", err)
	}
	if err := os.Remove(filler); err != nil {
		t.Fatal(err)
	}
	// kubelet tries again.
	eventually(t, 2*time.Minute, "the emptyDir is writable", func() error {
		id, err := p.create("cat /data/kept /part/kept; rm -f /data/big /data/[0-9]* && dd if=/dev/zero of=/data/new bs=64k count=160 conv=fsync 2>/dev/null && echo more >> /part/kept && sync && echo written", ms)
		if err == nil {
			err = p.n.Runtime.StartContainer(testContext(t, time.Minute), id)
		}
		if err != nil {
			return err
		}
		st, log := p.wait(id), p.logText(id)
		if st.ExitCode != 0 || log != "kept\npart\nwritten\n" {
			return fmt.Errorf("container says %q, exit code %d", log, st.ExitCode)
		}
		return nil
	})
	// The pod is the same, and so is its VM.
	if st, err := p.n.Runtime.PodSandboxStatus(testContext(t, time.Minute), p.id, false); err != nil || st.GetStatus().GetState() != cri.PodSandboxState_SANDBOX_READY {
		t.Errorf("the sandbox is %v (%v)", st.GetStatus().GetState(), err)
	}
}
