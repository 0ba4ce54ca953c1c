package server

import (
	"context"
	"errors"
	"fmt"
	"path"
	"slices"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
	crierrors "k8s.io/cri-api/pkg/errors"

	"github.com/crivm/crivm/agentproto"
	"github.com/crivm/crivm/imageservice"
	"github.com/crivm/crivm/server/store"
)

// imageVolumes finds the images that a container mounts, by the number of the mount.
func (s *Server) imageVolumes(ctx context.Context, config *cri.ContainerConfig) (map[int]imageservice.Image, error) {
	images := map[int]imageservice.Image{}
	for n, m := range config.GetMounts() {
		if m.GetImage().GetImage() == "" {
			continue
		}
		field := fmt.Sprintf("config.mounts[%d] (%s)", n, m.GetContainerPath())
		switch {
		case !path.IsAbs(m.GetContainerPath()) || path.Clean(m.GetContainerPath()) == "/":
			return nil, invalid(field+".container_path", "is not an absolute path below /")
		case m.GetHostPath() != "":
			return nil, invalid(field+".host_path", "is given beside an image")
		case !m.GetReadonly():
			return nil, invalid(field+".readonly", "an image volume is read-only")
		case m.GetPropagation() == cri.MountPropagation_PROPAGATION_BIDIRECTIONAL:
			return nil, invalid(field+".propagation", "BIDIRECTIONAL is not for image volumes")
		}
		if err := validateMountOptions(field, m); err != nil {
			return nil, err
		}
		image, err := s.resolveImage(ctx, m.GetImage())
		if err != nil {
			return nil, fmt.Errorf("%w: %s: %w", crierrors.ErrImageVolumeMountFailed, field, err)
		}
		images[n] = image
	}
	return images, nil
}

func imageMount(m *cri.Mount, image imageservice.Image) *agentproto.Mount {
	return &agentproto.Mount{Destination: path.Clean(m.GetContainerPath()), Readonly: true, Options: m.GetMountOptions(), Source: &agentproto.Mount_Image{
		Image: &agentproto.ImageVolume{Serial: diskSerial(image.ID), SubPath: m.GetImageSubPath()},
	}}
}

// plugVolumes makes the disks of image volumes visible in the guest. They are in the container's record before.
func (s *Server) plugVolumes(ctx context.Context, sb *sandbox, containerID string, images map[int]imageservice.Image) error {
	if len(images) == 0 {
		return nil
	}
	_, err := s.store.UpdateContainer(containerID, func(r *store.Container) error {
		r.VolumeDisks = nil
		for _, image := range images {
			r.VolumeDisks = append(r.VolumeDisks, diskSerial(image.ID))
		}
		slices.Sort(r.VolumeDisks)
		r.VolumeDisks = slices.Compact(r.VolumeDisks)
		return nil
	})
	if err != nil {
		return err
	}
	for _, image := range images {
		if err := s.plugImage(ctx, sb, containerID, image.ID, diskSerial(image.ID)); err != nil {
			return fmt.Errorf("%w: %w", crierrors.ErrImageVolumeMountFailed, err)
		}
	}
	return nil
}

// unplugVolumes takes a container off the disks of its image volumes.
func (s *Server) unplugVolumes(ctx context.Context, sb *sandbox, containerID string) error {
	rec, err := s.store.Container(containerID)
	if err != nil {
		return ignoreMissing(err)
	}
	var errs []error
	for _, serial := range rec.VolumeDisks {
		errs = append(errs, s.unplugImage(ctx, sb, containerID, serial))
	}
	return errors.Join(errs...)
}
