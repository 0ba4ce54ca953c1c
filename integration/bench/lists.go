package main

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// measureLists runs the benchmark of calls on 1,000 records, which has its records without VMs.
func (b *bench) measureLists(ctx context.Context, s *section) error {
	// The tests make namespaces of their own, and would take the mount of this one's /run/netns, which theirs hides, for their own.
	cmd := exec.CommandContext(ctx, "sh", "-c", `umount -l /run/netns; exec "$@"`, "sh", "go", "test", "./server", "-run", "^$", "-bench", "BenchmarkCalls", "-benchtime", fmt.Sprintf("%dx", b.o.lists))
	cmd.Dir = b.o.checkout
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: unix.CLONE_NEWNS}
	out, err := cmd.Output()
	if err != nil {
		return fmt.Errorf("go test ./server -bench BenchmarkCalls: %w: %s", err, out)
	}
	t := s.table("calls on 1,000 pods with 1,000 containers")
	for lines := bufio.NewScanner(strings.NewReader(string(out))); lines.Scan(); {
		name, values := benchmarkLine(lines.Text())
		name = strings.ReplaceAll(strings.TrimPrefix(name, "BenchmarkCalls/"), "_", " ")
		for _, unit := range []string{"p50-ms", "p99-ms", "server-cpu-ms"} {
			if v, ok := values[unit]; ok {
				t.add(name+", "+strings.TrimSuffix(unit, "-ms"), "ms", newDist([]float64{v}), nil)
			}
		}
		switch name {
		case "ListPodSandbox/read", "ListContainers/read":
			s.Ratios = append(s.Ratios, ratio{name + ", p99 in ms", values["p99-ms"], 5, false})
		case "ContainerStatus/read, 20 VMs boot":
			s.Ratios = append(s.Ratios, ratio{name + ", p99 in ms", values["p99-ms"], 2, false})
		}
	}
	if len(t.Rows) == 0 {
		return fmt.Errorf("go test ./server -bench BenchmarkCalls printed no figures: %s", out)
	}
	return nil
}

// benchmarkLine takes a line of go test's benchmarks apart: its name, and values by unit.
func benchmarkLine(line string) (name string, values map[string]float64) {
	fields := strings.Fields(line)
	if len(fields) < 4 || !strings.HasPrefix(fields[0], "Benchmark") {
		return "", nil
	}
	values = map[string]float64{}
	for i := 2; i+1 < len(fields); i += 2 {
		if v, err := strconv.ParseFloat(fields[i], 64); err == nil {
			values[fields[i+1]] = v
		}
	}
	name = fields[0]
	if i := strings.LastIndexByte(name, '-'); i > 0 { // GOMAXPROCS
		if _, err := strconv.Atoi(name[i+1:]); err == nil {
			name = name[:i]
		}
	}
	return name, values
}
