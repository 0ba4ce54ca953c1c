package server

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crivm/crivm/server/store"
)

type listStream[T any] struct {
	grpc.ServerStream
	ctx context.Context
	got []*T
}

func (l *listStream[T]) Context() context.Context { return l.ctx }
func (l *listStream[T]) Send(m *T) error          { l.got = append(l.got, m); return nil }

func TestParts(t *testing.T) {
	var items []*cri.ContainerStats
	for i := range 50 {
		kib := 100
		if i == 30 {
			kib = 3000 // is a message of its own
		}
		items = append(items, &cri.ContainerStats{Attributes: &cri.ContainerAttributes{Id: fmt.Sprint(i), Annotations: map[string]string{"a": string(make([]byte, kib<<10))}}})
	}
	seen, parts := 0, 0
	err := inParts(items, func(part []*cri.ContainerStats) error {
		if size := proto.Size(&cri.StreamContainerStatsResponse{ContainerStats: part}); len(part) == 0 || len(part) > 1 && size > partBytes+100 {
			t.Errorf("part of %d items in %d bytes", len(part), size)
		}
		for _, c := range part {
			if c.Attributes.Id != fmt.Sprint(seen) {
				t.Errorf("item %s where %d is due", c.Attributes.Id, seen)
			}
			seen++
		}
		parts++
		return nil
	})
	if err != nil || seen != len(items) || parts != 6 {
		t.Errorf("%d items in %d parts (%v)", seen, parts, err)
	}
	if err := inParts(nil, func([]*cri.ContainerStats) error { t.Error("an empty part"); return nil }); err != nil {
		t.Error(err)
	}
	if err := inParts(items, func([]*cri.ContainerStats) error { return context.Canceled }); err != context.Canceled {
		t.Errorf("error of a client that went away: %v", err)
	}
}

// What gRPC sends, from bytes that are kept, is what the server says, after each kind of change too.
func TestEncodedLists(t *testing.T) {
	r := newRig(t)
	ids := r.records(20, 0)
	client := r.client()
	same := func(when string, filter *cri.ContainerFilter, want int) {
		t.Helper()
		plain, err := r.ListContainers(t.Context(), &cri.ListContainersRequest{Filter: filter})
		if err != nil {
			t.Fatal(err)
		}
		sent, err := client.ListContainers(t.Context(), &cri.ListContainersRequest{Filter: filter})
		if err != nil || !proto.Equal(plain, sent) || len(sent.GetContainers()) != want {
			t.Errorf("%s: %d containers sent (%v), %d known, want %d", when, len(sent.GetContainers()), err, len(plain.GetContainers()), want)
		}
		pods := &cri.PodSandboxFilter{LabelSelector: filter.GetLabelSelector()}
		plainPods, err := r.ListPodSandbox(t.Context(), &cri.ListPodSandboxRequest{Filter: pods})
		if err != nil {
			t.Fatal(err)
		}
		sentPods, err := client.ListPodSandbox(t.Context(), &cri.ListPodSandboxRequest{Filter: pods})
		if err != nil || !proto.Equal(plainPods, sentPods) {
			t.Errorf("%s: sandboxes are sent as %v (%v), known as %v", when, sentPods, err, plainPods)
		}
	}
	same("at first", nil, 20)
	same("by a label", &cri.ContainerFilter{LabelSelector: map[string]string{"io.kubernetes.pod.name": "pod-3"}}, 1)
	same("by a label that none has", &cri.ContainerFilter{LabelSelector: map[string]string{"no": "such"}}, 0)
	if _, err := r.store.UpdateContainer(ids[5], func(c *store.Container) error { c.State = store.ContainerRunning; return nil }); err != nil {
		t.Fatal(err)
	}
	same("after a change", nil, 20)
	same("by state", &cri.ContainerFilter{State: &cri.ContainerStateValue{State: cri.ContainerState_CONTAINER_RUNNING}}, 1)
	more := r.records(1, 1)
	same("after a creation", nil, 21)
	if err := r.store.DeleteContainer(more[0]); err != nil {
		t.Fatal(err)
	}
	same("after a removal", nil, 20)
}

// Kubelet reads 16 MiB. A longer list is an error to it, which the log explains; a client that reads more gets all,
// and so does one that has it streamed.
func TestListsBeyondKubeletsLimit(t *testing.T) {
	r := newRig(t)
	const n = 1000
	ids := r.records(n, 17<<10)
	slices.Reverse(ids) // newest first
	var log bytes.Buffer
	r.Server.log = slog.New(slog.NewTextHandler(&log, nil))
	client := r.client()
	kubelet := grpc.MaxCallRecvMsgSize(kubeletTakes)
	for range 2 {
		for call, err := range map[string]error{
			"ListContainers": func() error {
				_, err := client.ListContainers(t.Context(), &cri.ListContainersRequest{}, kubelet)
				return err
			}(),
			"ListPodSandbox": func() error {
				_, err := client.ListPodSandbox(t.Context(), &cri.ListPodSandboxRequest{}, kubelet)
				return err
			}(),
		} {
			if status.Code(err) != codes.ResourceExhausted || !strings.Contains(err.Error(), "16777216") {
				t.Errorf("%s of more than 16 MiB: %v", call, err)
			}
			if warned := strings.Count(log.String(), "call="+call); warned != 1 {
				t.Errorf("%d warnings about %s, want one", warned, call)
			}
		}
	}
	list, err := client.ListContainers(t.Context(), &cri.ListContainersRequest{}, grpc.MaxCallRecvMsgSize(4*kubeletTakes))
	if err != nil || len(list.GetContainers()) != n || list.GetContainers()[0].GetId() != ids[0] {
		t.Errorf("a client that reads more gets %d containers (%v)", len(list.GetContainers()), err)
	}
	containers, err := client.StreamContainers(t.Context(), &cri.StreamContainersRequest{}, kubelet)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	messages := received(t, containers, func(m *cri.StreamContainersResponse) int {
		for _, c := range m.GetContainers() {
			got = append(got, c.GetId())
		}
		return len(m.GetContainers())
	})
	if !slices.Equal(got, ids) || messages < 17 {
		t.Errorf("%d containers streamed in %d messages, not those of the list in its order", len(got), messages)
	}
	sandboxes, err := client.StreamPodSandboxes(t.Context(), &cri.StreamPodSandboxesRequest{}, kubelet)
	if err != nil {
		t.Fatal(err)
	}
	count := 0
	messages = received(t, sandboxes, func(m *cri.StreamPodSandboxesResponse) int {
		count += len(m.GetPodSandboxes())
		return len(m.GetPodSandboxes())
	})
	if count != n || messages < 17 {
		t.Errorf("%d sandboxes streamed in %d messages", count, messages)
	}
	none := &listStream[cri.StreamContainersResponse]{ctx: t.Context()}
	if err := r.StreamContainers(&cri.StreamContainersRequest{Filter: &cri.ContainerFilter{Id: ids[0], PodSandboxId: ids[1]}}, none); err != nil || len(none.got) > 0 {
		t.Errorf("nothing streams as %v (%v)", none.got, err)
	}
}

// received reads a stream to its end and tells how many messages there were. None may be empty or too long.
func received[T any, M interface {
	*T
	proto.Message
}](t *testing.T, stream grpc.ServerStreamingClient[T], items func(M) int) (messages int) {
	t.Helper()
	for {
		m, err := stream.Recv()
		if err != nil {
			if status.Code(err) != codes.OK && err.Error() != "EOF" {
				t.Errorf("stream ended: %v", err)
			}
			return messages
		}
		messages++
		if n, size := items(m), proto.Size(M(m)); n == 0 || size > 2*partBytes {
			t.Errorf("a message of %d items in %d bytes", n, size)
		}
	}
}
