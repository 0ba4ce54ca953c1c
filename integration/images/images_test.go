package images

import (
	"archive/tar"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/validate"

	"github.com/crivm/crivm/integration/registry"
)

// build makes the images with this test's own program as the stand-in; only its bytes matter.
func build(t *testing.T) (dir string, names []string) {
	t.Helper()
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		t.Skip("no busybox on this machine: `go run ./integration/cmd/provision packages` installs it")
	}
	standin := filepath.Join(t.TempDir(), "standin")
	if err := os.WriteFile(standin, []byte("a program"), 0o755); err != nil {
		t.Fatal(err)
	}
	dir = filepath.Join(t.TempDir(), "images")
	if names, err = Build(dir, Sources{Busybox: busybox, Standin: standin}); err != nil {
		t.Fatal(err)
	}
	return dir, names
}

func byName(t *testing.T, dir string) (map[string]v1.Descriptor, v1.ImageIndex) {
	t.Helper()
	path, err := layout.FromPath(dir)
	if err != nil {
		t.Fatal(err)
	}
	index, err := path.ImageIndex()
	if err != nil {
		t.Fatal(err)
	}
	manifest, err := index.IndexManifest()
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]v1.Descriptor{}
	for _, d := range manifest.Manifests {
		all[d.Annotations[registry.RefAnnotation]] = d
	}
	return all, index
}

func TestImagesAreValidAndReproducible(t *testing.T) {
	first, names := build(t)
	all, index := byName(t, first)
	for _, name := range names {
		d, ok := all[name]
		if !ok {
			t.Errorf("%s is not in the layout", name)
			continue
		}
		if d.MediaType.IsIndex() {
			many, err := index.ImageIndex(d.Digest)
			if err == nil {
				err = validate.Index(many)
			}
			if err != nil {
				t.Errorf("%s: %v", name, err)
			}
			continue
		}
		var options []validate.Option
		if strings.Contains(name, "zstd") {
			options = append(options, validate.Fast) // validate reads gzip only
		}
		image, err := index.Image(d.Digest)
		if err == nil {
			err = validate.Image(image, options...)
		}
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	if all["docker.io/library/busybox:latest"].Digest == all["gcr.io/k8s-staging-cri-tools/test-image-1:latest"].Digest ||
		all["gcr.io/k8s-staging-cri-tools/test-image-tags:1"].Digest != all["gcr.io/k8s-staging-cri-tools/test-image-tags:3"].Digest {
		t.Error("tags that shall differ do not, or the other way round")
	}
	second, _ := build(t)
	again, _ := byName(t, second)
	if !reflect.DeepEqual(all, again) {
		t.Error("built twice, the images differ")
	}
}

// The root file system works: its shell starts with the libraries that came along, and nothing else.
func TestBusyboxRuns(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root for chroot and for owners of files")
	}
	dir, _ := build(t)
	all, index := byName(t, dir)
	image, err := index.Image(all["docker.io/library/busybox:latest"].Digest)
	if err != nil {
		t.Fatal(err)
	}
	config, err := image.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	if config.Architecture != runtime.GOARCH || !slices.Equal(config.Config.Cmd, []string{"sh"}) {
		t.Errorf("config %+v", config)
	}
	root := t.TempDir()
	if err := os.Chmod(root, 0o755); err != nil {
		t.Fatal(err)
	}
	tarball := mutate.Extract(image)
	defer tarball.Close()
	unpack := exec.Command("tar", "-x", "-p", "-C", root)
	unpack.Stdin = tarball
	if out, err := unpack.CombinedOutput(); err != nil {
		t.Fatalf("tar: %v: %s", err, out)
	}
	run := exec.Command("chroot", root, "/bin/sh", "-c", "echo $(id -un) $(stat -c %a /tmp) $(echo abc | tr b B) $(httpd --help 2>&1 | head -c 0); pgrep x; test $? = 1 && test -x /bin/ipcs")
	run.Env = config.Config.Env
	out, err := run.CombinedOutput()
	if err != nil || strings.TrimSpace(string(out)) != "root 1777 aBc" {
		t.Errorf("%q, %v", out, err)
	}
}

func TestLayersImage(t *testing.T) {
	dir, _ := build(t)
	all, index := byName(t, dir)
	image, err := index.Image(all["docker.io/crivm/layers:latest"].Digest)
	if err != nil {
		t.Fatal(err)
	}
	files := map[string]*tar.Header{}
	flat := mutate.Extract(image)
	defer flat.Close()
	for r := tar.NewReader(flat); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		files[strings.TrimSuffix(h.Name, "/")] = h
	}
	for _, name := range []string{"data/kept", "hard/two", "dangling", "fifo", "null", "umlaut-ä-字", "bin/sh"} {
		if files[name] == nil {
			t.Errorf("%s is missing", name)
		}
	}
	if files["data/removed"] != nil {
		t.Error("data/removed is there in spite of its whiteout")
	}
	if h := files["owned"]; h == nil || h.Mode != 0o4711 || h.Uid != 1234 || h.Gid != 5678 {
		t.Errorf("owned: %+v", h)
	}
	if h := files["capable"]; h == nil || len(h.PAXRecords["SCHILY.xattr.security.capability"]) != 20 {
		t.Errorf("capable: %+v", h)
	}
}

func TestLinkedFindsWhatIsMissing(t *testing.T) {
	if _, err := linked("/no/such/program"); err == nil {
		t.Error("no error for a program that is not there")
	}
}
