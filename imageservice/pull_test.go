package imageservice

import (
	"context"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/random"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestPull(t *testing.T) {
	for _, driver := range []string{"overlay", "vfs"} {
		t.Run(driver, func(t *testing.T) {
			reg := newRegistry(t, false)
			s := newService(t, func(c *Config) {
				c.StorageDriver = driver
				write(t, c.RegistriesConf, insecure(reg))
			})
			img := simpleImage(t, "one")
			ref := reg.push(t, "lib/one:v1", img)
			id := pull(t, s, ref)
			if want := configDigest(t, img); id != want {
				t.Errorf("image_ref %s, want the config digest %s", id, want)
			}
			images := list(t, s)
			if len(images) != 1 {
				t.Fatalf("%d images, want 1", len(images))
			}
			got := images[0]
			if got.Id != id || !slices.Equal(got.RepoTags, []string{ref}) ||
				!slices.Equal(got.RepoDigests, []string{reg.host + "/lib/one@" + manifestDigest(t, img)}) || got.Size < 1024 {
				t.Errorf("listed as %v", got)
			}
			disk, err := s.Disk(context.Background(), id)
			if err != nil {
				t.Fatal(err)
			}
			st, err := os.Stat(disk)
			if err != nil || st.Mode().Perm() != 0o644 {
				t.Errorf("disk %v %v, want mode 0644", st.Mode(), err)
			}
			if st, err := os.Stat(s.config.DiskDir); err != nil || st.Mode().Perm() != 0o711 {
				t.Errorf("disk directory %v %v, want mode 0711", st.Mode(), err)
			}
			remove(t, s, ref)
			checkEmpty(t, s)
		})
	}
}

type digester interface{ Digest() (v1.Hash, error) }

func manifestDigest(t testing.TB, img digester) string {
	t.Helper()
	h, err := img.Digest()
	if err != nil {
		t.Fatal(err)
	}
	return h.String()
}

func remove(t testing.TB, s *Service, ref string) {
	t.Helper()
	if _, err := s.RemoveImage(context.Background(), &cri.RemoveImageRequest{Image: &cri.ImageSpec{Image: ref}}); err != nil {
		t.Fatalf("RemoveImage %s: %v", ref, err)
	}
}

func resolve(t *testing.T, s *Service, ref string) Image {
	t.Helper()
	img, err := s.Resolve(context.Background(), ref)
	if err != nil {
		t.Fatalf("Resolve %s: %v", ref, err)
	}
	return img
}

// TestRetag: a tag that moves in the registry moves here, and what it was on stays by its digest.
func TestRetag(t *testing.T) {
	reg := newRegistry(t, false)
	s := newService(t, func(c *Config) { write(t, c.RegistriesConf, insecure(reg)) })
	first, second := simpleImage(t, "first"), simpleImage(t, "second")
	ref := reg.push(t, "app:latest", first)
	a := pull(t, s, ref)
	if again := pull(t, s, ref); again != a {
		t.Errorf("second pull gave %s, first %s", again, a)
	}
	if img := resolve(t, s, a); len(img.RepoTags) != 1 || len(img.RepoDigests) != 1 {
		t.Errorf("pulled twice: %+v", img)
	}
	reg.push(t, "app:latest", second)
	b := pull(t, s, ref)
	if a == b {
		t.Fatal("the moved tag gave the old image")
	}
	if img := resolve(t, s, ref); img.ID != b {
		t.Errorf("tag is on %s, want %s", img.ID, b)
	}
	old := resolve(t, s, a)
	if len(old.RepoTags) != 0 || !slices.Equal(old.RepoDigests, []string{reg.host + "/app@" + manifestDigest(t, first)}) {
		t.Errorf("old image has names %v %v", old.RepoTags, old.RepoDigests)
	}
}

// TestTwoRegistries: one image from two registries is one image; removing it by one name removes all.
func TestTwoRegistries(t *testing.T) {
	sequential(t)
	one, two := newRegistry(t, false), newRegistry(t, false)
	s := newService(t, func(c *Config) { write(t, c.RegistriesConf, insecure(one, two)) })
	img := simpleImage(t, "same")
	refs := []string{one.push(t, "pause:3", img), two.push(t, "other/pause:4", img), two.push(t, "other/pause:5", img)}
	ids := map[string]bool{}
	for _, ref := range refs {
		ids[pull(t, s, ref)] = true
	}
	if len(ids) != 1 {
		t.Errorf("IDs %v, want one", ids)
	}
	images := list(t, s)
	slices.Reverse(refs) // the newest comes first
	if len(images) != 1 || !slices.Equal(images[0].RepoTags, refs) || len(images[0].RepoDigests) != 2 {
		t.Errorf("listed as %v", images)
	}
	remove(t, s, refs[1])
	checkEmpty(t, s)
}

func TestIndex(t *testing.T) {
	sequential(t)
	reg := newRegistry(t, false)
	s := newService(t, func(c *Config) { write(t, c.RegistriesConf, insecure(reg)) })
	arch := s.system().ArchitectureChoice
	ours := newImage(t, func(c *v1.ConfigFile) { c.Architecture = arch }, tarLayer(t, map[string]string{"f": "ours"}))
	other := newImage(t, func(c *v1.ConfigFile) { c.Architecture = "s390x" }, tarLayer(t, map[string]string{"f": "other"}))
	index := mutate.AppendManifests(empty.Index,
		mutate.IndexAddendum{Add: other, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: "s390x"}}},
		mutate.IndexAddendum{Add: ours, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: arch}}})
	ref := reg.push(t, "multi:1", index)
	id := pull(t, s, ref)
	if want := configDigest(t, ours); id != want {
		t.Errorf("pulled %s, want %s", id, want)
	}
	want := []string{reg.host + "/multi@" + manifestDigest(t, index), reg.host + "/multi@" + manifestDigest(t, ours)}
	if img := resolve(t, s, id); !slices.Equal(img.RepoDigests, want) {
		t.Errorf("RepoDigests %v, want %v", img.RepoDigests, want)
	}
	for _, d := range want {
		if img := resolve(t, s, d); img.ID != id {
			t.Errorf("%s is %s", d, img.ID)
		}
		if got := pull(t, s, d); got != id {
			t.Errorf("pull of %s gave %s", d, got)
		}
	}
	slices.Reverse(want) // the last pull was by the manifest's digest
	if img := resolve(t, s, id); !slices.Equal(img.RepoDigests, want) || !slices.Equal(img.RepoTags, []string{ref}) {
		t.Errorf("after pulls by digest: %+v", img)
	}
}

func TestPullByDigest(t *testing.T) {
	sequential(t)
	reg := newRegistry(t, false)
	s := newService(t, func(c *Config) { write(t, c.RegistriesConf, insecure(reg)) })
	img := simpleImage(t, "by digest")
	ref := reg.push(t, "app:v1", img)
	byDigest := reg.host + "/app@" + manifestDigest(t, img)
	id := pull(t, s, ref+"@"+manifestDigest(t, img))
	got := resolve(t, s, byDigest)
	if got.ID != id || len(got.RepoTags) != 0 || !slices.Equal(got.RepoDigests, []string{byDigest}) {
		t.Errorf("image %+v", got)
	}
	if _, err := s.Resolve(context.Background(), ref); !errdefs.IsNotFound(err) {
		t.Errorf("the tag resolves although only the digest was pulled: %v", err)
	}
	wrong := reg.host + "/app@sha256:" + strings.Repeat("0", 64)
	if _, err := tryPull(context.Background(), s, wrong, nil); !errdefs.IsNotFound(err) {
		t.Errorf("pull of an unknown digest: %v, want not found", err)
	}
}

func TestSharedLayers(t *testing.T) {
	sequential(t)
	reg := newRegistry(t, false)
	s := newService(t, func(c *Config) { write(t, c.RegistriesConf, insecure(reg)) })
	base := tarLayer(t, map[string]string{"base": strings.Repeat("b", 100000)})
	a := pull(t, s, reg.push(t, "aa:1", newImage(t, nil, base, tarLayer(t, map[string]string{"a": "a"}))))
	b := pull(t, s, reg.push(t, "bb:1", newImage(t, nil, base, tarLayer(t, map[string]string{"b": "b"}))))
	if n := countBlobs(t, s.config); n != 3 {
		t.Errorf("%d layers, want the shared one and two", n)
	}
	remove(t, s, a)
	disk, err := s.Disk(context.Background(), b)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(disk); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Disk(context.Background(), b); err != nil {
		t.Errorf("disk of the image that is left: %v", err)
	}
	remove(t, s, b)
	checkEmpty(t, s)
}

func TestParallelLayers(t *testing.T) {
	reg := newRegistry(t, false)
	s := newService(t, func(c *Config) { write(t, c.RegistriesConf, insecure(reg)) })
	img, err := random.Image(100000, 6)
	if err != nil {
		t.Fatal(err)
	}
	id := pull(t, s, reg.push(t, "random:1", img))
	if got := resolve(t, s, id); got.Size < 6*100000 {
		t.Errorf("size %d is less than the layers", got.Size)
	}
}

func TestImageWithoutLayers(t *testing.T) {
	reg := newRegistry(t, false)
	s := newService(t, func(c *Config) { write(t, c.RegistriesConf, insecure(reg)) })
	id := pull(t, s, reg.push(t, "scratch:1", newImage(t, nil)))
	if _, err := s.Disk(context.Background(), id); err != nil {
		t.Error(err)
	}
	if images := list(t, s); len(images) != 1 || images[0].Size == 0 {
		t.Errorf("listed as %v", images)
	}
}

func TestPullRefusesBadReferences(t *testing.T) {
	s := newService(t, nil)
	for _, ref := range []string{"", "UPPER/case:x", "host/path:bad tag", "a@sha256:12", "docker://x", "http://h/x", strings.Repeat("x", 300)} {
		if _, err := tryPull(context.Background(), s, ref, nil); !errdefs.IsInvalidArgument(err) {
			t.Errorf("pull of %q: %v, want invalid argument", ref, err)
		}
	}
	checkEmpty(t, s)
}
