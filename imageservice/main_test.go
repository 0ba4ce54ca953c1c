package imageservice

import (
	"archive/tar"
	"bytes"
	"context"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"go.podman.io/storage/pkg/reexec"
	"go.uber.org/goleak"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestMain(m *testing.M) {
	if reexec.Init() { // the store unpacks layers in a child that is this program again
		return
	}
	goleak.VerifyTestMain(m, goleak.IgnoreAnyFunction("github.com/golang/glog.(*fileSink).flushDaemon"))
}

// sequential skips a test under the race detector when it runs one call after another. Each layer is unpacked
// by a child that is this program again, which takes seconds to start with the detector in it.
func sequential(t *testing.T) {
	t.Helper()
	if raceEnabled {
		t.Skip("one call after another: nothing for the race detector, and slow with it")
	}
}

// acceptAll is a policy.json.
const acceptAll = `{"default":[{"type":"insecureAcceptAnything"}]}`

// newService makes a service of its own for a test; change may alter the configuration. At the end nothing
// of it may be mounted and its temporary directories are empty.
func newService(t testing.TB, change func(*Config)) *Service {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("unpacking layers with their owners needs root")
	}
	return openService(t, testConfig(t, change))
}

func testConfig(t testing.TB, change func(*Config)) Config {
	t.Helper()
	dir := t.TempDir()
	c := Config{
		Root:              filepath.Join(dir, "root"),
		RunRoot:           filepath.Join(dir, "run"),
		DiskDir:           filepath.Join(dir, "disks"),
		RegistriesConf:    filepath.Join(dir, "registries.conf"),
		RegistriesConfDir: filepath.Join(dir, "none"),
		SignaturePolicy:   filepath.Join(dir, "policy.json"),
		AuthFile:          filepath.Join(dir, "auth.json"),
		CertsDir:          filepath.Join(dir, "certs.d"),
		ShortNameAliases:  filepath.Join(dir, "aliases.conf"),
	}
	write(t, c.RegistriesConf, "")
	write(t, c.SignaturePolicy, acceptAll)
	write(t, c.AuthFile, "{}")
	if change != nil {
		change(&c)
	}
	return c
}

func openService(t testing.TB, c Config) *Service {
	t.Helper()
	s, err := New(context.Background(), c)
	if err != nil {
		t.Fatalf("New: %v", err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
		checkNoMounts(t, filepath.Dir(c.Root))
		checkNoTemp(t, c)
	})
	return s
}

func checkNoMounts(t testing.TB, below string) {
	t.Helper()
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range strings.Split(string(b), "\n") {
		if f := strings.Fields(line); len(f) > 4 && strings.HasPrefix(f[4], below+"/") {
			t.Errorf("still mounted: %s", f[4])
		}
	}
}

func checkNoTemp(t testing.TB, c Config) {
	t.Helper()
	left, err := os.ReadDir(filepath.Join(c.Root, "crivm-tmp"))
	if err != nil {
		t.Error(err)
	}
	for _, e := range left {
		t.Errorf("left of a download: %s", e.Name())
	}
	if left, _ := filepath.Glob(filepath.Join(c.DiskDir, "*"+tempSuffix)); len(left) > 0 {
		t.Errorf("left of a disk build: %v", left)
	}
}

func write(t testing.TB, path, content string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

// testRegistry is a registry in this process; every request passes wrap if it is set.
type testRegistry struct {
	host     string // address and port
	server   *httptest.Server
	requests atomic.Int64
	wrap     atomic.Pointer[func(w http.ResponseWriter, r *http.Request, next http.Handler)]
}

func newRegistry(t testing.TB, useTLS bool) *testRegistry {
	t.Helper()
	reg := &testRegistry{}
	next := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		reg.requests.Add(1)
		if wrap := reg.wrap.Load(); wrap != nil {
			(*wrap)(w, r, next)
			return
		}
		next.ServeHTTP(w, r)
	})
	if useTLS {
		reg.server = httptest.NewTLSServer(handler)
	} else {
		reg.server = httptest.NewServer(handler)
	}
	reg.server.Config.ErrorLog = log.New(io.Discard, "", 0)
	_, reg.host, _ = strings.Cut(reg.server.URL, "://")
	t.Cleanup(reg.server.Close)
	return reg
}

func (reg *testRegistry) intercept(f func(w http.ResponseWriter, r *http.Request, next http.Handler)) {
	if f == nil {
		reg.wrap.Store(nil)
		return
	}
	reg.wrap.Store(&f)
}

// insecure is a registries.conf that allows plain HTTP for these registries.
func insecure(regs ...*testRegistry) string {
	var b strings.Builder
	for _, r := range regs {
		b.WriteString("[[registry]]\nlocation = \"" + r.host + "\"\ninsecure = true\n")
	}
	return b.String()
}

// push puts an image or index into the registry and returns the full reference.
func (reg *testRegistry) push(t testing.TB, repoTag string, img any) string {
	t.Helper()
	ref, err := name.ParseReference(reg.host+"/"+repoTag, name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	opts := []remote.Option{remote.WithTransport(reg.server.Client().Transport)}
	switch img := img.(type) {
	case v1.Image:
		err = remote.Write(ref, img, opts...)
	case v1.ImageIndex:
		err = remote.WriteIndex(ref, img, opts...)
	default:
		t.Fatalf("push of %T", img)
	}
	if err != nil {
		t.Fatalf("push %s: %v", ref, err)
	}
	return reg.host + "/" + repoTag
}

// tarLayer makes a gzipped layer of files (path to content).
func tarLayer(t testing.TB, files map[string]string) v1.Layer {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	var names []string
	for n := range files {
		names = append(names, n)
	}
	slices.Sort(names)
	for _, n := range names {
		h := &tar.Header{Typeflag: tar.TypeReg, Name: n, Mode: 0o644, Size: int64(len(files[n])), ModTime: time.Unix(1000, 0)}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, files[n]); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return rawLayer(t, b.Bytes())
}

func rawLayer(t testing.TB, tar []byte) v1.Layer {
	t.Helper()
	l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(tar)), nil })
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// newImage makes an image of layers, with a configuration that config may change.
func newImage(t testing.TB, config func(*v1.ConfigFile), layers ...v1.Layer) v1.Image {
	t.Helper()
	img, err := mutate.AppendLayers(empty.Image, layers...)
	if err != nil {
		t.Fatal(err)
	}
	cf, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	cf = cf.DeepCopy()
	cf.Architecture, cf.OS = "amd64", "linux"
	if config != nil {
		config(cf)
	}
	if img, err = mutate.ConfigFile(img, cf); err != nil {
		t.Fatal(err)
	}
	return img
}

// simpleImage is an image that differs from others by its text.
func simpleImage(t testing.TB, text string) v1.Image {
	t.Helper()
	return newImage(t, nil, tarLayer(t, map[string]string{"etc/text": text}))
}

func configDigest(t testing.TB, img v1.Image) string {
	t.Helper()
	h, err := img.ConfigName()
	if err != nil {
		t.Fatal(err)
	}
	return h.String()
}

func pull(t testing.TB, s *Service, ref string) string {
	t.Helper()
	id, err := tryPull(context.Background(), s, ref, nil)
	if err != nil {
		t.Fatalf("PullImage %s: %v", ref, err)
	}
	return id
}

func tryPull(ctx context.Context, s *Service, ref string, auth *cri.AuthConfig) (string, error) {
	resp, err := s.PullImage(ctx, &cri.PullImageRequest{Image: &cri.ImageSpec{Image: ref}, Auth: auth})
	return resp.GetImageRef(), err
}

func list(t testing.TB, s *Service) []*cri.Image {
	t.Helper()
	resp, err := s.ListImages(context.Background(), &cri.ListImagesRequest{})
	if err != nil {
		t.Fatalf("ListImages: %v", err)
	}
	return resp.GetImages()
}

// countBlobs is how many layers are kept.
func countBlobs(t testing.TB, c Config) int {
	t.Helper()
	entries, err := os.ReadDir(filepath.Join(c.Root, blobsDir))
	if err != nil {
		t.Error(err)
	}
	return len(entries)
}

// checkEmpty checks that the store holds nothing at all.
func checkEmpty(t testing.TB, s *Service) {
	t.Helper()
	s.sums.Wait() // one of a disk that was removed meanwhile removes itself
	if images, err := s.store.Images(); err != nil || len(images) > 0 {
		t.Errorf("images left: %v %v", images, err)
	}
	if layers, err := s.store.Layers(); err != nil || len(layers) > 0 {
		t.Errorf("%d layers left (%v)", len(layers), err)
	}
	if n := countBlobs(t, s.config); n > 0 {
		t.Errorf("%d layers left", n)
	}
	disks, err := os.ReadDir(s.config.DiskDir)
	if err != nil || len(disks) > 0 {
		t.Errorf("disks left: %v %v", disks, err)
	}
	checkNoTemp(t, s.config)
}
