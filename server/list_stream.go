package server

import (
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// partBytes is about how big a message of a streamed list becomes: far below the 16 MiB that clients take. An item
// is never split, so one that is bigger is a message of its own.
const partBytes = 1 << 20

// StreamPodSandboxes is ListPodSandbox in messages of bounded size.
func (s *Server) StreamPodSandboxes(req *cri.StreamPodSandboxesRequest, stream grpc.ServerStreamingServer[cri.StreamPodSandboxesResponse]) error {
	list, err := s.ListPodSandbox(stream.Context(), &cri.ListPodSandboxRequest{Filter: req.GetFilter()})
	if err != nil {
		return err
	}
	return inParts(list.GetItems(), func(part []*cri.PodSandbox) error {
		return stream.Send(&cri.StreamPodSandboxesResponse{PodSandboxes: part})
	})
}

// StreamContainers is ListContainers in messages of bounded size.
func (s *Server) StreamContainers(req *cri.StreamContainersRequest, stream grpc.ServerStreamingServer[cri.StreamContainersResponse]) error {
	list, err := s.ListContainers(stream.Context(), &cri.ListContainersRequest{Filter: req.GetFilter()})
	if err != nil {
		return err
	}
	return inParts(list.GetContainers(), func(part []*cri.Container) error {
		return stream.Send(&cri.StreamContainersResponse{Containers: part})
	})
}

// inParts sends a list in its order, in messages of at most partBytes each or of one item. No message is empty.
func inParts[T proto.Message](items []T, send func([]T) error) error {
	for len(items) > 0 {
		n, size := 1, proto.Size(items[0])
		for n < len(items) {
			if size += proto.Size(items[n]); size > partBytes {
				break
			}
			n++
		}
		if err := send(items[:n]); err != nil {
			return err
		}
		items = items[n:]
	}
	return nil
}
