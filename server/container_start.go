package server

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crivm/crivm/agentproto"
	"github.com/crivm/crivm/server/store"
)

// StartContainer runs the process of a CREATED container and returns when it has been executed. When that
// fails the container is EXITED with code 128 and reason StartError.
func (s *Server) StartContainer(ctx context.Context, req *cri.StartContainerRequest) (*cri.StartContainerResponse, error) {
	if err := s.awaitContainer(ctx, req.GetContainerId()); err != nil {
		return nil, err
	}
	rec, err := s.visibleContainer(req.GetContainerId())
	if err != nil {
		return nil, err
	}
	defer s.starts()()
	c := s.container(rec.ID)
	if err := c.op.lock(ctx); err != nil {
		return nil, fmt.Errorf("container %s: %w", rec.ID, err)
	}
	defer c.op.unlock()
	if rec, err = s.visibleContainer(rec.ID); err != nil {
		return nil, err
	}
	if rec.State != store.ContainerCreated {
		return nil, fmt.Errorf("container %s is %s, not CREATED: %w", rec.ID, rec.State, errdefs.ErrFailedPrecondition)
	}
	sandboxRec, err := s.store.Sandbox(rec.SandboxID)
	if err != nil {
		return nil, err
	}
	if sandboxRec.State != store.SandboxReady {
		return nil, fmt.Errorf("sandbox %s is %s, not READY: %w", sandboxRec.ID, sandboxRec.State, errdefs.ErrFailedPrecondition)
	}
	agent, err := s.containerClient(ctx, rec)
	if err != nil {
		return nil, fmt.Errorf("container %s: %w", rec.ID, err)
	}
	out, err := s.openOutput(rec)
	if err != nil {
		return nil, fmt.Errorf("log of container %s: %w", rec.ID, err)
	}
	// Not cut short by the end of the request: it either runs or it does not, and the record must say which.
	startCtx, cancel := detached(ctx, startLimit)
	defer cancel()
	startedAt := time.Now()
	inGuest := timingsOf(ctx).remote("start in guest")
	started, err := agent.StartContainer(startCtx, &agentproto.StartContainerRequest{ContainerId: rec.ID})
	if err != nil {
		out.close()
		// A connection that broke amid the call leaves open whether it was carried out. What is recorded as EXITED
		// must not run.
		killCtx, cancel := detached(ctx, stopLimit)
		defer cancel()
		if killErr := s.signal(killCtx, rec, int32(unix.SIGKILL), true); killErr != nil && !s.vmDead(rec) {
			s.log.Warn("killing a container that could not be started", "container", rec.ID, "error", killErr)
		}
		recordErr := s.exited(rec.ID, exitRecord{at: time.Now(), code: 128, reason: reasonStartError, message: err.Error()})
		return nil, errors.Join(fmt.Errorf("starting container %s: %w", rec.ID, err), recordErr)
	}
	inGuest(started.GetSteps())
	defer timingsOf(ctx).span("record")()
	s.keepTrace(ctx, rec.SandboxID, rec.ID)
	rec, err = s.store.UpdateContainer(rec.ID, func(r *store.Container) error {
		if r.State == store.ContainerCreated { // a VM that died meanwhile has made it EXITED
			r.State, r.StartedAt = store.ContainerRunning, startedAt
		}
		return nil
	})
	if err != nil {
		out.close()
		return nil, err
	}
	c.mu.Lock()
	c.output = out
	c.mu.Unlock()
	out.start()
	s.watchContainer(rec, out)
	return &cri.StartContainerResponse{}, nil
}

// startLimit bounds the OCI runtime's start in the guest.
const startLimit = 90 * time.Second
