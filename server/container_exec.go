package server

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// maxExecOutput is how much of each stream ExecSync returns; the rest is dropped (cri-api).
const maxExecOutput = 16 << 20

// ExecSync runs a command to its end. DeadlineExceeded, and the process tree killed, after its timeout.
func (s *Server) ExecSync(ctx context.Context, req *cri.ExecSyncRequest) (*cri.ExecSyncResponse, error) {
	if err := s.awaitContainer(ctx, req.GetContainerId()); err != nil {
		return nil, err
	}
	rec, err := s.runningContainer(req.GetContainerId())
	if err != nil {
		return nil, err
	}
	if len(req.GetCmd()) == 0 {
		return nil, invalid("cmd", "is empty")
	}
	execCtx := ctx
	if req.GetTimeout() > 0 {
		var cancel context.CancelFunc
		execCtx, cancel = context.WithTimeout(ctx, time.Duration(req.GetTimeout())*time.Second)
		defer cancel()
	}
	stdout, stderr := &limitedBuffer{limit: maxExecOutput}, &limitedBuffer{limit: maxExecOutput}
	code, err := s.exec(execCtx, rec, execution{args: req.GetCmd(), stdout: stdout, stderr: stderr})
	if errors.Is(err, context.DeadlineExceeded) && ctx.Err() == nil {
		return nil, fmt.Errorf("exec in container %s: no end within its timeout of %d s: %w", rec.ID, req.GetTimeout(), err)
	}
	if err != nil {
		return nil, fmt.Errorf("exec in container %s: %w", rec.ID, err)
	}
	return &cri.ExecSyncResponse{Stdout: stdout.Bytes(), Stderr: stderr.Bytes(), ExitCode: code}, nil
}

// Exec returns the URL at which the streams of a new process are served.
func (s *Server) Exec(ctx context.Context, req *cri.ExecRequest) (*cri.ExecResponse, error) {
	if err := s.awaitContainer(ctx, req.GetContainerId()); err != nil {
		return nil, err
	}
	if _, err := s.runningContainer(req.GetContainerId()); err != nil {
		return nil, err
	}
	if len(req.GetCmd()) == 0 {
		return nil, invalid("cmd", "is empty")
	}
	return s.streams.GetExec(req)
}

// Attach returns the URL at which the streams of the container's process are served.
func (s *Server) Attach(ctx context.Context, req *cri.AttachRequest) (*cri.AttachResponse, error) {
	if err := s.awaitContainer(ctx, req.GetContainerId()); err != nil {
		return nil, err
	}
	rec, err := s.runningContainer(req.GetContainerId())
	if err != nil {
		return nil, err
	}
	if req.GetTty() != rec.Config.GetTty() {
		return nil, fmt.Errorf("container %s: tty is %t, not %t: %w", rec.ID, rec.Config.GetTty(), req.GetTty(), errdefs.ErrInvalidArgument)
	}
	return s.streams.GetAttach(req)
}

// PortForward returns the URL at which connections to the pod's ports are served.
func (s *Server) PortForward(ctx context.Context, req *cri.PortForwardRequest) (*cri.PortForwardResponse, error) {
	if err := s.awaitSandbox(ctx, req.GetPodSandboxId()); err != nil {
		return nil, err
	}
	rec, err := s.visibleSandbox(req.GetPodSandboxId())
	if err != nil {
		return nil, err
	}
	if _, err := s.sandbox(rec.ID).machine(); err != nil {
		return nil, err
	}
	return s.streams.GetPortForward(req)
}
