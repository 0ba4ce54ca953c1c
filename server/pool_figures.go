package server

import (
	"maps"
	"time"
)

// poolCounts are what a pool has done since the daemon started. Guarded by warm.mu.
type poolCounts struct {
	hits           uint64
	misses         map[string]uint64 // by reason
	booted, failed uint64
	dropped        map[string]uint64 // by reason
	lastAge        time.Duration     // of the slot that was taken last, when it was
}

func newPoolCounts() poolCounts {
	return poolCounts{misses: map[string]uint64{}, dropped: map[string]uint64{}}
}

// PoolFigures are the state of a warm pool, for Status and metrics.
type PoolFigures struct {
	Handlers      []string          `json:"handlers"` // that share it
	Size          int               `json:"size"`
	Ready         int               `json:"ready"`
	Booting       int               `json:"booting"`
	Rehearsed     int               `json:"rehearsed"` // of those that are ready
	Hits          uint64            `json:"hits"`
	Misses        map[string]uint64 `json:"misses"` // pods that booted their own VM, by reason
	Booted        uint64            `json:"booted"`
	BootsFailed   uint64            `json:"bootsFailed"`
	LastFailure   string            `json:"lastFailure,omitempty"`
	Dropped       map[string]uint64 `json:"dropped"` // slots that no pod got, by reason
	OldestSeconds float64           `json:"oldestSeconds"`
	LastAge       float64           `json:"lastTakenAgeSeconds"`
}

// PoolFigures tells how the pools are doing. It never waits for a guest.
func (s *Server) PoolFigures() []PoolFigures {
	s.warm.mu.Lock()
	defer s.warm.mu.Unlock()
	all := make([]PoolFigures, 0, len(s.warm.pools))
	for _, p := range s.warm.pools {
		f := PoolFigures{
			Handlers: p.handlers, Size: p.size, Ready: len(p.slots), Booting: p.booting, Hits: p.figures.hits, Misses: maps.Clone(p.figures.misses),
			Booted: p.figures.booted, BootsFailed: p.figures.failed, LastFailure: p.lastFail, Dropped: maps.Clone(p.figures.dropped), LastAge: p.figures.lastAge.Seconds(),
		}
		for _, sl := range p.slots {
			if sl.rehearsed {
				f.Rehearsed++
			}
		}
		if len(p.slots) > 0 {
			f.OldestSeconds = time.Since(p.slots[0].since).Seconds()
		}
		all = append(all, f)
	}
	return all
}

func (s *Server) hit(p *pool, sl *slot) {
	s.warm.mu.Lock()
	p.figures.hits++
	p.figures.lastAge = time.Since(sl.since)
	s.observed.ages.WithLabelValues(handlersLabel(p.handlers)).Observe(p.figures.lastAge.Seconds())
	close(sl.gone)
	s.warm.mu.Unlock()
	s.warm.poke()
}

func (s *Server) miss(p *pool, reason string) {
	s.warm.mu.Lock()
	defer s.warm.mu.Unlock()
	p.figures.misses[reason]++
}
