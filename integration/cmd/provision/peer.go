package main

import (
	"context"
	"crypto/sha256"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
)

// Pins of the runtime that the benchmarks measure beside crivm.
const (
	containerd = "github.com/containerd/containerd/v2@v2.4.2"
	runc       = "github.com/opencontainers/runc@v1.5.2"
)

// peerPackages are what runc's parts in C and the sandbox image's one program need to build.
var peerPackages = []string{"gcc", "libc6-dev", "libseccomp-dev", "pkg-config"}

// peer builds containerd with its runc shim. The tags leave out snapshotters that need C libraries or other storage than a
// directory, and the shim is built as its Makefile does, without gRPC, which it does not speak.
func (p *provisioner) peer() step {
	return p.foreign("containerd", containerd, "CGO_ENABLED=0", []foreignBuild{
		{"./cmd/containerd", "no_btrfs no_zfs no_devmapper no_aufs", "-X github.com/containerd/containerd/v2/version.Version="},
		{"./cmd/containerd-shim-runc-v2", "no_grpc", "-X github.com/containerd/containerd/v2/version.Version="},
	})
}

// runc has parts in C.
func (p *provisioner) runc() step {
	return p.foreign("runc", runc, "CGO_ENABLED=1", []foreignBuild{{".", "seccomp", "-X main.version="}})
}

type foreignBuild struct{ pkg, tags, version string }

// foreign builds programs of another module into build/bin/peer, in the module's own directory, so that exactly the dependencies
// are used that its authors have pinned.
func (p *provisioner) foreign(name, module, cgo string, builds []foreignBuild) step {
	target := func(b foreignBuild) string {
		if b.pkg == "." {
			return filepath.Join(p.build, "bin/peer", name)
		}
		return filepath.Join(p.build, "bin/peer", filepath.Base(b.pkg))
	}
	return step{
		name: name, extra: true,
		key: func(context.Context) (string, error) { return module + "\n" + runtime.Version(), nil },
		have: func(context.Context) bool {
			for _, b := range builds {
				if !executable(target(b)) {
					return false
				}
			}
			return true
		},
		make: func(ctx context.Context) error {
			dir, err := download(ctx, module)
			if err != nil {
				return err
			}
			if err := os.MkdirAll(filepath.Join(p.build, "bin/peer"), 0o755); err != nil {
				return err
			}
			_, version, _ := strings.Cut(module, "@v")
			for _, b := range builds {
				temp := target(b) + ".new"
				err := run(ctx, dir, append(append([]string{}, cleanGo...), cgo), "go", "build", "-trimpath", "-buildvcs=false", "-tags", b.tags,
					"-ldflags", "-s -w "+b.version+version, "-o", temp, b.pkg)
				if err != nil {
					return err
				}
				if err := replace(temp, target(b)); err != nil {
					return err
				}
			}
			return nil
		},
	}
}

// pause is the program of containerd's sandbox image.
func (p *provisioner) pause() step {
	source, target := filepath.Join(p.root, "integration/bench/pause/pause.c"), filepath.Join(p.build, "bin/peer/pause")
	return step{
		name: "pause", extra: true,
		key: func(context.Context) (string, error) {
			hash := sha256.New()
			err := hashFile(hash, source)
			return fmt.Sprintf("from pause.c (%x)", hash.Sum(nil)[:8]), err
		},
		have: func(context.Context) bool { return executable(target) },
		make: func(ctx context.Context) error {
			if err := os.MkdirAll(filepath.Dir(target), 0o755); err != nil {
				return err
			}
			return run(ctx, p.root, nil, "gcc", "-Os", "-static", "-s", "-o", target, source)
		},
	}
}
