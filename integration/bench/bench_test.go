package main

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

const ms = time.Millisecond

func TestReadySteps(t *testing.T) {
	log := `time=2026-11-21T19:00:00Z level=INFO msg="sandbox ready" sandbox=aaa pod=x/y vmm=qemu total=1s steps="cni add=1ms+2ms"
time=2026-11-21T19:00:01Z level=DEBUG msg="something else" sandbox=bbb steps="no"
time=2026-11-21T19:00:02Z level=INFO msg="sandbox ready" sandbox=bbb pod="a/\"b\"" vmm=qemu total=2s kernel_to_agent=1.2s steps="netns=0s+3ms, boot to agent=3ms+1.5s, setup in guest=1.503s+40ms"
`
	got, err := readySteps(log, "bbb")
	want := []step{{"netns", 0, 3 * ms}, {"boot to agent", 3 * ms, 1500 * ms}, {"of it guest, from its kernel's start to its agent", 303 * ms, 1200 * ms}, {"setup in guest", 1503 * ms, 40 * ms}}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("steps are %v, %v; want %v", got, err, want)
	}
	if _, err := readySteps(log, "ccc"); err == nil {
		t.Error("steps of a sandbox that is not in the log")
	}
	for _, text := range []string{"", "a", "a=1ms", "a=1ms+x", "a=+1ms"} {
		if got, err := parseSteps(text); err == nil {
			t.Errorf("steps of %q are %v", text, got)
		}
	}
}

func TestUncovered(t *testing.T) {
	for name, c := range map[string]struct {
		steps []step
		total time.Duration
		want  time.Duration
	}{
		"nothing":       {nil, 5 * ms, 5 * ms},
		"all":           {[]step{{"a", 0, 5 * ms}}, 5 * ms, 0},
		"before, after": {[]step{{"a", 1 * ms, 2 * ms}}, 5 * ms, 3 * ms},
		"overlap":       {[]step{{"a", 0, 4 * ms}, {"b", 1 * ms, 1 * ms}, {"c", 6 * ms, 1 * ms}}, 8 * ms, 3 * ms},
		"rounded up":    {[]step{{"a", 0, 6 * ms}}, 5 * ms, 0},
	} {
		if got := uncovered(c.steps, c.total); got != c.want {
			t.Errorf("%s: %s, want %s", name, got, c.want)
		}
	}
}

func TestDist(t *testing.T) {
	if d := newDist(nil); d != nil || d.cells()[0] != "" {
		t.Errorf("of no samples: %+v", d)
	}
	if d := newDist([]float64{4, 1, 3, 2}); d.N != 4 || d.Min != 1 || d.P50 != 2.5 || d.P95 != 4 || d.Max != 4 || d.Samples[0] != 4 {
		t.Errorf("%+v", d)
	}
	var many []time.Duration
	for i := range time.Duration(100) {
		many = append(many, (100-i)*ms)
	}
	if d := times(many); d.P50 != 50.5 || d.P95 != 95 || d.Max != 100 {
		t.Errorf("%+v", d)
	}
}

// TestReport goes from samples to text, to the file and back, and to the page.
func TestReport(t *testing.T) {
	s := &section{Name: "start", Title: "Starting", Machine: machine{Peer: "containerd 1", CPUs: 2}, LoadBefore: "1.00 40.00 40.00", LoadAfter: "12.00 9.00 9.00"}
	ours, other := newDist([]float64{30, 10, 20}), newDist([]float64{25})
	s.compare("fast", ours, other, 0.8, false)
	s.compare("slow", ours, other, 0.7, false)
	s.compare("many", ours, other, 0.9, true)
	s.compare("not measured", ours, nil, 1, false)
	s.table("verbs").add("Run", "ms", ours, other)
	s.table("ours alone").add("Floor", "ms", ours, nil)
	s.Tables[0].add("nothing", "ms", nil, nil)
	path := filepath.Join(t.TempDir(), "bench.json")
	r, err := load(path)
	if err != nil {
		t.Fatal(err)
	}
	r.put(&section{Name: "pull"})
	r.put(&section{Name: "start", Title: "older"})
	r.put(s)
	if err := r.save(path); err != nil {
		t.Fatal(err)
	}
	if r, err = load(path); err != nil || len(r.Sections) != 2 || r.Sections[0].Title != "Starting" || r.Sections[1].Name != "pull" {
		t.Fatalf("%+v, %v", r, err)
	}
	if missed := r.missed(); !slices.Equal(missed, []string{"slow: 0.80, bar 0.70", "many: 0.80, bar 0.90"}) {
		t.Errorf("missed: %q", missed)
	}
	var text strings.Builder
	r.Sections[0].print(&text)
	for _, want := range []string{"Starting\n", "containerd 1", "BUSY       6 runnable", "at most 0.80, met", "at most 0.70, MISSED", "at least 0.90, MISSED", "20.0       30.0  3  25.0", "  0.80\n", "ours alone      p50"} {
		if !strings.Contains(text.String(), want) {
			t.Errorf("no %q in\n%s", want, &text)
		}
	}
	if strings.Contains(text.String(), "not") {
		t.Errorf("what was not measured is printed:\n%s", &text)
	}
	page := filepath.Join(t.TempDir(), "performance.md")
	if err := r.document(page); err != nil {
		t.Fatal(err)
	}
	written, err := os.ReadFile(page)
	if err != nil || !strings.Contains(string(written), "at most 0.80, met") || !strings.Contains(string(written), "Not measured") {
		t.Errorf("%v: the page is\n%s", err, written)
	}
}

func TestStepTables(t *testing.T) {
	log := `time=2026-11-21T19:00:00Z level=INFO msg=call call=RunPodSandbox took=100ms handler="" steps="record=0s+10ms, boot=10ms+80ms"
time=2026-11-21T19:00:00Z level=INFO msg=call call=RunPodSandbox took=20ms handler=warm steps="record=0s+10ms"
time=2026-11-21T19:00:01Z level=INFO msg=call call=StopContainer took=3ms
time=2026-11-21T19:00:01Z level=INFO msg="something else" steps="no"
time=2026-11-21T19:00:02Z level=INFO msg="pulled image" image=a copy=3s disk=1s
`
	steps := newStepTables()
	if err := errors.Join(steps.read(log, "warm"), steps.readPulls(log, "big")); err != nil {
		t.Fatal(err)
	}
	tables := steps.tables()
	var titles []string
	for _, table := range tables {
		titles = append(titles, table.Title)
	}
	if want := []string{"steps of RunPodSandbox, cold (ms, n = 1)", "steps of RunPodSandbox, warm (ms, n = 1)", "steps of PullImage, big (ms, n = 1)"}; !slices.Equal(titles, want) {
		t.Fatalf("tables are %q", titles)
	}
	boot, left := tables[0].Rows[1], tables[0].Rows[2]
	if boot.Name != "boot" || boot.Begins != 10 || boot.Crivm.P50 != 80 || boot.Share != 0.8 || left.Crivm.P50 != 10 {
		t.Errorf("%+v, %+v", boot, left)
	}
}

func TestBenchmarkLine(t *testing.T) {
	name, values := benchmarkLine("BenchmarkCalls/ListContainers/socket-2   \t 100\t  1234 ns/op\t 1.500 p50-ms\t 2.250 p99-ms")
	if name != "BenchmarkCalls/ListContainers/socket" || values["p50-ms"] != 1.5 || values["p99-ms"] != 2.25 {
		t.Errorf("%q %v", name, values)
	}
	if name, _ := benchmarkLine("PASS"); name != "" {
		t.Errorf("PASS is a benchmark: %q", name)
	}
}

// TestPullImages holds the images that are pulled to what the page says of them.
func TestPullImages(t *testing.T) {
	tar, err := filesTar(1, 200, 4<<10)
	if err != nil {
		t.Fatal(err)
	}
	layer, err := layerOf(tar)
	if err != nil {
		t.Fatal(err)
	}
	size, err := layer.Size()
	if quotient := float64(size) / float64(len(tar)); err != nil || quotient < 0.3 || quotient > 0.8 {
		t.Errorf("compressed to %.2f (%v), which is not as programs are", quotient, err)
	}
	again, err := filesTar(1, 200, 4<<10)
	if err != nil || !bytes.Equal(tar, again) {
		t.Errorf("not the same again (%v)", err)
	}
}

// TestCommandLines takes a pod's command line, in the form in which crivm starts QEMU, to the floor's.
func TestCommandLines(t *testing.T) {
	line := strings.Join([]string{
		"-machine", "q35,memory-backend=ram", "-kernel", "/g/vmlinux", "-append", "quiet", "-chardev", "pipe,id=console,path=/run/vm/abc/console",
		"-device", "virtio-serial-pci,id=serial", "-device", "virtserialport,chardev=agent,name=crivm", "-object", "rng-builtin,id=rng", "-device", "virtio-rng-pci,rng=rng",
		"-object", "memory-backend-ram,id=ram,size=1", "-device", "pcie-root-port,id=rp0",
		"-blockdev", `{"driver":"raw","file":{"driver":"file","filename":"/state/pods/abc/scratch.img"},"node-name":"disk"}`, "-device", `{"driver":"virtio-blk-pci"}`,
		"-netdev", "tap,id=eth0,fd=5", "-device", `{"driver":"virtio-net-pci"}`, "",
	}, "\x00")
	full, disk := rebuild(splitCommandLine([]byte(line)), "/run/vm/abc", "/bench")
	if disk != "/bench/disk.img" {
		t.Errorf("disk is %q", disk)
	}
	text := strings.Join(full, " ")
	if strings.Contains(text, "/run/vm") || strings.Contains(text, "/state") || !strings.Contains(text, "path=/bench/console ") || !strings.Contains(text, `"filename":"/bench/disk.img"}`) {
		t.Errorf("floor is started with %s", text)
	}
	want := "-machine q35,memory-backend=ram -kernel /g/vmlinux -append quiet -chardev pipe,id=console,path=/bench/console " +
		"-device virtio-serial-pci,id=serial -device virtserialport,chardev=agent,name=crivm -object memory-backend-ram,id=ram,size=1"
	if bare := strings.Join(bareArguments(full), " "); bare != want {
		t.Errorf("bare floor is started with\n%s, want\n%s", bare, want)
	}
}
