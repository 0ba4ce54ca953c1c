package imageservice

import (
	"context"
	"sync"

	"github.com/containerd/errdefs"
)

// flights runs work that several callers may want at a time once for all of them. The work goes on until
// it is done, or until all its callers have gone. The zero value with life set is ready.
type flights[T any] struct {
	life context.Context // ends all work
	// settle makes the last caller that goes wait for the end of the work, which is near: its context has ended.
	settle bool

	mu      sync.Mutex
	running map[string]*flight[T]
	active  int
	idle    *sync.Cond
}

type flight[T any] struct {
	counter blobCounter // for work that receives something
	waiting int
	cancel  context.CancelFunc
	done    chan struct{} // closed when result and err are set
	result  T
	err     error
}

// do joins the work with this key or starts it. It returns when the work is done or ctx ends.
func (g *flights[T]) do(ctx context.Context, key string, work func(context.Context) (T, error)) (T, error) {
	return g.doBegun(ctx, key, func(*blobCounter) func(context.Context) (T, error) { return work }, nil)
}

// doBegun is do for a caller that wants to know whether the work is its own: only then begin is called, before the work
// can end. It is called with the flights locked. The work's counter goes to joined in both cases.
func (g *flights[T]) doBegun(ctx context.Context, key string, begin func(*blobCounter) func(context.Context) (T, error), joined func(*blobCounter)) (T, error) {
	var none T
	if err := ctx.Err(); err != nil {
		return none, err
	}
	if g.life.Err() != nil {
		return none, errdefs.ErrUnavailable
	}
	g.mu.Lock()
	f := g.running[key]
	if f == nil {
		workCtx, cancel := context.WithCancel(g.life)
		f = &flight[T]{cancel: cancel, done: make(chan struct{})}
		if g.running == nil {
			g.running = map[string]*flight[T]{}
		}
		g.running[key] = f
		g.active++
		go g.run(workCtx, key, f, begin(&f.counter))
	}
	f.waiting++
	g.mu.Unlock()
	if joined != nil {
		joined(&f.counter)
	}

	select {
	case <-f.done:
		return f.result, f.err
	case <-ctx.Done():
	}
	g.mu.Lock()
	last := false
	if f.waiting--; f.waiting == 0 {
		last = true
		f.cancel()
		if g.running[key] == f {
			delete(g.running, key) // the next caller starts afresh
		}
	}
	g.mu.Unlock()
	if last && g.settle {
		<-f.done
	}
	return none, ctx.Err()
}

func (g *flights[T]) run(ctx context.Context, key string, f *flight[T], work func(context.Context) (T, error)) {
	f.result, f.err = work(ctx)
	f.cancel()
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.running[key] == f {
		delete(g.running, key)
	}
	close(f.done)
	g.active--
	if g.active == 0 && g.idle != nil {
		g.idle.Broadcast()
	}
}

// wait returns when no work runs. Its callers have ended life.
func (g *flights[T]) wait() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.idle == nil {
		g.idle = sync.NewCond(&g.mu)
	}
	for g.active > 0 {
		g.idle.Wait()
	}
}
