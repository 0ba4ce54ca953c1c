//go:build integration

package integration

import (
	"context"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crivm/crivm/integration/node"
	"github.com/crivm/crivm/integration/registry"
)

const (
	busybox = "docker.io/library/busybox:latest"
	standin = "registry.k8s.io/e2e-test-images/nginx:1.14-2" // busybox and integration/cmd/standin
)

var (
	buildDir = flag.String("build", "../build", "the checkout's build directory")
	guestDir = flag.String("guest", "", "directory of the guest image of the node that most tests use; BUILD/guest when not given")
	images   *registry.Registry
	baseDir  string     // of all nodes
	shared   *node.Node // the node that most tests use; each must leave it as it was
)

func TestMain(m *testing.M) {
	flag.Parse()
	os.Exit(run(m))
}

func run(m *testing.M) int {
	if os.Geteuid() != 0 {
		fmt.Println("SKIP: the integration tests need root: network namespaces, taps and mounts")
		return 0
	}
	build, err := node.Isolate(*buildDir)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	*buildDir = build
	if images, err = registry.Serve(filepath.Join(build, "images")); err != nil {
		fmt.Fprintln(os.Stderr, "registry:", err)
		return 1
	}
	defer images.Close()
	baseDir, err = os.MkdirTemp("", "crivm-integration-")
	if err == nil {
		err = os.Chmod(baseDir, 0o711) // VMM processes of other uids pass through
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(baseDir)
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	if shared, err = node.Start(ctx, node.Options{Build: build, Guest: *guestDir, Dir: filepath.Join(baseDir, "shared"), Registry: images.Addr()}); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	for _, image := range []string{busybox, standin} {
		if _, err := shared.Images.PullImage(ctx, &cri.ImageSpec{Image: image}, nil, nil); err != nil {
			fmt.Fprintln(os.Stderr, err, shared.LogTail())
			return 1
		}
	}
	code := m.Run()
	if err := shared.CheckLeaks(context.Background()); err != nil {
		fmt.Fprintln(os.Stderr, "after all tests:", err)
		code = 1
	}
	if err := shared.Stop(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	if err := node.RemoveCgroups(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	return code
}
