package imageservice

import (
	"context"
	"errors"
	"fmt"
	"log/slog"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"go.podman.io/storage"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// RemoveImage removes the image with all its names, whichever of them is given, and its disk. Layers that
// other images use stay. Idempotent.
func (s *Service) RemoveImage(ctx context.Context, req *cri.RemoveImageRequest) (*cri.RemoveImageResponse, error) {
	ref := req.GetImage().GetImage()
	if ref == "" {
		return nil, fmt.Errorf("empty image reference: %w", errdefs.ErrInvalidArgument)
	}
	img, err := s.lookup(ref)
	if errdefs.IsNotFound(err) {
		return &cri.RemoveImageResponse{}, nil
	}
	if err != nil {
		return nil, err
	}
	if err := s.deleteImage(img.ID); err != nil {
		return nil, fmt.Errorf("remove image %q: %w", ref, err)
	}
	return &cri.RemoveImageResponse{}, nil
}

// deleteImage removes an image from the store and then its disk. An image that is gone already is fine.
func (s *Service) deleteImage(id string) error {
	s.removals.Add(1)
	r, recordErr := s.record(id)
	_, err := s.store.DeleteImage(id, true)
	switch {
	case errors.Is(err, storage.ErrImageUsedByContainer):
		return fmt.Errorf("%w: %w", err, errdefs.ErrFailedPrecondition)
	case err != nil && !isGone(err):
		return err
	}
	s.forget(id)
	if err := s.removeDisk(id); err != nil {
		return err
	}
	if recordErr != nil {
		return nil // there are no layers, or nobody knows them: the next start finds them
	}
	var blobs []digest.Digest
	for _, l := range r.layers {
		if l.blob != "" {
			blobs = append(blobs, l.blob)
		}
	}
	return s.sweepBlobs(blobs)
}

// sweepLayers deletes layers that failed pulls left: layers of no image and no container. It does nothing
// while pulls run, since they own layers of no image yet; the last of them sweeps.
func (s *Service) sweepLayers() error {
	if !s.pulling.TryLock() {
		return nil
	}
	defer s.pulling.Unlock()
	images, err := s.store.Images()
	if err != nil {
		return err
	}
	layers, err := s.unusedLayers(images)
	if err != nil {
		return err
	}
	var errs []error
	for _, id := range layers {
		if err := s.store.DeleteLayer(id); err != nil && !isGone(err) {
			errs = append(errs, fmt.Errorf("layer %s: %w", id, err))
			continue
		}
		slog.Debug("removed layer of no image", "layer", id)
	}
	return errors.Join(errs...)
}
