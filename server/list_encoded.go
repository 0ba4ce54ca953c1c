package server

import (
	"context"
	"fmt"
	"iter"
	"sync/atomic"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crivm/crivm/server/store"
)

// Service is a Server as gRPC serves it. kubelet lists everything once a second, and nearly all of it is as it
// was a second before: so the two lists are put together from items that are encoded once for each change of a
// record and kept with it. They are in the answer as bytes of fields, which the message has as "unknown" ones
// and writes as they are; a client sees no difference. On a node with 1,000 pods that takes a hundredth of the
// time that encoding the messages does (docs/performance.md).
type Service struct {
	*Server

	sandboxes  wholeList[store.Sandbox]
	containers wholeList[store.Container]
}

// wholeList keeps the last list that had no filter: where nothing has changed since, there is nothing to do.
type wholeList[R any] struct {
	last atomic.Pointer[listed[R]]
	long atomic.Bool // the last list was longer than kubelet reads
}

type listed[R any] struct {
	entries []*store.Entry[R] // what it was made of; the store makes others when anything changes
	items   []byte
}

// kubeletTakes is how big an answer kubelet reads, as do crictl and gRPC clients of Go that ask for it.
const kubeletTakes = 16 << 20

// ListPodSandbox is the Server's, with its items already encoded.
func (s *Service) ListPodSandbox(_ context.Context, req *cri.ListPodSandboxRequest) (*cri.ListPodSandboxResponse, error) {
	entries := s.store.SandboxEntries()
	items, err := s.sandboxes.items(entries, proto.Size(req.GetFilter()) == 0, selectedSandboxes(entries, req.GetFilter()),
		func(r *store.Sandbox) ([]byte, error) { return listItem(r.ID, listedSandbox(r)) })
	if err != nil {
		return nil, err
	}
	s.warnLong(&s.sandboxes.long, "ListPodSandbox", len(items))
	resp := &cri.ListPodSandboxResponse{}
	resp.ProtoReflect().SetUnknown(items)
	return resp, nil
}

// ListContainers is the Server's, with its items already encoded.
func (s *Service) ListContainers(_ context.Context, req *cri.ListContainersRequest) (*cri.ListContainersResponse, error) {
	entries := s.store.ContainerEntries()
	items, err := s.containers.items(entries, proto.Size(req.GetFilter()) == 0, selectedContainers(entries, req.GetFilter()),
		func(r *store.Container) ([]byte, error) { return listItem(r.ID, listedContainer(r)) })
	if err != nil {
		return nil, err
	}
	s.warnLong(&s.containers.long, "ListContainers", len(items))
	resp := &cri.ListContainersResponse{}
	resp.ProtoReflect().SetUnknown(items)
	return resp, nil
}

// items of a list; all tells that nothing filters it.
func (w *wholeList[R]) items(entries []*store.Entry[R], all bool, selected iter.Seq[*store.Entry[R]], encode func(*R) ([]byte, error)) ([]byte, error) {
	if !all || len(entries) == 0 {
		return encoded(selected, encode)
	}
	if l := w.last.Load(); l != nil && len(l.entries) == len(entries) && &l.entries[0] == &entries[0] {
		return l.items, nil
	}
	items, err := encoded(selected, encode)
	if err == nil {
		w.last.Store(&listed[R]{entries, items})
	}
	return items, err
}

// encoded are the items of a list, one after the other.
func encoded[R any](entries iter.Seq[*store.Entry[R]], encode func(*R) ([]byte, error)) ([]byte, error) {
	var parts [][]byte
	size := 0
	for e := range entries {
		b, err := e.Shown(encode)
		if err != nil {
			return nil, err
		}
		parts = append(parts, b)
		size += len(b)
	}
	items := make([]byte, 0, size)
	for _, b := range parts {
		items = append(items, b...)
	}
	return items, nil
}

// listItem encodes an item of ListPodSandboxResponse.items or ListContainersResponse.containers, which both are
// field 1.
func listItem(id string, m proto.Message) ([]byte, error) {
	size := proto.Size(m)
	b := make([]byte, 0, protowire.SizeTag(1)+protowire.SizeBytes(size))
	b = protowire.AppendTag(b, 1, protowire.BytesType)
	b = protowire.AppendVarint(b, uint64(size))
	b, err := proto.MarshalOptions{UseCachedSize: true}.MarshalAppend(b, m)
	if err != nil {
		return nil, fmt.Errorf("record %s: %w", id, err)
	}
	return b, nil
}

// warnLong says, once each time that it begins, that kubelet cannot read a list any more: it gets ResourceExhausted
// from its own side and nothing of it would be seen here. The list is sent all the same, for clients that take more.
func (s *Service) warnLong(was *atomic.Bool, call string, size int) {
	if long := size > kubeletTakes; was.Swap(long) != long && long {
		s.log.Warn("a list is longer than kubelet reads; remove dead containers, or have kubelet stream lists (CRIListStreaming)", "call", call, "bytes", size, "limit", kubeletTakes)
	}
}
