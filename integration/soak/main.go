// Command soak runs a node for some minutes while a random one of its parts is killed every few seconds: crivm itself
// (SIGKILL and SIGTERM), VMMs, virtiofsds, guest kernels with their agents, and guests that only hang. Meanwhile workers
// live the lives of pods as kubelet would, and check all they are told: no log line is lost or doubled, no exit code
// wrong, no container begins twice, and a pod that nobody killed goes on. At the end nothing may be left.
//
// What is random comes from a seed, which is printed; a run cannot be repeated exactly, but its mixture can.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crivm/crivm/integration/node"
	"github.com/crivm/crivm/integration/registry"
)

const busybox = "docker.io/library/busybox:latest"

// endLimit bounds the lives that are under way when the time is over.
const endLimit = 20 * time.Minute

func main() {
	build := flag.String("build", "build", "the checkout's build directory")
	duration := flag.Duration("duration", 10*time.Minute, "how long")
	seed := flag.Uint64("seed", uint64(time.Now().UnixNano()), "of what is random")
	pods := flag.Int("pods", 3, "at a time")
	pause := flag.Duration("pause", 8*time.Second, "between kills, on average")
	flag.Parse()
	dir, err := node.Isolate(*build)
	if err != nil {
		fail(err)
	}
	fmt.Printf("seed %d, for %s\n", *seed, *duration)
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	defer stop()
	if err := soak(ctx, dir, *duration, *seed, *pods, *pause); err != nil {
		fail(fmt.Errorf("seed %d: %w", *seed, err))
	}
}

func fail(err error) {
	fmt.Fprintln(os.Stderr, "soak:", err)
	os.Exit(1)
}

func soak(ctx context.Context, build string, duration time.Duration, seed uint64, pods int, pause time.Duration) (retErr error) {
	images, err := registry.Serve(filepath.Join(build, "images"))
	if err != nil {
		return fmt.Errorf("local registry: %w", err)
	}
	defer images.Close()
	state := filepath.Join(build, "soak")
	if err := os.RemoveAll(state); err != nil {
		return err
	}
	n, err := node.Start(ctx, node.Options{Build: build, Dir: state, Registry: images.Addr()})
	if err != nil {
		return err
	}
	s := &soaking{n: n, seed: seed, pause: pause, end: time.Now().Add(duration), counts: map[string]int{}, pods: map[string]*life{}}
	s.setUp(false)
	s.setUp(true)
	if _, err := n.Images.PullImage(ctx, &cri.ImageSpec{Image: busybox}, nil, nil); err != nil {
		return errors.Join(err, n.Stop())
	}
	ctx, cancel := context.WithDeadline(ctx, s.end.Add(endLimit))
	defer cancel()
	var workers, killer sync.WaitGroup
	for i := range pods {
		workers.Go(func() { s.work(ctx, i) })
	}
	over := make(chan struct{})
	killer.Go(func() { s.kill(ctx, over) })
	workers.Wait()
	close(over)
	killer.Wait()
	fmt.Println(s.summary())

	cleanup, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Minute)
	defer cancel()
	err = errors.Join(append(s.failures, n.RemoveAllPods(cleanup), n.CheckLeaks(cleanup), s.collectsNothing(cleanup), s.logIsFine())...)
	if err != nil { // the node's directory stays for a look at it
		return errors.Join(fmt.Errorf("%w\ncrivm's log is %s", err, n.LogPath()), n.StopDaemon(), os.RemoveAll(n.RunDir), node.RemoveCgroups())
	}
	return errors.Join(n.Stop(), node.RemoveCgroups())
}

// soaking is what the workers and the killer share.
type soaking struct {
	n     *node.Node
	seed  uint64
	pause time.Duration
	end   time.Time

	mu       sync.Mutex
	up       chan struct{} // closed while crivm is meant to run
	failures []error
	counts   map[string]int
	progress int              // lives that came further, since crivm was last ended
	barren   bool             // it was 0 when crivm was last ended
	pods     map[string]*life // by ID; those that can be killed
}

func (s *soaking) random(stream int) *rand.Rand { return rand.New(rand.NewPCG(s.seed, uint64(stream))) }

func (s *soaking) count(what string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.counts[what]++
}

func (s *soaking) fail(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	fmt.Fprintln(os.Stderr, "FAILED:", err)
	s.failures = append(s.failures, err)
}

// setUp says whether calls make sense.
func (s *soaking) setUp(up bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if up {
		close(s.up)
		return
	}
	s.up = make(chan struct{})
}

func (s *soaking) awaitUp(ctx context.Context) error {
	s.mu.Lock()
	up := s.up
	s.mu.Unlock()
	select {
	case <-up:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (s *soaking) summary() string {
	var lines []string
	for what, n := range s.counts {
		lines = append(lines, fmt.Sprintf("%6d %s", n, what))
	}
	sortByName(lines)
	return strings.Join(lines, "\n")
}

// collectsNothing asks crivm for leftovers; there must be none.
func (s *soaking) collectsNothing(ctx context.Context) error {
	out, err := s.n.Crivm(ctx, "gc", "--dry-run")
	if err == nil && !strings.Contains(out, "nothing is left") {
		err = fmt.Errorf("crivm gc --dry-run finds %s", out)
	}
	return err
}

// logIsFine looks for panics in crivm's log.
func (s *soaking) logIsFine() error {
	text, err := os.ReadFile(s.n.LogPath())
	if err != nil {
		return err
	}
	for _, bad := range []string{"handler panicked", "\npanic: ", "DATA RACE", "output is lost"} {
		if i := strings.Index(string(text), bad); i >= 0 {
			return fmt.Errorf("in crivm's log: %s", text[max(0, i-200):min(len(text), i+1000)])
		}
	}
	return nil
}
