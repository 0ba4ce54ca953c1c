package server

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/containerd/errdefs"

	"github.com/crivm/crivm/server/store"
	"github.com/crivm/crivm/vmruntime"
	"github.com/crivm/crivm/vmruntime/virtiofsd"
)

// shareTag is how the guest finds the pod's share.
const shareTag = "host"

// shareDirs is where the file servers of all sandboxes have their directories, below the run directory.
const shareDirs = "fs"

// shareDir is the directory of a sandbox's file server. Unlike the VM's, nobody but root can write there.
func shareDir(rec store.Sandbox) string {
	return filepath.Join(filepath.Dir(filepath.Dir(rec.VMDir)), shareDirs, filepath.Base(rec.VMDir))
}

// shareVolumes puts volumes into the pod's share. Which entries a container uses is in its record before they
// are made.
func (s *Server) shareVolumes(ctx context.Context, sb *sandbox, rec store.Container, sandboxRec store.Sandbox, volumes []sharedVolume) error {
	if len(volumes) == 0 {
		return nil
	}
	if err := sb.share.lock(ctx); err != nil {
		return fmt.Errorf("volumes: %w", err)
	}
	defer sb.share.unlock()
	_, err := s.store.UpdateContainer(rec.ID, func(r *store.Container) error {
		for _, v := range volumes {
			r.Shares = append(slices.Clone(r.Shares), v.entry)
		}
		return nil
	})
	if err != nil {
		return err
	}
	files, err := s.fileServerLocked(ctx, sb, sandboxRec)
	if err != nil {
		return fmt.Errorf("volumes: %w", err)
	}
	for _, v := range volumes {
		if err := files.Add(v.entry, v.source, v.access); err != nil {
			return fmt.Errorf("%s: %w", v.source.Name(), err)
		}
	}
	return nil
}

// unshareVolumes takes out of the share what no other container of the pod uses.
func (s *Server) unshareVolumes(ctx context.Context, sb *sandbox, id string) error {
	rec, err := s.store.Container(id)
	if err != nil {
		return ignoreMissing(err)
	}
	if len(rec.Shares) == 0 {
		return nil
	}
	if err := sb.share.lock(ctx); err != nil {
		return fmt.Errorf("volumes: %w", err)
	}
	defer sb.share.unlock()
	sb.mu.Lock()
	files := sb.files
	sb.mu.Unlock()
	if files == nil {
		return nil
	}
	used := map[string]bool{}
	for _, other := range s.store.Containers(rec.SandboxID) {
		for _, entry := range other.Shares {
			used[entry] = used[entry] || other.ID != id
		}
	}
	var errs []error
	for _, entry := range rec.Shares {
		if !used[entry] {
			errs = append(errs, files.Remove(entry))
		}
	}
	return errors.Join(errs...)
}

// fileServerLocked starts the pod's file server, if it is not there yet, and plugs it.
func (s *Server) fileServerLocked(ctx context.Context, sb *sandbox, rec store.Sandbox) (*virtiofsd.Server, error) {
	vm, err := sb.machine()
	if err != nil {
		return nil, err
	}
	sb.mu.Lock()
	files, plugged := sb.files, sb.sharePlugged
	sb.mu.Unlock()
	if plugged {
		return files, nil
	}
	if files == nil {
		program, err := virtiofsd.Find(ctx)
		if err != nil {
			return nil, fmt.Errorf("sharing host directories: %w", err)
		}
		files, err = virtiofsd.Start(ctx, program, virtiofsd.Spec{
			Dir: shareDir(rec), Client: rec.UID, Process: vmruntime.ProcessSpec{NetnsPath: rec.NetnsPath, Cgroup: vmruntime.Cgroup{
				Systemd: s.opts.SystemdCgroups, Parent: s.cgroupParent(rec.Config.PodSandboxConfig), Name: "crivm-fs-" + rec.ID,
			}},
		})
		if err != nil {
			return nil, err
		}
		sb.mu.Lock()
		sb.files = files
		sb.mu.Unlock()
		s.watchFileServer(sb, vm, files)
	}
	// From here on the guest may hang without the server.
	if _, err := s.store.UpdateSandbox(rec.ID, func(r *store.Sandbox) error { r.Shared = true; return nil }); err != nil {
		return nil, err
	}
	if err := vm.AddShare(ctx, vmruntime.Share{Tag: shareTag, Socket: files.Socket()}); err != nil {
		err = fmt.Errorf("plugging the share: %w", err)
		select {
		case <-files.Done():
			err = fmt.Errorf("virtiofsd ended: %s: %w: %w", files.Exit(), errdefs.ErrUnavailable, err)
		default:
		}
		return nil, vmFailure(vm, err)
	}
	sb.mu.Lock()
	sb.sharePlugged = true
	sb.mu.Unlock()
	return files, nil
}

// shareGrace is how long a file server may be dead before its VM, which ends it by ending, counts as alive.
const shareGrace = time.Second

// watchFileServer ends a VM whose file server has ended: whatever in the guest touches a volume would hang
// for ever.
func (s *Server) watchFileServer(sb *sandbox, vm vmruntime.VM, files *virtiofsd.Server) {
	s.goTask(func() {
		select {
		case <-s.life.Done():
			return
		case <-vm.Done():
			return
		case <-files.Done():
		}
		select {
		case <-vm.Done():
			return
		case <-time.After(shareGrace):
		}
		s.endVM(sb, vm, "virtiofsd, which serves the pod's volumes, ended: "+files.Exit())
	})
}

// endVM kills a VM that is of no use any more. The reason goes into the sandbox's record.
func (s *Server) endVM(sb *sandbox, vm vmruntime.VM, reason string) {
	sb.mu.Lock()
	sb.cause = reason
	sb.mu.Unlock()
	s.log.Error("ending a VM", "sandbox", sb.id, "reason", reason)
	ctx, cancel := detached(s.life, teardownLimit)
	defer cancel()
	if err := vm.Kill(ctx); err != nil {
		s.log.Error("ending a VM", "sandbox", sb.id, "error", err)
	}
}

// adoptFileServer takes the file server of an adopted VM over from an earlier daemon. A VM that has lost its
// own is ended.
func (s *Server) adoptFileServer(ctx context.Context, sb *sandbox, rec store.Sandbox, vm vmruntime.VM) error {
	dir := shareDir(rec)
	if _, err := os.Lstat(dir); errors.Is(err, os.ErrNotExist) && !rec.Shared {
		return nil
	}
	files, err := virtiofsd.Adopt(dir)
	if errdefs.IsNotFound(err) && !rec.Shared { // the daemon died while it started
		return virtiofsd.Sweep(ctx, dir)
	}
	if err != nil {
		err = fmt.Errorf("the pod's volumes: %w", err)
		s.endVM(sb, vm, err.Error())
		return err
	}
	sb.mu.Lock()
	sb.files = files
	sb.mu.Unlock()
	s.watchFileServer(sb, vm, files)
	return nil
}
