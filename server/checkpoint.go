package server

import (
	"context"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// CheckpointContainer is not offered: the one unit that can be frozen and moved is the VM, with all of its pod.
func (s *Server) CheckpointContainer(context.Context, *cri.CheckpointContainerRequest) (*cri.CheckpointContainerResponse, error) {
	return nil, unsupported("CheckpointContainer", "a container lives in its pod's VM and cannot be taken out of it; there is no CRIU in the guest")
}

// CheckpointPod is not offered yet.
func (s *Server) CheckpointPod(context.Context, *cri.CheckpointPodRequest) (*cri.CheckpointPodResponse, error) {
	return nil, unsupported("CheckpointPod", "snapshots of a pod's VM are not supported yet")
}

// RestorePod is not offered yet.
func (s *Server) RestorePod(context.Context, *cri.RestorePodRequest) (*cri.RestorePodResponse, error) {
	return nil, unsupported("RestorePod", "snapshots of a pod's VM are not supported yet")
}
