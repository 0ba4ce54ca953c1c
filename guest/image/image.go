// Package image builds what a VM boots: an ELF kernel that a VMM can enter directly (PVH), and an
// initramfs with the agent as /init, the OCI runtime with its libraries and the kernel modules that the
// guest needs. It runs on the host, for `crivm guest build`; nothing of it is in the guest.
//
// The output is a function of the input files alone: entries sorted, times and owners zero, inode
// numbers counted, so the same inputs give the same bytes on every machine.
//
// It reads a distribution's kernel package as installed or merely unpacked. Dependencies of modules
// come from the modules' own .modinfo sections, not from modules.dep, which only exists after depmod ran.
package image

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"

	"github.com/crivm/crivm/agentproto"
)

// Names of the files that Build writes into Options.Output.
const (
	KernelFile      = "vmlinux"
	InitramfsFile   = "initramfs"
	DescriptionFile = "guest.json"
)

// NoModules as Options.ModulesDir says that the kernel has everything built in.
const NoModules = "none"

// Options tells Build what to build from.
type Options struct {
	Kernel      string // bzImage (vmlinuz) or ELF; "" is the newest of /boot
	ModulesDir  string // such as /lib/modules/6.1.0-56-cloud-amd64; "" looks beside the kernel's directory; or NoModules
	Agent       string // static crivm-agent binary
	OCIRuntime  string // crun or runc; "" looks for crun, then runc, in PATH
	Output      string // directory, made when missing
	Compression string // of the initramfs: "none" (also ""), "lz4" or "zstd"
}

// Description is the content of guest.json beside the image: the manifest that the agent reads, and
// the digests by which Verify tells that kernel and initramfs belong together.
type Description struct {
	agentproto.Manifest
	KernelSHA256    string `json:"kernelSHA256"`
	InitramfsSHA256 string `json:"initramfsSHA256"`
	// MissingModules are the optional ones that this kernel does not have.
	MissingModules []string `json:"missingModules,omitempty"`
}

// Build writes kernel, initramfs and guest.json into o.Output. Each file is replaced as a whole, guest.json
// last. Errors: errdefs.ErrNotFound for an input that is missing, errdefs.ErrInvalidArgument for one that
// cannot be used.
func Build(ctx context.Context, o Options) (Description, error) {
	var d Description
	if err := o.complete(); err != nil {
		return d, err
	}
	vmlinux, release, err := loadKernel(o.Kernel)
	if err != nil {
		return d, fmt.Errorf("kernel %s: %w", o.Kernel, err)
	}
	if err := ctx.Err(); err != nil {
		return d, err
	}

	var a archive
	addSkeleton(&a)
	if err := addAgent(&a, o.Agent); err != nil {
		return d, fmt.Errorf("agent %s: %w", o.Agent, err)
	}
	if d.OCIRuntime, err = addProgram(&a, o.OCIRuntime, hostLibraryPaths()); err != nil {
		return d, fmt.Errorf("OCI runtime %s: %w", o.OCIRuntime, err)
	}

	d.Version = 1
	d.Kernel = release
	d.Modules = map[string]agentproto.Module{}
	if o.ModulesDir != NoModules {
		if o.ModulesDir == "" {
			if o.ModulesDir, err = modulesBeside(o.Kernel, release); err != nil {
				return d, err
			}
		}
		set, err := openModules(o.ModulesDir, release)
		if err != nil {
			return d, err
		}
		if err := set.addTo(&a, &d); err != nil {
			return d, err
		}
	}
	manifest, err := json.MarshalIndent(d.Manifest, "", "\t")
	if err != nil {
		return d, fmt.Errorf("manifest: %w", err)
	}
	a.addFile(agentproto.ManifestPath, 0o644, append(manifest, '\n'))

	var cpio bytes.Buffer
	if err := a.writeTo(&cpio); err != nil {
		return d, fmt.Errorf("initramfs: %w", err)
	}
	initramfs, err := compress(o.Compression, cpio.Bytes())
	if err != nil {
		return d, fmt.Errorf("initramfs: %w", err)
	}
	if err := ctx.Err(); err != nil {
		return d, err
	}
	d.KernelSHA256 = digest(vmlinux)
	d.InitramfsSHA256 = digest(initramfs)
	description, err := json.MarshalIndent(d, "", "\t")
	if err != nil {
		return d, fmt.Errorf("description: %w", err)
	}
	if err := os.MkdirAll(o.Output, 0o755); err != nil {
		return d, err
	}
	return d, errors.Join(
		replaceFile(filepath.Join(o.Output, KernelFile), vmlinux),
		replaceFile(filepath.Join(o.Output, InitramfsFile), initramfs),
		replaceFile(filepath.Join(o.Output, DescriptionFile), append(description, '\n')),
	)
}

// complete checks o and fills the defaults that do not depend on the kernel's release.
func (o *Options) complete() error {
	if o.Output == "" {
		return fmt.Errorf("no output directory given: %w", errdefs.ErrInvalidArgument)
	}
	if o.Agent == "" {
		return fmt.Errorf("no agent binary given: %w", errdefs.ErrInvalidArgument)
	}
	switch o.Compression {
	case "", "none", "lz4", "zstd":
	default:
		return fmt.Errorf("compression %q is not none, lz4 or zstd: %w", o.Compression, errdefs.ErrInvalidArgument)
	}
	var err error
	if o.Kernel == "" {
		if o.Kernel, err = newestKernel("/boot"); err != nil {
			return err
		}
	}
	if o.OCIRuntime == "" {
		if o.OCIRuntime, err = findOCIRuntime(); err != nil {
			return err
		}
	}
	return nil
}

// Verify reads guest.json beside a kernel and an initramfs and checks that both are the files it
// describes. errdefs.ErrNotFound: a file is missing; errdefs.ErrDataLoss: digests differ.
func Verify(kernel, initramfs string) (Description, error) {
	var d Description
	name := filepath.Join(filepath.Dir(initramfs), DescriptionFile)
	raw, err := os.ReadFile(name)
	if err != nil {
		return d, missing(err)
	}
	if err := json.Unmarshal(raw, &d); err != nil {
		return d, fmt.Errorf("%s: %w", name, err)
	}
	if err := verifyFile(kernel, d.KernelSHA256); err != nil {
		return d, err
	}
	return d, verifyFile(initramfs, d.InitramfsSHA256)
}

func verifyFile(name, want string) error {
	f, err := os.Open(name)
	if err != nil {
		return missing(err)
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return err
	}
	if got := hex.EncodeToString(h.Sum(nil)); got != want {
		return fmt.Errorf("%s is not the file that %s beside it describes (sha256 %s, want %s): %w",
			name, DescriptionFile, got, want, errdefs.ErrDataLoss)
	}
	return nil
}

// addSkeleton adds the directories that the agent mounts on and the files that programs expect.
func addSkeleton(a *archive) {
	for _, dir := range []string{"/dev", "/etc", "/proc", "/root", "/run", "/sbin", "/sys", "/tmp", "/var"} {
		a.addDir(dir)
	}
	a.addCharDevice("/dev/console", 0o600, 5, 1) // PID 1's stdio, before devtmpfs is there
	a.addFile("/etc/passwd", 0o644, []byte("root:x:0:0:root:/root:/sbin/nologin\n"))
	a.addFile("/etc/group", 0o644, []byte("root:x:0:\n"))
}

func digest(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

// replaceFile writes name whole or not at all.
func replaceFile(name string, content []byte) (retErr error) {
	f, err := os.CreateTemp(filepath.Dir(name), "."+filepath.Base(name)+"-")
	if err != nil {
		return err
	}
	defer func() {
		if retErr != nil {
			os.Remove(f.Name())
		}
	}()
	_, err = f.Write(content)
	if err := errors.Join(err, f.Chmod(0o644), f.Sync(), f.Close()); err != nil {
		return fmt.Errorf("write %s: %w", name, err)
	}
	return os.Rename(f.Name(), name)
}

// missing gives a file-does-not-exist error its errdefs class.
func missing(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%w: %w", err, errdefs.ErrNotFound)
	}
	return err
}
