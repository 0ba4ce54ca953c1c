package imageservice

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/klauspost/pgzip"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	imagelib "go.podman.io/image/v5/image"
	"go.podman.io/image/v5/manifest"
	"go.podman.io/image/v5/pkg/blobinfocache/none"
	"go.podman.io/image/v5/types"
)

const (
	// maxConfig bounds an image's configuration; the library takes as much.
	maxConfig = 4 << 20
	// zstdWindow bounds what the compressor of a layer can make us keep.
	zstdWindow = 128 << 20
	// largeLayer is from how many bytes on a layer is worth goroutines and buffers of its own.
	largeLayer = 1 << 20
)

// errUnusual says that an image is of a kind that is left to the library.
var errUnusual = errors.New("not of the usual kind")

// usualImage is an image whose layers are kept as they come.
type usualImage struct {
	id               string // hex
	manifest, config []byte
	layers           []layer // lowest first
}

// usual reads manifest and configuration; errUnusual when the image has layers that are encrypted or not in the registry,
// or a configuration that does not tell their digests.
func usual(ctx context.Context, source types.ImageSource, unparsed *imagelib.UnparsedImage) (*usualImage, error) {
	raw, kind, err := unparsed.Manifest(ctx)
	if err != nil {
		return nil, err
	}
	switch kind {
	case ocispec.MediaTypeImageManifest, manifest.DockerV2Schema2MediaType:
	default:
		return nil, fmt.Errorf("manifest %s: %w", kind, errUnusual)
	}
	m, err := manifest.FromBlob(raw, kind)
	if err != nil {
		return nil, fmt.Errorf("manifest: %w", err)
	}
	info := m.ConfigInfo()
	if err := info.Digest.Validate(); err != nil || info.Digest.Algorithm() != digest.SHA256 {
		return nil, fmt.Errorf("digest %q of the configuration: %w", info.Digest, errUnusual)
	}
	if t := info.MediaType; t != ocispec.MediaTypeImageConfig && t != manifest.DockerV2Schema2ConfigMediaType {
		return nil, fmt.Errorf("configuration %s: %w", t, errUnusual)
	}
	config, err := readConfig(ctx, source, info)
	if err != nil {
		return nil, fmt.Errorf("configuration: %w", err)
	}
	layers, err := manifestLayers(m, config)
	if err != nil {
		return nil, err
	}
	return &usualImage{id: info.Digest.Encoded(), manifest: raw, config: config, layers: layers}, nil
}

// manifestLayers puts together what manifest and configuration say of each layer.
func manifestLayers(m manifest.Manifest, rawConfig []byte) ([]layer, error) {
	var config ocispec.Image
	if err := json.Unmarshal(rawConfig, &config); err != nil {
		return nil, fmt.Errorf("configuration: %w", err)
	}
	infos := m.LayerInfos()
	if len(infos) != len(config.RootFS.DiffIDs) {
		return nil, fmt.Errorf("%d layers, %d digests: %w", len(infos), len(config.RootFS.DiffIDs), errUnusual)
	}
	var layers []layer
	for i, info := range infos {
		diffID := config.RootFS.DiffIDs[i]
		if err := errors.Join(diffID.Validate(), info.Digest.Validate()); err != nil {
			return nil, fmt.Errorf("layer %d: %w", i+1, err)
		}
		switch info.MediaType {
		case ocispec.MediaTypeImageLayer, ocispec.MediaTypeImageLayerGzip, ocispec.MediaTypeImageLayerZstd,
			manifest.DockerV2Schema2LayerMediaType, manifest.DockerV2SchemaLayerMediaTypeUncompressed:
		default:
			return nil, fmt.Errorf("layer %s: %w", info.MediaType, errUnusual)
		}
		if diffID.Algorithm() != digest.SHA256 || info.Digest.Algorithm() != digest.SHA256 || info.EmptyLayer || len(info.URLs) > 0 || info.Size < 0 {
			return nil, fmt.Errorf("layer %d: %w", i+1, errUnusual)
		}
		layers = append(layers, layer{id: info.Digest.Encoded(), bytes: info.Size, blob: info.Digest, diffID: diffID})
	}
	return layers, nil
}

func readConfig(ctx context.Context, source types.ImageSource, info types.BlobInfo) ([]byte, error) {
	stream, _, err := source.GetBlob(ctx, info, none.NoCache)
	if err != nil {
		return nil, err
	}
	defer stream.Close()
	raw, err := io.ReadAll(io.LimitReader(stream, maxConfig+1))
	if err != nil {
		return nil, err
	}
	if len(raw) > maxConfig || digest.FromBytes(raw) != info.Digest {
		return nil, errors.New("is not what the manifest names")
	}
	return raw, nil
}

type compression int

const (
	plain compression = iota
	gzipped
	zstandard
)

// compressionOf tells the kind of compression by how a file begins, as everybody does; errUnusual for bzip2 and xz.
func compressionOf(file *os.File) (compression, error) {
	head := make([]byte, 4)
	n, err := file.ReadAt(head, 0)
	if err != nil && err != io.EOF {
		return 0, err
	}
	switch head = head[:n]; {
	case bytes.HasPrefix(head, []byte{0x1f, 0x8b}):
		return gzipped, nil
	case bytes.HasPrefix(head, []byte{0x28, 0xb5, 0x2f, 0xfd}):
		return zstandard, nil
	case bytes.HasPrefix(head, []byte("BZh")), bytes.HasPrefix(head, []byte{0xfd, '7', 'z', 'X'}):
		return 0, errUnusual
	}
	return plain, nil
}

// decompress reads a file from where it stands. Large ones are decompressed ahead of the reader, by goroutines of their
// own, which end tells to go.
func decompress(file *os.File) (_ io.Reader, end func(), err error) {
	kind, err := compressionOf(file)
	if err != nil {
		return nil, nil, err
	}
	st, err := file.Stat()
	if err != nil {
		return nil, nil, err
	}
	large := st.Size() > largeLayer
	switch {
	case kind == gzipped && !large:
		r, err := gzip.NewReader(file)
		if err != nil {
			return nil, nil, err
		}
		return r, func() { r.Close() }, nil
	case kind == gzipped:
		r, err := pgzip.NewReader(file)
		if err != nil {
			return nil, nil, err
		}
		return r, func() { r.Close() }, nil
	case kind == zstandard:
		workers := 1
		if large {
			workers = 0 // as many as there are CPUs
		}
		r, err := zstd.NewReader(file, zstd.WithDecoderMaxWindow(zstdWindow), zstd.WithDecoderConcurrency(workers))
		if err != nil {
			return nil, nil, err
		}
		return r, r.Close, nil
	}
	return file, func() {}, nil
}

// checkedReader fails instead of ending when what went through it does not have the wanted digest, so that
// whoever reads it never takes wrong content for whole.
type checkedReader struct {
	r     io.Reader
	hash  hash.Hash
	want  digest.Digest
	whole bool // the end was seen, and all is well
}

func (c *checkedReader) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.hash.Write(p[:n])
	if err == io.EOF && !c.whole {
		if got := digest.NewDigest(digest.SHA256, c.hash); got != c.want {
			return n, fmt.Errorf("content has digest %s, the configuration says %s", got, c.want)
		}
		c.whole = true
	}
	return n, err
}

// contextReader ends with its context.
type contextReader struct {
	ctx context.Context
	r   io.Reader
}

func (c *contextReader) Read(p []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	return c.r.Read(p)
}
