package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crivm/crivm/agentproto"
	"github.com/crivm/crivm/imageservice"
	"github.com/crivm/crivm/server/store"
	"github.com/crivm/crivm/vmruntime"
)

// CreateContainer makes a container in the sandbox's VM, up to the point where its process waits for
// StartContainer. What can be found wrong is found here: image, user, volumes, profiles. Calls for one name
// share one container: see once.
func (s *Server) CreateContainer(ctx context.Context, req *cri.CreateContainerRequest) (*cri.CreateContainerResponse, error) {
	if err := s.awaitSandbox(ctx, req.GetPodSandboxId()); err != nil {
		return nil, err
	}
	sandboxRec, err := s.visibleSandbox(req.GetPodSandboxId())
	if err != nil {
		return nil, err
	}
	if sandboxRec.State != store.SandboxReady {
		return nil, fmt.Errorf("sandbox %s is %s, not READY: %w", sandboxRec.ID, sandboxRec.State, errdefs.ErrFailedPrecondition)
	}
	pod, config := sandboxRec.Config.PodSandboxConfig, req.GetConfig()
	if err := validateContainer(config, pod); err != nil {
		return nil, err
	}
	if err := s.validateImage("config.image", config.GetImage()); err != nil {
		return nil, err
	}
	s.tellIgnored(config)
	defer s.starts()()
	name := containerName(config.GetMetadata(), pod.GetMetadata())
	id, err := s.once(ctx, "container "+sandboxRec.ID+" "+name, s.created, func() (string, error) {
		return s.createContainer(ctx, name, config, sandboxRec)
	})
	if err != nil {
		return nil, err
	}
	return &cri.CreateContainerResponse{ContainerId: id}, nil
}

// created tells whether a container waits to be started.
func (s *Server) created(id string) bool {
	rec, err := s.store.Container(id)
	return err == nil && rec.State == store.ContainerCreated
}

func (s *Server) createContainer(ctx context.Context, name string, config *cri.ContainerConfig, sandboxRec store.Sandbox) (string, error) {
	pod := sandboxRec.Config.PodSandboxConfig
	image, err := s.resolveImage(ctx, config.GetImage())
	if err != nil {
		return "", err
	}
	stop, err := stopSignal(config.GetStopSignal(), image.Config.StopSignal)
	if err != nil {
		return "", err
	}
	if err := s.undoHalfMade(ctx, sandboxRec.ID, name); err != nil {
		return "", err
	}
	id := newID()
	rec, err := s.store.CreateContainer(store.Container{
		ID: id, SandboxID: sandboxRec.ID, Name: name, State: store.ContainerCreating,
		LogPath: logPath(config, pod), ImageID: image.ID, ImageRef: imageRef(image), ImageName: imageName(config.GetImage(), image), ImageDisk: diskSerial(image.ID),
		StopSignal: int32(stop), Config: store.ContainerConfig{ContainerConfig: config},
	})
	if err != nil {
		return "", err
	}
	c := s.container(id)
	if err := c.op.lock(context.WithoutCancel(ctx)); err != nil { // nobody else has its ID yet; a record must not stay
		return "", err
	}
	defer c.op.unlock()
	if err := s.createInGuest(ctx, rec, sandboxRec, image); err != nil {
		err = fmt.Errorf("container %s of sandbox %s: %w", config.GetMetadata().GetName(), sandboxRec.ID, err)
		undo, cancel := detached(ctx, teardownLimit)
		defer cancel()
		if undoErr := s.removeContainer(undo, rec); undoErr != nil {
			s.log.Error("undoing a failed container", "container", id, "error", undoErr)
		}
		return "", err
	}
	return id, nil
}

// undoHalfMade undoes what an earlier call for this name had made and could not undo, as it holds the name.
func (s *Server) undoHalfMade(ctx context.Context, sandboxID, name string) error {
	for _, rec := range s.store.Containers(sandboxID) {
		if rec.Name != name || rec.State != store.ContainerCreating {
			continue
		}
		c := s.container(rec.ID)
		if err := c.op.lock(ctx); err != nil {
			return fmt.Errorf("container %s: %w", rec.ID, err)
		}
		err := s.removeContainer(ctx, rec)
		c.op.unlock()
		if err != nil {
			return fmt.Errorf("undoing an earlier, half made one: %w", err)
		}
	}
	return nil
}

func (s *Server) createInGuest(ctx context.Context, rec store.Container, sandboxRec store.Sandbox, image imageservice.Image) error {
	pod, config := sandboxRec.Config.PodSandboxConfig, rec.Config.ContainerConfig
	spec, err := ociSpec(config, pod, image.Config)
	if err != nil {
		return err
	}
	images, err := s.imageVolumes(ctx, config)
	if err != nil {
		return err
	}
	own, err := ownVolumes(config, image.Config)
	if err != nil {
		return err
	}
	sb := s.sandbox(rec.SandboxID)
	empty, err := s.emptyDirs(ctx, sb, rec, sandboxRec)
	if err != nil {
		return err
	}
	volumes, err := guestMounts(rec, sandboxRec, images, empty)
	if err != nil {
		return err
	}
	defer closeVolumes(volumes.shared)
	blocks, err := hostDevices(config.GetDevices())
	if err != nil {
		return err
	}
	text, err := json.Marshal(spec)
	if err != nil {
		return fmt.Errorf("OCI spec: %w", err)
	}
	if err := os.MkdirAll(filepath.Dir(rec.LogPath), 0o755); err != nil {
		return fmt.Errorf("log directory: %w", err)
	}
	steps := timingsOf(ctx)
	done := steps.span("image disk")
	if err := s.plugImage(ctx, sb, rec.ID, image.ID, rec.ImageDisk); err != nil {
		return err
	}
	done()
	done = steps.span("volumes")
	if err := s.plugVolumes(ctx, sb, rec.ID, images); err != nil {
		return err
	}
	if err := s.shareVolumes(ctx, sb, rec, sandboxRec, volumes.shared); err != nil {
		return err
	}
	if err := s.copyVolumes(ctx, sb, rec.ID, volumes.copies); err != nil {
		return err
	}
	devices, err := s.plugDevices(ctx, sb, rec, blocks)
	if err != nil {
		return err
	}
	if err := s.settleHugepages(ctx, sb); err != nil {
		return err
	}
	done()
	agent, err := sb.client(ctx)
	if err != nil {
		return err
	}
	inGuest := steps.remote("create in guest")
	options := config.GetLinux().GetSecurityContext().GetNamespaceOptions()
	resp, err := agent.CreateContainer(ctx, &agentproto.CreateContainerRequest{
		ContainerId: rec.ID, OciSpec: text, Mounts: append(volumes.mounts, own...), User: guestUser(config, image.Config),
		Rootfs: &agentproto.Rootfs{ImageSerial: rec.ImageDisk, Readonly: config.GetLinux().GetSecurityContext().GetReadonlyRootfs()},
		Stdio:  &agentproto.Stdio{Stdin: config.GetStdin(), Tty: config.GetTty()},
		PidPod: options.GetPid() == cri.NamespaceMode_POD, PidTarget: options.GetTargetId(), Devices: devices,
	})
	if err != nil {
		return fmt.Errorf("in the guest: %w", err)
	}
	inGuest(resp.GetSteps())
	s.keepTrace(ctx, rec.SandboxID, rec.ID)
	defer steps.span("record")()
	_, err = s.store.UpdateContainer(rec.ID, func(r *store.Container) error {
		if sandboxRec, err := s.store.Sandbox(rec.SandboxID); err != nil || sandboxRec.State != store.SandboxReady {
			return fmt.Errorf("sandbox was stopped meanwhile: %w", errdefs.ErrFailedPrecondition) // and its containers made EXITED
		}
		r.State, r.TerminationLog = store.ContainerCreated, volumes.terminationLog
		r.User = store.User{UID: resp.GetUser().GetUid(), GID: resp.GetUser().GetGid(), Groups: resp.GetUser().GetGroups()}
		return nil
	})
	return err
}

// plugImage makes the disk of an image visible in the guest and notes its user.
func (s *Server) plugImage(ctx context.Context, sb *sandbox, containerID, imageID, serial string) error {
	path, err := s.images.Disk(ctx, imageID)
	if err != nil {
		return fmt.Errorf("root disk: %w", err)
	}
	if err := sb.plug.lock(ctx); err != nil {
		return fmt.Errorf("root disk: %w", err)
	}
	defer sb.plug.unlock()
	vm, err := sb.machine()
	if err != nil {
		return err
	}
	sb.mu.Lock()
	sb.useDisk(serial, containerID) // the undoing of a failed container takes it back
	sb.mu.Unlock()
	if err := vm.AddDisk(ctx, vmruntime.Disk{Serial: serial, Path: path, ReadOnly: true}); err != nil {
		return vmFailure(vm, fmt.Errorf("plugging the root disk: %w", err))
	}
	return nil
}

// unplugImage takes a user of a disk away, and unplugs the disk after the last one. Idempotent.
func (s *Server) unplugImage(ctx context.Context, sb *sandbox, containerID, serial string) error {
	if err := sb.plug.lock(ctx); err != nil {
		return fmt.Errorf("root disk: %w", err)
	}
	defer sb.plug.unlock()
	sb.mu.Lock()
	delete(sb.disks[serial], containerID)
	inUse := len(sb.disks[serial]) > 0
	sb.mu.Unlock()
	vm, err := sb.machine()
	if inUse || err != nil {
		return nil
	}
	agent, err := sb.client(ctx)
	if err != nil {
		return err
	}
	if _, err := agent.DetachDisk(ctx, &agentproto.DetachDiskRequest{Serial: serial}); ignoreMissing(err) != nil {
		return fmt.Errorf("detaching disk %s: %w", serial, err)
	}
	if err := vm.RemoveDisk(ctx, serial); err != nil {
		return fmt.Errorf("unplugging disk %s: %w", serial, err)
	}
	return nil
}

// resolveImage finds the image; kubelet names it by the ID that PullImage returned.
func (s *Server) resolveImage(ctx context.Context, spec *cri.ImageSpec) (imageservice.Image, error) {
	ref := spec.GetImage()
	if ref == "" {
		ref = spec.GetImageRef()
	}
	image, err := s.images.Resolve(ctx, ref)
	if err != nil {
		return image, fmt.Errorf("image %q: %w", ref, err)
	}
	return image, nil
}

// imageRef is what a status shows as image_ref: a digest, so that the pod's imageID says exactly what runs.
func imageRef(image imageservice.Image) string {
	if len(image.RepoDigests) > 0 {
		return image.RepoDigests[0]
	}
	return image.ID
}

func imageName(spec *cri.ImageSpec, image imageservice.Image) string {
	switch {
	case spec.GetUserSpecifiedImage() != "":
		return spec.GetUserSpecifiedImage()
	case len(image.RepoTags) > 0:
		return image.RepoTags[0]
	}
	return spec.GetImage()
}

// diskSerial names an image's disk in the guest; virtio-blk has 20 bytes for it.
func diskSerial(imageID string) string {
	const prefix = len("sha256:")
	return "img-" + imageID[prefix:prefix+16]
}

// logPath is where a container's output goes; shownLogPath is what kubelet sees.
func logPath(config *cri.ContainerConfig, pod *cri.PodSandboxConfig) string {
	if config.GetLogPath() == "" {
		return os.DevNull
	}
	return filepath.Join(pod.GetLogDirectory(), config.GetLogPath())
}

// removeContainer kills and unmakes a container in its guest, then forgets it. Idempotent.
func (s *Server) removeContainer(ctx context.Context, rec store.Container) error {
	sb := s.sandbox(rec.SandboxID)
	c := s.container(rec.ID)
	if _, err := sb.machine(); err == nil {
		agent, err := sb.client(ctx)
		if err == nil {
			_, err = agent.DeleteContainer(ctx, &agentproto.DeleteContainerRequest{ContainerId: rec.ID})
		}
		if err == nil || errdefs.IsNotFound(err) {
			err = errors.Join(s.unshareVolumes(ctx, sb, rec.ID), s.releaseCopies(ctx, sb, rec.ID), s.unplugVolumes(ctx, sb, rec.ID), s.unplugImage(ctx, sb, rec.ID, rec.ImageDisk))
		}
		if err != nil && s.lives(rec.SandboxID) {
			return fmt.Errorf("container %s: %w", rec.ID, err)
		}
	} else {
		s.forgetCopies(sb)
	}
	c.mu.Lock()
	out := c.output
	c.mu.Unlock()
	if out != nil {
		out.close()
	}
	if err := s.eraseContainer(rec); err != nil {
		return err
	}
	s.releaseHugepages(ctx, rec)
	return nil
}

// lives tells whether a sandbox has a VM that is not being ended: what cannot be undone in any other ends with it.
func (s *Server) lives(sandboxID string) bool {
	rec, err := s.store.Sandbox(sandboxID)
	if err != nil || rec.State == store.SandboxStopping || rec.State == store.SandboxNotReady {
		return false
	}
	_, err = s.sandbox(sandboxID).machine()
	return err == nil
}

// eraseContainer deletes the record of a container that is no more.
func (s *Server) eraseContainer(rec store.Container) error {
	err := errors.Join(s.store.DeleteContainer(rec.ID), ignoreNotExist(os.Remove(s.positionPath(rec))))
	if err == nil {
		s.forgetContainer(rec.ID)
	}
	return err
}

func ignoreNotExist(err error) error {
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return err
}
