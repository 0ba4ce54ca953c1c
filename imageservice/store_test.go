package imageservice

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"google.golang.org/grpc"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crivm/crivm/imageservice/rootdisk"
)

func TestResolve(t *testing.T) {
	sequential(t)
	reg := newRegistry(t, false)
	s := newService(t, func(c *Config) { write(t, c.RegistriesConf, insecure(reg)) })
	ref := reg.push(t, "team/app:v1", simpleImage(t, "app"))
	id := pull(t, s, ref)
	hex := strings.TrimPrefix(id, "sha256:")
	ctx := context.Background()
	for _, r := range []string{id, hex, ref, hex[:13], "sha256:" + hex[:13], resolve(t, s, id).RepoDigests[0]} {
		if img := resolve(t, s, r); img.ID != id {
			t.Errorf("%s is %s", r, img.ID)
		}
	}
	for _, r := range []string{reg.host + "/team/app", reg.host + "/team/app:v2", strings.Repeat("0", 64), hex[:3], "nothing", "UPPER"} {
		if _, err := s.Resolve(ctx, r); !errdefs.IsNotFound(err) {
			t.Errorf("Resolve(%q): %v, want not found", r, err)
		}
		if resp, err := s.ImageStatus(ctx, &cri.ImageStatusRequest{Image: &cri.ImageSpec{Image: r}}); err != nil || resp.GetImage() != nil {
			t.Errorf("ImageStatus(%q): %v %v, want nothing", r, resp, err)
		}
		remove(t, s, r) // idempotent
	}
	if _, err := s.Resolve(ctx, ""); !errdefs.IsInvalidArgument(err) {
		t.Errorf("Resolve of nothing: %v", err)
	}
	if _, err := s.Disk(ctx, "../../etc/passwd"); !errdefs.IsInvalidArgument(err) {
		t.Errorf("Disk of a path: %v", err)
	}
	if _, err := s.Disk(ctx, strings.Repeat("0", 64)); !errdefs.IsNotFound(err) {
		t.Errorf("Disk of an unknown image: %v", err)
	}
	if img := resolve(t, s, id); img.Created.IsZero() != true && img.Created.After(time.Now()) {
		t.Errorf("created %v", img.Created)
	}
}

func TestListAndStatus(t *testing.T) {
	sequential(t)
	reg := newRegistry(t, false)
	s := newService(t, func(c *Config) {
		write(t, c.RegistriesConf, insecure(reg))
		c.Pinned = []string{reg.host + "/pinned:1"}
	})
	ctx := context.Background()
	for _, tt := range []struct {
		user, name string
		uid        int64
		hasUID     bool
	}{
		{"", "", 0, false}, {"1002", "", 1002, true}, {"www-data", "www-data", 0, false},
		{"1003:50", "", 1003, true}, {"www-data:50", "www-data", 0, false}, {"0", "", 0, true},
	} {
		img := newImage(t, func(c *v1.ConfigFile) { c.Config.User = tt.user }, tarLayer(t, map[string]string{"user": tt.user}))
		ref := reg.push(t, "user/u"+strings.NewReplacer(":", "-").Replace(tt.user)+":1", img)
		id := pull(t, s, ref)
		resp, err := s.ImageStatus(ctx, &cri.ImageStatusRequest{Image: &cri.ImageSpec{Image: ref}})
		if err != nil {
			t.Fatal(err)
		}
		got := resp.GetImage()
		if got.GetId() != id || got.GetUsername() != tt.name || (got.GetUid() != nil) != tt.hasUID || got.GetUid().GetValue() != tt.uid {
			t.Errorf("user %q: %v", tt.user, got)
		}
		if got.GetPinned() || got.GetSpec() == nil || resp.GetInfo() != nil {
			t.Errorf("status %v", resp)
		}
		if c := resolve(t, s, ref).Config; c.User != tt.user {
			t.Errorf("configuration has user %q", c.User)
		}
	}
	pinned := pull(t, s, reg.push(t, "pinned:1", simpleImage(t, "pinned")))
	resp, err := s.ImageStatus(ctx, &cri.ImageStatusRequest{Image: &cri.ImageSpec{Image: pinned}, Verbose: true})
	if err != nil || !resp.GetImage().GetPinned() {
		t.Errorf("pinned image: %v %v", resp, err)
	}
	var info struct {
		ImageSpec struct{ Architecture string }
		Disk      string
	}
	if err := json.Unmarshal([]byte(resp.GetInfo()["info"]), &info); err != nil || info.ImageSpec.Architecture != "amd64" || info.Disk == "" {
		t.Errorf("verbose info %q: %v", resp.GetInfo()["info"], err)
	}
	all := list(t, s)
	if len(all) != 7 {
		t.Errorf("%d images listed, want 7", len(all))
	}
	one, err := s.ListImages(ctx, &cri.ListImagesRequest{Filter: &cri.ImageFilter{Image: &cri.ImageSpec{Image: reg.host + "/pinned:1"}}})
	if err != nil || len(one.GetImages()) != 1 || one.GetImages()[0].GetId() != pinned {
		t.Errorf("filtered list %v %v", one, err)
	}
	none, err := s.ListImages(ctx, &cri.ListImagesRequest{Filter: &cri.ImageFilter{Image: &cri.ImageSpec{Image: "none/such"}}})
	if err != nil || len(none.GetImages()) != 0 {
		t.Errorf("filtered list %v %v", none, err)
	}
	stream := &imageStream{}
	if err := s.StreamImages(&cri.StreamImagesRequest{}, stream); err != nil || len(stream.images) != 7 {
		t.Errorf("streamed %d images, %v", len(stream.images), err)
	}
}

type imageStream struct {
	grpc.ServerStreamingServer[cri.StreamImagesResponse]
	images []*cri.Image
}

func (s *imageStream) Send(r *cri.StreamImagesResponse) error {
	s.images = append(s.images, r.GetImages()...)
	return nil
}

func TestImageFsInfo(t *testing.T) {
	sequential(t)
	reg := newRegistry(t, false)
	s := newService(t, func(c *Config) {
		write(t, c.RegistriesConf, insecure(reg))
		c.ScratchDir = filepath.Join(filepath.Dir(c.Root), "scratch")
		write(t, filepath.Join(c.ScratchDir, "pod", "disk"), strings.Repeat("x", 100000))
	})
	info := func() (image, container *cri.FilesystemUsage) {
		t.Helper()
		resp, err := s.ImageFsInfo(context.Background(), &cri.ImageFsInfoRequest{})
		if err != nil || len(resp.GetImageFilesystems()) != 1 || len(resp.GetContainerFilesystems()) != 1 {
			t.Fatalf("ImageFsInfo: %v %v", resp, err)
		}
		return resp.GetImageFilesystems()[0], resp.GetContainerFilesystems()[0]
	}
	image, container := info()
	if image.GetFsId().GetMountpoint() != s.config.Root || image.GetUsedBytes().GetValue() != 0 || image.GetTimestamp() == 0 {
		t.Errorf("empty store: %v", image)
	}
	if container.GetFsId().GetMountpoint() != s.config.ScratchDir || container.GetUsedBytes().GetValue() < 100000 || container.GetInodesUsed().GetValue() != 3 {
		t.Errorf("containers: %v", container)
	}
	img, err := random.Image(1<<20, 2)
	if err != nil {
		t.Fatal(err)
	}
	id := pull(t, s, reg.push(t, "app:1", img))
	image, _ = info()
	if used := image.GetUsedBytes().GetValue(); used < 4<<20 || used > 5<<20 || image.GetInodesUsed().GetValue() != 4 {
		t.Errorf("with 2 MiB in 2 files: %v, want them twice, as layers and as disk", image)
	}
	remove(t, s, id)
	if image, _ = info(); image.GetUsedBytes().GetValue() != 0 {
		t.Errorf("after the removal: %v", image)
	}
}

// hardTar is a layer with all that a disk must keep.
func hardTar(t *testing.T) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	add := func(h tar.Header, data string) {
		h.Size = int64(len(data))
		h.ModTime = time.Unix(1234567890, 123456789)
		h.Format = tar.FormatPAX
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, data); err != nil {
			t.Fatal(err)
		}
	}
	caps := "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"
	add(tar.Header{Typeflag: tar.TypeDir, Name: "bin/", Mode: 0o755}, "")
	add(tar.Header{Typeflag: tar.TypeReg, Name: "bin/su", Mode: 0o4755}, "setuid")
	add(tar.Header{Typeflag: tar.TypeLink, Name: "bin/su2", Linkname: "bin/su", Mode: 0o4755}, "")
	add(tar.Header{Typeflag: tar.TypeReg, Name: "bin/ping", Mode: 0o755, PAXRecords: map[string]string{"SCHILY.xattr.security.capability": caps}}, "ping")
	add(tar.Header{Typeflag: tar.TypeDir, Name: "tmp/", Mode: 0o1777}, "")
	add(tar.Header{Typeflag: tar.TypeChar, Name: "null", Mode: 0o666, Devmajor: 1, Devminor: 3}, "")
	add(tar.Header{Typeflag: tar.TypeSymlink, Name: "sh", Linkname: "bin/su", Mode: 0o777}, "")
	add(tar.Header{Typeflag: tar.TypeReg, Name: "owned", Uid: 1000, Gid: 70000, Mode: 0o600}, strings.Repeat("o", 12345))
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// TestDiskIsOfTheLayers: the disk made by way of the store is byte for byte the one made of the original
// layers, for layers as they came and for those that the image library has unpacked, on both of its storage drivers, and
// again after it was lost.
func TestDiskIsOfTheLayers(t *testing.T) {
	sequential(t)
	upper := tarBytes(t, "bin/.wh.ping", "", "tmp/.wh..wh..opq", "", "new", "file", "owned", "replaced")
	layers := [][]byte{hardTar(t), tarBytes(t, "tmp/old", "old", "keep", strings.Repeat("k", 1<<20)), upper}
	img := newImage(t, nil, rawLayer(t, layers[0]), rawLayer(t, layers[1]), rawLayer(t, layers[2]))
	var raw []rootdisk.Layer
	for _, b := range layers {
		raw = append(raw, func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b)), nil })
	}
	f, err := os.Create(filepath.Join(t.TempDir(), "want"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	id := strings.TrimPrefix(configDigest(t, img), "sha256:")
	if err := rootdisk.Build(context.Background(), f, diskUUID(id), raw); err != nil {
		t.Fatal(err)
	}
	want, err := os.ReadFile(f.Name())
	if err != nil {
		t.Fatal(err)
	}
	for name, driver := range map[string]string{"as they came": "", "overlay": "overlay", "vfs": "vfs"} {
		t.Run(name, func(t *testing.T) {
			reg := newRegistry(t, false)
			s := newService(t, func(c *Config) {
				c.StorageDriver = driver
				write(t, c.RegistriesConf, insecure(reg))
			})
			s.library = driver != ""
			pull(t, s, reg.push(t, "hard:1", img))
			for _, damage := range []func(string) error{
				func(string) error { return nil },
				os.Remove,
				func(p string) error { return os.Truncate(p, 8192) },
				func(p string) error { return os.WriteFile(p, nil, 0o644) },
			} {
				if err := damage(s.diskPath(id)); err != nil {
					t.Fatal(err)
				}
				disk, err := s.Disk(context.Background(), "sha256:"+id)
				if err != nil {
					t.Fatal(err)
				}
				got, err := os.ReadFile(disk)
				if err != nil {
					t.Fatal(err)
				}
				if !bytes.Equal(got, want) {
					t.Error("the disk differs from one of the original layers")
				}
			}
		})
	}
}

// tarBytes makes a tar of pairs of name and content.
func tarBytes(t *testing.T, pairs ...string) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for p := range slices.Chunk(pairs, 2) {
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: p[0], Mode: 0o644, Size: int64(len(p[1]))}); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, p[1]); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// TestDamagedLayer: a layer whose files are not what they were, as after a power failure, makes no disk; the
// disk that exists is not affected, and a pull mends it.
func TestDamagedLayer(t *testing.T) {
	sequential(t)
	damages := map[string]func(string) error{
		"changed":   func(p string) error { return os.WriteFile(p, []byte("as it shouldn't"), 0o644) },
		"flipped":   func(p string) error { return flip(p, 12) },
		"truncated": func(p string) error { return os.Truncate(p, 0) },
		"missing":   os.Remove,
	}
	for name, damage := range damages {
		testDamagedLayer(t, name+", as it came", damage, false, blobsDir+"/*")
		testDamagedLayer(t, name+", unpacked", damage, true, "*/*/*/etc/text")
	}
}

func testDamagedLayer(t *testing.T, name string, damage func(string) error, library bool, pattern string) {
	{
		t.Run(name, func(t *testing.T) {
			reg := newRegistry(t, false)
			s := newService(t, func(c *Config) { write(t, c.RegistriesConf, insecure(reg)) })
			s.library = library
			ref := reg.push(t, "app:1", newImage(t, nil, tarLayer(t, map[string]string{"etc/text": "as it should be"})))
			id := pull(t, s, ref)
			files, err := filepath.Glob(filepath.Join(s.config.Root, pattern))
			if err != nil || len(files) != 1 {
				t.Fatalf("files of the layer: %v %v", files, err)
			}
			if err := damage(files[0]); err != nil {
				t.Fatal(err)
			}
			if _, err := s.Disk(context.Background(), id); err != nil {
				t.Errorf("the disk that exists: %v", err)
			}
			if err := os.Remove(s.diskPath(strings.TrimPrefix(id, "sha256:"))); err != nil {
				t.Fatal(err)
			}
			if _, err := s.Disk(context.Background(), id); err == nil {
				t.Error("a disk was built of a damaged layer")
			}
			if again := pull(t, s, ref); again != id {
				t.Errorf("pulled %s, want %s", again, id)
			}
			if _, err := s.Disk(context.Background(), id); err != nil {
				t.Errorf("after the pull: %v", err)
			}
			if images := list(t, s); len(images) != 1 || len(images[0].GetRepoTags()) != 1 {
				t.Errorf("listed %v", images)
			}
		})
	}
}

// TestLayerIsReadWithoutLock: a disk build of layers that the library has unpacked does not keep others from the store.
func TestLayerIsReadWithoutLock(t *testing.T) {
	reg := newRegistry(t, false)
	s := newService(t, func(c *Config) { write(t, c.RegistriesConf, insecure(reg)) })
	s.library = true
	pull(t, s, reg.push(t, "one:1", simpleImage(t, "one")))
	layers, err := s.store.Layers()
	if err != nil || len(layers) != 1 {
		t.Fatalf("%d layers, %v", len(layers), err)
	}
	stream, err := s.openLayer(layers[0].ID)
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	if _, err := tryPull(ctx, s, reg.push(t, "two:1", simpleImage(t, "two")), nil); err != nil {
		t.Errorf("pull while a layer is read: %v", err)
	}
}

func TestConcurrentDisks(t *testing.T) {
	reg := newRegistry(t, false)
	s := newService(t, func(c *Config) { write(t, c.RegistriesConf, insecure(reg)) })
	img, err := random.Image(1<<20, 2)
	if err != nil {
		t.Fatal(err)
	}
	id := pull(t, s, reg.push(t, "app:1", img))
	if err := os.Remove(s.diskPath(strings.TrimPrefix(id, "sha256:"))); err != nil {
		t.Fatal(err)
	}
	var inodes sync.Map
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			path, err := s.Disk(context.Background(), id)
			if err != nil {
				t.Error(err)
				return
			}
			st, err := os.Stat(path)
			if err != nil {
				t.Error(err)
				return
			}
			inodes.Store(st.ModTime(), true)
		})
	}
	wg.Wait()
	n := 0
	inodes.Range(func(any, any) bool { n++; return true })
	if n != 1 {
		t.Errorf("%d disks were built, want one", n)
	}
}

// TestSimultaneousRemove and pulls: no error, and nothing is left at the end.
func TestSimultaneousRemove(t *testing.T) {
	reg := newRegistry(t, false)
	s := newService(t, func(c *Config) { write(t, c.RegistriesConf, insecure(reg)) })
	base := tarLayer(t, map[string]string{"base": strings.Repeat("b", 20000)})
	refs := []string{
		reg.push(t, "app/one:1", newImage(t, nil, base, tarLayer(t, map[string]string{"one": "1"}))),
		reg.push(t, "app/two:1", newImage(t, nil, base, tarLayer(t, map[string]string{"two": "2"}))),
	}
	var wg sync.WaitGroup
	for _, ref := range refs {
		for range 3 {
			wg.Go(func() {
				for range 2 {
					if _, err := tryPull(context.Background(), s, ref, nil); err != nil {
						t.Errorf("pull: %v", err)
					}
					if _, err := s.RemoveImage(context.Background(), &cri.RemoveImageRequest{Image: &cri.ImageSpec{Image: ref}}); err != nil {
						t.Errorf("remove: %v", err)
					}
				}
			})
		}
	}
	wg.Wait()
	for _, ref := range refs {
		remove(t, s, ref)
	}
	if err := s.sweepLayers(); err != nil {
		t.Error(err)
	}
	checkEmpty(t, s)
}

// TestPinned: an image is pinned by any of its names, as they are or as users write them, and by no name that it has lost.
func TestPinned(t *testing.T) {
	sequential(t)
	reg := newRegistry(t, false)
	s := newService(t, func(c *Config) {
		write(t, c.RegistriesConf, insecure(reg))
		c.Pinned = []string{reg.host + "/lib/kept", "busybox"}
	})
	image, other := simpleImage(t, "kept"), simpleImage(t, "other")
	ref := reg.push(t, "lib/kept:latest", image)
	kept, free := pull(t, s, ref), pull(t, s, reg.push(t, "lib/other:v1", other))
	pinned := func(id string) bool {
		t.Helper()
		resp, err := s.ImageStatus(context.Background(), &cri.ImageStatusRequest{Image: &cri.ImageSpec{Image: id}})
		if err != nil || resp.GetImage() == nil {
			t.Fatalf("image %s: %v, %v", id, resp, err)
		}
		for _, listed := range list(t, s) {
			if listed.Id == id && listed.Pinned != resp.Image.Pinned {
				t.Errorf("%s: pinned is %t in the list and %t in the status", id, listed.Pinned, resp.Image.Pinned)
			}
		}
		return resp.Image.Pinned
	}
	if !pinned(kept) || pinned(free) {
		t.Errorf("pinned are %t and %t, want the first", pinned(kept), pinned(free))
	}
	reg.push(t, "lib/kept:latest", other) // the name moves on
	pull(t, s, ref)
	if pinned(kept) || !pinned(free) {
		t.Errorf("after the name has moved, pinned are %t and %t", pinned(kept), pinned(free))
	}
}
