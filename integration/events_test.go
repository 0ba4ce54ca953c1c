//go:build integration

package integration

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crivm/crivm/integration/node"
)

func dial(t *testing.T, n *node.Node) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient(n.Socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// One pod's life as an event subscriber sees it; other tests' pods may be told of too.
func TestEventsOfAPod(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	client := cri.NewRuntimeServiceClient(dial(t, shared))
	stream, err := client.GetContainerEvents(ctx, &cri.GetEventsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Header(); err != nil { // the subscription stands
		t.Fatal(err)
	}
	p := runPod(t, shared)
	id := p.start("exit 7")
	p.wait(id)
	if err := shared.Runtime.RemoveContainer(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	second := p.start("exec sleep 1000")
	p.remove()
	names := map[string]string{p.id: "pod", id: "first", second: "second"}
	var got []string
	last := int64(0)
	for len(got) == 0 || got[len(got)-1] != "pod DELETED" {
		e, err := stream.Recv()
		if err != nil {
			t.Fatalf("after %q: %v", got, err)
		}
		if names[e.ContainerId] == "" {
			continue
		}
		kind := strings.TrimSuffix(strings.TrimPrefix(e.ContainerEventType.String(), "CONTAINER_"), "_EVENT")
		got = append(got, names[e.ContainerId]+" "+kind)
		if e.PodSandboxStatus.GetId() != p.id || e.PodSandboxStatus.GetNetwork().GetIp() == "" || e.CreatedAt <= last {
			t.Errorf("event is %v", e)
		}
		last = e.CreatedAt
		if got[len(got)-1] == "first STOPPED" && (len(e.ContainersStatuses) != 1 || e.ContainersStatuses[0].ExitCode != 7) {
			t.Errorf("event of an exit is %v", e)
		}
	}
	want := []string{
		"pod CREATED", "pod STARTED", "first CREATED", "first STARTED", "first STOPPED", "first DELETED",
		"second CREATED", "second STARTED", "second STOPPED", "pod STOPPED", "second DELETED", "pod DELETED",
	}
	if !slices.Equal(got, want) {
		t.Errorf("events are %q, want %q", got, want)
	}
}

// The streamed lists are the lists.
func TestStreamedLists(t *testing.T) {
	p := runPod(t, shared)
	for range 2 {
		p.start("exec sleep 1000")
	}
	client := cri.NewRuntimeServiceClient(dial(t, shared))
	ctx := testContext(t, time.Minute)
	list, err := shared.Runtime.ListContainers(ctx, &cri.ContainerFilter{PodSandboxId: p.id})
	if err != nil {
		t.Fatal(err)
	}
	containers, err := client.StreamContainers(ctx, &cri.StreamContainersRequest{Filter: &cri.ContainerFilter{PodSandboxId: p.id}})
	if err != nil {
		t.Fatal(err)
	}
	var want, got []string
	for _, c := range list {
		want = append(want, c.String())
	}
	for {
		m, err := containers.Recv()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range m.Containers {
			got = append(got, c.String())
		}
	}
	if len(got) != 2 || !slices.Equal(got, want) {
		t.Errorf("streamed are %q, listed %q", got, want)
	}
	sandboxes, err := client.StreamPodSandboxes(ctx, &cri.StreamPodSandboxesRequest{Filter: &cri.PodSandboxFilter{Id: p.id}})
	if err != nil {
		t.Fatal(err)
	}
	if m, err := sandboxes.Recv(); err != nil || len(m.PodSandboxes) != 1 || m.PodSandboxes[0].Id != p.id {
		t.Errorf("streamed is %v (%v)", m, err)
	}
	if m, err := sandboxes.Recv(); err != io.EOF {
		t.Errorf("after the last: %v (%v)", m, err)
	}
	images, err := cri.NewImageServiceClient(dial(t, shared)).StreamImages(ctx, &cri.StreamImagesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if m, err := images.Recv(); err != nil || len(m.Images) < 2 {
		t.Errorf("streamed are %v (%v)", m, err)
	}
	if _, err := client.CheckpointContainer(ctx, &cri.CheckpointContainerRequest{}); err == nil || !strings.Contains(fmt.Sprint(err), "Unimplemented") || !strings.Contains(err.Error(), "VM") {
		t.Errorf("CheckpointContainer: %v", err)
	}
}
