package cni

import (
	"context"
	"sync"
)

// keyedLock is a set of locks by name. Unlike a map of mutexes it forgets unused names, and waiting for
// one ends with the context: whoever holds a pod's lock may be waiting for a plugin.
type keyedLock struct {
	mu   sync.Mutex
	held map[string]*heldLock
}

type heldLock struct {
	token chan struct{} // one element while the lock is taken
	users int           // holder and waiters
}

// lock waits for the lock named key and returns the function that frees it.
func (k *keyedLock) lock(ctx context.Context, key string) (func(), error) {
	k.mu.Lock()
	l := k.held[key]
	if l == nil {
		l = &heldLock{token: make(chan struct{}, 1)}
		k.held[key] = l
	}
	l.users++
	k.mu.Unlock()

	leave := func() {
		k.mu.Lock()
		defer k.mu.Unlock()
		if l.users--; l.users == 0 {
			delete(k.held, key)
		}
	}
	select {
	case l.token <- struct{}{}:
		return func() { <-l.token; leave() }, nil
	case <-ctx.Done():
		leave()
		return nil, ctx.Err()
	}
}
