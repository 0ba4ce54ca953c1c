package imageservice

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"go.podman.io/image/v5/docker/reference"
	"go.podman.io/storage"
)

// Image is an image that can be run.
type Image struct {
	ID          string   // "sha256:<hex>", the digest of the configuration; the same from every registry
	RepoTags    []string // newest first
	RepoDigests []string // "repository@digest" for each index and manifest it was pulled by; newest first
	Size        uint64   // bytes of all layers as they are kept, and of the root disk
	Config      ocispec.ImageConfig
	Pinned      bool
	Created     time.Time // when the image was built, by its own account
}

// record is what never changes of an image.
type record struct {
	id          string // hex
	config      ocispec.Image
	annotations map[string]string
	layers      []layer // lowest first
}

type layer struct {
	id    string
	bytes int64 // as it is kept: compressed, where it is a blob

	// Of a layer that is kept as it came. Layers that the image library has unpacked do not have them.
	blob   digest.Digest
	diffID digest.Digest // of the tar in it
}

func (r *record) size() uint64 {
	// An image without layers is no image of size 0, which clients take for an error.
	return uint64(blobBytes(r.layers)) + 1
}

// Names of images that are being pulled are in a repository that cannot exist (RFC 2606).
const pullingRepository = "crivm.invalid/pulling"

func isPullingName(name string) bool { return strings.HasPrefix(name, pullingRepository+":") }

// permanent leaves out names of pulls under way.
func permanent(names []string) []string {
	return slices.DeleteFunc(slices.Clone(names), isPullingName)
}

// hidden tells whether an image is only being pulled. Images without any name are not hidden.
func hidden(names []string) bool {
	return len(names) > 0 && len(permanent(names)) == 0
}

// record returns what never changes of the image with an ID, from memory after the first time.
func (s *Service) record(id string) (*record, error) {
	s.mu.Lock()
	r := s.records[id]
	s.mu.Unlock()
	if r != nil {
		return r, nil
	}
	img, err := s.store.Image(id)
	if err != nil {
		return nil, storeError(err)
	}
	raw, err := s.store.ImageBigData(id, digest.NewDigestFromEncoded(digest.SHA256, id).String())
	if err != nil {
		return nil, fmt.Errorf("image %s has no configuration that its ID is the digest of (Docker schema 1?): %w", id, errdefs.ErrFailedPrecondition)
	}
	r = &record{id: id}
	if err := json.Unmarshal(raw, &r.config); err != nil {
		return nil, fmt.Errorf("configuration of image %s: %w", id, err)
	}
	if raw, err := s.store.ImageBigData(id, storage.ImageDigestBigDataKey); err == nil {
		var m ocispec.Manifest
		if json.Unmarshal(raw, &m) == nil {
			r.annotations = m.Annotations
		}
	}
	for next := img.TopLayer; next != ""; {
		l, err := s.store.Layer(next)
		if err != nil {
			return nil, fmt.Errorf("layer %s of image %s: %w", next, id, storeError(err))
		}
		r.layers = append(r.layers, layer{id: l.ID, bytes: l.UncompressedSize})
		next = l.Parent
	}
	slices.Reverse(r.layers)
	if img.TopLayer == "" {
		if r.layers, err = s.blobLayers(id, raw); err != nil {
			return nil, err
		}
	}
	s.mu.Lock()
	s.records[id] = r
	s.mu.Unlock()
	return r, nil
}

// diskBytes is what an image's root disk takes; 0 when it has none now.
func (s *Service) diskBytes(id string) uint64 {
	n, _, err := allocated(s.diskPath(id))
	if err != nil {
		return 0
	}
	return n
}

func (s *Service) forget(id string) {
	s.mu.Lock()
	delete(s.records, id)
	s.mu.Unlock()
}

// storeError gives errors of the store their class.
func storeError(err error) error {
	if err != nil && isGone(err) {
		return fmt.Errorf("%w: %w", err, errdefs.ErrNotFound)
	}
	return err
}

// isGone tells whether an error of the store means that an image or layer is not there (any more).
func isGone(err error) bool {
	for _, target := range []error{storage.ErrImageUnknown, storage.ErrNotAnImage, storage.ErrNotAnID, storage.ErrLayerUnknown, storage.ErrParentUnknown} {
		if errors.Is(err, target) {
			return true
		}
	}
	return false
}

// image puts names and record together.
func (s *Service) image(names []string, r *record) Image {
	img := Image{
		ID:     "sha256:" + r.id,
		Size:   r.size() + s.diskBytes(r.id),
		Config: r.config.Config,
	}
	if r.config.Created != nil {
		img.Created = *r.config.Created
	}
	for _, name := range permanent(names) {
		img.Pinned = img.Pinned || s.pinned[name]
		if named, err := reference.ParseNormalizedNamed(name); err == nil {
			if _, ok := named.(reference.Digested); ok {
				img.RepoDigests = append(img.RepoDigests, name)
				continue
			}
		}
		img.RepoTags = append(img.RepoTags, name)
	}
	return img
}

// Resolve finds an image by ID with or without "sha256:", by tag or digest, by short name, or by the
// beginning of its ID. errdefs.ErrNotFound when there is none.
func (s *Service) Resolve(ctx context.Context, ref string) (Image, error) {
	img, r, err := s.find(ref)
	if err != nil {
		return Image{}, err
	}
	return s.image(img.Names, r), nil
}

// find looks up an image that is not hidden.
func (s *Service) find(ref string) (*storage.Image, *record, error) {
	if ref == "" {
		return nil, nil, fmt.Errorf("empty image reference: %w", errdefs.ErrInvalidArgument)
	}
	img, err := s.lookup(ref)
	if err != nil {
		return nil, nil, err
	}
	r, err := s.record(img.ID)
	if err != nil {
		return nil, nil, err
	}
	return img, r, nil
}

func (s *Service) lookup(ref string) (*storage.Image, error) {
	notFound := fmt.Errorf("image %q: %w", ref, errdefs.ErrNotFound)
	if id, ok := imageID(ref); ok {
		img, err := s.store.Image(id)
		if err != nil {
			return nil, fmt.Errorf("image %q: %w", ref, storeError(err))
		}
		// The store finds by name and by any unique beginning too.
		if img.ID != id || hidden(img.Names) {
			return nil, notFound
		}
		return img, nil
	}
	images, err := s.store.Images()
	if err != nil {
		return nil, err
	}
	images = slices.DeleteFunc(images, func(img storage.Image) bool { return hidden(img.Names) })
	names, err := s.localNames(ref)
	if err != nil {
		return nil, err
	}
	for _, name := range names {
		for i := range images {
			if slices.Contains(images[i].Names, name) {
				return &images[i], nil
			}
		}
	}
	var found *storage.Image
	prefix := strings.TrimPrefix(ref, "sha256:")
	if len(prefix) >= 4 {
		for i := range images {
			if strings.HasPrefix(images[i].ID, prefix) {
				if found != nil {
					return nil, fmt.Errorf("image ID %q is ambiguous: %w", ref, errdefs.ErrInvalidArgument)
				}
				found = &images[i]
			}
		}
	}
	if found == nil {
		return nil, notFound
	}
	return found, nil
}

// imageID takes the hexadecimal ID out of an ID with or without its algorithm.
func imageID(ref string) (string, bool) {
	hex := strings.TrimPrefix(ref, "sha256:")
	if digest.SHA256.Validate(hex) != nil {
		return "", false
	}
	return hex, true
}
