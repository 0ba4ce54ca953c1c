package store

import (
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
)

// Entry is a record as all readers share it. Neither it nor what it points to is ever changed: a change of the
// record makes another Entry. So what was made of a record stays true for as long as its Entry is found.
type Entry[R any] struct {
	Record R

	shown atomic.Pointer[[]byte]
}

// Shown is what encode makes of the record. It is made once, or more than once by callers at the same time, and
// kept; so encode must always be the same function of the record alone, and the bytes are read only.
func (e *Entry[R]) Shown(encode func(*R) ([]byte, error)) ([]byte, error) {
	if b := e.shown.Load(); b != nil {
		return *b, nil
	}
	b, err := encode(&e.Record)
	if err != nil {
		return nil, err
	}
	e.shown.Store(&b)
	return b, nil
}

// records are those of one kind. newest is copied by every change, so that a reader keeps what it was given.
type records[R record] struct {
	byID   map[string]*Entry[R]
	newest []*Entry[R] // by their times of creation, the last one first
}

type record interface {
	Sandbox | Container
	createdAt() time.Time
}

func (r Sandbox) createdAt() time.Time   { return r.CreatedAt }
func (r Container) createdAt() time.Time { return r.CreatedAt }

func newRecords[R record]() records[R] { return records[R]{byID: map[string]*Entry[R]{}} }

// add takes a new record: the newest one, or in no order those that were found at a start.
func (s *records[R]) add(id string, r R) {
	e := &Entry[R]{Record: r}
	s.byID[id] = e
	i := slices.IndexFunc(s.newest, func(other *Entry[R]) bool { return other.Record.createdAt().Before(r.createdAt()) })
	if i < 0 {
		i = len(s.newest)
	}
	s.newest = slices.Concat(s.newest[:i], []*Entry[R]{e}, s.newest[i:])
}

// change replaces a record that is there.
func (s *records[R]) change(id string, r R) {
	e := &Entry[R]{Record: r}
	i := slices.Index(s.newest, s.byID[id])
	s.byID[id] = e
	s.newest = slices.Clone(s.newest)
	s.newest[i] = e
}

func (s *records[R]) remove(id string) (R, bool) {
	e, ok := s.byID[id]
	if !ok {
		var none R
		return none, false
	}
	delete(s.byID, id)
	i := slices.Index(s.newest, e)
	s.newest = slices.Concat(s.newest[:i], s.newest[i+1:])
	return e.Record, true
}

func (s *records[R]) get(id string) (R, bool) {
	if e, ok := s.byID[id]; ok {
		return e.Record, true
	}
	var none R
	return none, false
}

// find takes an ID or an unambiguous prefix of one. NotFound otherwise.
func (s *records[R]) find(noun, id string) (R, error) {
	if e, ok := s.byID[id]; ok {
		return e.Record, nil
	}
	var found R
	matches := 0
	if id != "" && len(id) < 64 {
		for full, e := range s.byID {
			if strings.HasPrefix(full, id) {
				found, matches = e.Record, matches+1
			}
		}
	}
	if matches == 1 {
		return found, nil
	}
	var none R
	return none, fmt.Errorf("%s %q: %w", noun, id, errdefs.ErrNotFound)
}
