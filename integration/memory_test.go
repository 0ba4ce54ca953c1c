//go:build integration

package integration

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// TestMemoryGoesBack: what a pod has freed is the node's again, without anybody asking for it (free page reporting).
func TestMemoryGoesBack(t *testing.T) {
	const used = 256 << 20
	p := runPod(t, shared, func(c *cri.PodSandboxConfig) {
		c.Linux.Resources = &cri.LinuxContainerResources{MemoryLimitInBytes: 640 << 20}
	})
	p.start("sleep 1000")
	before := p.vmmMemory()
	user := p.start(fmt.Sprintf("dd if=/dev/zero bs=%dM count=1 | sleep 1000", used>>20)) // dd fills its block and waits
	var full int64
	eventually(t, time.Minute, "the VMM's memory grows", func() error {
		if full = p.vmmMemory(); full < before+used*9/10 {
			return fmt.Errorf("VMM has %d MiB, %d before", full>>20, before>>20)
		}
		return nil
	})
	if err := p.n.Runtime.StopContainer(t.Context(), user, 0); err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	var after int64
	eventually(t, time.Minute, "the VMM's memory shrinks", func() error {
		if after = p.vmmMemory(); after > full-used*8/10 {
			return fmt.Errorf("VMM has %d MiB, %d when full, %d before", after>>20, full>>20, before>>20)
		}
		return nil
	})
	t.Logf("VMM: %d MiB before, %d with %d MiB in use, %d when they were freed, after %s",
		before>>20, full>>20, used>>20, after>>20, time.Since(start).Round(100*time.Millisecond))
}

// vmmMemory is how much of the node's memory the pod's VMM holds, guest included, in bytes.
func (p *pod) vmmMemory() int64 {
	p.t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.vmmPID()))
	if err != nil {
		p.t.Fatal(err)
	}
	for line := range strings.Lines(string(status)) {
		var kilobytes int64
		if n, _ := fmt.Sscanf(line, "VmRSS: %d kB", &kilobytes); n == 1 {
			return kilobytes << 10
		}
	}
	p.t.Fatalf("no VmRSS in %s", status)
	return 0
}

// TestDaemonOutOfMemory: a daemon whose cgroup is nearly full begins nothing until there is room again. One that gets no
// more memory at all is ended by the kernel, as by kill -9: pods go on, and the next daemon takes over where it was.
func TestDaemonOutOfMemory(t *testing.T) {
	p := runPod(t, shared)
	const lines = 20_000
	script, image := writer(lines, 1, "sleep 3; exit 7")
	id := p.start(script, image)
	sleeper := p.start("sleep 1000")

	pid := shared.PID()
	group, limit := limitMemory(t, pid) // what it has already does not count
	limit(16 << 20)
	large := newConfig(t)
	large.Annotations = map[string]string{"big": strings.Repeat("x", 6<<20)}
	for range 10 {
		if _, err := shared.Runtime.RunPodSandbox(t.Context(), large, ""); status.Code(err) != codes.ResourceExhausted {
			t.Errorf("a pod without memory: %v", err)
		}
	}
	limit(1 << 30)
	other := runPod(t, shared)
	if other.start("true"); shared.PID() != pid {
		t.Error("the daemon was ended")
	}

	limit(1 << 20) // and this call nothing refuses
	eventually(t, time.Minute, "the kernel ends the daemon", func() error {
		if _, err := shared.Runtime.Version(t.Context(), strings.Repeat("x", 6<<20)); err == nil {
			return errors.New("it answers")
		}
		if err := unix.Kill(pid, 0); !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("process %d is there (%v)", pid, err)
		}
		return nil
	})
	if err := errors.Join(shared.KillDaemon(), shared.StartDaemon(testContext(t, 2*time.Minute)), os.Remove(group)); err != nil {
		t.Fatal(err)
	}
	if out := p.exec(sleeper, "echo", "alive"); out != "alive\n" {
		t.Errorf("exec says %q", out)
	}
	if s := p.wait(id); s.ExitCode != 7 {
		t.Errorf("exit code is %d, want 7", s.ExitCode)
	}
	numbered(t, p.logText(id), lines)
}

// limitMemory moves a process to a cgroup of its own, and returns what sets how many bytes more than now it may have.
func limitMemory(t *testing.T, pid int) (dir string, limit func(more int64)) {
	t.Helper()
	root, limitFile, usageFile := "/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
	if _, err := os.Stat(root); err != nil {
		root, limitFile, usageFile = "/sys/fs/cgroup", "memory.max", "memory.current"
	}
	dir = filepath.Join(root, fmt.Sprintf("crivm-memory-test-%d", os.Getpid()))
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Remove(dir) })
	if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0); err != nil {
		t.Fatal(err)
	}
	return dir, func(more int64) {
		t.Helper()
		text, err := os.ReadFile(filepath.Join(dir, usageFile))
		if err != nil {
			t.Fatal(err)
		}
		usage, err := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64)
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, limitFile), strconv.AppendInt(nil, usage+more, 10), 0)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}
