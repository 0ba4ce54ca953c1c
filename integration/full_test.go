//go:build integration

package integration

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crivm/crivm/integration/node"
)

// TestExhaustion runs a node whose state is on a small file system and whose network has two addresses, and uses up one
// thing after the other: each time there is a clear error, nothing is left, other pods go on, and the daemon needs no
// restart when there is some again.
func TestExhaustion(t *testing.T) {
	dir := filepath.Join(baseDir, "small")
	if err := os.MkdirAll(dir, 0o711); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=96m,mode=711"); err != nil {
		t.Fatal(err)
	}
	ctx := testContext(t, 8*time.Minute)
	n, err := node.Start(ctx, node.Options{Build: *buildDir, Dir: filepath.Join(dir, "node"), Registry: images.Addr(),
		CNI: fmt.Sprintf(`{"cniVersion": "1.0.0", "name": "two", "plugins": [{"type": "bridge", "bridge": "crivm1", "isGateway": true,
 "ipam": {"type": "host-local", "dataDir": %q, "ranges": [[{"subnet": "10.124.0.0/24", "rangeStart": "10.124.0.2", "rangeEnd": "10.124.0.3"}]]}}]}`, filepath.Join(dir, "ipam"))})
	if err != nil {
		t.Fatal(err)
	}
	daemon := n.PID()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
		defer cancel()
		if n.PID() != daemon {
			t.Error("the daemon was started again")
		}
		if err := errors.Join(n.RemoveAllPods(ctx), n.CheckLeaks(ctx), n.Stop(), unix.Unmount(dir, 0)); err != nil {
			t.Error(err)
		}
	})
	if _, err := n.Images.PullImage(ctx, &cri.ImageSpec{Image: busybox}, nil, nil); err != nil {
		t.Fatal(err)
	}

	// Disk, with nothing running.
	fill := func() (free func() error) {
		filler, err := os.Create(filepath.Join(dir, "filler"))
		if err != nil {
			t.Fatal(err)
		}
		for block := make([]byte, 64<<10); err == nil; {
			_, err = filler.Write(block)
		}
		if !errors.Is(err, unix.ENOSPC) {
			t.Fatal(err)
		}
		return func() error { return errors.Join(filler.Truncate(0), filler.Close()) }
	}
	free := fill()
	_, err = n.Runtime.RunPodSandbox(ctx, newConfig(t), "")
	wantError(t, err, codes.ResourceExhausted, "no space left on device")
	_, err = n.Images.PullImage(ctx, &cri.ImageSpec{Image: standin}, nil, nil)
	wantError(t, err, codes.ResourceExhausted, "MiB free")
	if err := errors.Join(free(), n.CheckLeaks(ctx)); err != nil {
		t.Fatal(err)
	}

	// Descriptors: four more numbers from the first that is free, whatever the daemon was started with.
	var limit unix.Rlimit
	first := uint64(0)
	for ; err == nil; first++ {
		_, err = os.Lstat(fmt.Sprintf("/proc/%d/fd/%d", daemon, first))
	}
	err = errors.Join(unix.Prlimit(daemon, unix.RLIMIT_NOFILE, nil, &limit),
		unix.Prlimit(daemon, unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: first - 1 + 4, Max: limit.Max}, nil))
	if err != nil {
		t.Fatal(err)
	}
	_, err = n.Runtime.RunPodSandbox(ctx, newConfig(t), "")
	wantError(t, err, codes.ResourceExhausted, "too many open files")
	if err := errors.Join(unix.Prlimit(daemon, unix.RLIMIT_NOFILE, &limit, nil), n.RemoveAllPods(ctx), n.CheckLeaks(ctx)); err != nil {
		t.Fatal(err)
	}

	// Addresses.
	p := runPod(t, n)
	q, err := n.Runtime.RunPodSandbox(ctx, newConfig(t), "")
	if err != nil {
		t.Fatal(err)
	}
	_, err = n.Runtime.RunPodSandbox(ctx, newConfig(t), "")
	wantError(t, err, codes.ResourceExhausted, "no IP addresses available")
	if pods, err := n.Runtime.ListPodSandbox(ctx, nil); err != nil || len(pods) != 2 {
		t.Errorf("pods are %v (%v)", pods, err)
	}
	if err := errors.Join(n.Runtime.StopPodSandbox(ctx, q), n.Runtime.RemovePodSandbox(ctx, q)); err != nil {
		t.Fatal(err)
	}
	runPod(t, n)

	// Disk, below a pod's scratch disk: its containers are told, its VM goes on, and writes again afterwards.
	c := p.start("sleep 1000")
	write := func(container string) error { // overlays are not synced, their file system is
		_, stderr, err := n.Runtime.ExecSync(ctx, container, []string{"sh", "-c", "dd if=/dev/zero of=/big bs=64k count=160; sync; dd if=/dev/zero of=/small bs=1k count=1 conv=fsync"}, time.Minute)
		if err != nil {
			err = fmt.Errorf("%w: %s", err, stderr)
		}
		return err
	}
	free = fill()
	if err := write(c); err == nil {
		t.Error("10 MiB are written to a full disk")
	}
	if out := p.exec(c, "echo", "alive"); out != "alive\n" {
		t.Errorf("exec says %q", out)
	}
	if err := free(); err != nil {
		t.Fatal(err)
	}
	if err := write(p.start("sleep 1000")); err != nil {
		t.Errorf("with space again: %v", err)
	}
	if s, out := p.run("echo space again"); s.ExitCode != 0 || out != "space again\n" {
		t.Errorf("container after all: %v %q", s, out)
	}
}
