package server

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crivm/crivm/agentproto"
	"github.com/crivm/crivm/server/store"
	"github.com/crivm/crivm/vmruntime"
)

// The warm pool: slots are VMs that were booted before there is a pod for them, complete with network namespace, tap,
// scratch disk and an agent that answers. A slot is a sandbox record like a pod's, in the states BOOTING and POOLED, so
// all that knows records (restarts, garbage collection, user ids) knows slots. A pod that takes one claims the record:
// the slot's ID becomes the pod's, and nothing is renamed.

const (
	// slotAnswer bounds how long a slot that was taken may be silent, for a handler without a health timeout.
	slotAnswer = 10 * time.Second
	// noGrowth is how long pods that need a bigger VM boot their own, after a slot could not be made bigger.
	noGrowth = 10 * time.Minute
)

// Reasons why a pod boots its own VM although there is a pool.
const (
	missEmpty   = "empty"   // no slot is ready
	missSmaller = "smaller" // the pod asks for less than what slots have booted with, which no VM gives back
	missLarger  = "larger"  // the pod asks for more than what a slot can grow to
	missGrowth  = "growth"  // a slot could not grow lately
	missChanged = "changed" // kernel or initramfs are not what the slots have booted
)

// warm is all pools of the node.
type warm struct {
	wake chan struct{} // there may be something to do; holds 1

	mu        sync.Mutex // guards the rest, and the pools; never held over I/O
	pools     []*pool
	byHandler map[string]*pool
	cold      int       // pods that boot their own VM at the moment
	starting  int       // calls under way that make or start pods and containers
	started   time.Time // when the last of them ended
	lacking   time.Time // since when pools have had too few slots; zero: they have enough
}

// pool is the slots of handlers whose VMs are alike.
type pool struct {
	handlers    []string
	handlerName string // the one that slots are booted as
	handler     Handler
	size        int

	class    string
	slots    []*slot // ready; the oldest first
	booting  int
	failed   int       // boots in a row
	bootAt   time.Time // of the next boot, after one that failed
	growAt   time.Time // before then slots are not made bigger
	lastFail string
	noShow   bool // a rehearsal has failed, and slots are left as they booted
	figures  poolCounts
}

// slot is one that waits for a pod.
type slot struct {
	class string
	sb    *sandbox
	vm    vmruntime.VM
	since time.Time
	gone  chan struct{} // closed when it is no longer in the pool

	rehearsed bool // its guest has done for once what a pod will have it do; guarded by warm.mu
}

// makePools groups handlers by what their VMs are made of.
func (s *Server) makePools() {
	s.warm.wake, s.warm.byHandler = make(chan struct{}, 1), map[string]*pool{}
	names := make([]string, 0, len(s.opts.Handlers))
	for name := range s.opts.Handlers {
		names = append(names, name)
	}
	slices.Sort(names)
	byClass := map[string]*pool{}
	for _, name := range names {
		handler := s.opts.Handlers[name]
		class, err := s.slotClass(handler)
		if err != nil {
			s.log.Warn("no warm pool for a handler", "handler", name, "error", err)
			continue
		}
		p := byClass[class]
		if p == nil {
			p = &pool{handlerName: name, handler: handler, class: class, figures: newPoolCounts()}
			byClass[class] = p
		}
		p.handlers, p.size = append(p.handlers, name), max(p.size, handler.PoolSize)
		s.warm.byHandler[name] = p
	}
	for _, name := range names {
		if p := s.warm.byHandler[name]; p != nil && p.size == 0 {
			delete(s.warm.byHandler, name)
		} else if p != nil && p.handlerName == name {
			s.warm.pools = append(s.warm.pools, p)
		}
	}
}

// slotClass names what a handler's VMs are made of, files by what tells that they are the same ones. Slots of another
// class are of no use.
func (s *Server) slotClass(h Handler) (string, error) {
	type file struct {
		Path           string
		Dev, Inode     uint64
		Size, Modified int64
	}
	var files []file
	for _, path := range []string{h.Kernel, h.Initrd} {
		var st unix.Stat_t
		if err := unix.Stat(path, &st); err != nil {
			return "", fmt.Errorf("guest image %s: %w", path, err)
		}
		files = append(files, file{path, st.Dev, st.Ino, st.Size, st.Mtim.Nano()})
	}
	text, err := json.Marshal([]any{
		s.opts.Version, h.Driver.Name(), h.Revision, h.Acceleration, files, h.Cmdline, h.VCPUs, h.MaxVCPUs, h.Memory, h.MaxMemory, h.ScratchBytes,
		s.opts.UIDCount > 0, s.opts.SystemdCgroups,
	})
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("%x", sha256.Sum256(text))[:16], nil
}

// takeSlot makes a slot the pod's, if there is one that fits: its record is CREATING then, with the pod's name. Else ok
// is false, and the pod boots its own VM. AlreadyExists as for any record.
func (s *Server) takeSlot(ctx context.Context, name, handlerName string, handler Handler, config *cri.PodSandboxConfig) (rec store.Sandbox, ok bool, _ error) {
	p := s.warm.byHandler[handlerName]
	if p == nil {
		return store.Sandbox{}, false, nil
	}
	reason := s.unfit(p, vmSize(handler, config))
	if reason == "" && !s.current(p) {
		reason = missChanged
	}
	for reason == "" {
		sl := s.pick(p)
		if sl == nil {
			reason = missEmpty
			break
		}
		if _, err := sl.sb.machine(); err != nil { // it ended just now
			close(sl.gone)
			s.goTask(func() { s.discard(p, sl.sb, "dead") })
			continue
		}
		rec, err := s.store.ClaimSandbox(sl.sb.id, name, func(r *store.Sandbox) {
			r.Handler, r.Config = handlerName, store.SandboxConfig{PodSandboxConfig: config}
		})
		if err != nil {
			s.putBack(p, sl)
			return store.Sandbox{}, false, err
		}
		s.hit(p, sl)
		return rec, true, nil
	}
	s.miss(p, reason)
	return store.Sandbox{}, false, nil
}

// unfit tells why a pod's VM cannot be made of a slot; "" if it can. CPUs and memory can be added to a VM, but what it
// booted with it keeps.
func (s *Server) unfit(p *pool, want vmruntime.Size) string {
	s.warm.mu.Lock()
	defer s.warm.mu.Unlock()
	has := vmruntime.Size{VCPUs: p.handler.VCPUs, MemoryBytes: alignMemory(p.handler.Memory)}
	switch {
	case want == has:
		return ""
	case want.VCPUs < has.VCPUs || want.MemoryBytes < has.MemoryBytes:
		return missSmaller
	case want.VCPUs > p.handler.MaxVCPUs || want.MemoryBytes > p.handler.MaxMemory || want.MemoryBytes > maxGrowth*has.MemoryBytes:
		return missLarger
	case time.Now().Before(p.growAt):
		return missGrowth
	default:
		return ""
	}
}

// growthFailed has pods that need a bigger VM boot their own for some time.
func (s *Server) growthFailed(handlerName string) {
	s.warm.mu.Lock()
	defer s.warm.mu.Unlock()
	if p := s.warm.byHandler[handlerName]; p != nil {
		p.growAt = time.Now().Add(noGrowth)
	}
}

// pick takes the oldest slot out of the pool, of those that have rehearsed if there are any.
func (s *Server) pick(p *pool) *slot {
	s.warm.mu.Lock()
	defer s.warm.mu.Unlock()
	if len(p.slots) == 0 {
		return nil
	}
	i := max(slices.IndexFunc(p.slots, func(sl *slot) bool { return sl.rehearsed }), 0)
	sl := p.slots[i]
	p.slots = slices.Delete(p.slots, i, i+1)
	return sl
}

// putBack returns a picked slot that no pod has got.
func (s *Server) putBack(p *pool, sl *slot) {
	s.warm.mu.Lock()
	defer s.warm.mu.Unlock()
	p.slots = slices.Insert(p.slots, 0, sl)
}

// current tells whether a pool's slots have booted what its handler names now. Those that have not are dropped.
func (s *Server) current(p *pool) bool {
	class, err := s.slotClass(p.handler)
	if err != nil { // the next boot tells
		return false
	}
	s.warm.mu.Lock()
	var stale []*slot
	p.class = class
	p.slots = slices.DeleteFunc(p.slots, func(sl *slot) bool {
		if sl.class == class {
			return false
		}
		stale = append(stale, sl)
		close(sl.gone)
		return true
	})
	s.warm.mu.Unlock()
	for _, sl := range stale {
		s.log.Info("slot of the warm pool is outdated: kernel or initramfs have changed", "sandbox", sl.sb.id)
		s.goTask(func() { s.discard(p, sl.sb, "changed") })
	}
	return len(stale) == 0
}

// enlist makes the VM of a slot that was taken the pod's: it is accounted to the pod and as big as it asks for.
func (s *Server) enlist(ctx context.Context, sb *sandbox, rec store.Sandbox, handler Handler, config *cri.PodSandboxConfig, steps *timings) (*agentproto.Client, error) {
	vm, err := sb.machine()
	if err != nil {
		return nil, err
	}
	process := s.podProcess(rec, config)
	group, groupCtx := errgroup.WithContext(ctx)
	group.Go(func() error { // most of it is a wait for the host's kernel
		defer steps.span("move to the pod")()
		if err := vm.Move(groupCtx, process.Cgroup, *process.OOMScoreAdj); err != nil {
			return vmFailure(vm, fmt.Errorf("moving the VM to its pod's cgroup: %w", err))
		}
		return nil
	})
	group.Go(func() error {
		answer, cancel := context.WithTimeout(groupCtx, cmp.Or(handler.HealthTimeout, slotAnswer))
		defer cancel()
		if err := sb.ping(answer); err != nil {
			return vmFailure(vm, fmt.Errorf("a VM of the warm pool does not answer: %w", err))
		}
		return nil
	})
	if err := group.Wait(); err != nil {
		return nil, err
	}
	if want := vmSize(handler, config); want.VCPUs > rec.VM.VCPUs || want.MemoryBytes > rec.VM.Memory {
		defer steps.span("grow")()
		if err := sb.size.lock(ctx); err != nil {
			return nil, err
		}
		defer sb.size.unlock()
		if err := s.growVM(ctx, sb, want); err != nil {
			if ctx.Err() == nil {
				s.growthFailed(rec.Handler)
			}
			return nil, fmt.Errorf("making the VM as big as the pod asks for: %w", err)
		}
	}
	return sb.client(ctx)
}

// discard undoes a slot. What cannot be undone is tried again, and by the next daemon.
func (s *Server) discard(p *pool, sb *sandbox, why string) {
	s.warm.mu.Lock()
	p.figures.dropped[why]++
	s.warm.mu.Unlock()
	s.untilDone("undoing a slot of the warm pool", sb.id, func() error { return s.undoSlot(sb) })
	s.warm.poke()
}

// undoSlot is teardown, and the end of the record. Idempotent.
func (s *Server) undoSlot(sb *sandbox) error {
	ctx, cancel := detached(s.life, teardownLimit)
	defer cancel()
	if err := sb.op.lock(ctx); err != nil {
		return err
	}
	defer sb.op.unlock()
	rec, err := s.store.Sandbox(sb.id)
	if err != nil {
		return ignoreMissing(err)
	}
	if err := s.teardown(ctx, sb, rec); err != nil {
		return err
	}
	if err := s.eraseSandbox(rec); err != nil {
		return err
	}
	s.forgetSandbox(sb.id)
	return nil
}

// poke has the pools looked at.
func (w *warm) poke() {
	select {
	case w.wake <- struct{}{}:
	default:
	}
}
