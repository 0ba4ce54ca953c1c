//go:build integration

package integration

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// Fifty probes at once, each with an answer of its own, while others of them fail or time out; the container's
// processes are as before afterwards.
func TestConcurrentProbes(t *testing.T) {
	const probes = 50
	p := runPod(t, shared)
	c := p.start("exec sleep 1000")
	ctx := testContext(t, 5*time.Minute)
	var wg sync.WaitGroup
	took := make([]time.Duration, probes)
	start := time.Now()
	for i := range probes {
		wg.Go(func() {
			start := time.Now()
			switch i % 10 {
			case 8: // a probe that fails
				_, stderr, err := shared.Runtime.ExecSync(ctx, c, []string{"sh", "-c", fmt.Sprintf("echo bad %d >&2; exit 3", i)}, 4*time.Minute)
				if err == nil || !strings.Contains(err.Error(), "exited with 3") || string(stderr) != fmt.Sprintf("bad %d\n", i) {
					t.Errorf("probe %d: %v, %q", i, err, stderr)
				}
			case 4, 9: // a probe that hangs, or that is not even started in time
				_, _, err := shared.Runtime.ExecSync(ctx, c, []string{"sleep", "4711"}, time.Second)
				if err == nil || !strings.Contains(err.Error(), "DeadlineExceeded") && !strings.Contains(err.Error(), "timed out") {
					t.Errorf("probe %d: %v, want a timeout", i, err)
				}
			default:
				stdout, _, err := shared.Runtime.ExecSync(ctx, c, []string{"echo", fmt.Sprint("probe ", i)}, 4*time.Minute)
				if err != nil || string(stdout) != fmt.Sprintf("probe %d\n", i) {
					t.Errorf("probe %d: %v, %q", i, err, stdout)
				}
			}
			took[i] = time.Since(start)
		})
	}
	wg.Wait()
	slices.Sort(took)
	t.Logf("%d probes at once in %s; one takes %s (median), %s (longest)", probes, time.Since(start).Round(time.Millisecond),
		took[probes/2].Round(time.Millisecond), took[probes-1].Round(time.Millisecond))
	eventually(t, 30*time.Second, "processes of timed out probes are gone", func() error {
		if out := p.exec(c, "pgrep", "sleep"); strings.TrimSpace(out) != "1" {
			return fmt.Errorf("processes called sleep are %q, want the container's own", out)
		}
		return nil
	})
}
