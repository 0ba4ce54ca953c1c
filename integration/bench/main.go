// Command bench measures crivm, and containerd with runc beside it, in turns in one run, so that a busy machine slows both:
// pods' lives, bursts, pulls, output, idle pods, list calls. Both are driven through their CRI sockets with the same CNI
// plugins, registry and images. Cold RunPodSandbox is measured against the bare floor too, which is the same VMM with the
// same command line, kernel and initramfs, started directly and timed until the guest agent's first byte. It prints tables,
// keeps all samples in a JSON file, and writes docs/performance.md from it. `make bench` builds what it needs and runs it as
// root.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/crivm/crivm/integration/node"
	"github.com/crivm/crivm/integration/registry"
)

// limit bounds one pod's life; a boot under software emulation on a busy machine takes up to half a minute.
const limit = 3 * time.Minute

// wholeLimit bounds a run.
const wholeLimit = 3 * time.Hour

type options struct {
	build, guest, output, docs string
	checkout                   string
	sections                   string
	peer, enforce              bool

	rounds, execs, bursts, pulls, outputs, outputMB, idlePods, lists, busyPods int
	idleWindow                                                                 time.Duration
}

// measurement fills one section of the report.
type measurement struct {
	name, title string
	slots       int // of the warm handler's pool
	run         func(*bench, context.Context, *section) error
}

var measurements []measurement

func init() { // refers to what refers to it
	measurements = []measurement{
		{"start", "Starting and ending a pod", 2, (*bench).measureStart},
		{"burst", "Many pods at once", 10, (*bench).measureBurst},
		{"pull", "Pulling images", 0, (*bench).measurePull},
		{"output", "Output of containers", 0, (*bench).measureOutput},
		{"idle", "What an idle pod costs", 0, (*bench).measureIdle},
		{"lists", "List and status calls", 0, (*bench).measureLists},
		{"busy", "Calls while VMs boot", 0, (*bench).measureBusy},
	}
}

// bench is what all sections share.
type bench struct {
	o        options
	n        *node.Node
	crivm    *system
	peer     *peer // nil: not measured
	registry *registry.Registry
	dir      string
	slots    int // of the warm handler's pool
	machine  machine
}

func main() {
	var o options
	flag.StringVar(&o.build, "build", "build", "the checkout's build directory")
	flag.StringVar(&o.guest, "guest", "", "directory of the guest image; BUILD/guest when not given")
	flag.StringVar(&o.output, "json", "", "file for all samples; BUILD/bench.json when not given. Sections that are not measured are kept")
	flag.StringVar(&o.docs, "docs", "", "file to write as docs/performance.md is, from the JSON file")
	flag.StringVar(&o.sections, "sections", "", "what to measure, such as start,pull; all when not given, none with \"none\"")
	flag.BoolVar(&o.peer, "peer", true, "measure containerd too")
	flag.IntVar(&o.rounds, "rounds", 6, "rounds of start: a pod of each kind, and floors")
	flag.IntVar(&o.execs, "execs", 3, "ExecSync calls in each pod")
	flag.IntVar(&o.bursts, "bursts", 2, "rounds of burst, 10 pods wide; 30 wide is done once")
	flag.IntVar(&o.pulls, "pulls", 3, "rounds of pull, each image")
	flag.IntVar(&o.outputs, "outputs", 2, "rounds of output")
	flag.IntVar(&o.outputMB, "output-mb", 64, "megabytes that a container prints in output")
	flag.IntVar(&o.idlePods, "idle-pods", 12, "pods in idle")
	flag.DurationVar(&o.idleWindow, "idle-window", 15*time.Second, "for how long CPU time is counted in idle")
	flag.IntVar(&o.lists, "lists", 1000, "calls of each kind in lists")
	flag.IntVar(&o.busyPods, "busy-pods", 20, "pods that boot at once in busy")
	flag.BoolVar(&o.enforce, "enforce", false, "exit with status 1 when a bar is missed")
	flag.Parse()
	if err := o.complete(); err != nil {
		fail(err)
	}
	r, err := load(o.output)
	if err != nil {
		fail(err)
	}
	if o.sections != "none" {
		reach, err := node.Isolate(o.build)
		if err != nil {
			fail(err)
		}
		if inside, err := filepath.Rel(o.build, o.guest); err == nil && filepath.IsLocal(inside) {
			o.guest = filepath.Join(reach, inside)
		}
		o.build = reach
		ctx, cancel := context.WithTimeout(context.Background(), wholeLimit)
		defer cancel()
		ctx, stop := signal.NotifyContext(ctx, os.Interrupt, unix.SIGTERM)
		defer stop()
		if err := run(ctx, o, r); err != nil {
			fail(err)
		}
	}
	if o.docs != "" {
		if err := r.document(o.docs); err != nil {
			fail(err)
		}
	}
	if missed := r.missed(); len(missed) > 0 {
		fmt.Fprintf(os.Stderr, "bars missed:\n  %s\n", strings.Join(missed, "\n  "))
		if o.enforce {
			os.Exit(1)
		}
	}
}

func fail(err error) {
	fmt.Fprintln(os.Stderr, "bench:", err)
	os.Exit(2)
}

// complete checks options and fills in what depends on others.
func (o *options) complete() (err error) {
	if min(o.rounds, o.execs, o.bursts, o.pulls, o.outputs, o.outputMB, o.idlePods, o.lists, o.busyPods) < 1 {
		return errors.New("numbers of rounds, pods and calls have to be positive")
	}
	if o.build, err = filepath.Abs(o.build); err != nil {
		return err
	}
	o.checkout = filepath.Dir(o.build)
	if o.guest == "" {
		o.guest = filepath.Join(o.build, "guest")
	}
	if o.guest, err = filepath.Abs(o.guest); err != nil {
		return err
	}
	if o.output == "" {
		o.output = filepath.Join(o.build, "bench.json")
	}
	var names []string
	for _, m := range measurements {
		names = append(names, m.name)
	}
	for _, name := range o.chosen() {
		if name != "none" && !slices.Contains(names, name) {
			return fmt.Errorf("no section %q; there are %s", name, strings.Join(names, ", "))
		}
	}
	return nil
}

func (o *options) chosen() []string {
	if o.sections == "" {
		return nil
	}
	return strings.Split(o.sections, ",")
}

// run measures on a node of its own. Each section is saved when it is done.
func run(ctx context.Context, o options, r *report) (retErr error) {
	images, err := registry.Serve(filepath.Join(o.build, "images"))
	if err != nil {
		return fmt.Errorf("local registry: %w", err)
	}
	defer images.Close()
	dir, err := os.MkdirTemp("", "crivm-bench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if err := os.Chmod(dir, 0o711); err != nil { // VMM processes of other uids pass through
		return err
	}
	b := &bench{o: o, dir: dir, registry: images, slots: -1}
	if b.n, err = node.Start(ctx, node.Options{Build: o.build, Guest: o.guest, Dir: filepath.Join(dir, "node"), Registry: images.Addr()}); err != nil {
		return err
	}
	defer func() {
		cleanup, cancel := context.WithTimeout(context.WithoutCancel(ctx), limit)
		defer cancel()
		if retErr != nil {
			fmt.Fprintf(os.Stderr, "last lines of crivm's log:\n%s\n", b.n.LogTail())
		}
		retErr = errors.Join(retErr, b.n.RemoveAllPods(cleanup), b.setPool(cleanup, 0), b.n.CheckLeaks(cleanup), b.n.Stop(), node.RemoveCgroups())
	}()
	b.crivm = crivmSystem(b.n)
	b.crivm.logs, b.crivm.image, b.crivm.addTime = filepath.Join(dir, "logs"), images.Addr()+"/"+busyboxRepository, b.networkTime
	systems := []*system{b.crivm}
	if o.peer {
		if err := peerBuilt(o.build); err != nil {
			return err
		}
		if b.peer, err = startPeer(ctx, o.build, filepath.Join(dir, "peer"), images); err != nil {
			return err
		}
		defer func() {
			cleanup, cancel := context.WithTimeout(context.WithoutCancel(ctx), limit)
			defer cancel()
			if retErr != nil {
				fmt.Fprintf(os.Stderr, "last lines of containerd's log:\n%s\n", tail(b.peer.logPath()))
			}
			retErr = errors.Join(retErr, b.peer.stop(cleanup))
		}()
		b.peer.logs, b.peer.image = b.crivm.logs, b.crivm.image
		systems = append(systems, &b.peer.system)
	}
	for _, sys := range systems {
		if _, err := sys.pull(ctx, sys.image); err != nil {
			return err
		}
	}
	if err := b.look(ctx); err != nil {
		return err
	}
	for _, m := range measurements {
		if o.sections != "" && !slices.Contains(o.chosen(), m.name) {
			continue
		}
		if err := b.setPool(ctx, m.slots); err != nil {
			return fmt.Errorf("section %s: %w", m.name, err)
		}
		s := &section{Name: m.name, Title: m.title, Date: time.Now(), Machine: b.machine, LoadBefore: loadAverage()}
		if err := m.run(b, ctx, s); err != nil {
			return fmt.Errorf("section %s: %w", m.name, err)
		}
		s.LoadAfter, s.Took = loadAverage(), time.Since(s.Date).Seconds()
		fmt.Println()
		s.print(os.Stdout)
		r.put(s)
		if err := r.save(o.output); err != nil {
			return err
		}
	}
	return nil
}

// look starts a pod to see what it runs in.
func (b *bench) look(ctx context.Context) error {
	pod, err := b.crivm.runtime.RunPodSandbox(ctx, b.crivm.podConfig(), "")
	if err != nil {
		return fmt.Errorf("first pod: %w", err)
	}
	v, err := b.vmm(ctx, pod)
	if err != nil {
		return err
	}
	b.machine = describe(v, b.o.guest)
	if b.peer != nil {
		b.machine.Peer = b.peer.versions(ctx, b.o.build)
	}
	return b.crivm.remove(ctx, pod)
}
