// Package images makes the container images that tests and the demo pull, from what a Debian machine has:
// its busybox, and a small program of ours. They carry the names of the images that Kubernetes' own tests
// use, so that critest runs against a local registry; what they do is what those tests look at, no more.
package images

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"os"
	"runtime"
	"strings"

	"github.com/google/go-containerregistry/pkg/compression"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/crivm/crivm/integration/registry"
)

const (
	e2e     = "registry.k8s.io/e2e-test-images/"
	staging = "gcr.io/k8s-staging-cri-tools/"
)

// Sources are the programs that go into the images.
type Sources struct {
	Busybox string // dynamically linked; its libraries come along
	Standin string // integration/cmd/standin, built statically
}

// Build writes an OCI layout with all images to dir, which must not exist, and returns their names.
func Build(dir string, s Sources) ([]string, error) {
	b := &builder{standin: s.Standin}
	var err error
	root, err := rootfs(s.Busybox)
	if err != nil {
		return nil, fmt.Errorf("root file system of %s: %w", s.Busybox, err)
	}
	if b.base, err = b.layer(root); err != nil {
		return nil, err
	}
	if b.layout, err = layout.Write(dir, empty.Index); err != nil {
		return nil, err
	}
	for _, step := range []func() error{b.plain, b.servers, b.users, b.tags, b.formats, b.platforms, b.layers} {
		if err := step(); err != nil {
			return nil, err
		}
	}
	return b.names, nil
}

type builder struct {
	layout  layout.Path
	base    v1.Layer
	standin string
	names   []string
}

// plain images have busybox and nothing else.
func (b *builder) plain() error {
	image, err := b.image(v1.Config{Cmd: []string{"sh"}}, b.base)
	if err != nil {
		return err
	}
	return b.put(image, "docker.io/library/busybox:latest", "docker.io/library/busybox:1.35", e2e+"busybox:1.29-2")
}

// servers stand for nginx and httpd, and for images with one program only.
func (b *builder) servers() error {
	programs := &tree{}
	if err := b.program(programs, "usr/sbin/nginx", 0o755); err != nil {
		return err
	}
	layer, err := b.layer(programs)
	if err != nil {
		return err
	}
	for reference, port := range map[string]string{
		e2e + "nginx:1.14-2":   "80",
		e2e + "httpd:2.4.39-4": "80",
		staging + "hostnet-nginx-" + runtime.GOARCH + ":latest": "12003",
	} {
		image, err := b.image(v1.Config{
			Entrypoint: []string{"/usr/sbin/nginx"}, Cmd: []string{"serve", port, "/var/run/nginx.pid"},
			ExposedPorts: map[string]struct{}{port + "/tcp": {}}, StopSignal: "SIGQUIT",
		}, b.base, layer)
		if err != nil {
			return err
		}
		if err := b.put(image, reference); err != nil {
			return err
		}
	}

	programs = &tree{}
	if err := b.program(programs, "nnp", 0o4755); err != nil {
		return err
	}
	if layer, err = b.layer(programs); err != nil {
		return err
	}
	image, err := b.image(v1.Config{Entrypoint: []string{"/nnp", "euid"}}, layer)
	if err != nil {
		return err
	}
	if err := b.put(image, e2e+"nonewprivs:1.3"); err != nil {
		return err
	}

	programs = &tree{}
	if err := b.program(programs, "pause", 0o755); err != nil {
		return err
	}
	if layer, err = b.layer(programs); err != nil {
		return err
	}
	if image, err = b.image(v1.Config{Entrypoint: []string{"/pause", "pause"}, User: "65535:65535"}, layer); err != nil {
		return err
	}
	return b.put(image, "registry.k8s.io/pause:3.9", "k8s.gcr.io/pause:3.9", "registry.k8s.io/pause:3.10")
}

// users differ in the user they run as.
func (b *builder) users() error {
	for kind, user := range map[string]string{
		"user-uid": "1002", "user-username": "www-data", "user-uid-group": "1003:users", "user-username-group": "www-data:100",
	} {
		image, err := b.image(v1.Config{Cmd: []string{"sh"}, User: user}, b.base)
		if err != nil {
			return err
		}
		if err := b.put(image, staging+"test-image-"+kind+":latest"); err != nil {
			return err
		}
	}
	accounts := &tree{}
	accounts.file("etc/passwd", 0o644, passwd+"default-user:x:1000:1000:default user:/home/default-user:/bin/sh\n")
	accounts.file("etc/group", 0o644, group+"default-user:x:1000:\ngroup-defined-in-image:x:50000:default-user\n")
	layer, err := b.layer(accounts)
	if err != nil {
		return err
	}
	image, err := b.image(v1.Config{Cmd: []string{"sh"}, User: "1000"}, b.base, layer)
	if err != nil {
		return err
	}
	return b.put(image, staging+"test-image-predefined-group:latest")
}

// tags are images that differ in one file, under one or several tags each.
func (b *builder) tags() error {
	for kind, references := range map[string][]string{
		"latest": {"test-image-latest:latest"},
		"tag":    {"test-image-tag:test", "test-image-tag:all"},
		"1":      {"test-image-1:latest"},
		"2":      {"test-image-2:latest"},
		"3":      {"test-image-3:latest"},
		"tags":   {"test-image-tags:1", "test-image-tags:2", "test-image-tags:3"},
		"digest": {"test-image-digest:latest"},
	} {
		content := &tree{}
		content.file("test-image-"+kind, 0o644, kind+"\n")
		layer, err := b.layer(content)
		if err != nil {
			return err
		}
		image, err := b.image(v1.Config{Cmd: []string{"sh"}}, b.base, layer)
		if err != nil {
			return err
		}
		for _, reference := range references {
			if err := b.put(image, staging+reference); err != nil {
				return err
			}
		}
	}
	return nil
}

// formats are busybox in the other forms in which registries hand out images.
func (b *builder) formats() error {
	root, err := b.base.Uncompressed()
	if err != nil {
		return err
	}
	defer root.Close()
	data, err := io.ReadAll(root)
	if err != nil {
		return err
	}
	gzip, err := tarball.LayerFromOpener(opener(data), tarball.WithCompressedCaching, tarball.WithMediaType(types.DockerLayer))
	if err != nil {
		return err
	}
	image, err := b.image(v1.Config{Cmd: []string{"sh"}}, gzip)
	if err != nil {
		return err
	}
	docker := mutate.ConfigMediaType(mutate.MediaType(image, types.DockerManifestSchema2), types.DockerConfigJSON)
	if err := b.put(docker, "docker.io/crivm/docker-format:latest"); err != nil {
		return err
	}

	zstd, err := tarball.LayerFromOpener(opener(data), tarball.WithCompression(compression.ZStd), tarball.WithMediaType(types.OCILayerZStd))
	if err != nil {
		return err
	}
	if image, err = b.image(v1.Config{Cmd: []string{"sh"}}, zstd); err != nil {
		return err
	}
	return b.put(image, "docker.io/crivm/zstd:latest")
}

// platforms is an index: the machine's own image must be picked. The other one has nothing to run.
func (b *builder) platforms() error {
	own, err := b.image(v1.Config{Cmd: []string{"sh"}}, b.base)
	if err != nil {
		return err
	}
	note := &tree{}
	note.file("wrong-platform", 0o644, "this image is for another machine\n")
	layer, err := b.layer(note)
	if err != nil {
		return err
	}
	foreign, err := b.image(v1.Config{Cmd: []string{"/wrong-platform"}}, layer)
	if err != nil {
		return err
	}
	file, err := foreign.ConfigFile()
	if err != nil {
		return err
	}
	file = file.DeepCopy()
	file.Architecture = "s390x"
	if foreign, err = mutate.ConfigFile(foreign, file); err != nil {
		return err
	}
	var index v1.ImageIndex = mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
	for _, i := range []struct {
		image        v1.Image
		architecture string
	}{{foreign, "s390x"}, {own, runtime.GOARCH}} {
		index = mutate.AppendManifests(index, mutate.IndexAddendum{
			Add: i.image, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: i.architecture}},
		})
	}
	reference := "docker.io/crivm/multi-platform:latest"
	b.names = append(b.names, reference)
	return b.layout.AppendIndex(index, layout.WithAnnotations(map[string]string{registry.RefAnnotation: reference}))
}

// layers is an image that shows what a root file system must get right: files removed and directories
// replaced by upper layers, hard links, owners, modes, capabilities, device nodes, odd names.
func (b *builder) layers() error {
	lower := &tree{}
	lower.file("data/kept", 0o644, "kept\n")
	lower.file("data/removed", 0o644, "must not be seen\n")
	lower.file("opaque/old", 0o644, "must not be seen\n")
	lower.file("turns-into-file/inside", 0o644, "must not be seen\n")
	lower.file("hard/one", 0o640, "one file, two names\n")
	lower.add(tar.Header{Typeflag: tar.TypeLink, Name: "hard/two", Linkname: "hard/one"}, nil)
	lower.symlink("dangling", "/no/such/file")
	lower.add(tar.Header{Typeflag: tar.TypeReg, Name: "owned", Mode: 0o4711, Uid: 1234, Gid: 5678}, []byte("x"))
	lower.add(tar.Header{Typeflag: tar.TypeFifo, Name: "fifo", Mode: 0o600}, nil)
	lower.add(tar.Header{Typeflag: tar.TypeChar, Name: "null", Mode: 0o666, Devmajor: 1, Devminor: 3}, nil)
	lower.file(strings.Repeat("long", 50), 0o644, "name of 200 bytes\n")
	lower.file("umlaut-ä-字", 0o644, "not ASCII\n")
	// A copy of busybox that may bind low ports: VFS_CAP_REVISION_2, effective, CAP_NET_BIND_SERVICE.
	lower.add(tar.Header{Typeflag: tar.TypeReg, Name: "capable", Mode: 0o755, PAXRecords: map[string]string{
		"SCHILY.xattr.security.capability": "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00",
		"SCHILY.xattr.user.note":           "kept",
	}}, []byte("x"))
	lower.add(tar.Header{Typeflag: tar.TypeDir, Name: "seeded", Mode: 0o2750, Uid: 1234, Gid: 5678}, nil)
	lower.add(tar.Header{Typeflag: tar.TypeReg, Name: "seeded/file", Mode: 0o640, Uid: 1234, Gid: 5678}, []byte("of the image\n"))
	lower.symlink("seeded/link", "file")
	upper := &tree{}
	upper.dir("data", 0o755)
	upper.file("data/.wh.removed", 0o644, "")
	upper.file("opaque/.wh..wh..opq", 0o644, "")
	upper.file("opaque/new", 0o644, "new\n")
	upper.file("turns-into-file", 0o644, "now a file\n")
	all := []v1.Layer{b.base}
	for _, t := range []*tree{lower, upper} {
		layer, err := b.layer(t)
		if err != nil {
			return err
		}
		all = append(all, layer)
	}
	image, err := b.image(v1.Config{
		Cmd: []string{"sh"}, WorkingDir: "/data", Env: []string{"FROM_IMAGE=yes"}, StopSignal: "SIGUSR1",
		Volumes: map[string]struct{}{"/volume": {}, "/seeded": {}}, Labels: map[string]string{"org.crivm.test": "layers"},
	}, all...)
	if err != nil {
		return err
	}
	return b.put(image, "docker.io/crivm/layers:latest")
}

func (b *builder) program(t *tree, to string, mode int64) error {
	data, err := os.ReadFile(b.standin)
	if err != nil {
		return err
	}
	t.add(tar.Header{Typeflag: tar.TypeReg, Name: to, Mode: mode}, data)
	return nil
}

func opener(data []byte) tarball.Opener {
	return func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(data)), nil }
}

func (b *builder) layer(t *tree) (v1.Layer, error) {
	data, err := t.bytes()
	if err != nil {
		return nil, err
	}
	return tarball.LayerFromOpener(opener(data), tarball.WithCompressedCaching, tarball.WithMediaType(types.OCILayer))
}

func (b *builder) image(config v1.Config, layers ...v1.Layer) (v1.Image, error) {
	image := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	image, err := mutate.AppendLayers(image, layers...)
	if err != nil {
		return nil, err
	}
	file, err := image.ConfigFile()
	if err != nil {
		return nil, err
	}
	file = file.DeepCopy()
	config.Env = append([]string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}, config.Env...)
	file.OS, file.Architecture, file.Config, file.Created = "linux", runtime.GOARCH, config, v1.Time{Time: epoch}
	return mutate.ConfigFile(image, file)
}

// put adds image to the layout under each reference.
func (b *builder) put(image v1.Image, references ...string) error {
	for _, reference := range references {
		if _, err := name.ParseReference(reference, name.StrictValidation); err != nil {
			return err
		}
		err := b.layout.AppendImage(image, layout.WithAnnotations(map[string]string{registry.RefAnnotation: reference}),
			layout.WithPlatform(v1.Platform{OS: "linux", Architecture: runtime.GOARCH}))
		if err != nil {
			return fmt.Errorf("%s: %w", reference, err)
		}
		b.names = append(b.names, reference)
	}
	return nil
}
