package server

import (
	"context"
	"fmt"
	"iter"
	"strings"

	"github.com/containerd/errdefs"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crivm/crivm/server/store"
)

// ListPodSandbox answers from the records, newest first. The parts of a filter are AND-ed.
func (s *Server) ListPodSandbox(_ context.Context, req *cri.ListPodSandboxRequest) (*cri.ListPodSandboxResponse, error) {
	resp := &cri.ListPodSandboxResponse{}
	for e := range selectedSandboxes(s.store.SandboxEntries(), req.GetFilter()) {
		resp.Items = append(resp.Items, listedSandbox(&e.Record))
	}
	return resp, nil
}

// selectedSandboxes are those that clients may see and a filter lets through, newest first.
func selectedSandboxes(entries []*store.Entry[store.Sandbox], filter *cri.PodSandboxFilter) iter.Seq[*store.Entry[store.Sandbox]] {
	return func(yield func(*store.Entry[store.Sandbox]) bool) {
		for _, e := range entries {
			rec := &e.Record
			switch {
			case !rec.State.Shown(),
				!strings.HasPrefix(rec.ID, filter.GetId()),
				filter.GetState() != nil && filter.GetState().GetState() != sandboxState(rec.State),
				!matches(filter.GetLabelSelector(), rec.Config.GetLabels()):
				continue
			}
			if !yield(e) {
				return
			}
		}
	}
}

// listedSandbox is what a list shows of a sandbox; it depends on the record alone.
func listedSandbox(rec *store.Sandbox) *cri.PodSandbox {
	return &cri.PodSandbox{
		Id: rec.ID, Metadata: rec.Config.GetMetadata(), State: sandboxState(rec.State), CreatedAt: rec.CreatedAt.UnixNano(),
		Labels: rec.Config.GetLabels(), Annotations: rec.Config.GetAnnotations(), RuntimeHandler: rec.Handler,
	}
}

// matches tells whether labels have all that a selector asks for.
func matches(selector, labels map[string]string) bool {
	for k, v := range selector {
		if got, ok := labels[k]; !ok || got != v {
			return false
		}
	}
	return true
}

func notFound(noun, id string) error {
	return fmt.Errorf("%s %q: %w", noun, id, errdefs.ErrNotFound)
}
