package server

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crivm/crivm/server/store"
)

// ContainerStatus answers from the record; no guest is asked. NotFound when it is unknown.
func (s *Server) ContainerStatus(_ context.Context, req *cri.ContainerStatusRequest) (*cri.ContainerStatusResponse, error) {
	rec, err := s.visibleContainer(req.GetContainerId())
	if err != nil {
		return nil, err
	}
	resp := &cri.ContainerStatusResponse{Status: containerStatus(rec)}
	if req.GetVerbose() {
		info, err := json.Marshal(map[string]any{"sandboxID": rec.SandboxID, "imageDisk": rec.ImageDisk, "config": rec.Config})
		if err != nil {
			return nil, fmt.Errorf("container %s: %w", rec.ID, err)
		}
		resp.Info = map[string]string{"info": string(info)}
	}
	return resp, nil
}

// containerStatus is what CRI shows of a container.
func containerStatus(rec store.Container) *cri.ContainerStatus {
	config := rec.Config
	spec := &cri.ImageSpec{
		Image: rec.ImageName, Annotations: config.GetImage().GetAnnotations(),
		UserSpecifiedImage: config.GetImage().GetUserSpecifiedImage(), RuntimeHandler: config.GetImage().GetRuntimeHandler(),
	}
	return &cri.ContainerStatus{
		Id: rec.ID, Metadata: config.GetMetadata(), State: containerState(rec.State),
		CreatedAt: rec.CreatedAt.UnixNano(), StartedAt: unixNano(rec.StartedAt), FinishedAt: unixNano(rec.FinishedAt),
		ExitCode: rec.ExitCode, Reason: rec.Reason, Message: rec.Message,
		Image: spec, ImageRef: rec.ImageRef, ImageId: rec.ImageID, Labels: config.GetLabels(), Annotations: config.GetAnnotations(),
		Mounts: config.GetMounts(), LogPath: shownLogPath(rec), Resources: &cri.ContainerResources{Linux: config.GetLinux().GetResources()},
		User: containerUser(rec.User), StopSignal: criSignal(rec.StopSignal),
	}
}

// shownLogPath of a container without a log is one that cannot exist: when the container is dead kubelet removes all that
// log_path* matches, which would be /dev/null itself.
func shownLogPath(rec store.Container) string {
	if rec.LogPath == os.DevNull {
		return filepath.Join(os.DevNull, rec.ID+".log")
	}
	return rec.LogPath
}

func unixNano(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixNano()
}

func containerUser(u store.User) *cri.ContainerUser {
	linux := &cri.LinuxContainerUser{Uid: int64(u.UID), Gid: int64(u.GID)}
	for _, g := range u.Groups {
		linux.SupplementalGroups = append(linux.SupplementalGroups, int64(g))
	}
	return &cri.ContainerUser{Linux: linux}
}
