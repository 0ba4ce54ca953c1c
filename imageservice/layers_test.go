package imageservice

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
)

// TestLayersAreFetchedOnce pulls an image whose layers the library then finds in the store.
func TestLayersAreFetchedOnce(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("unpacking layers with their owners needs root")
	}
	reg := newRegistry(t, false)
	s := newService(t, func(c *Config) { write(t, c.RegistriesConf, insecure(reg)) })
	var blobs []string
	var mu sync.Mutex
	reg.intercept(func(w http.ResponseWriter, r *http.Request, next http.Handler) {
		if r.Method == http.MethodGet && strings.Contains(r.URL.Path, "/blobs/") {
			mu.Lock()
			blobs = append(blobs, r.URL.Path)
			mu.Unlock()
		}
		next.ServeHTTP(w, r)
	})
	layers := []v1.Layer{tarLayer(t, map[string]string{"a": "1"}), tarLayer(t, map[string]string{"b": "2"}), tarLayer(t, map[string]string{"c": "3"})}
	ref := reg.push(t, "app:1", newImage(t, nil, layers...))
	blobs = nil
	id := pull(t, s, ref)
	for _, l := range layers {
		d, err := l.Digest()
		if err != nil {
			t.Fatal(err)
		}
		n := 0
		for _, b := range blobs {
			if strings.HasSuffix(b, d.String()) {
				n++
			}
		}
		if n != 1 {
			t.Errorf("layer %s was fetched %d times", d, n)
		}
	}
	r, err := s.record(strings.TrimPrefix(id, "sha256:"))
	if err != nil || len(r.layers) != 3 {
		t.Fatalf("%+v, %v", r, err)
	}
	for i, l := range r.layers {
		d, _ := layers[i].Digest()
		diff, _ := layers[i].DiffID()
		size, _ := layers[i].Size()
		if l.blob.String() != d.String() || l.diffID.String() != diff.String() || l.bytes != size || !s.hasBlob(l.blob, size) {
			t.Errorf("layer %d is %+v", i, l)
		}
	}
}

// TestFalseDigests has an image whose configuration lies about a layer: it must not get the name of another.
func TestFalseDigests(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("unpacking layers with their owners needs root")
	}
	reg := newRegistry(t, false)
	s := newService(t, func(c *Config) { write(t, c.RegistriesConf, insecure(reg)) })
	good := tarLayer(t, map[string]string{"etc/passwd": "root"})
	diff, err := good.DiffID()
	if err != nil {
		t.Fatal(err)
	}
	bad := newImage(t, func(c *v1.ConfigFile) { c.RootFS.DiffIDs = []v1.Hash{diff} }, tarLayer(t, map[string]string{"etc/passwd": "mallory"}))
	if id, err := tryPull(context.Background(), s, reg.push(t, "bad:1", bad), nil); err == nil {
		t.Errorf("an image with a false configuration was pulled: %s", id)
	}
	checkEmpty(t, s)
	pull(t, s, reg.push(t, "good:1", newImage(t, nil, good)))
}

func TestCheckedReader(t *testing.T) {
	data := bytes.Repeat([]byte("data"), 1000)
	right := digest.FromBytes(data)
	for want, ok := range map[digest.Digest]bool{right: true, digest.FromString("other"): false} {
		r := &checkedReader{r: bytes.NewReader(data), hash: sha256.New(), want: want}
		if _, err := io.Copy(io.Discard, r); (err == nil) != ok || r.whole != ok {
			t.Errorf("%s: %v, whole: %t", want, err, r.whole)
		}
		if n, err := r.Read(make([]byte, 1)); n != 0 || err == nil {
			t.Errorf("%s: read %d, %v after the end", want, n, err)
		}
	}
}

func TestDecompress(t *testing.T) {
	data := bytes.Repeat([]byte("some content "), 10000)
	var gz, zs bytes.Buffer
	g := gzip.NewWriter(&gz)
	z, err := zstd.NewWriter(&zs)
	if err != nil {
		t.Fatal(err)
	}
	for _, w := range []io.WriteCloser{g, z} {
		if _, err := w.Write(data); err != nil {
			t.Fatal(err)
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
	}
	for name, c := range map[string]struct {
		packed, want []byte
		ok           bool
	}{
		"plain": {data, data, true}, "gzip": {gz.Bytes(), data, true}, "zstd": {zs.Bytes(), data, true}, "empty": {nil, nil, true},
		"bzip2": {[]byte("BZh9..."), nil, false}, "cut gzip": {gz.Bytes()[:50], nil, false}, "cut zstd": {zs.Bytes()[:20], nil, false},
	} {
		path := filepath.Join(t.TempDir(), "blob")
		if err := os.WriteFile(path, c.packed, 0o600); err != nil {
			t.Fatal(err)
		}
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		r, end, err := decompress(f)
		var got []byte
		if err == nil {
			got, err = io.ReadAll(r)
			end()
		}
		if (err == nil) != c.ok || c.ok && !bytes.Equal(got, c.want) {
			t.Errorf("%s: %d bytes, %v", name, len(got), err)
		}
	}
}
