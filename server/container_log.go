package server

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// ReopenContainerLog goes over to a new log file after kubelet has renamed the old one. FailedPrecondition,
// and no file made, when the container does not run.
func (s *Server) ReopenContainerLog(ctx context.Context, req *cri.ReopenContainerLogRequest) (*cri.ReopenContainerLogResponse, error) {
	if err := s.awaitContainer(ctx, req.GetContainerId()); err != nil {
		return nil, err
	}
	rec, err := s.runningContainer(req.GetContainerId())
	if err != nil {
		return nil, err
	}
	c := s.container(rec.ID)
	c.mu.Lock()
	out := c.output
	c.mu.Unlock()
	if out == nil {
		return nil, fmt.Errorf("log of container %s is not open: %w", rec.ID, errdefs.ErrFailedPrecondition)
	}
	if err := out.log.reopen(); err != nil {
		return nil, fmt.Errorf("reopening log of container %s: %w", rec.ID, err)
	}
	return &cri.ReopenContainerLogResponse{}, nil
}
