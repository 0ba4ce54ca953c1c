package store

import (
	"fmt"

	"github.com/containerd/errdefs"
)

// ClaimSandbox makes a POOLED sandbox a pod's: it gets the pod's name and a creation time of its own, and what change
// sets. AlreadyExists, naming the holder's ID, when the name is taken; FailedPrecondition when it is not POOLED (any
// more).
func (s *Store) ClaimSandbox(id, name string, change func(*Sandbox)) (Sandbox, error) {
	s.write.Lock()
	defer s.write.Unlock()
	r, err := s.Sandbox(id)
	if err != nil {
		return Sandbox{}, err
	}
	before := r
	if r.State != SandboxPooled {
		return Sandbox{}, fmt.Errorf("sandbox %s is %s, not POOLED: %w", r.ID, r.State, errdefs.ErrFailedPrecondition)
	}
	if holder, taken := s.nameHolder("s/" + name); taken {
		return Sandbox{}, fmt.Errorf("sandbox name %q is reserved for %s: %w", name, holder, errdefs.ErrAlreadyExists)
	}
	change(&r)
	r.Name, r.State, r.CreatedAt = name, SandboxCreating, s.nextCreated()
	if err := s.put(bucketSandboxes, r.ID, r); err != nil {
		return Sandbox{}, err
	}
	s.mu.Lock()
	delete(s.names, sandboxName(before))
	s.sandboxes.remove(r.ID)
	s.sandboxes.add(r.ID, r) // it is the newest now
	s.names[sandboxName(r)] = r.ID
	s.mu.Unlock()
	s.sandboxChanged(&before, &r)
	return r, nil
}
