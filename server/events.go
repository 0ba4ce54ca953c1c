package server

import (
	"fmt"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crivm/crivm/server/store"
)

// eventQueue is how many events may wait for one subscriber. A busy node makes some tens a second.
const eventQueue = 1024

// events hands every transition of a visible sandbox or container to all subscribers: once, and in the order in
// which the records change, which is also what status and list calls show.
type events struct {
	mu          sync.Mutex // guards the fields below; nothing waits while it is held
	subscribers map[*subscriber]bool
	ended       bool
	last        int64 // time of the last event, ns since the epoch
}

// subscriber is one GetContainerEvents call. Its queue is closed when it gets no more; err says why.
type subscriber struct {
	queue chan *cri.ContainerEventResponse
	err   error
}

// GetContainerEvents streams the transitions of sandboxes and containers from now on, each with the statuses of the
// pod and its containers as they were at that moment. Headers are sent when the subscription stands. A sandbox is
// told of with its own ID, as CREATED and STARTED when it is READY, STOPPED when it is NOTREADY, DELETED.
//
// A subscriber that reads too slowly is not waited for: what was queued is delivered, and then the call ends with
// ResourceExhausted: there are events that it will never see, so it must list anew.
func (s *Server) GetContainerEvents(_ *cri.GetEventsRequest, stream grpc.ServerStreamingServer[cri.ContainerEventResponse]) error {
	sub := s.events.subscribe()
	defer s.events.unsubscribe(sub)
	if err := stream.SendHeader(metadata.MD{}); err != nil {
		return err
	}
	for {
		select {
		case event, more := <-sub.queue:
			if !more {
				return sub.err
			}
			if err := stream.Send(event); err != nil {
				return err
			}
		case <-stream.Context().Done():
			return stream.Context().Err()
		}
	}
}

// EndStreams ends the calls that would go on for ever, for a gRPC server that stops when its calls have ended.
func (s *Server) EndStreams() { s.events.end() }

func (e *events) subscribe() *subscriber {
	e.mu.Lock()
	defer e.mu.Unlock()
	sub := &subscriber{queue: make(chan *cri.ContainerEventResponse, eventQueue)}
	if e.ended {
		sub.close(errStopping)
		return sub
	}
	if e.subscribers == nil {
		e.subscribers = map[*subscriber]bool{}
	}
	e.subscribers[sub] = true
	return sub
}

func (e *events) unsubscribe(sub *subscriber) {
	e.mu.Lock()
	defer e.mu.Unlock()
	delete(e.subscribers, sub)
}

var errStopping = fmt.Errorf("crivm is stopping: %w", errdefs.ErrUnavailable)

func (e *events) end() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.ended = true
	for sub := range e.subscribers {
		sub.close(errStopping)
	}
	clear(e.subscribers)
}

// close is called once, with events.mu held or before anybody else knows the subscriber.
func (sub *subscriber) close(err error) {
	sub.err = err
	close(sub.queue)
}

// wanted tells whether anybody listens; without, no event is made.
func (e *events) wanted() bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return len(e.subscribers) > 0
}

// publish queues an event for everybody and waits for nobody.
func (e *events) publish(event *cri.ContainerEventResponse) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.last = max(time.Now().UnixNano(), e.last+1)
	event.CreatedAt = e.last
	for sub := range e.subscribers {
		select {
		case sub.queue <- event:
		default:
			delete(e.subscribers, sub)
			sub.close(fmt.Errorf("events were lost because they were read too slowly; list pods and containers anew, then subscribe again: %w", errdefs.ErrResourceExhausted))
		}
	}
}

// observers turn changes of records into events.
func (s *Server) observers() store.Observers {
	return store.Observers{Sandbox: s.sandboxChanged, Container: s.containerChanged}
}

func (s *Server) sandboxChanged(before, after *store.Sandbox) {
	if !s.events.wanted() {
		return
	}
	visible := func(r *store.Sandbox) bool { return r != nil && r.State.Shown() }
	if visible(after) && !visible(before) {
		s.publish(cri.ContainerEventType_CONTAINER_CREATED_EVENT, after.ID, *after)
		if after.State == store.SandboxReady {
			s.publish(cri.ContainerEventType_CONTAINER_STARTED_EVENT, after.ID, *after)
		}
	}
	if after != nil && after.State == store.SandboxNotReady && before != nil && before.State != store.SandboxNotReady {
		s.publish(cri.ContainerEventType_CONTAINER_STOPPED_EVENT, after.ID, *after)
	}
	if visible(before) && after == nil {
		s.publish(cri.ContainerEventType_CONTAINER_DELETED_EVENT, before.ID, *before)
	}
}

func (s *Server) containerChanged(before, after *store.Container) {
	if !s.events.wanted() {
		return
	}
	var was, is store.ContainerState
	rec := before
	if before != nil {
		was = before.State
	}
	if after != nil {
		is, rec = after.State, after
	}
	var kind cri.ContainerEventType
	switch {
	case was == is || is == store.ContainerCreating || is == "" && was == store.ContainerCreating:
		return
	case is == store.ContainerCreated:
		kind = cri.ContainerEventType_CONTAINER_CREATED_EVENT
	case is == store.ContainerRunning:
		kind = cri.ContainerEventType_CONTAINER_STARTED_EVENT
	case is == store.ContainerExited:
		kind = cri.ContainerEventType_CONTAINER_STOPPED_EVENT
	default:
		kind = cri.ContainerEventType_CONTAINER_DELETED_EVENT
	}
	sandboxRec, err := s.store.Sandbox(rec.SandboxID)
	if err != nil { // its records are deleted after its containers'
		s.log.Error("event of a container without a sandbox", "container", rec.ID, "error", err)
		return
	}
	s.publish(kind, rec.ID, sandboxRec)
}

func (s *Server) publish(kind cri.ContainerEventType, id string, sandboxRec store.Sandbox) {
	s.events.publish(&cri.ContainerEventResponse{
		ContainerId: id, ContainerEventType: kind,
		PodSandboxStatus: sandboxStatus(sandboxRec), ContainersStatuses: s.containersStatuses(sandboxRec.ID),
	})
}

// containersStatuses are those of a sandbox's visible containers, newest first; never nil.
func (s *Server) containersStatuses(sandboxID string) []*cri.ContainerStatus {
	statuses := []*cri.ContainerStatus{}
	for _, rec := range s.store.Containers(sandboxID) {
		if rec.State != store.ContainerCreating {
			statuses = append(statuses, containerStatus(rec))
		}
	}
	return statuses
}
