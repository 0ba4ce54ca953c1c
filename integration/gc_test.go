//go:build integration

package integration

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// TestGC: `crivm gc` finds and removes what nobody owns beside a running pod, by the daemon and without one.
func TestGC(t *testing.T) {
	p := runPod(t, shared)
	c := p.start("sleep 1000")
	for _, running := range []bool{true, false} {
		if !running {
			if err := shared.StopDaemon(); err != nil {
				t.Fatal(err)
			}
		}
		planted := []string{
			filepath.Join(shared.RunDir, "vm", strings.Repeat("ab", 8)), filepath.Join(shared.Dir, "state/pods", strings.Repeat("ab", 32)),
			filepath.Join(shared.Dir, "state/disks", strings.Repeat("cd", 32)+".erofs"),
		}
		for _, path := range planted {
			if err := os.MkdirAll(path, 0o755); err != nil {
				t.Fatal(err)
			}
		}
		for _, args := range [][]string{{"gc", "--dry-run", "--json"}, {"gc", "--json"}} {
			out, err := shared.Crivm(testContext(t, time.Minute), args...)
			if err != nil {
				t.Fatal(err)
			}
			var got struct {
				DryRun    bool
				Leftovers []struct{ Kind, Name, Why, Error string }
				Skipped   []string
			}
			if err := json.Unmarshal([]byte(out[strings.Index(out, "{"):]), &got); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			if len(got.Leftovers) != len(planted) || len(got.Skipped) > 0 || got.DryRun != (len(args) == 3) {
				t.Errorf("running %t, %v: %s", running, args, out)
			}
		}
		for _, path := range planted {
			if _, err := os.Stat(path); !os.IsNotExist(err) {
				t.Errorf("running %t: %s is left (%v)", running, path, err)
			}
		}
		if out, err := shared.Crivm(testContext(t, time.Minute), "gc"); err != nil || !strings.Contains(out, "nothing is left that nobody owns") {
			t.Errorf("running %t: afterwards: %q (%v)", running, out, err)
		}
		if !running {
			if err := shared.StartDaemon(testContext(t, time.Minute)); err != nil {
				t.Fatal(err)
			}
		}
		if out := p.exec(c, "echo", "alive"); out != "alive\n" {
			t.Errorf("running %t: exec says %q", running, out)
		}
	}
}
