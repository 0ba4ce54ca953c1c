package server

import (
	"bufio"
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// TestLogOracle: while a container writes numbered lines to both streams, at 0.5, 5 and 20 MB/s in turn, the daemon is
// killed at random and kubelet rotates the log at random, also while the daemon is dead and also without ever telling
// it. Every number must be in the logs once, in order. CRIVM_TEST_SEED repeats a run.
func TestLogOracle(t *testing.T) {
	t.Parallel()
	n := newKillNode(t, killVMM(t))
	seed := uint64(time.Now().UnixNano())
	if text := os.Getenv("CRIVM_TEST_SEED"); text != "" {
		var err error
		if seed, err = strconv.ParseUint(text, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("CRIVM_TEST_SEED=%d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	kills := 50
	if testing.Short() || raceDetector {
		kills = 10
	}
	stop := filepath.Join(n.plan.Dir, "stop")
	// Lines of 100 bytes, in bursts 20 ms apart; 2,000 of them in each of two streams are 20 MB/s.
	pad := strings.Repeat("x", 91)
	writer := func(redirect string) string {
		return fmt.Sprintf(`(i=10000000; while [ ! -e %s ]; do for n in 50 50 50 50 50 500 500 500 500 500 2000 2000 2000 2000 2000; do
			seq -f '%%.0f%s' $((i+1)) $((i+n)); i=$((i+n)); sleep 0.02; done; done) %s`, stop, pad, redirect)
	}
	n.start()
	pod := n.runPod()
	id := n.create(pod, "writer", writer("&")+" "+writer(">&2")+"; wait; exit 5")
	n.startContainer(id)

	var rotated []string
	rotate := func() {
		to := fmt.Sprintf("%s.%d", n.logPath("writer"), len(rotated))
		if err := os.Rename(n.logPath("writer"), to); os.IsNotExist(err) {
			return // renamed already, and not made anew yet
		} else if err != nil {
			t.Fatal(err)
		}
		rotated = append(rotated, to)
	}
	for range kills {
		time.Sleep(time.Duration(random.IntN(100)) * time.Millisecond) // the moment of the kill is what is tried
		switch random.IntN(4) {
		case 0:
			rotate()
			n.must("ReopenContainerLog", func(ctx context.Context) error {
				_, err := n.cri.ReopenContainerLog(ctx, &cri.ReopenContainerLogRequest{ContainerId: id})
				return err
			})
			time.Sleep(time.Duration(random.IntN(20)) * time.Millisecond)
		case 1:
			rotate() // kubelet dies, too
			time.Sleep(time.Duration(random.IntN(20)) * time.Millisecond)
		}
		n.kill()
		if random.IntN(4) == 0 {
			rotate()
		}
		n.start()
	}
	if err := os.WriteFile(stop, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if s := n.exit(id); s.GetExitCode() != 5 {
		t.Errorf("writer is %v", s)
	}
	n.once("writer")
	n.stays(pod)
	const first, round = 10_000_000, 5 * (50 + 500 + 2000)
	last, lengths := map[string]int{"stdout": first, "stderr": first}, map[string]int{}
	for _, path := range append(rotated, n.logPath("writer")) {
		if err := countLines(path, pad, last, lengths); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("%d kills, %d rotations, last lines: %v, at most %d bytes in a tenth of a second", kills, len(rotated), last, slices.Max(slices.Collect(maps.Values(lengths))))
	for stream, number := range last {
		if number <= first || (number-first)%round != 0 {
			t.Errorf("%s ends with %d", stream, number)
		}
	}
	n.removePod(pod)
	n.clean()
}

// countLines checks that the numbers of each stream go on from the last. It adds up what came in each tenth of a second.
func countLines(path, pad string, last, lengths map[string]int) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	scanner := bufio.NewScanner(f)
	for row := 1; scanner.Scan(); row++ {
		parts := strings.SplitN(scanner.Text(), " ", 4)
		if len(parts) != 4 || parts[2] != tagFull {
			return fmt.Errorf("%s:%d: %q", path, row, scanner.Text())
		}
		text, padded := strings.CutSuffix(parts[3], pad)
		number, err := strconv.Atoi(text)
		if err != nil || !padded || number != last[parts[1]]+1 {
			return fmt.Errorf("%s:%d: %s has %q after %d", path, row, parts[1], parts[3], last[parts[1]])
		}
		last[parts[1]] = number
		lengths[parts[0][:len("2006-01-02T15:04:05.0")]] += len(parts[3]) + 1
	}
	return scanner.Err()
}
