package server

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crivm/crivm/server/store"
)

// RemoveContainer kills a container that still runs and forgets it. Its log stays for kubelet.
// Idempotent; an unknown container is a removed one.
func (s *Server) RemoveContainer(ctx context.Context, req *cri.RemoveContainerRequest) (*cri.RemoveContainerResponse, error) {
	if err := s.awaitContainer(ctx, req.GetContainerId()); err != nil {
		return nil, err
	}
	rec, err := s.visibleContainer(req.GetContainerId())
	if errdefs.IsNotFound(err) {
		return &cri.RemoveContainerResponse{}, nil
	}
	if err != nil {
		return nil, err
	}
	c := s.container(rec.ID)
	if err := c.op.lock(ctx); err != nil {
		return nil, fmt.Errorf("container %s: %w", rec.ID, err)
	}
	defer c.op.unlock()
	rec, err = s.visibleContainer(rec.ID)
	if errdefs.IsNotFound(err) {
		return &cri.RemoveContainerResponse{}, nil
	}
	if err != nil {
		return nil, err
	}
	if rec.State == store.ContainerRunning {
		if err := s.kill(ctx, rec); err != nil {
			return nil, fmt.Errorf("removing container %s: %w", rec.ID, err)
		}
	}
	if err := s.removeContainer(ctx, rec); err != nil {
		return nil, fmt.Errorf("removing: %w", err)
	}
	return &cri.RemoveContainerResponse{}, nil
}
