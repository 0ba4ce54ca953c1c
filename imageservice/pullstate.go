package imageservice

import (
	"context"
	"log/slog"
	"math"
	"sync"
	"sync/atomic"
	"time"

	"github.com/opencontainers/go-digest"
	"go.podman.io/image/v5/types"
)

// pullState is how far a pull is.
type pullState struct {
	ref     string
	started time.Time

	building atomic.Bool // all layers are there, and the root disk is being made

	mu     sync.Mutex
	blobs  []*blobProgress // one for each layer; none before the manifest is there
	copied map[digest.Digest]*blobProgress
}

// blobProgress is how far a layer of a pull is, whoever fetches it.
type blobProgress struct {
	size    int64
	done    atomic.Bool
	counter atomic.Pointer[blobCounter] // of the last that fetches it
}

// blobCounter counts what comes of a blob.
type blobCounter struct {
	got       atomic.Int64
	receiving atomic.Bool // the registry has been asked, and has not sent all
}

func (b *blobProgress) follow(c *blobCounter) { b.counter.Store(c) }
func (b *blobProgress) ready()                { b.done.Store(true) }

// bytes are those that are there.
func (b *blobProgress) bytes() int64 {
	if b.done.Load() {
		return b.size
	}
	if c := b.counter.Load(); c != nil {
		return min(c.got.Load(), b.size)
	}
	return 0
}

// expect tells which layers the pull needs.
func (p *pullState) expect(layers []layer) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.blobs = make([]*blobProgress, 0, len(layers))
	for _, l := range layers {
		p.blobs = append(p.blobs, &blobProgress{size: l.bytes})
	}
}

// bytes are those of the layers that are there, and those that the image has; 0 of 0 before its manifest is there.
func (p *pullState) bytes() (done, total int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, b := range p.blobs {
		done += b.bytes()
		total += b.size
	}
	return done, total
}

// layers are those that are there, and all of the image.
func (p *pullState) layers() (done, total int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, b := range p.blobs {
		if b.done.Load() {
			done++
		}
	}
	return done, len(p.blobs)
}

// note takes an event of a pull that is left to the image library.
func (p *pullState) note(e types.ProgressProperties) {
	p.mu.Lock()
	defer p.mu.Unlock()
	b := p.copied[e.Artifact.Digest]
	if b == nil {
		if p.copied == nil {
			p.copied = map[digest.Digest]*blobProgress{}
		}
		b = &blobProgress{size: max(e.Artifact.Size, 0)}
		b.follow(&blobCounter{})
		p.copied[e.Artifact.Digest], p.blobs = b, append(p.blobs, b)
	}
	b.counter.Load().got.Store(int64(min(e.Offset, math.MaxInt64)))
	if e.Event == types.ProgressEventDone || e.Event == types.ProgressEventSkipped {
		b.ready()
	}
}

// report logs how far the pull is, every reportInterval, until stop.
func (p *pullState) report() (stop func()) {
	done, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		tick := time.NewTicker(reportInterval)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				bytes, ofBytes := p.bytes()
				layers, ofLayers := p.layers()
				slog.Info("pulling image", "image", p.ref, "phase", p.phase(), "bytes", bytes, "of_bytes", ofBytes,
					"layers", layers, "of_layers", ofLayers, "for", time.Since(p.started).Round(time.Second))
			case <-done:
				return
			}
		}
	}()
	return func() {
		close(done)
		<-ended
	}
}

// reportInterval is how often the log hears of a pull under way.
const reportInterval = 10 * time.Second

// phase is what the pull is at: "manifest", "layers" or "root disk".
func (p *pullState) phase() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case p.building.Load():
		return "root disk"
	case p.blobs == nil:
		return "manifest"
	}
	return "layers"
}

// queued tells whether the pull waits for nothing but for its turn, behind layers of other pulls.
func (p *pullState) queued() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, b := range p.blobs {
		if c := b.counter.Load(); !b.done.Load() && c != nil && c.receiving.Load() {
			return false
		}
	}
	return len(p.blobs) > 0
}

// watch cancels a pull that waits for the registry for longer than timeout: for its manifest, or for any byte of the layers
// that are being received. stop, which may be called again, ends the watching.
func (p *pullState) watch(cancel context.CancelCauseFunc, timeout time.Duration) (stop func()) {
	done, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		tick := time.NewTicker(max(timeout/10, time.Millisecond))
		defer tick.Stop()
		last, since := int64(-1), time.Now()
		for {
			select {
			case <-tick.C:
				if now, _ := p.bytes(); now != last || p.queued() {
					last, since = now, time.Now()
				} else if time.Since(since) >= timeout {
					cancel(errStalled)
					return
				}
			case <-done:
				return
			}
		}
	}()
	var once sync.Once
	return func() {
		once.Do(func() { close(done) })
		<-ended
	}
}
