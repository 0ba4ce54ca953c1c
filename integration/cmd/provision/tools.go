package main

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"github.com/crivm/crivm/integration/images"
)

// Pins. Changing one makes its step build again.
const (
	criTools   = "sigs.k8s.io/cri-tools@v1.36.0"
	cniPlugins = "github.com/containernetworking/plugins@v1.9.1"
)

var pluginPackages = []string{
	"plugins/main/bridge", "plugins/main/loopback", "plugins/main/ptp",
	"plugins/ipam/host-local", "plugins/ipam/static",
	"plugins/meta/bandwidth", "plugins/meta/portmap", "plugins/meta/tuning",
}

// cleanGo is the environment for building other modules: neither the flags of crivm's own build nor a
// workspace shall reach them.
var cleanGo = []string{"GOFLAGS=-mod=readonly", "GOWORK=off", "CGO_ENABLED=0", "GOOS=", "GOARCH=", "GOBIN="}

const offline = "Go modules cannot be fetched: is a Go module proxy reachable (go env GOPROXY)?"

func (p *provisioner) crictl() step {
	return p.tool("crictl", "build", "./cmd/crictl")
}

// critest is a test binary: its only source file is a test.
func (p *provisioner) critest() step {
	return p.tool("critest", "test", "./cmd/critest")
}

// ginkgo runs critest's specs in several processes; of the version that critest itself is built with.
func (p *provisioner) ginkgo() step {
	return p.tool("ginkgo", "build", "github.com/onsi/ginkgo/v2/ginkgo")
}

// tool builds a program of cri-tools, or of a module it uses, in cri-tools' own directory, so that exactly the dependencies are
// used that its authors have pinned.
func (p *provisioner) tool(name, verb, pkg string) step {
	target := filepath.Join(p.build, "bin", name)
	return step{
		name: name,
		key:  func(context.Context) (string, error) { return criTools + "\n" + runtime.Version(), nil },
		have: func(context.Context) bool { return executable(target) },
		make: func(ctx context.Context) error {
			dir, err := download(ctx, criTools)
			if err != nil {
				return err
			}
			_, version, _ := strings.Cut(criTools, "@v")
			temp := target + ".new"
			args := []string{verb, "-trimpath", "-buildvcs=false", "-o", temp,
				"-ldflags", "-s -w -X sigs.k8s.io/cri-tools/pkg/version.Version=" + version}
			if verb == "test" {
				args = append(args, "-c")
			}
			if err := os.MkdirAll(filepath.Dir(target), 0o755); err != nil {
				return err
			}
			if err := run(ctx, dir, cleanGo, "go", append(args, pkg)...); err != nil {
				return err
			}
			return replace(temp, target)
		},
	}
}

func (p *provisioner) plugins() step {
	target := filepath.Join(p.build, "bin/cni")
	return step{
		name: "cni",
		key: func(context.Context) (string, error) {
			var names []string
			for _, pkg := range pluginPackages {
				names = append(names, filepath.Base(pkg))
			}
			return cniPlugins + ": " + strings.Join(names, " ") + "\n" + runtime.Version(), nil
		},
		have: func(context.Context) bool {
			return !slices.ContainsFunc(pluginPackages, func(pkg string) bool {
				return !executable(filepath.Join(target, filepath.Base(pkg)))
			})
		},
		make: func(ctx context.Context) error {
			dir, err := download(ctx, cniPlugins)
			if err != nil {
				return err
			}
			temp, err := os.MkdirTemp(p.build, "cni-")
			if err != nil {
				return err
			}
			defer os.RemoveAll(temp)
			if err := os.Chmod(temp, 0o755); err != nil {
				return err
			}
			// Built in the module itself: with exactly the dependencies its authors have pinned.
			args := []string{"build", "-trimpath", "-buildvcs=false", "-ldflags", "-s -w", "-o", temp + "/"}
			for _, pkg := range pluginPackages {
				args = append(args, "./"+pkg)
			}
			if err := run(ctx, dir, cleanGo, "go", args...); err != nil {
				return err
			}
			return replace(temp, target)
		},
	}
}

// images builds the OCI layout of the images that the registry of tests and demo serves.
func (p *provisioner) images() step {
	target := filepath.Join(p.build, "images")
	return step{
		name: "images",
		key: func(context.Context) (string, error) {
			busybox, err := exec.LookPath("busybox")
			if err != nil {
				return "", fmt.Errorf("no busybox: the step \"packages\" installs it")
			}
			// The images change with the programs in them and with the code that puts them together.
			sources := []string{busybox}
			for _, dir := range []string{"integration/images", "integration/cmd/standin"} {
				files, err := filepath.Glob(filepath.Join(p.root, dir, "*.go"))
				if err != nil {
					return "", err
				}
				sources = append(sources, files...)
			}
			hash := sha256.New()
			for _, source := range sources {
				if err := hashFile(hash, source); err != nil {
					return "", err
				}
			}
			return fmt.Sprintf("from %s and our sources (%x)\n%s", busybox, hash.Sum(nil)[:8], runtime.Version()), nil
		},
		have: func(context.Context) bool {
			_, err := os.Stat(filepath.Join(target, "index.json"))
			return err == nil
		},
		make: func(ctx context.Context) error {
			busybox, err := exec.LookPath("busybox")
			if err != nil {
				return err
			}
			temp, err := os.MkdirTemp(p.build, "images-")
			if err != nil {
				return err
			}
			defer os.RemoveAll(temp)
			standin := filepath.Join(temp, "standin")
			err = run(ctx, p.root, []string{"CGO_ENABLED=0", "GOFLAGS="}, "go", "build", "-trimpath", "-buildvcs=false", "-ldflags", "-s -w -buildid=",
				"-o", standin, "./integration/cmd/standin")
			if err != nil {
				return err
			}
			layout := filepath.Join(temp, "layout")
			names, err := images.Build(layout, images.Sources{Busybox: busybox, Standin: standin})
			if err != nil {
				return err
			}
			fmt.Printf("provision: images    %d references\n", len(names))
			return replace(layout, target)
		},
	}
}

func hashFile(to io.Writer, path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = io.Copy(to, f)
	return err
}

// download puts a module into Go's module cache and returns the directory.
func download(ctx context.Context, module string) (string, error) {
	cmd := exec.CommandContext(ctx, "go", "mod", "download", "-json", module)
	cmd.Env = append(os.Environ(), cleanGo...)
	out, err := cmd.Output()
	var answer struct{ Dir, Error string }
	if parsed := json.Unmarshal(out, &answer); parsed != nil {
		return "", fmt.Errorf("%s: %v: %s", module, err, offline)
	}
	if answer.Error != "" || answer.Dir == "" {
		return "", fmt.Errorf("%s: %s\n%s", module, answer.Error, offline)
	}
	return answer.Dir, nil
}
