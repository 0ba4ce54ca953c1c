package server

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crivm/crivm/server/store"
	"github.com/crivm/crivm/vmruntime"
)

const (
	// slotPatience is how many times the handler's timeouts a slot has for booting and answering: it yields the CPU to
	// everything else.
	slotPatience = 3
	// slotOOMScore makes the host's kernel end slots before anything else.
	slotOOMScore = 1000
	// poolRound is how often pools are looked at without a cause: for files that changed, and boots to be tried again.
	poolRound = 5 * time.Second
	// Pause after boots that failed: it doubles with each.
	bootPause, maxBootPause = time.Second, 5 * time.Minute
)

// keepPools boots slots where there are too few, until Close.
func (s *Server) keepPools() {
	select {
	case <-s.restored: // it is known which slots there are
	case <-s.life.Done():
		return
	}
	round := time.NewTicker(poolRound)
	defer round.Stop()
	for {
		var calm <-chan time.Time
		for p, wait := s.nextBoot(); p != nil || wait > 0; p, wait = s.nextBoot() {
			if p == nil {
				calm = time.After(wait)
				break
			}
			s.goTask(func() { s.fill(p) })
		}
		select {
		case <-s.life.Done():
			return
		case <-s.warm.wake:
		case <-calm:
		case <-round.C:
			for _, p := range s.warm.pools {
				s.current(p)
			}
		}
	}
}

// nextBoot is the pool that lacks most and gets a slot now; nil for none, and then for how long there is to wait, if it is
// for pods. No more slots boot at a time than configured, and each pod that boots its own VM counts as one.
func (s *Server) nextBoot() (*pool, time.Duration) {
	s.warm.mu.Lock()
	defer s.warm.mu.Unlock()
	boots, now := s.warm.cold, time.Now()
	var next *pool
	lack := func(p *pool) int { return p.size - len(p.slots) - p.booting }
	for _, p := range s.warm.pools {
		boots += p.booting
		if lack(p) > 0 && !now.Before(p.bootAt) && (next == nil || lack(p) > lack(next)) {
			next = p
		}
	}
	if next == nil {
		s.warm.lacking = time.Time{}
		return nil, 0
	}
	if s.warm.lacking.IsZero() {
		s.warm.lacking = now
	}
	if boots >= max(s.opts.PoolBoots, 1) {
		return nil, 0
	}
	if wait := s.warm.calmLocked(s.opts.PoolCalm, now); wait > 0 {
		return nil, wait
	}
	next.booting++
	return next, 0
}

// calmPatience is for how many times PoolCalm slots are not booted although pools lack some, where pods start all the time.
const calmPatience = 5

// calmLocked is how long slots are not to boot, for the sake of pods that start; 0 or less for not at all.
func (w *warm) calmLocked(calm time.Duration, now time.Time) time.Duration {
	patience := w.lacking.Add(calmPatience * calm).Sub(now)
	if w.starting > 0 {
		return patience
	}
	return min(w.started.Add(calm).Sub(now), patience)
}

// starts counts a call that makes or starts a pod or container, until the function that it returns is called.
func (s *Server) starts() func() {
	s.warm.mu.Lock()
	defer s.warm.mu.Unlock()
	s.warm.starting++
	return func() {
		s.warm.mu.Lock()
		s.warm.starting--
		s.warm.started = time.Now()
		s.warm.mu.Unlock()
		s.warm.poke()
	}
}

// bootsCold counts a pod that boots its own VM, until the function that it returns is called.
func (s *Server) bootsCold() func() {
	s.warm.mu.Lock()
	defer s.warm.mu.Unlock()
	s.warm.cold++
	return func() {
		s.warm.mu.Lock()
		s.warm.cold--
		s.warm.mu.Unlock()
		s.warm.poke()
	}
}

// fill boots one slot for a pool that counts it as booting.
func (s *Server) fill(p *pool) {
	sl, err := s.bootSlot(p)
	s.warm.mu.Lock()
	p.booting--
	switch {
	case err == nil:
		p.failed, p.lastFail, p.bootAt = 0, "", time.Time{}
		p.slots = append(p.slots, sl)
		p.figures.booted++
	case s.life.Err() == nil:
		p.failed, p.lastFail = min(p.failed+1, 20), err.Error()
		pause := min(bootPause<<(p.failed-1), maxBootPause)
		p.bootAt = time.Now().Add(pause)
		p.figures.failed++
		s.goTask(func() {
			if s.pause(s.life, pause) {
				s.warm.poke()
			}
		})
	}
	s.warm.mu.Unlock()
	if err == nil {
		s.watchSlot(p, sl)
		s.rehearse(p, sl)
	} else if s.life.Err() == nil {
		s.log.Error("booting a slot of the warm pool", "handler", p.handlerName, "error", err)
	}
	s.warm.poke()
}

// bootSlot makes a VM without a pod: all that RunPodSandbox does before it knows the pod.
func (s *Server) bootSlot(p *pool) (_ *slot, retErr error) {
	start := time.Now()
	steps := newTimings(start)
	class, err := s.slotClass(p.handler)
	if err != nil {
		return nil, err
	}
	handler := p.handler
	handler.BootTimeout *= slotPatience
	config := &cri.PodSandboxConfig{}
	rec, err := s.reserveSandbox("", p.handlerName, handler, config, &store.Slot{Class: class})
	if err != nil {
		return nil, err
	}
	sb := s.sandbox(rec.ID)
	defer func() { // reads retErr only
		if retErr != nil {
			retErr = fmt.Errorf("slot %s: %w", rec.ID, retErr)
			s.untilDone("undoing a slot of the warm pool", rec.ID, func() error { return s.undoSlot(sb) })
		}
	}()
	rec, network, err := s.prepareNetwork(s.life, rec)
	if err != nil {
		return nil, err
	}
	if _, err := s.boot(s.life, sb, rec, handler, s.slotProcess(rec), network, steps); err != nil {
		return nil, err
	}
	rec, err = s.store.UpdateSandbox(rec.ID, func(r *store.Sandbox) error {
		r.State, r.Slot = store.SandboxPooled, &store.Slot{Class: class, Since: time.Now()}
		return nil
	})
	if err != nil {
		return nil, err
	}
	vm, err := sb.machine()
	if err != nil {
		return nil, err
	}
	s.log.Info("slot of the warm pool ready", "sandbox", rec.ID, "vmm", rec.Driver, "total", time.Since(start).Round(time.Millisecond), "steps", steps)
	return &slot{class: class, sb: sb, vm: vm, since: rec.Slot.Since, gone: make(chan struct{})}, nil
}

// slotProcess is where the VMM of a slot runs: in a cgroup beside the one of pods.
func (s *Server) slotProcess(rec store.Sandbox) vmruntime.ProcessSpec {
	parent := strings.TrimSuffix(filepath.Clean("/"+s.opts.CgroupParent), "/") + "_pool"
	if s.opts.SystemdCgroups { // not nested: a dash in its name would be
		parent = strings.ReplaceAll(strings.TrimSuffix(filepath.Base(s.opts.CgroupParent), ".slice"), "-", "_") + "_pool.slice"
	}
	return vmruntime.ProcessSpec{NetnsPath: rec.NetnsPath, UID: rec.UID, GID: rec.UID, OOMScoreAdj: ptr(slotOOMScore), Cgroup: vmruntime.Cgroup{
		Systemd: s.opts.SystemdCgroups, Parent: parent, Name: "crivm-slot-" + rec.ID, ParentWeight: s.opts.PoolWeight,
	}}
}

// watchSlot drops a slot whose VM has ended or whose guest is silent, until it is taken.
func (s *Server) watchSlot(p *pool, sl *slot) {
	s.goTask(func() {
		limit := slotPatience * p.handler.HealthTimeout
		var rounds <-chan time.Time
		if limit > 0 {
			ticker := time.NewTicker(limit * 3 / 10)
			defer ticker.Stop()
			rounds = ticker.C
		}
		for {
			why := ""
			select {
			case <-s.life.Done():
				return
			case <-sl.gone:
				return
			case <-sl.vm.Done():
				why = "dead"
			case <-rounds:
				if s.within(limit*7/10, sl.sb.ping) || s.life.Err() != nil {
					continue
				}
				why = "silent"
			}
			for !s.remove(p, sl) { // a pod is about to take it, or to put it back
				select {
				case <-s.life.Done():
					return
				case <-sl.gone:
					return
				case <-time.After(time.Second):
				}
			}
			s.log.Warn("slot of the warm pool is "+why, "sandbox", sl.sb.id, "console", sl.vm.Console())
			s.discard(p, sl.sb, why)
			return
		}
	})
}

// remove takes a slot out of the pool; false when it is not in it any more.
func (s *Server) remove(p *pool, sl *slot) bool {
	s.warm.mu.Lock()
	defer s.warm.mu.Unlock()
	i := slices.Index(p.slots, sl)
	if i < 0 {
		return false
	}
	p.slots = slices.Delete(p.slots, i, i+1)
	return true
}

// restoreSlot takes a slot of an earlier daemon over if it is healthy and still wanted. Else it is undone.
func (s *Server) restoreSlot(ctx context.Context, sb *sandbox, rec store.Sandbox) error {
	p, sl, err := s.adoptSlot(ctx, sb, rec)
	if err == nil {
		s.log.Info("slot of the warm pool adopted", "sandbox", rec.ID)
		s.watchSlot(p, sl)
		s.rehearse(p, sl)
		return nil
	}
	if ctx.Err() != nil {
		return err // this daemon ends, and has found out nothing; the next one does
	}
	s.log.Info("undoing a slot of the warm pool", "sandbox", rec.ID, "reason", err)
	if p != nil {
		s.warm.mu.Lock()
		p.figures.dropped["restart"]++
		s.warm.mu.Unlock()
	}
	if err := s.undoSlot(sb); err != nil {
		s.goTask(func() {
			s.untilDone("undoing a slot of the warm pool", rec.ID, func() error { return s.undoSlot(sb) })
		})
		return err
	}
	return nil
}

// adoptSlot returns the pool even when it fails, if there is one.
func (s *Server) adoptSlot(ctx context.Context, sb *sandbox, rec store.Sandbox) (p *pool, sl *slot, err error) {
	for _, candidate := range s.warm.pools {
		if candidate.class == rec.Slot.Class {
			p = candidate
		}
	}
	driver := s.driver(rec.Driver)
	if rec.State == store.SandboxBooting {
		return nil, nil, errors.New("crivm was restarted while it booted")
	}
	if p == nil || driver == nil {
		return p, nil, errors.New("no pool has slots like this one")
	}
	ctx, cancel := context.WithTimeout(ctx, adoptLimit)
	defer cancel()
	vm, err := driver.Reattach(ctx, rec.ID, rec.VMDir)
	if err != nil {
		return p, nil, err
	}
	sb.mu.Lock()
	sb.vm = vm
	sb.mu.Unlock()
	agent, err := sb.client(ctx)
	if err != nil {
		return p, nil, vmFailure(vm, err)
	}
	if agent.Info().GetSandboxReady() {
		return p, nil, fmt.Errorf("its guest has been made a pod: %w", errdefs.ErrFailedPrecondition)
	}
	sl = &slot{class: rec.Slot.Class, sb: sb, vm: vm, since: rec.Slot.Since, gone: make(chan struct{})}
	s.warm.mu.Lock()
	defer s.warm.mu.Unlock()
	if len(p.slots) >= p.size {
		return p, nil, errors.New("the pool is full")
	}
	p.slots = append(p.slots, sl)
	slices.SortFunc(p.slots, func(a, b *slot) int { return a.since.Compare(b.since) })
	return p, sl, nil
}
