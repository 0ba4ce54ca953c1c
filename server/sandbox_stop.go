package server

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crivm/crivm/server/store"
	"github.com/crivm/crivm/vmruntime/virtiofsd"
)

// stopLimit bounds killing the containers of a sandbox through the agent before the VM itself is killed.
const stopLimit = 5 * time.Second

// StopPodSandbox kills what runs in the sandbox, gives the network back and ends the VM. Idempotent; an
// unknown sandbox is a stopped one.
func (s *Server) StopPodSandbox(ctx context.Context, req *cri.StopPodSandboxRequest) (*cri.StopPodSandboxResponse, error) {
	if err := s.awaitSandbox(ctx, req.GetPodSandboxId()); err != nil {
		return nil, err
	}
	rec, err := s.store.Sandbox(req.GetPodSandboxId())
	if errdefs.IsNotFound(err) || rec.State.Slot() {
		return &cri.StopPodSandboxResponse{}, nil
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
		return nil, fmt.Errorf("stopping sandbox %s: %w", rec.ID, err)
	}
	if rec.State == store.SandboxReady {
		s.keepTrace(ctx, rec.ID, "")
	}
	return &cri.StopPodSandboxResponse{}, nil
}

// stopSandbox is called with sb.op held. It goes on when the request ends: a half stopped sandbox is of no
// use to anybody.
func (s *Server) stopSandbox(ctx context.Context, sb *sandbox) error {
	ctx, cancel := detached(ctx, teardownLimit)
	defer cancel()
	rec, err := s.store.UpdateSandbox(sb.id, func(r *store.Sandbox) error {
		if r.State == store.SandboxReady || r.State == store.SandboxCreating {
			r.State = store.SandboxStopping
		}
		return nil
	})
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return err
	}
	done := timingsOf(ctx).span("end of containers")
	s.killContainers(ctx, rec.ID)
	done()
	s.detachEmptyDirs(ctx, sb, rec)
	s.syncDevices(ctx, rec.ID)
	if err := s.teardown(ctx, sb, rec); err != nil {
		return err
	}
	_, err = s.store.UpdateSandbox(sb.id, func(r *store.Sandbox) error { r.State = store.SandboxNotReady; return nil })
	return err
}

// killContainers ends the running containers through the agent, so that their last output and true exit
// codes are kept. What does not end in time ends with the VM.
func (s *Server) killContainers(ctx context.Context, sandboxID string) {
	ctx, cancel := context.WithTimeout(ctx, stopLimit)
	defer cancel()
	var wg sync.WaitGroup
	for _, r := range s.store.Containers(sandboxID) {
		if r.State != store.ContainerRunning {
			continue
		}
		wg.Go(func() {
			if err := s.kill(ctx, r); err != nil {
				s.log.Warn("killing a container of a sandbox that is stopped", "container", r.ID, "error", err)
			}
		})
	}
	wg.Wait()
}

// teardown undoes all that was made for a sandbox but its record: the VM first, then everything is tried
// and the errors joined. Idempotent; what is already gone counts as done.
func (s *Server) teardown(ctx context.Context, sb *sandbox, rec store.Sandbox) error {
	sb.disconnect()
	sb.mu.Lock()
	vm := sb.vm
	sb.mu.Unlock()
	done := timingsOf(ctx).span("end of the vm")
	if vm != nil {
		if err := vm.Kill(ctx); err != nil {
			return fmt.Errorf("ending the VM: %w", err)
		}
	} else if driver := s.driver(rec.Driver); driver != nil {
		if err := driver.Sweep(ctx, rec.ID, rec.VMDir); err != nil {
			return fmt.Errorf("ending the VM: %w", err)
		}
	} else {
		return fmt.Errorf("VMM driver %q of the sandbox is not configured any more: %w", rec.Driver, errdefs.ErrFailedPrecondition)
	}
	done()
	err := errors.Join(
		s.exitContainers(rec.ID, time.Now(), "sandbox stopped"),
		virtiofsd.Sweep(ctx, shareDir(rec)),
		s.delNetwork(ctx, rec),
		os.RemoveAll(rec.VMDir),
		os.RemoveAll(rec.Dir),
	)
	if err != nil {
		return err
	}
	sb.mu.Lock()
	defer sb.mu.Unlock()
	sb.vm, sb.files, sb.sharePlugged = nil, nil, false
	return nil
}

func (s *Server) delNetwork(ctx context.Context, rec store.Sandbox) error {
	ctx, done := timingsOf(ctx).plugins(ctx, "cni del")
	defer done()
	return ignoreMissing(s.net.Del(ctx, networkPod(rec, rec.Config.PodSandboxConfig)))
}

func (s *Server) driver(name string) Driver {
	for _, h := range s.opts.Handlers {
		if h.Driver.Name() == name {
			return h.Driver
		}
	}
	return nil
}
