// Command volbench measures file systems as containers see them: the container's root, an emptyDir and a hostPath, each
// as a ratio to the same work on a bare ext4 on a virtio-blk disk in the same guest, with the kernel's own mount options
// and mkfs.ext4's own defaults. Rounds go over all of them in turn, so that a busy machine slows all. `make bench` runs it as root.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crivm/crivm/integration/node"
	"github.com/crivm/crivm/integration/registry"
)

// bar is what the root and an emptyDir may take in units of the bare disk, all small file work together.
const bar = 1.2

const image = "docker.io/library/busybox:latest"

type options struct {
	build               string
	files, batch, large int
	limit               time.Duration
	enforce             bool
}

func main() {
	var o options
	flag.StringVar(&o.build, "build", "build", "the checkout's build directory")
	flag.IntVar(&o.files, "files", 5000, "small files in each place")
	flag.IntVar(&o.batch, "batch", 1000, "small files in a round over all places")
	flag.DurationVar(&o.limit, "limit", 10*time.Minute, "no round begins after this; the first one always does")
	flag.IntVar(&o.large, "large", 64, "MiB of the large file")
	flag.BoolVar(&o.enforce, "enforce", false, "exit with status 1 when the bar is missed")
	flag.Parse()
	o.batch = min(max(o.batch, 1), max(o.files, 1))
	var err error
	if o.build, err = node.Isolate(o.build); err != nil {
		fail(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), o.limit+20*time.Minute)
	defer cancel()
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt, unix.SIGTERM)
	defer stop()
	met, err := run(ctx, o)
	if err != nil {
		fail(err)
	}
	if o.enforce && !met {
		os.Exit(1)
	}
}

func fail(err error) {
	fmt.Fprintln(os.Stderr, "volbench:", err)
	os.Exit(2)
}

// place is where work is done.
type place struct {
	name, path string
	note       string
	bar        bool
}

var places = []place{
	{name: "bare disk", path: "/bare"},
	{name: "root", path: "/var", bar: true},
	{name: "emptyDir", path: "/empty", bar: true},
	{name: "hostPath", path: "/host", note: "each call asks the host: nothing is cached, so that nothing is ever stale"},
}

// smallFiles is the first four steps together.
const smallFiles = "small files"

// steps in the order in which they are printed.
var steps = []string{"create", "stat", "read", "delete", "write", "stream read"}

func run(ctx context.Context, o options) (met bool, retErr error) {
	images, err := registry.Serve(filepath.Join(o.build, "images"))
	if err != nil {
		return false, fmt.Errorf("local registry: %w", err)
	}
	defer images.Close()
	dir, err := os.MkdirTemp("", "crivm-volbench-")
	if err != nil {
		return false, err
	}
	defer os.RemoveAll(dir)
	if err := os.Chmod(dir, 0o711); err != nil { // VMM processes of other uids pass through
		return false, err
	}
	n, err := node.Start(ctx, node.Options{Build: o.build, Dir: filepath.Join(dir, "node"), Registry: images.Addr(), Config: "[vm]\nmemory = \"512MiB\"\n"})
	if err != nil {
		return false, err
	}
	defer func() {
		cleanup, cancel := context.WithTimeout(context.WithoutCancel(ctx), 3*time.Minute)
		defer cancel()
		if retErr != nil {
			fmt.Fprintf(os.Stderr, "last lines of crivm's log:\n%s\n", n.LogTail())
		}
		retErr = errors.Join(retErr, n.RemoveAllPods(cleanup), n.CheckLeaks(cleanup), n.Stop(), node.RemoveCgroups())
	}()
	container, err := prepare(ctx, n, dir)
	if err != nil {
		return false, err
	}
	times := map[string]map[string][]time.Duration{} // by place and step
	for _, p := range places {
		times[p.name] = map[string][]time.Duration{}
	}
	rounds, end := (o.files+o.batch-1)/o.batch, time.Now().Add(o.limit)
	done := 0
	for ; done < rounds && (done == 0 || time.Now().Before(end)); done++ {
		for i := range places {
			p := places[(done+i)%len(places)]
			for _, work := range [][]string{{"small", p.path, strconv.Itoa(o.batch)}, {"stream", p.path, strconv.Itoa(o.large)}} {
				stdout, stderr, err := n.Runtime.ExecSync(ctx, container, append([]string{"/tools/filecheck"}, work...), 8*time.Minute)
				if err != nil {
					return false, fmt.Errorf("%q: %w: %s", work, err, stderr)
				}
				if err := take(times[p.name], work[0], string(stdout)); err != nil {
					return false, err
				}
			}
			fmt.Fprintf(os.Stderr, "round %d of %d: %s\n", done+1, rounds, p.name)
		}
	}
	if done < rounds {
		fmt.Fprintf(os.Stderr, "the time was up after %d of %d rounds\n", done, rounds)
	}
	return report(times, o), nil
}

// take reads what filecheck prints: a step and its nanoseconds a line.
func take(times map[string][]time.Duration, work, out string) error {
	for line := range strings.Lines(out) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), " ")
		n, err := strconv.ParseInt(value, 10, 64)
		if err != nil {
			return fmt.Errorf("output of filecheck: %q", line)
		}
		if work == "stream" && name == "read" {
			name = "stream read"
		}
		times[name] = append(times[name], time.Duration(n))
	}
	return nil
}

// prepare makes a privileged container, which may drop caches, with one mount of each kind. The bare disk is an emptyDir
// in which a disk formatted by mkfs.ext4's defaults lies already, and is then mounted anew with the kernel's defaults.
func prepare(ctx context.Context, n *node.Node, dir string) (string, error) {
	if _, err := n.Images.PullImage(ctx, &cri.ImageSpec{Image: image}, nil, nil); err != nil {
		return "", err
	}
	tools, host := filepath.Join(dir, "tools"), filepath.Join(dir, "host")
	empty := filepath.Join(dir, "pods/volbench/volumes/kubernetes.io~empty-dir/empty")
	bare := filepath.Join(dir, "pods/volbench/volumes/kubernetes.io~empty-dir/bare")
	for _, d := range []string{tools, host, empty, bare} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return "", err
		}
	}
	build := exec.CommandContext(ctx, "go", "build", "-o", filepath.Join(tools, "filecheck"), "github.com/crivm/crivm/integration/cmd/filecheck")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return "", fmt.Errorf("building filecheck: %w: %s", err, out)
	}
	disk := filepath.Join(bare, ".crivm-disk")
	if err := os.WriteFile(disk, nil, 0o600); err != nil {
		return "", err
	}
	if err := os.Truncate(disk, 4<<30); err != nil {
		return "", err
	}
	if out, err := exec.CommandContext(ctx, "mkfs.ext4", "-q", "-F", "-E", "assume_storage_prezeroed=1", disk).CombinedOutput(); err != nil {
		return "", fmt.Errorf("mkfs.ext4: %w: %s", err, out)
	}
	options := &cri.NamespaceOption{Pid: cri.NamespaceMode_CONTAINER}
	pod := &cri.PodSandboxConfig{
		Metadata: &cri.PodSandboxMetadata{Name: "volbench", Namespace: "bench", Uid: "volbench"}, LogDirectory: filepath.Join(dir, "logs"),
		Linux: &cri.LinuxPodSandboxConfig{SecurityContext: &cri.LinuxSandboxSecurityContext{Privileged: true, NamespaceOptions: options}},
	}
	sandbox, err := n.Runtime.RunPodSandbox(ctx, pod, "")
	if err != nil {
		return "", err
	}
	container, err := n.Runtime.CreateContainer(ctx, sandbox, &cri.ContainerConfig{
		Metadata: &cri.ContainerMetadata{Name: "c"}, Image: &cri.ImageSpec{Image: image}, Command: []string{"sleep", "100000"}, LogPath: "c.log",
		Mounts: []*cri.Mount{
			{ContainerPath: "/tools", HostPath: tools, Readonly: true}, {ContainerPath: "/host", HostPath: host},
			{ContainerPath: "/empty", HostPath: empty}, {ContainerPath: "/bare", HostPath: bare},
		},
		Linux: &cri.LinuxContainerConfig{SecurityContext: &cri.LinuxContainerSecurityContext{Privileged: true, NamespaceOptions: options}},
	}, pod)
	if err != nil {
		return "", err
	}
	if err := n.Runtime.StartContainer(ctx, container); err != nil {
		return "", err
	}
	if _, stderr, err := n.Runtime.ExecSync(ctx, container, []string{"/tools/filecheck", "plain", "/bare"}, time.Minute); err != nil {
		return "", fmt.Errorf("mounting the bare disk: %w: %s", err, stderr)
	}
	return container, nil
}

// summary is the time of all rounds together, and the median of their ratios to the same round's of the bare disk.
type summary struct {
	total time.Duration
	ratio float64
}

func summarize(times, base []time.Duration) summary {
	var s summary
	var ratios []float64
	for i, d := range times {
		s.total += d
		ratios = append(ratios, float64(d)/float64(base[i]))
	}
	slices.Sort(ratios)
	n := len(ratios)
	s.ratio = (ratios[(n-1)/2] + ratios[n/2]) / 2
	return s
}

// report prints times and their ratios to the bare disk's; met tells whether the bar is.
func report(times map[string]map[string][]time.Duration, o options) (met bool) {
	rounds := len(times[places[0].name]["create"])
	for _, t := range times { // the four steps of each round together
		for i := range rounds {
			t[smallFiles] = append(t[smallFiles], t["create"][i]+t["stat"][i]+t["read"][i]+t["delete"][i])
		}
	}
	fmt.Printf("%d files of 2 KiB and %d MiB in one file, in %d rounds; time of all rounds, and median of the rounds' ratios to the bare disk\n\n%-10s",
		rounds*o.batch, rounds*o.large, rounds, "")
	columns := append([]string{smallFiles}, steps...)
	for _, s := range columns {
		fmt.Printf(" %18s", s)
	}
	fmt.Println()
	met = true
	for _, p := range places {
		fmt.Printf("%-10s", p.name)
		for _, c := range columns {
			s := summarize(times[p.name][c], times[places[0].name][c])
			fmt.Printf(" %10s %6.2fx", s.total.Round(time.Millisecond), s.ratio)
			met = met && (!p.bar || c != smallFiles || s.ratio <= bar)
		}
		fmt.Println("  " + p.note)
	}
	verdict := "met"
	if !met {
		verdict = "missed"
	}
	fmt.Printf("\nbar: small files on root and emptyDir at most %.1fx: %s\n", bar, verdict)
	return met
}
