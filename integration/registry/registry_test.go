package registry

import (
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/validate"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestServesALayout(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "layout")
	path, err := layout.Write(dir, empty.Index)
	if err != nil {
		t.Fatal(err)
	}
	image, err := random.Image(1000, 2)
	if err != nil {
		t.Fatal(err)
	}
	index, err := random.Index(1000, 1, 2)
	if err != nil {
		t.Fatal(err)
	}
	if err := path.AppendImage(image, layout.WithAnnotations(map[string]string{RefAnnotation: "docker.io/library/one:v1"})); err != nil {
		t.Fatal(err)
	}
	if err := path.AppendIndex(index, layout.WithAnnotations(map[string]string{RefAnnotation: "registry.k8s.io/many:latest"})); err != nil {
		t.Fatal(err)
	}
	r, err := Serve(dir)
	if err != nil {
		t.Fatal(err)
	}
	transport := http.DefaultTransport.(*http.Transport).Clone()
	defer transport.CloseIdleConnections()
	defer http.DefaultTransport.(*http.Transport).CloseIdleConnections()
	defer remote.DefaultTransport.(*http.Transport).CloseIdleConnections()
	option := remote.WithTransport(transport)

	want, err := image.Digest()
	if err != nil {
		t.Fatal(err)
	}
	for _, repository := range []string{"docker.io/library/one:v1", "library/one:v1"} {
		ref, err := name.ParseReference(r.Addr()+"/"+repository, name.Insecure)
		if err != nil {
			t.Fatal(err)
		}
		got, err := remote.Image(ref, option)
		if err != nil {
			t.Fatalf("%s: %v", repository, err)
		}
		if digest, err := got.Digest(); err != nil || digest != want {
			t.Errorf("%s: digest %s, %v, want %s", repository, digest, err, want)
		}
		if err := validate.Image(got); err != nil {
			t.Errorf("%s: %v", repository, err)
		}
	}
	ref, err := name.ParseReference(r.Addr()+"/many", name.Insecure)
	if err != nil {
		t.Fatal(err)
	}
	many, err := remote.Index(ref, option)
	if err != nil {
		t.Fatal(err)
	}
	if err := validate.Index(many); err != nil {
		t.Error(err)
	}
	if asked := r.Requests(); !slices.Contains(asked, "GET /v2/many/manifests/latest") || slices.ContainsFunc(asked, func(s string) bool { return strings.HasPrefix(s, "P") }) {
		t.Errorf("requests %v", asked)
	}

	r.Intercept(func(w http.ResponseWriter, req *http.Request) bool {
		if strings.Contains(req.URL.Path, "/manifests/") {
			http.Error(w, "gone fishing", http.StatusServiceUnavailable)
			return true
		}
		return false
	})
	if _, err := remote.Get(ref, option, remote.WithRetryStatusCodes()); err == nil || !strings.Contains(err.Error(), "503") {
		t.Errorf("intercepted: %v", err)
	}
	r.Intercept(nil)
	if _, err := remote.Get(ref, option); err != nil {
		t.Errorf("no longer intercepted: %v", err)
	}
	if err := r.Close(); err != nil {
		t.Error(err)
	}
	if _, err := remote.Get(ref, option, remote.WithRetryPredicate(func(error) bool { return false })); err == nil {
		t.Error("a closed registry answers")
	}
}

func TestServeWithoutLayout(t *testing.T) {
	if _, err := Serve(t.TempDir()); err == nil {
		t.Error("no layout, no error")
	}
}
