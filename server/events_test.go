package server

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// eventStream is the server's end of a GetContainerEvents call.
type eventStream struct {
	grpc.ServerStream
	ctx        context.Context
	subscribed chan struct{}
	hold       chan struct{} // Send waits for it, if there is one

	mu  sync.Mutex
	got []*cri.ContainerEventResponse
}

func (e *eventStream) Context() context.Context { return e.ctx }

func (e *eventStream) SendHeader(metadata.MD) error { close(e.subscribed); return nil }

func (e *eventStream) Send(event *cri.ContainerEventResponse) error {
	if e.hold != nil {
		<-e.hold
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	e.got = append(e.got, event)
	return nil
}

func (e *eventStream) events() []*cri.ContainerEventResponse {
	e.mu.Lock()
	defer e.mu.Unlock()
	return slices.Clone(e.got)
}

// subscribe starts a call; its error comes when it ends.
func (r *rig) subscribe(ctx context.Context, hold chan struct{}) (*eventStream, <-chan error) {
	stream := &eventStream{ctx: ctx, subscribed: make(chan struct{}), hold: hold}
	ended := make(chan error, 1)
	go func() { ended <- r.GetContainerEvents(&cri.GetEventsRequest{}, stream) }()
	<-stream.subscribed
	return stream, ended
}

func (e *eventStream) await(t *testing.T, n int) []*cri.ContainerEventResponse {
	t.Helper()
	for limit := time.Now().Add(20 * time.Second); ; time.Sleep(time.Millisecond) {
		if got := e.events(); len(got) >= n || time.Now().After(limit) {
			return got
		}
	}
}

func TestEvents(t *testing.T) {
	r := newRig(t)
	ctx, cancel := context.WithCancel(t.Context())
	first, firstEnded := r.subscribe(ctx, nil)
	second, secondEnded := r.subscribe(t.Context(), nil)
	pod := r.runPod("a")
	exits := r.run(pod, "exits", "exit 3")
	r.exit(exits)
	failed := r.create(pod, "fails", "")
	if _, err := r.StopContainer(t.Context(), &cri.StopContainerRequest{ContainerId: failed}); err != nil {
		t.Fatal(err)
	}
	sleeps := r.run(pod, "sleeps", "exec sleep 1000")
	if _, err := r.RemoveContainer(t.Context(), &cri.RemoveContainerRequest{ContainerId: exits}); err != nil {
		t.Fatal(err)
	}
	vm, err := r.sandbox(pod).machine()
	if err != nil {
		t.Fatal(err)
	}
	if err := vm.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	r.exit(sleeps)
	for range 2 {
		if _, err := r.RemovePodSandbox(t.Context(), &cri.RemovePodSandboxRequest{PodSandboxId: pod}); err != nil {
			t.Fatal(err)
		}
	}
	names := map[string]string{pod: "pod", exits: "exits", failed: "fails", sleeps: "sleeps"}
	want := []string{
		"pod CREATED 0", "pod STARTED 0", "exits CREATED 1", "exits STARTED 1", "exits STOPPED 1", "fails CREATED 2", "fails STOPPED 2",
		"sleeps CREATED 3", "sleeps STARTED 3", "exits DELETED 2", "pod STOPPED 2", "sleeps STOPPED 2",
		"sleeps DELETED 1", "fails DELETED 0", "pod DELETED 0",
	}
	for i, stream := range []*eventStream{first, second} {
		var got []string
		last := int64(0)
		for _, e := range stream.await(t, len(want)) {
			kind := strings.TrimSuffix(strings.TrimPrefix(e.ContainerEventType.String(), "CONTAINER_"), "_EVENT")
			got = append(got, fmt.Sprintf("%s %s %d", names[e.ContainerId], kind, len(e.ContainersStatuses)))
			if e.PodSandboxStatus.GetId() != pod || e.PodSandboxStatus.GetMetadata().GetName() != "a" || e.ContainersStatuses == nil || e.CreatedAt <= last {
				t.Errorf("event is %v", e)
			}
			last = e.CreatedAt
			for _, c := range e.ContainersStatuses {
				if c.Id == exits && e.ContainerId == exits && kind == "STOPPED" && (c.ExitCode != 3 || c.State != cri.ContainerState_CONTAINER_EXITED) {
					t.Errorf("status in the event of an exit is %v", c)
				}
			}
		}
		if !slices.Equal(got, want) {
			t.Errorf("subscriber %d: events are\n%q, want\n%q", i, got, want)
		}
	}
	cancel()
	if err := <-firstEnded; err != context.Canceled {
		t.Errorf("a cancelled subscription ends with %v", err)
	}
	r.EndStreams()
	if err := <-secondEnded; !errdefs.IsUnavailable(err) {
		t.Errorf("a subscription of a stopping daemon ends with %v", err)
	}
	if err := r.GetContainerEvents(&cri.GetEventsRequest{}, &eventStream{ctx: t.Context(), subscribed: make(chan struct{})}); !errdefs.IsUnavailable(err) {
		t.Errorf("subscribing to a stopping daemon: %v", err)
	}
}

func TestSlowSubscriberIsCutOff(t *testing.T) {
	r := newRig(t)
	hold := make(chan struct{})
	slow, slowEnded := r.subscribe(t.Context(), hold)
	fast, _ := r.subscribe(t.Context(), nil)
	defer r.EndStreams()
	for i := range 2 * eventQueue { // nothing waits
		r.events.publish(&cri.ContainerEventResponse{ContainerId: fmt.Sprint(i)})
		if fast.await(t, i+1); i == 10 && len(slow.events()) > 0 {
			t.Error("the slow one is not slow")
		}
	}
	if got := fast.events(); len(got) != 2*eventQueue {
		t.Errorf("the fast one has %d events of %d", len(got), 2*eventQueue)
	}
	close(hold)
	if err := <-slowEnded; !errdefs.IsResourceExhausted(err) || !strings.Contains(err.Error(), "list pods and containers anew") {
		t.Errorf("the slow one's error is %v", err)
	}
	got := slow.events()
	if len(got) < eventQueue || len(got) > eventQueue+1 {
		t.Errorf("the slow one has %d events, the queue holds %d", len(got), eventQueue)
	}
	for i, e := range got {
		if e.ContainerId != fmt.Sprint(i) {
			t.Fatalf("event %d is %s", i, e.ContainerId)
		}
	}
}

// What is not visible makes no event.
func TestEventsOfFailures(t *testing.T) {
	r := newRig(t)
	stream, _ := r.subscribe(t.Context(), nil)
	defer r.EndStreams()
	r.net.fail = errdefs.ErrUnavailable
	if _, err := r.RunPodSandbox(t.Context(), &cri.RunPodSandboxRequest{Config: r.podConfig("a")}); err == nil {
		t.Fatal("no error")
	}
	r.net.fail = nil
	pod := r.runPod("a")
	_, err := r.CreateContainer(t.Context(), &cri.CreateContainerRequest{PodSandboxId: pod, Config: &cri.ContainerConfig{
		Metadata: &cri.ContainerMetadata{Name: "c"}, Image: &cri.ImageSpec{Image: "image"}, Mounts: []*cri.Mount{{ContainerPath: "/x", HostPath: "/nowhere/at/all"}},
	}})
	if err == nil {
		t.Fatal("no error")
	}
	id := r.create(pod, "d", "exit 0")
	if got := stream.await(t, 3); len(got) != 3 || got[0].ContainerId != pod || got[1].ContainerId != pod || got[2].ContainerId != id {
		t.Errorf("events are %v", got)
	}
}

func TestSandboxStatusHasItsContainers(t *testing.T) {
	r := newRig(t)
	pod := r.runPod("a")
	before := time.Now().UnixNano()
	id := r.create(pod, "c", "exit 0")
	r.create(r.runPod("b"), "other", "exit 0")
	resp, err := r.PodSandboxStatus(t.Context(), &cri.PodSandboxStatusRequest{PodSandboxId: pod})
	if err != nil {
		t.Fatal(err)
	}
	if len(resp.ContainersStatuses) != 1 || resp.ContainersStatuses[0].Id != id || resp.Timestamp <= before || resp.Timestamp > time.Now().UnixNano() {
		t.Errorf("response is %v", resp)
	}
}

func TestCheckpointsAreRefused(t *testing.T) {
	s := &Server{}
	_, container := s.CheckpointContainer(t.Context(), nil)
	_, pod := s.CheckpointPod(t.Context(), nil)
	_, restored := s.RestorePod(t.Context(), nil)
	for name, err := range map[string]error{"CheckpointContainer": container, "CheckpointPod": pod, "RestorePod": restored} {
		if !errdefs.IsNotImplemented(err) || !strings.HasPrefix(err.Error(), name+": ") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// Over a real connection whose client does not read, nothing waits either, and the client learns that it must list.
func TestSlowSubscriberOverGRPC(t *testing.T) {
	s := &Server{log: slog.Default()}
	listener, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	calls := grpc.NewServer(grpc.StreamInterceptor(StreamInterceptor))
	cri.RegisterRuntimeServiceServer(calls, s)
	served := make(chan error, 1)
	go func() { served <- calls.Serve(listener) }()
	defer func() {
		calls.Stop()
		if err := <-served; err != nil {
			t.Error(err)
		}
	}()
	conn, err := grpc.NewClient("unix://"+listener.Addr().String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	stream, err := cri.NewRuntimeServiceClient(conn).GetContainerEvents(t.Context(), &cri.GetEventsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Header(); err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	large := &cri.PodSandboxStatus{Annotations: map[string]string{"a": strings.Repeat("x", 1<<10)}}
	for i := range 20 * eventQueue {
		s.events.publish(&cri.ContainerEventResponse{ContainerId: fmt.Sprint(i), PodSandboxStatus: large})
	}
	if took := time.Since(start); took > 10*time.Second {
		t.Errorf("publishing took %s", took)
	}
	for i := 0; ; i++ {
		e, err := stream.Recv()
		if err != nil {
			if status.Code(err) != codes.ResourceExhausted || i < eventQueue || i >= 20*eventQueue {
				t.Errorf("after %d events: %v", i, err)
			}
			return
		}
		if e.ContainerId != fmt.Sprint(i) {
			t.Fatalf("event %d is %s", i, e.ContainerId)
		}
	}
}
