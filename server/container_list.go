package server

import (
	"context"
	"iter"
	"strings"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crivm/crivm/server/store"
)

// ListContainers answers from the records, newest first. The parts of a filter are AND-ed.
func (s *Server) ListContainers(_ context.Context, req *cri.ListContainersRequest) (*cri.ListContainersResponse, error) {
	resp := &cri.ListContainersResponse{}
	for e := range selectedContainers(s.store.ContainerEntries(), req.GetFilter()) {
		resp.Containers = append(resp.Containers, listedContainer(&e.Record))
	}
	return resp, nil
}

// selectedContainers are those that clients may see and a filter lets through, newest first.
func selectedContainers(entries []*store.Entry[store.Container], filter *cri.ContainerFilter) iter.Seq[*store.Entry[store.Container]] {
	return func(yield func(*store.Entry[store.Container]) bool) {
		for _, e := range entries {
			rec := &e.Record
			switch {
			case rec.State == store.ContainerCreating,
				!strings.HasPrefix(rec.ID, filter.GetId()),
				!strings.HasPrefix(rec.SandboxID, filter.GetPodSandboxId()),
				filter.GetState() != nil && filter.GetState().GetState() != containerState(rec.State),
				!matches(filter.GetLabelSelector(), rec.Config.GetLabels()):
				continue
			}
			if !yield(e) {
				return
			}
		}
	}
}

// listedContainer is what a list shows of a container; it depends on the record alone.
func listedContainer(rec *store.Container) *cri.Container {
	return &cri.Container{
		Id: rec.ID, PodSandboxId: rec.SandboxID, Metadata: rec.Config.GetMetadata(), State: containerState(rec.State), CreatedAt: rec.CreatedAt.UnixNano(),
		Image: rec.Config.GetImage(), ImageRef: rec.ImageRef, ImageId: rec.ImageID, Labels: rec.Config.GetLabels(), Annotations: rec.Config.GetAnnotations(),
	}
}

func containerState(s store.ContainerState) cri.ContainerState {
	switch s {
	case store.ContainerCreated:
		return cri.ContainerState_CONTAINER_CREATED
	case store.ContainerRunning:
		return cri.ContainerState_CONTAINER_RUNNING
	case store.ContainerExited:
		return cri.ContainerState_CONTAINER_EXITED
	}
	return cri.ContainerState_CONTAINER_UNKNOWN
}
