package server

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crivm/crivm/agentproto"
	"github.com/crivm/crivm/server/store"
)

// rehearsalLimit bounds a slot's rehearsal; its guest breaks it off before.
const rehearsalLimit = 3 * time.Minute

// rehearse has a slot's guest do for once, in the background, what a pod will have it do. A pod may take the slot
// meanwhile: then the guest breaks it off.
func (s *Server) rehearse(p *pool, sl *slot) {
	s.warm.mu.Lock()
	skip := p.noShow
	s.warm.mu.Unlock()
	if skip {
		return
	}
	s.goTask(func() {
		ctx, cancel := context.WithTimeout(s.life, rehearsalLimit)
		defer cancel()
		go func() {
			select {
			case <-sl.gone:
				cancel()
			case <-ctx.Done():
			}
		}()
		start := time.Now()
		steps := newTimings(start)
		err := s.rehearseSlot(ctx, sl, steps)
		switch {
		case err == nil:
			s.warm.mu.Lock()
			sl.rehearsed = true
			s.warm.mu.Unlock()
			s.log.Info("slot of the warm pool has rehearsed", "sandbox", sl.sb.id, "total", time.Since(start).Round(time.Millisecond), "steps", steps)
		case errdefs.IsDataLoss(err): // even if a pod has it already: that one's guest ends by itself
			s.noShow(p, sl, err)
			if s.remove(p, sl) {
				close(sl.gone)
				s.discard(p, sl.sb, "rehearsal")
			}
		case ctx.Err() != nil || errdefs.IsAborted(err) || errdefs.IsFailedPrecondition(err): // a pod has come, or the daemon ends
		default:
			if _, dead := sl.sb.machine(); dead == nil {
				s.noShow(p, sl, err)
			}
		}
	})
}

// noShow has the pool's slots stay as they booted: what failed in one guest would in the next.
func (s *Server) noShow(p *pool, sl *slot, err error) {
	s.warm.mu.Lock()
	p.noShow = true
	s.warm.mu.Unlock()
	s.log.Warn("slots of the warm pool do not rehearse any more; pods from it take longer", "handler", p.handlerName, "sandbox", sl.sb.id, "error", err)
}

func (s *Server) rehearseSlot(ctx context.Context, sl *slot, steps *timings) error {
	rec, err := s.store.Sandbox(sl.sb.id)
	if err != nil {
		return err
	}
	req, err := rehearsal(rec)
	if err != nil {
		return err
	}
	agent, err := sl.sb.client(ctx)
	if err != nil {
		return err
	}
	done := steps.remote("rehearsal in guest")
	resp, err := agent.Rehearse(ctx, req)
	done(resp.GetSteps())
	if err != nil {
		return fmt.Errorf("slot %s: %w", rec.ID, err)
	}
	return nil
}

// rehearsal is a pod like most: a container with the usual profile and nothing special.
func rehearsal(rec store.Sandbox) (*agentproto.RehearseRequest, error) {
	config := &cri.ContainerConfig{Command: []string{"rehearsal"}, Linux: &cri.LinuxContainerConfig{SecurityContext: &cri.LinuxContainerSecurityContext{
		Seccomp:       &cri.SecurityProfile{ProfileType: cri.SecurityProfile_RuntimeDefault},
		MaskedPaths:   []string{"/proc/kcore", "/proc/keys", "/proc/scsi"},
		ReadonlyPaths: []string{"/proc/bus", "/proc/irq", "/proc/sys"},
	}}}
	spec, err := ociSpec(config, &cri.PodSandboxConfig{}, ocispec.ImageConfig{})
	if err != nil {
		return nil, err
	}
	text, err := json.Marshal(spec)
	if err != nil {
		return nil, fmt.Errorf("OCI spec: %w", err)
	}
	entropy := make([]byte, 64)
	rand.Read(entropy)
	return &agentproto.RehearseRequest{
		Sandbox:   &agentproto.SetupSandboxRequest{Interfaces: []*agentproto.Interface{{MatchMac: rec.MAC}}, ScratchSerial: scratchSerial, UnixNanos: time.Now().UnixNano(), Entropy: entropy},
		Container: &agentproto.CreateContainerRequest{OciSpec: text, User: guestUser(config, ocispec.ImageConfig{}), Stdio: &agentproto.Stdio{}},
	}, nil
}
