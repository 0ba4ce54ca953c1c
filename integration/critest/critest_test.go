//go:build integration

// Package critest runs Kubernetes' own tests of container runtimes, critest, against crivm on real VMs. It
// holds what critest skips against a list with reasons, and docs/conformance.md against what a run says.
package critest

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/crivm/crivm/integration/node"
	"github.com/crivm/crivm/integration/registry"
)

var (
	buildDir  = flag.String("build", "../../build", "the checkout's build directory")
	focus     = flag.String("focus", "", "run only the specs that match; neither the list of skips nor the page is looked at then")
	update    = flag.Bool("update", false, "write docs/conformance.md from this run")
	processes = flag.Int("processes", 0, "1 runs specs one after the other only, more side by side in so many processes; 0 both ways")
)

const (
	// runLimit bounds a whole run. In software emulation a spec takes seconds: each boots a VM.
	runLimit = 35 * time.Minute
	endLimit = 2 * time.Minute // removing what is left of a run
)

func TestMain(m *testing.M) {
	flag.Parse()
	if os.Geteuid() != 0 {
		fmt.Println("SKIP: critest needs root: network namespaces, taps and mounts")
		os.Exit(0)
	}
	var err error
	if *buildDir, err = node.Isolate(*buildDir); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// rig is a node with a registry and a directory for one run.
type rig struct {
	*node.Node
	build, dir string
}

// newRig starts a node. When the test ends, nothing may be left of its pods.
func newRig(t *testing.T) *rig {
	t.Helper()
	build := *buildDir
	images, err := registry.Serve(filepath.Join(build, "images"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { images.Close() })
	dir, err := os.MkdirTemp("", "crivm-critest-")
	if err == nil {
		err = os.Chmod(dir, 0o711) // VMM processes of other uids pass through
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	n, err := node.Start(t.Context(), node.Options{Build: build, Dir: filepath.Join(dir, "node"), Registry: images.Addr()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), endLimit)
		defer cancel()
		if t.Failed() {
			t.Logf("log of crivm: %s", n.LogTail())
		}
		if err := errors.Join(n.RemoveAllPods(ctx), n.CheckLeaks(ctx), n.Stop(), node.RemoveCgroups()); err != nil {
			t.Error(err)
		}
	})
	return &rig{Node: n, build: build, dir: dir}
}

// run calls critest, with flags of its own, through ginkgo, with flags of its, and returns what the specs came
// to. What is printed is in build/NAME.log.
func (r *rig) run(t *testing.T, name string, ginkgo []string, own ...string) ([]spec, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), runLimit)
	defer cancel()
	// ginkgo runs programs with this suffix, and puts reports beside them.
	program := filepath.Join(r.dir, "critest.test")
	if err := os.Symlink(filepath.Join(r.build, "bin/critest"), program); err != nil {
		return nil, err
	}
	output, err := os.Create(filepath.Join(r.build, name+".log"))
	if err != nil {
		return nil, err
	}
	defer output.Close()
	args := slices.Concat([]string{"--no-color", "--junit-report", "junit.xml", "--timeout", runLimit.String()}, ginkgo,
		[]string{program, "--", "-runtime-endpoint", r.Socket, "-image-endpoint", r.Socket}, own)
	critest := exec.CommandContext(ctx, filepath.Join(r.build, "bin/ginkgo"), args...)
	critest.Dir, critest.Stdout, critest.Stderr = r.dir, output, output
	critest.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	critest.Cancel = func() error { return syscall.Kill(-critest.Process.Pid, syscall.SIGKILL) } // ginkgo's processes too
	runErr := critest.Run()
	specs, err := readReport(filepath.Join(r.dir, "junit.xml"))
	if err != nil {
		return nil, fmt.Errorf("critest: %v, %w; see %s", runErr, err, output.Name())
	}
	if runErr != nil {
		runErr = fmt.Errorf("critest: %w; see %s", runErr, output.Name())
	}
	return specs, runErr
}

// inParallel is how many of critest's processes run specs side by side.
const inParallel = 2

// TestCritest runs the specs, one after the other with VMs from a pool and then side by side with VMs that each boot for
// their pod. Those that fail fail the test, as does a skip without a reason, a reason that is not needed any more, and a
// page that says something else.
func TestCritest(t *testing.T) {
	if *processes != 0 {
		runAll(t, *processes)
		return
	}
	for _, n := range []int{1, inParallel} {
		t.Run(fmt.Sprintf("processes=%d", n), func(t *testing.T) { runAll(t, n) })
	}
}

func runAll(t *testing.T, processes int) {
	r := newRig(t)
	if processes == 1 {
		r.setPool(t, 2)
		t.Cleanup(func() { r.setPool(t, 0) }) // a slot is a VM that is left
	}
	flags := []string{"--nodes", strconv.Itoa(processes)}
	for _, s := range skips {
		if s.ask {
			flags = append(flags, "--skip", s.name)
		}
	}
	if *focus != "" {
		flags = append(flags, "--focus", *focus)
	}
	start := time.Now()
	specs, err := r.run(t, fmt.Sprintf("critest-%d", processes), flags)
	took := time.Since(start)
	specs = slices.DeleteFunc(specs, func(s spec) bool { return strings.Contains(s.Name, "benchmark") }) // figures, see TestStartFromScratch
	counts, total := map[string]int{}, 0.0
	for _, s := range specs {
		counts[s.Status]++
		total += s.Seconds
		if s.failed() {
			t.Errorf("%s (%.1f s): %s", s.Name, s.Seconds, s.Failure.Message)
		}
	}
	if err != nil && !t.Failed() {
		t.Error(err)
	}
	t.Logf("critest in %d processes: %s, %.0f s of specs, %v", processes, took.Round(time.Second), total, counts)
	slices.SortFunc(specs, func(a, b spec) int { return int(1000 * (b.Seconds - a.Seconds)) })
	for _, s := range specs[:min(10, len(specs))] {
		t.Logf("%6.1f s  %s", s.Seconds, s.Name)
	}
	if *focus == "" {
		checkSkips(t, specs)
		checkPage(t, specs)
	}
}

// setPool gives the node a pool of this size, 0 for none, and restarts its daemon.
func (r *rig) setPool(t *testing.T, size int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), endLimit) // cleanups do so, too
	defer cancel()
	path := filepath.Join(r.Dir, "conf.d/60-pool.toml")
	err := os.WriteFile(path, fmt.Appendf(nil, "[vm]\npool_size = %d\n[pool]\ncpu_weight = 100\n", size), 0o644)
	if err := errors.Join(err, r.KillDaemon(), r.StartDaemon(ctx)); err != nil {
		t.Fatal(err)
	}
}

// TestStartFromScratch prints critest's one benchmark that is always on: RunPodSandbox, CreateContainer,
// StartContainer, StopPodSandbox and RemovePodSandbox in less than 5 s.
func TestStartFromScratch(t *testing.T) {
	if *focus != "" {
		t.Skip("-focus is about the specs of TestCritest")
	}
	r := newRig(t)
	specs, err := r.run(t, "critest-benchmark", nil, "-benchmark")
	text, readErr := os.ReadFile(filepath.Join(r.build, "critest-benchmark.log"))
	if readErr != nil {
		t.Fatal(readErr)
	}
	measured := ""
	for line := range strings.Lines(string(text)) {
		if strings.Contains(line, "create PodSandbox and container") && strings.Contains(line, "|") {
			measured = strings.Join(strings.Fields(line), " ")
		}
	}
	if measured == "" {
		t.Fatalf("no figure in %s (%v)", filepath.Join(r.build, "critest-benchmark.log"), err)
	}
	status, statusErr := r.Runtime.Status(t.Context(), true)
	if statusErr != nil {
		t.Fatal(statusErr)
	}
	emulated := strings.Contains(fmt.Sprint(status), "emulation")
	t.Logf("from scratch (software emulation: %v; critest wants less than 5 s): %s", emulated, measured)
	if i := slices.IndexFunc(specs, spec.failed); i >= 0 && !emulated {
		t.Errorf("%s: %s", specs[i].Name, specs[i].Failure.Message)
	}
}
