package image

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cavaliergopher/cpio"
	"github.com/containerd/errdefs"

	"github.com/crivm/crivm/agentproto"
)

// testInputs makes a kernel, its modules, an agent and an OCI runtime, and options that name them.
func testInputs(t *testing.T) Options {
	t.Helper()
	root := t.TempDir()
	modules := filepath.Join(root, "lib/modules", testRelease)
	writeFile(t, []byte("kernel/fs/ext4.ko\nkernel/net/ipv6.ko\nkernel/net/af_packet.ko\n"), modules, "modules.builtin")
	for name, depends := range map[string]string{
		"virtio": "", "virtio_ring": "", "virtio_pci": "virtio,virtio_ring", "virtio_console": "virtio",
		"vsock": "", "vmw_vsock_virtio_transport": "vsock,virtio",
		"virtio_blk": "virtio", "virtio_net": "virtio,net_failover", "net_failover": "",
		"virtio_balloon": "virtio", "virtio-mem": "virtio",
		"erofs": "libcrc32c", "libcrc32c": "", "overlay": "", "fuse": "", "virtiofs": "fuse,virtio",
		"bridge": "stp,llc", "stp": "llc", "llc": "",
		"unwanted": "",
	} {
		writeFile(t, testModule(t, testRelease, "depends="+depends), modules, "kernel", name+".ko")
	}
	return Options{
		Kernel:     writeFile(t, bzImage(pack(t, "lz4", testKernel(t))), root, "boot/vmlinuz-"+testRelease),
		Agent:      writeFile(t, testProgram(t, "", ""), root, "crivm-agent"),
		OCIRuntime: writeFile(t, testProgram(t, "", ""), root, "runc"),
		Output:     filepath.Join(root, "output"),
	}
}

// readArchive gives the headers of a cpio archive in order and the content of its files.
func readArchive(t *testing.T, raw []byte) ([]*cpio.Header, map[string][]byte) {
	t.Helper()
	var headers []*cpio.Header
	files := map[string][]byte{}
	r := cpio.NewReader(bytes.NewReader(raw))
	for {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return headers, files
		}
		if err != nil {
			t.Fatal(err)
		}
		headers = append(headers, h)
		if h.Mode.IsRegular() {
			if files["/"+h.Name], err = io.ReadAll(r); err != nil {
				t.Fatal(err)
			}
		}
	}
}

func TestBuildContent(t *testing.T) {
	o := testInputs(t)
	d, err := Build(context.Background(), o)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := os.ReadFile(filepath.Join(o.Output, InitramfsFile))
	if err != nil {
		t.Fatal(err)
	}
	headers, files := readArchive(t, raw)
	seen := map[string]bool{}
	var last string
	for i, h := range headers {
		if h.Name <= last {
			t.Errorf("%s comes after %s: not sorted", h.Name, last)
		}
		last = h.Name
		if dir := filepath.Dir(h.Name); dir != "." && !seen[dir] {
			t.Errorf("%s comes before its directory", h.Name)
		}
		seen[h.Name] = true
		if h.Inode != int64(i+1) || h.Uid != 0 || h.Guid != 0 || h.ModTime.After(time.Unix(0, 0)) {
			t.Errorf("%s: inode %d, owner %d:%d, time %v", h.Name, h.Inode, h.Uid, h.Guid, h.ModTime)
		}
	}
	for _, dir := range []string{"dev", "dev/console", "proc", "sys", "run", "tmp", "etc/crivm", "sbin/crivm-agent"} {
		if !seen[dir] {
			t.Errorf("%s is not there", dir)
		}
	}
	agent, err := os.ReadFile(o.Agent)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(files["/init"], agent) {
		t.Error("/init is not the agent")
	}

	var m agentproto.Manifest
	if err := json.Unmarshal(files[agentproto.ManifestPath], &m); err != nil {
		t.Fatal(err)
	}
	if m.Version != 1 || m.Kernel != testRelease || m.OCIRuntime != "/usr/bin/runc" || files[m.OCIRuntime] == nil {
		t.Errorf("manifest %+v", m)
	}
	if want := []string{"virtio", "virtio_ring", "virtio_pci", "virtio_console", "vsock", "vmw_vsock_virtio_transport"}; !slices.Equal(m.Boot, want) {
		t.Errorf("boot list %q, want %q", m.Boot, want)
	}
	for name, module := range m.Modules {
		if files[module.Path] == nil {
			t.Errorf("module %s: %s is not in the archive", name, module.Path)
		}
		for _, dep := range module.Deps {
			if _, ok := m.Modules[dep]; !ok {
				t.Errorf("module %s needs %s, which the manifest lacks", name, dep)
			}
		}
	}
	if got := m.Modules["bridge"].Deps; !slices.Equal(got, []string{"llc", "stp"}) {
		t.Errorf("bridge needs %q", got)
	}
	for name, want := range map[string]bool{"virtio_mem": true, "libcrc32c": true, "net_failover": true, "ext4": false, "unwanted": false} {
		if _, ok := m.Modules[name]; ok != want {
			t.Errorf("module %s in the manifest: %v, want %v", name, ok, want)
		}
	}
	if !slices.Contains(d.MissingModules, "tun") || slices.Contains(d.MissingModules, "bridge") {
		t.Errorf("missing modules %q", d.MissingModules)
	}
}

func TestBuildIsReproducible(t *testing.T) {
	o := testInputs(t)
	for _, compression := range []string{"none", "lz4", "zstd"} {
		o.Compression = compression
		var builds [2]map[string][]byte
		for i := range builds {
			o.Output = t.TempDir()
			if _, err := Build(context.Background(), o); err != nil {
				t.Fatal(err)
			}
			builds[i] = map[string][]byte{}
			for _, name := range []string{KernelFile, InitramfsFile, DescriptionFile} {
				raw, err := os.ReadFile(filepath.Join(o.Output, name))
				if err != nil {
					t.Fatal(err)
				}
				builds[i][name] = raw
			}
			later := time.Now().Add(time.Hour)
			if err := os.Chtimes(o.Agent, later, later); err != nil {
				t.Fatal(err)
			}
		}
		for name := range builds[0] {
			if !bytes.Equal(builds[0][name], builds[1][name]) {
				t.Errorf("%s: two builds of %s differ", compression, name)
			}
		}
	}
}

func TestBuildCompressionRoundTrip(t *testing.T) {
	o := testInputs(t)
	read := func(compression string) []byte {
		o.Compression = compression
		if _, err := Build(context.Background(), o); err != nil {
			t.Fatal(err)
		}
		raw, err := os.ReadFile(filepath.Join(o.Output, InitramfsFile))
		if err != nil {
			t.Fatal(err)
		}
		return raw
	}
	plain := read("none")
	for _, compression := range []string{"lz4", "zstd"} {
		packed := read(compression)
		if len(packed) >= len(plain) {
			t.Errorf("%s: %d bytes of %d", compression, len(packed), len(plain))
		}
		if got, err := decompress(packed, len(plain)); err != nil || !bytes.Equal(got, plain) {
			t.Errorf("%s does not come back: %v", compression, err)
		}
	}
}

func TestVerify(t *testing.T) {
	o := testInputs(t)
	if _, err := Build(context.Background(), o); err != nil {
		t.Fatal(err)
	}
	kernel, initramfs := filepath.Join(o.Output, KernelFile), filepath.Join(o.Output, InitramfsFile)
	if d, err := Verify(kernel, initramfs); err != nil || d.Kernel != testRelease {
		t.Fatalf("%+v, %v", d, err)
	}
	writeFile(t, []byte("another"), initramfs)
	if _, err := Verify(kernel, initramfs); !errdefs.IsDataLoss(err) || !strings.Contains(err.Error(), initramfs) {
		t.Errorf("changed initramfs: %v", err)
	}
	if err := os.Remove(kernel); err != nil {
		t.Fatal(err)
	}
	if _, err := Verify(kernel, initramfs); !errdefs.IsNotFound(err) {
		t.Errorf("removed kernel: %v", err)
	}
}

func TestBuildBadInput(t *testing.T) {
	for name, test := range map[string]struct {
		change func(o *Options)
		want   string
		class  func(error) bool
	}{
		"no output":          {func(o *Options) { o.Output = "" }, "no output directory", errdefs.IsInvalidArgument},
		"no agent":           {func(o *Options) { o.Agent = "" }, "no agent binary", errdefs.IsInvalidArgument},
		"agent absent":       {func(o *Options) { o.Agent += "x" }, "agent ", errdefs.IsNotFound},
		"compression":        {func(o *Options) { o.Compression = "xz" }, `compression "xz"`, errdefs.IsInvalidArgument},
		"kernel absent":      {func(o *Options) { o.Kernel += "x" }, "kernel ", errdefs.IsNotFound},
		"kernel is text":     {func(o *Options) { o.Kernel = o.Agent + ".txt" }, "neither an ELF file nor a bzImage", errdefs.IsInvalidArgument},
		"modules elsewhere":  {func(o *Options) { o.ModulesDir = filepath.Dir(o.Agent) + "/lib" }, "modules.builtin", errdefs.IsNotFound},
		"module missing":     {func(o *Options) { os.Remove(modulePath(o, "erofs")) }, "kernel module erofs is neither in", errdefs.IsNotFound},
		"dependency missing": {func(o *Options) { os.Remove(modulePath(o, "libcrc32c")) }, "needed by erofs: kernel module libcrc32c", errdefs.IsNotFound},
		"modules not found":  {func(o *Options) { os.RemoveAll(filepath.Dir(filepath.Dir(modulePath(o, "erofs")))) }, "modules of kernel", errdefs.IsNotFound},
	} {
		t.Run(name, func(t *testing.T) {
			o := testInputs(t)
			writeFile(t, []byte("text"), o.Agent+".txt")
			test.change(&o)
			_, err := Build(context.Background(), o)
			if err == nil || !strings.Contains(err.Error(), test.want) || !test.class(err) {
				t.Fatalf("error %v, want %q", err, test.want)
			}
			if o.Output != "" {
				if left, _ := os.ReadDir(o.Output); len(left) != 0 {
					t.Errorf("left %v", left)
				}
			}
		})
	}
}

func modulePath(o *Options, name string) string {
	return filepath.Join(filepath.Dir(o.Agent), "lib/modules", testRelease, "kernel", name+".ko")
}

func TestBuildWithoutModules(t *testing.T) {
	o := testInputs(t)
	o.ModulesDir = NoModules
	d, err := Build(context.Background(), o)
	if err != nil || len(d.Modules) != 0 || len(d.Boot) != 0 || d.Kernel != testRelease {
		t.Fatalf("%+v, %v", d, err)
	}
}
