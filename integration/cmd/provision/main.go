// Command provision gets and builds what the demo and the tests need beside crivm itself, below the
// checkout's build directory:
//
//	packages  Debian packages, installed on the machine (as root)
//	kernel    a Debian cloud kernel, unpacked into build/kernel, not installed
//	crictl    build/bin/crictl
//	critest   build/bin/critest
//	ginkgo    build/bin/ginkgo, for critest in several processes
//	cni       CNI plugins, build/bin/cni
//	images    container images as an OCI layout, build/images
//
// Without arguments it does all of them, with arguments those named; more are done only when named:
// "compiler" (a C compiler, for go test -race and a static crun), "kernelbuild" (what guest/kernel/build.sh needs), "protos"
// (protoc), and for the benchmarks "peer-packages", "containerd", "runc" and "pause" (containerd's sandbox image), into
// build/bin/peer. Each step is done again only when
// what it is made from has changed; -force does it in any case.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// limit bounds everything; a first run on a slow network takes minutes.
const limit = 40 * time.Minute

// provisioner knows where things go.
type provisioner struct {
	build string // absolute
	root  string // of the checkout
	force bool

	listsFresh bool // apt-get update has run
}

// step makes one thing. key tells what it is made from; when it is the same as at the last time, and
// have says that the result is there, make is not called.
type step struct {
	name  string
	extra bool // only when named
	key   func(context.Context) (string, error)
	have  func(context.Context) bool
	make  func(context.Context) error
}

func (p *provisioner) steps() []step {
	return []step{
		p.packages("packages", false, runtimePackages),
		p.packages("compiler", true, []string{"gcc", "libc6-dev", "patch", "libsqlite3-dev"}),
		p.packages("kernelbuild", true, []string{"gcc", "libc6-dev", "make", "flex", "bison", "bc", "libelf-dev", "xz-utils"}),
		p.packages("protos", true, []string{"protobuf-compiler"}),
		p.kernel(),
		p.crictl(),
		p.critest(),
		p.ginkgo(),
		p.plugins(),
		p.images(),
		p.packages("peer-packages", true, peerPackages),
		p.peer(),
		p.runc(),
		p.pause(),
	}
}

func main() {
	p := &provisioner{}
	build := flag.String("build", "build", "directory to put things into")
	flag.BoolVar(&p.force, "force", false, "do the steps again even if nothing has changed")
	flag.Usage = func() {
		fmt.Fprintln(flag.CommandLine.Output(), "usage: provision [-build DIR] [-force] [step...]")
		for _, s := range p.steps() {
			fmt.Fprintln(flag.CommandLine.Output(), "  "+s.name)
		}
		flag.PrintDefaults()
	}
	flag.Parse()
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt, unix.SIGTERM)
	defer stop()
	if err := p.run(ctx, *build, flag.Args()); err != nil {
		fmt.Fprintln(os.Stderr, "provision:", err)
		os.Exit(1)
	}
}

func (p *provisioner) run(ctx context.Context, build string, named []string) (err error) {
	if p.root, err = checkout(); err != nil {
		return err
	}
	if p.build, err = filepath.Abs(build); err != nil {
		return err
	}
	if err := os.MkdirAll(p.stamps(), 0o755); err != nil {
		return err
	}
	// Two runs at once would get into each other's way, in apt and in the build directory.
	lock, err := os.OpenFile(filepath.Join(p.stamps(), "lock"), os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return err
	}
	defer lock.Close()
	if err := p.await(ctx, lock); err != nil {
		return err
	}
	steps := p.steps()
	for _, name := range named {
		if !slices.ContainsFunc(steps, func(s step) bool { return s.name == name }) {
			return fmt.Errorf("no step %q; -h lists them", name)
		}
	}
	for _, s := range steps {
		if len(named) > 0 && !slices.Contains(named, s.name) || len(named) == 0 && s.extra {
			continue
		}
		if err := p.do(ctx, s); err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
	}
	return nil
}

// await takes the lock, and says so when another run has it.
func (p *provisioner) await(ctx context.Context, lock *os.File) error {
	said := false
	for {
		err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil || err != unix.EWOULDBLOCK {
			return err
		}
		if !said {
			fmt.Println("provision: another run is at work, waiting for it")
			said = true
		}
		select {
		case <-time.After(200 * time.Millisecond):
		case <-ctx.Done():
			return fmt.Errorf("another run is still at work: %w", ctx.Err())
		}
	}
}

func (p *provisioner) do(ctx context.Context, s step) error {
	start := time.Now()
	key, err := s.key(ctx)
	if err != nil {
		return err
	}
	stamp := filepath.Join(p.stamps(), s.name)
	last, err := os.ReadFile(stamp)
	if err == nil && string(last) == key && !p.force && s.have(ctx) {
		fmt.Printf("provision: %-9s there already   [%6.2f s]\n", s.name, time.Since(start).Seconds())
		return nil
	}
	fmt.Printf("provision: %-9s %s\n", s.name, strings.ReplaceAll(key, "\n", ", "))
	if err := os.RemoveAll(stamp); err != nil {
		return err
	}
	if err := s.make(ctx); err != nil {
		return err
	}
	if err := os.WriteFile(stamp, []byte(key), 0o644); err != nil {
		return err
	}
	fmt.Printf("provision: %-9s done            [%6.2f s]\n", s.name, time.Since(start).Seconds())
	return nil
}

func (p *provisioner) stamps() string { return filepath.Join(p.build, "provision") }

// checkout is the directory with go.mod, here or above.
func checkout() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir, nil
		}
		if dir == filepath.Dir(dir) {
			return "", fmt.Errorf("not in a checkout of crivm: no go.mod here or above")
		}
		dir = filepath.Dir(dir)
	}
}
