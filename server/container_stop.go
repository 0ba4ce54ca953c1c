package server

import (
	"context"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crivm/crivm/agentproto"
	"github.com/crivm/crivm/server/store"
)

// killLimit bounds waiting for the exit after SIGKILL; a guest that does not deliver it has its VM killed
// by StopPodSandbox, not here: other containers of the pod may be well.
const killLimit = 30 * time.Second

// stopState is what StopContainer calls on one container share: the stop signal is sent once.
type stopState struct{ signalled bool }

// StopContainer sends the stop signal, waits the grace period, kills, and returns when the exit is
// recorded. Idempotent; an unknown container is a stopped one. Of concurrent calls the shortest grace wins.
func (s *Server) StopContainer(ctx context.Context, req *cri.StopContainerRequest) (*cri.StopContainerResponse, error) {
	if err := s.awaitContainer(ctx, req.GetContainerId()); err != nil {
		return nil, err
	}
	rec, err := s.visibleContainer(req.GetContainerId())
	if errdefs.IsNotFound(err) {
		return &cri.StopContainerResponse{}, nil
	}
	if err != nil {
		return nil, err
	}
	c := s.container(rec.ID)
	switch rec.State {
	case store.ContainerExited:
		return &cri.StopContainerResponse{}, nil
	case store.ContainerCreated:
		return s.stopCreated(ctx, c, rec)
	}
	if grace := time.Duration(req.GetTimeout()) * time.Second; grace > 0 {
		if err := s.signalOnce(ctx, c, rec); err != nil && !s.vmDead(rec) {
			return nil, fmt.Errorf("stopping container %s: %w", rec.ID, err)
		}
		timer := time.NewTimer(grace)
		defer timer.Stop()
		select {
		case <-c.exited:
			return &cri.StopContainerResponse{}, nil
		case <-ctx.Done():
			return nil, fmt.Errorf("stopping container %s: %w", rec.ID, ctx.Err())
		case <-timer.C:
		}
	}
	if err := s.kill(ctx, rec); err != nil {
		return nil, fmt.Errorf("stopping container %s: %w", rec.ID, err)
	}
	return &cri.StopContainerResponse{}, nil
}

// stopCreated ends a container that was never started.
func (s *Server) stopCreated(ctx context.Context, c *container, rec store.Container) (*cri.StopContainerResponse, error) {
	if err := c.op.lock(ctx); err != nil {
		return nil, fmt.Errorf("container %s: %w", rec.ID, err)
	}
	defer c.op.unlock()
	rec, err := s.visibleContainer(rec.ID)
	switch {
	case errdefs.IsNotFound(err):
		return &cri.StopContainerResponse{}, nil
	case err != nil:
		return nil, err
	case rec.State == store.ContainerRunning:
		return nil, fmt.Errorf("container %s was started meanwhile: %w", rec.ID, errdefs.ErrAborted)
	}
	if err := s.exited(rec.ID, exitRecord{at: time.Now(), code: 128, reason: reasonError, message: "stopped before it was started"}); err != nil {
		return nil, err
	}
	return &cri.StopContainerResponse{}, nil
}

// signalOnce sends the stop signal, if no call has done so. After a failure the next call tries again: a container
// that is not asked to stop is killed in the end without having had its grace.
func (s *Server) signalOnce(ctx context.Context, c *container, rec store.Container) error {
	c.mu.Lock()
	first := !c.stop.signalled
	c.stop.signalled = true
	c.mu.Unlock()
	if !first {
		return nil
	}
	err := s.signal(ctx, rec, int32(rec.StopSignal), false)
	if err != nil {
		c.mu.Lock()
		c.stop.signalled = false
		c.mu.Unlock()
	}
	return err
}

// kill sends SIGKILL to all of a container and waits for the record of its exit.
func (s *Server) kill(ctx context.Context, rec store.Container) error {
	ctx, cancel := context.WithTimeout(ctx, killLimit)
	defer cancel()
	if err := s.signal(ctx, rec, int32(unix.SIGKILL), true); err != nil && !s.vmDead(rec) {
		return err
	}
	select {
	case <-s.container(rec.ID).exited:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("no exit after SIGKILL: %w", ctx.Err())
	}
}

func (s *Server) signal(ctx context.Context, rec store.Container, signal int32, all bool) error {
	agent, err := s.containerClient(ctx, rec)
	if err != nil {
		return err
	}
	_, err = agent.Signal(ctx, &agentproto.SignalRequest{ContainerId: rec.ID, Signal: signal, All: all})
	if errdefs.IsNotFound(err) {
		return nil // already gone; its exit will tell
	}
	return err
}

// vmDead tells whether the container's end is certain without its agent's help.
func (s *Server) vmDead(rec store.Container) bool {
	_, err := s.sandbox(rec.SandboxID).machine()
	return err != nil
}
