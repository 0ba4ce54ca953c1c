package server

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crivm/crivm/server/store"
)

// RemovePodSandbox stops the sandbox if need be and forgets it and its containers. Logs belong to kubelet.
// Idempotent; an unknown sandbox is a removed one.
func (s *Server) RemovePodSandbox(ctx context.Context, req *cri.RemovePodSandboxRequest) (*cri.RemovePodSandboxResponse, error) {
	if err := s.awaitSandbox(ctx, req.GetPodSandboxId()); err != nil {
		return nil, err
	}
	rec, err := s.store.Sandbox(req.GetPodSandboxId())
	if errdefs.IsNotFound(err) || rec.State.Slot() {
		return &cri.RemovePodSandboxResponse{}, nil
	}
	if err != nil {
		return nil, err
	}
	sb := s.sandbox(rec.ID)
	if err := sb.op.lock(ctx); err != nil {
		return nil, fmt.Errorf("sandbox %s: %w", rec.ID, err)
	}
	defer sb.op.unlock()
	if err := s.stopSandbox(ctx, sb); err != nil {
		return nil, fmt.Errorf("removing sandbox %s: %w", rec.ID, err)
	}
	if err := s.eraseSandbox(rec); err != nil {
		return nil, fmt.Errorf("removing sandbox %s: %w", rec.ID, err)
	}
	s.forgetSandbox(rec.ID)
	return &cri.RemovePodSandboxResponse{}, nil
}

// eraseSandbox deletes the records of a sandbox that has been torn down, its containers' first.
func (s *Server) eraseSandbox(rec store.Sandbox) error {
	for _, c := range s.store.Containers(rec.ID) {
		if err := s.eraseContainer(c); err != nil {
			return err
		}
	}
	return s.store.DeleteSandbox(rec.ID)
}
