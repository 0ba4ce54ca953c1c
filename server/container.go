package server

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crivm/crivm/agentproto"
	"github.com/crivm/crivm/server/store"
)

// Reasons of an exit, as users know them.
const (
	reasonCompleted  = "Completed"
	reasonError      = "Error"
	reasonOOMKilled  = "OOMKilled"
	reasonStartError = "StartError"
	reasonUnknown    = "ContainerStatusUnknown"
)

// drainLimit bounds waiting for the last output of a container whose process has ended.
const drainLimit = 30 * time.Second

// container is the live side of a container record.
type container struct {
	id     string
	op     opLock        // held by verbs on it
	exited chan struct{} // closed when the exit is recorded
	once   sync.Once

	mu     sync.Mutex // guards the fields below
	output *output    // nil until started, or when it had exited before this daemon began
	stop   stopState
}

// container finds the live side of a record. That of a container without a record is an ended one, of the caller's own.
func (s *Server) container(id string) *container {
	s.mu.Lock()
	defer s.mu.Unlock()
	c, ok := s.containers[id]
	if !ok {
		c = &container{id: id, op: newOpLock(), exited: make(chan struct{})}
		if _, err := s.store.Container(id); err == nil {
			s.containers[id] = c
		} else {
			c.once.Do(func() { close(c.exited) })
		}
	}
	return c
}

func (s *Server) forgetContainer(id string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.containers, id)
}

// visibleContainer is a container that clients may see.
func (s *Server) visibleContainer(id string) (store.Container, error) {
	rec, err := s.store.Container(id)
	if err == nil && rec.State == store.ContainerCreating {
		err = notFound("container", id)
	}
	return rec, err
}

// runningContainer is one that can be exec'ed into or attached to.
func (s *Server) runningContainer(id string) (store.Container, error) {
	rec, err := s.visibleContainer(id)
	if err == nil && rec.State != store.ContainerRunning {
		err = fmt.Errorf("container %s is %s, not RUNNING: %w", rec.ID, rec.State, errdefs.ErrFailedPrecondition)
	}
	return rec, err
}

// containerClient is the agent of a container's sandbox.
func (s *Server) containerClient(ctx context.Context, rec store.Container) (*agentproto.Client, error) {
	return s.sandbox(rec.SandboxID).client(ctx)
}

// exitRecord is how a container ended.
type exitRecord struct {
	at              time.Time
	code            int32
	reason, message string
}

// exited records the end of a container. The first record stays; a container without a record has no end.
func (s *Server) exited(id string, e exitRecord) error {
	rec, err := s.store.UpdateContainer(id, func(r *store.Container) error {
		if r.State == store.ContainerExited {
			return nil
		}
		r.State, r.FinishedAt, r.ExitCode, r.Reason, r.Message = store.ContainerExited, e.at, e.code, e.reason, e.message
		return nil
	})
	if errdefs.IsNotFound(err) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("recording the exit of container %s: %w", id, err)
	}
	c := s.container(id)
	c.once.Do(func() { close(c.exited) })
	s.log.Info("container exited", "container", id, "code", rec.ExitCode, "reason", rec.Reason)
	return nil
}

// watchContainer follows a started container: its output into the log, its exit into the record, the last
// line on disk before EXITED is visible. It ends with the container, its VM or the server.
func (s *Server) watchContainer(rec store.Container, out *output) {
	sb := s.sandbox(rec.SandboxID)
	s.goTask(func() {
		end, err := s.awaitExit(sb, rec.ID)
		if err != nil {
			out.close()
			return // the VM's end records it, or the next daemon does
		}
		drained := time.NewTimer(drainLimit)
		defer drained.Stop()
		vm, err := sb.machine()
		if err == nil {
			select {
			case <-out.done:
			case <-vm.Done():
			case <-s.life.Done():
				out.close()
				return
			case <-drained.C:
				s.log.Warn("output of an exited container did not end in time", "container", rec.ID, "limit", drainLimit)
			}
		}
		out.close()
		if rec.TerminationLog != "" && end.GetTerminationLog() != nil {
			if err := writeTerminationLog(rec.TerminationLog, end.GetTerminationLog()); err != nil {
				s.log.Error("termination log of a container", "container", rec.ID, "error", err)
			}
		}
		exit := end.GetExit()
		e := exitRecord{at: time.Unix(0, exit.GetUnixNanos()), code: exit.GetCode(), reason: reasonCompleted}
		if e.code != 0 {
			e.reason = reasonError
		}
		if exit.GetOomKilled() {
			e.reason, e.code = reasonOOMKilled, 137
		}
		if now := time.Now(); e.at.After(now) || e.at.Before(rec.StartedAt) { // the guest's clock is the guest's word
			e.at = now
		}
		s.untilDone("recording an exit", rec.ID, func() error { return s.exited(rec.ID, e) })
	})
}

// awaitExit asks the agent, over as many connections as it takes.
func (s *Server) awaitExit(sb *sandbox, id string) (*agentproto.WaitResponse, error) {
	for {
		client, err := sb.client(s.life)
		if err != nil {
			if s.life.Err() != nil {
				return nil, err
			}
			if _, dead := sb.machine(); dead != nil {
				return nil, err
			}
			if !s.pause(s.life, reconnectPause) {
				return nil, s.life.Err()
			}
			continue
		}
		resp, err := client.Wait(s.life, &agentproto.WaitRequest{ContainerId: id})
		switch {
		case err == nil:
			return resp, nil
		case s.life.Err() != nil:
			return nil, err
		case errdefs.IsNotFound(err):
			return &agentproto.WaitResponse{Exit: &agentproto.Exit{Code: 255, UnixNanos: time.Now().UnixNano()}}, nil // the guest has lost it
		}
		if !s.pause(s.life, reconnectPause) {
			return nil, s.life.Err()
		}
	}
}

// reconnectPause is between tries to reach an agent whose VM lives.
const reconnectPause = 100 * time.Millisecond

// pause waits; false when ctx ended.
func (s *Server) pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// containerName is what must be unique on the node.
func containerName(m *cri.ContainerMetadata, pod *cri.PodSandboxMetadata) string {
	return strings.Join([]string{m.GetName(), pod.GetName(), pod.GetNamespace(), pod.GetUid(), fmt.Sprint(m.GetAttempt())}, "_")
}
