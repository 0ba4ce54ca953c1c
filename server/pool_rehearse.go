package server

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crivm/crivm/agentproto"
	"github.com/crivm/crivm/imageservice/rootdisk"
	"github.com/crivm/crivm/server/store"
	"github.com/crivm/crivm/vmruntime"
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
		case ctx.Err() != nil || errdefs.IsAborted(err) || errdefs.IsFailedPrecondition(err) || s.taken(sl): // a pod has come, or the daemon ends
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

// taken tells whether a slot is not in the pool any more.
func (s *Server) taken(sl *slot) bool {
	select {
	case <-sl.gone:
		return true
	default:
		return false
	}
}

// rehearseSlot returns when the guest has undone it, also when a pod comes meanwhile: the guest then breaks it off.
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
	done := steps.span("rehearsal disk")
	err = s.plugRehearsal(ctx, sl.sb, rec)
	done()
	plain := func(err error) { // as it would be for a guest that has no disks
		req.Container.Rootfs = nil
		if _, dead := sl.sb.machine(); dead == nil && ctx.Err() == nil {
			s.log.Warn("a slot of the warm pool rehearses without a disk; its pod takes longer", "sandbox", rec.ID, "error", err)
		}
	}
	req.Container.Rootfs = &agentproto.Rootfs{ImageSerial: rehearsalSerial}
	if err != nil {
		plain(err)
	}
	inGuest := steps.remote("rehearsal in guest")
	resp, err := agent.Rehearse(ctx, req)
	if errdefs.IsNotFound(err) && req.Container.Rootfs != nil { // it has not come in time: a slot yields the CPU to everything else
		plain(err)
		resp, err = agent.Rehearse(ctx, req)
	}
	inGuest(resp.GetSteps())
	if err != nil {
		err = fmt.Errorf("slot %s: %w", rec.ID, err)
	}
	if !errdefs.IsDataLoss(err) { // else the guest may hold it
		defer steps.span("rehearsal disk")()
		s.unplugRehearsal(ctx, sl.sb, rec)
	}
	return err
}

// rehearsalSerial is how the guest finds the disk of a rehearsal, and what the disk's users have it as.
const rehearsalSerial = "rehearsal"

// plugRehearsal makes a small image disk one of the slot's. Which devices a VM has is in its driver's record, and the file is in
// the slot's directory, so both end with the slot or pod at the latest. Idempotent.
func (s *Server) plugRehearsal(ctx context.Context, sb *sandbox, rec store.Sandbox) error {
	path := rehearsalDisk(rec)
	if err := makeRehearsalDisk(ctx, path); err != nil {
		return err
	}
	if err := sb.plug.lock(ctx); err != nil {
		return err
	}
	defer sb.plug.unlock()
	vm, err := sb.machine()
	if err != nil {
		return err
	}
	return vm.AddDisk(ctx, vmruntime.Disk{Serial: rehearsalSerial, Path: path, ReadOnly: true})
}

// unplugRehearsal undoes plugRehearsal, in a pod's VM too. When that fails, or the daemon ends, the next daemon does it for
// a slot; a pod has one device more then that nothing uses.
func (s *Server) unplugRehearsal(ctx context.Context, sb *sandbox, rec store.Sandbox) {
	err := s.unplugImage(ctx, sb, rehearsalSerial, rehearsalSerial)
	if err == nil {
		err = ignoreNotExist(os.Remove(rehearsalDisk(rec)))
	}
	if _, dead := sb.machine(); err != nil && dead == nil && s.life.Err() == nil {
		s.log.Warn("unplugging the disk of a rehearsal", "sandbox", rec.ID, "error", err)
	}
}

func rehearsalDisk(rec store.Sandbox) string { return filepath.Join(rec.Dir, "rehearsal.erofs") }

// makeRehearsalDisk makes an image of a few directories and files, unless it is there: nobody ever sees one that is half
// made.
func makeRehearsalDisk(ctx context.Context, path string) (err error) {
	if _, err := os.Stat(path); err == nil {
		return nil
	}
	layer, err := rehearsalLayer()
	if err != nil {
		return err
	}
	temp := path + newImage
	f, err := os.OpenFile(temp, os.O_CREATE|os.O_RDWR|os.O_TRUNC, 0o644)
	if err != nil {
		return err
	}
	defer f.Close()
	open := func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(layer)), nil }
	if err := rootdisk.Build(ctx, f, [16]byte{}, []rootdisk.Layer{open}); err != nil {
		return fmt.Errorf("disk of a rehearsal: %w", err)
	}
	return errors.Join(f.Chmod(0o644), os.Rename(temp, path))
}

// rehearsalLayer is what an agent and an OCI runtime look for in an image.
func rehearsalLayer() ([]byte, error) {
	var text bytes.Buffer
	w := tar.NewWriter(&text)
	for _, dir := range []string{"dev", "etc", "proc", "sys"} {
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: dir, Mode: 0o755}); err != nil {
			return nil, err
		}
	}
	for _, file := range []struct{ name, text string }{{"etc/group", "root:x:0:\n"}, {"etc/passwd", "root:x:0:0:root:/:/bin/sh\n"}} {
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: file.name, Mode: 0o644, Size: int64(len(file.text))}); err != nil {
			return nil, err
		}
		if _, err := io.WriteString(w, file.text); err != nil {
			return nil, err
		}
	}
	err := w.Close()
	return text.Bytes(), err
}

// rehearsal is a pod like most: a container with the usual profile and nothing special. Of the network only the NIC is real;
// the rest is for the guest to have decoded such a thing.
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
		Sandbox: &agentproto.SetupSandboxRequest{
			ScratchSerial: scratchSerial, UnixNanos: time.Now().UnixNano(), Entropy: entropy,
			Interfaces: []*agentproto.Interface{{MatchMac: rec.MAC, Name: "eth0", Mtu: 1450, Addresses: []string{"10.1.2.3/24", "fd00::3/64"}}},
			Routes:     []*agentproto.Route{{Destination: "0.0.0.0/0", Gateway: "10.1.2.1", Interface: "eth0"}, {Destination: "::/0", Gateway: "fd00::1", Interface: "eth0"}},
			Neighbours: []*agentproto.Neighbour{{Address: "10.1.2.1", Mac: rec.MAC, Interface: "eth0"}},
		},
		Container: &agentproto.CreateContainerRequest{OciSpec: text, User: guestUser(config, ocispec.ImageConfig{}), Stdio: &agentproto.Stdio{}},
	}, nil
}
