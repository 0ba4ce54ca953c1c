package server

import (
	"context"
	"fmt"
	"time"
)

// lateKept is how long a result that nobody waited for is kept for a retry. kubelet retries within a minute.
const lateKept = 5 * time.Minute

// calls are RunPodSandbox and CreateContainer calls under way and such results of theirs as no client has
// seen, by the name that they reserve. Guarded by Server.mu.
type calls struct {
	running map[string]*running
	late    map[string]late
}

// running is a call under way: a second one for the same name waits for it.
type running struct {
	done chan struct{}
	id   string
	err  error
	left bool // its client had gone when it ended
}

type late struct {
	id string
	at time.Time
}

// once makes sure that of calls for one name one is under way. The others wait for it and share its result, which a
// failure is not when it only came of the first one's client going away. A result that comes too late for its
// client is handed to the next call for that name, if valid still says so: a retry would be refused for
// ever, as the name is taken.
func (s *Server) once(ctx context.Context, name string, valid func(id string) bool, do func() (string, error)) (string, error) {
	for {
		s.mu.Lock()
		earlier, ok := s.calls.running[name]
		if !ok {
			break
		}
		s.mu.Unlock()
		select {
		case <-earlier.done:
		case <-ctx.Done():
			return "", fmt.Errorf("waiting for an earlier call for the same name: %w", ctx.Err())
		}
		if earlier.err != nil && earlier.left {
			continue
		}
		s.mu.Lock()
		delete(s.calls.late, name)
		s.mu.Unlock()
		return earlier.id, earlier.err
	}
	kept, ok := s.calls.late[name]
	delete(s.calls.late, name)
	run := &running{done: make(chan struct{})}
	if s.calls.running == nil {
		s.calls.running, s.calls.late = map[string]*running{}, map[string]late{}
	}
	s.calls.running[name] = run
	s.mu.Unlock()

	if ok && valid(kept.id) {
		run.id = kept.id
	} else {
		run.id, run.err = do()
	}

	s.mu.Lock()
	run.left = ctx.Err() != nil
	now := time.Now()
	for name, l := range s.calls.late {
		if now.Sub(l.at) > lateKept {
			delete(s.calls.late, name)
		}
	}
	if run.left && run.err == nil {
		s.calls.late[name] = late{run.id, now}
	}
	delete(s.calls.running, name)
	s.mu.Unlock()
	close(run.done)
	return run.id, run.err
}
