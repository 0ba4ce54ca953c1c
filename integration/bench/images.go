package main

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"time"

	"github.com/google/go-containerregistry/pkg/compression"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"

	"github.com/crivm/crivm/integration/registry"
)

const (
	busyboxRepository = "library/busybox:latest"
	pauseRepository   = "bench/pause:latest"
	linesRepository   = "bench/lines:latest"
)

// pullImage is an image whose pull is measured.
type pullImage struct {
	name       string // what is printed
	repository string
	make       func() ([][]byte, error) // layers as tar, lowest first
}

var pullImages = []pullImage{
	{"3 layers of 50 MB", "bench/large:latest", func() ([][]byte, error) {
		return layers(3, func(i int) ([]byte, error) { return filesTar(uint64(i), 50, 1<<20) })
	}},
	{"200 layers of 20 KB", "bench/layers:latest", func() ([][]byte, error) {
		return layers(200, func(i int) ([]byte, error) { return filesTar(uint64(1000+i), 5, 4<<10) })
	}},
	{"1 layer of 20,000 files", "bench/files:latest", func() ([][]byte, error) {
		return layers(1, func(i int) ([]byte, error) { return filesTar(5000, 20000, 2<<10) })
	}},
}

func layers(n int, layer func(int) ([]byte, error)) (all [][]byte, err error) {
	for i := range n {
		l, err := layer(i)
		if err != nil {
			return nil, err
		}
		all = append(all, l)
	}
	return all, nil
}

// filesTar is a layer of files about so large, a hundred in a directory. Content compresses about as programs do, to half.
func filesTar(seed uint64, files, size int) ([]byte, error) {
	random := rand.New(rand.NewPCG(seed, 7))
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for i := range files {
		if i%100 == 0 {
			if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: fmt.Sprintf("data%d/%d/", seed, i/100), Mode: 0o755, ModTime: time.Unix(1700000000, 0)}); err != nil {
				return nil, err
			}
		}
		data := content(random, size/2+random.IntN(size))
		h := &tar.Header{Typeflag: tar.TypeReg, Name: fmt.Sprintf("data%d/%d/file%d", seed, i/100, i), Mode: 0o644, Size: int64(len(data)), ModTime: time.Unix(1700000000, 0)}
		if err := w.WriteHeader(h); err != nil {
			return nil, err
		}
		if _, err := w.Write(data); err != nil {
			return nil, err
		}
	}
	return buf.Bytes(), w.Close()
}

// content mixes random bytes with pieces that it had before.
func content(random *rand.Rand, size int) []byte {
	data := make([]byte, 0, size+64)
	for len(data) < size {
		if len(data) > 64 && random.IntN(2) == 0 {
			from := max(0, len(data)-1-random.IntN(16<<10))
			data = append(data, data[from:min(len(data), from+24)]...)
			continue
		}
		for range 3 {
			word := random.Uint64()
			data = append(data, byte(word), byte(word>>8), byte(word>>16), byte(word>>24), byte(word>>32), byte(word>>40), byte(word>>48), byte(word>>56))
		}
	}
	return data[:size]
}

// pushPullImages puts the images whose pulls are measured into the registry; gives their unpacked and compressed bytes.
func pushPullImages(r *registry.Registry) (sizes map[string]string, err error) {
	sizes = map[string]string{}
	for _, p := range pullImages {
		tars, err := p.make()
		if err != nil {
			return nil, err
		}
		image, err := imageOf(v1.Config{Cmd: []string{"/none"}}, tars...)
		if err != nil {
			return nil, err
		}
		unpacked, packed := 0, int64(0)
		for _, t := range tars {
			unpacked += len(t)
		}
		ls, err := image.Layers()
		if err != nil {
			return nil, err
		}
		for _, l := range ls {
			n, err := l.Size()
			if err != nil {
				return nil, err
			}
			packed += n
		}
		sizes[p.name] = fmt.Sprintf("%d MB unpacked, %d MB compressed", unpacked/1e6, packed/1e6)
		if err := r.Push(p.repository, image); err != nil {
			return nil, fmt.Errorf("image %s: %w", p.name, err)
		}
	}
	return sizes, nil
}

func pushPause(r *registry.Registry, program string) error {
	data, err := os.ReadFile(program)
	if err != nil {
		return err
	}
	layer, err := singleFile("pause", 0o755, data)
	if err != nil {
		return err
	}
	image, err := imageOf(v1.Config{Entrypoint: []string{"/pause"}}, layer)
	if err != nil {
		return err
	}
	return r.Push(pauseRepository, image)
}

// pushLines adds a file of lines to busybox, for containers that write much to stdout.
func pushLines(r *registry.Registry, lines []byte) error {
	base, err := r.Pull(busyboxRepository)
	if err != nil {
		return err
	}
	data, err := singleFile("lines", 0o644, lines)
	if err != nil {
		return err
	}
	layer, err := layerOf(data)
	if err != nil {
		return err
	}
	image, err := mutate.AppendLayers(base, layer)
	if err != nil {
		return err
	}
	return r.Push(linesRepository, image)
}

func singleFile(name string, mode int64, data []byte) ([]byte, error) {
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: mode, Size: int64(len(data)), ModTime: time.Unix(1700000000, 0)}); err != nil {
		return nil, err
	}
	if _, err := w.Write(data); err != nil {
		return nil, err
	}
	return buf.Bytes(), w.Close()
}

func layerOf(data []byte) (v1.Layer, error) {
	return tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(data)), nil },
		tarball.WithCompression(compression.GZip), tarball.WithCompressedCaching)
}

func imageOf(config v1.Config, tars ...[]byte) (v1.Image, error) {
	image, err := mutate.ConfigFile(empty.Image, &v1.ConfigFile{Architecture: "amd64", OS: "linux", Config: config})
	if err != nil {
		return nil, err
	}
	for _, t := range tars {
		layer, err := layerOf(t)
		if err != nil {
			return nil, err
		}
		if image, err = mutate.AppendLayers(image, layer); err != nil {
			return nil, err
		}
	}
	return image, nil
}
