//go:build integration

package integration

import (
	"context"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestTwentyPodsAtOnce(t *testing.T) {
	const pods = 20
	ctx := testContext(t, 12*time.Minute)
	start := time.Now()
	var wg sync.WaitGroup
	errs := make([]error, pods)
	for i := range pods {
		config := newConfig(t)
		wg.Go(func() {
			errs[i] = func() error {
				id, err := shared.Runtime.RunPodSandbox(ctx, config, "")
				if err != nil {
					return err
				}
				defer func() {
					shared.Runtime.StopPodSandbox(context.WithoutCancel(ctx), id)
					shared.Runtime.RemovePodSandbox(context.WithoutCancel(ctx), id)
				}()
				c, err := shared.Runtime.CreateContainer(ctx, id, &cri.ContainerConfig{
					Metadata: &cri.ContainerMetadata{Name: "c"}, Linux: &cri.LinuxContainerConfig{SecurityContext: &cri.LinuxContainerSecurityContext{
						NamespaceOptions: &cri.NamespaceOption{Pid: cri.NamespaceMode_CONTAINER}}}, Image: &cri.ImageSpec{Image: busybox}, Command: []string{"sleep", "1000"}, LogPath: "c.log",
				}, config)
				if err != nil {
					return err
				}
				if err := shared.Runtime.StartContainer(ctx, c); err != nil {
					return err
				}
				out, _, err := shared.Runtime.ExecSync(ctx, c, []string{"hostname"}, 2*time.Minute)
				if err == nil && strings.TrimSpace(string(out)) != config.Hostname {
					err = fmt.Errorf("hostname is %q, want %q", out, config.Hostname)
				}
				return err
			}()
		})
	}
	wg.Wait()
	t.Logf("%d pods made, used and removed in %s", pods, time.Since(start).Round(time.Second))
	for i, err := range errs {
		if err != nil {
			t.Errorf("pod %d: %v", i, err)
		}
	}
	if err := shared.CheckLeaks(t.Context()); err != nil {
		t.Error(err)
	}
}

// writer is a container that prints numbered lines of 100 bytes at a rate in MB/s, then runs a shell script. A
// shell loop would be slower than the logs in software emulation.
func writer(lines, rate int, then string) (string, func(*cri.ContainerConfig)) {
	return fmt.Sprintf("/usr/sbin/nginx lines %d %d; %s", lines, rate, then), func(c *cri.ContainerConfig) { c.Image.Image = standin }
}

// numbered checks that a log has lines 1..n once each, in order.
func numbered(t *testing.T, text string, n int) {
	t.Helper()
	next := 1
	for line := range strings.Lines(text) {
		var got int
		if _, err := fmt.Sscanf(line, "%d ", &got); err != nil || len(line) != 100 {
			t.Fatalf("line %d is %q", next, line)
		}
		if got != next {
			t.Fatalf("line %d follows line %d", got, next-1)
		}
		next++
	}
	if next-1 != n {
		t.Fatalf("log has %d lines, want %d", next-1, n)
	}
}

func TestLogWriter(t *testing.T) {
	const lines = 1_000_000 // 100 MB
	p := runPod(t, shared)
	script, image := writer(lines, 10, "true")
	id := p.start(script, image)
	status := p.wait(id)
	took := time.Duration(status.FinishedAt - status.StartedAt)
	if status.ExitCode != 0 {
		t.Fatalf("writer: exit code %d", status.ExitCode)
	}
	numbered(t, p.logText(id), lines)
	t.Logf("%d MB of lines in %s: %.1f MB/s", lines*100/1_000_000, took.Round(time.Millisecond), float64(lines)*100/1e6/took.Seconds())
}

func TestLogRotationUnderLoad(t *testing.T) {
	const lines = 200_000
	p := runPod(t, shared)
	script, image := writer(lines, 4, "sleep 1000")
	id := p.start(script, image)
	path := p.logPath(id)
	var rotated []string
	for i := range 5 {
		eventually(t, time.Minute, "the log grows", func() error {
			info, err := os.Stat(path)
			if err == nil && info.Size() < 100_000 {
				err = fmt.Errorf("has %d bytes", info.Size())
			}
			return err
		})
		to := fmt.Sprintf("%s.%d", path, i)
		if err := os.Rename(path, to); err != nil {
			t.Fatal(err)
		}
		rotated = append(rotated, to)
		if err := shared.Runtime.ReopenContainerLog(t.Context(), id); err != nil {
			t.Fatal(err)
		}
	}
	var all strings.Builder
	eventually(t, 2*time.Minute, "the last line is logged", func() error {
		all.Reset()
		for _, file := range append(rotated, path) {
			text, err := os.ReadFile(file)
			if err != nil {
				return err
			}
			all.Write(text)
		}
		if !strings.Contains(all.String(), fmt.Sprintf("F %09d ", lines)) {
			return fmt.Errorf("log has %d bytes", all.Len())
		}
		return nil
	})
	var text strings.Builder
	for line := range strings.Lines(all.String()) {
		text.WriteString(strings.SplitN(line, " ", 4)[3])
	}
	numbered(t, text.String(), lines)
}
