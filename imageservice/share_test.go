package imageservice

import (
	"context"
	"errors"
	"net/http"
	"os"
	"strings"
	"sync"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// blobCounts counts the requests for each blob of a registry, and holds those for one of them until it is released.
type blobCounts struct {
	mu       sync.Mutex
	requests map[string]int // by digest
	held     string
	release  chan struct{}
	broken   bool // the held blob's answers end early instead
}

func countRequests(t *testing.T, reg *testRegistry, held string) *blobCounts {
	c := &blobCounts{requests: map[string]int{}, held: held, release: make(chan struct{})}
	reg.intercept(func(w http.ResponseWriter, r *http.Request, next http.Handler) {
		if isBlob(r) && r.Method == http.MethodGet {
			digest := r.URL.Path[strings.LastIndex(r.URL.Path, "/")+1:]
			c.mu.Lock()
			c.requests[digest]++
			c.mu.Unlock()
			if digest == c.held {
				select {
				case <-c.release:
				case <-r.Context().Done():
					return
				}
				if c.broken {
					http.Error(w, "broken", http.StatusInternalServerError)
					return
				}
			}
		}
		next.ServeHTTP(w, r)
	})
	return c
}

func (c *blobCounts) of(digest string) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.requests[digest]
}

// waiting is how many pulls wait for a layer.
func (s *Service) waiting(digest string) int {
	s.fetches.mu.Lock()
	defer s.fetches.mu.Unlock()
	if f := s.fetches.running[digest]; f != nil {
		return f.waiting
	}
	return 0
}

// TestConcurrentPullsShareLayers: images that are pulled at a time and have a layer in common fetch it once, also when the
// one that began is cancelled, or fails with its registry.
func TestConcurrentPullsShareLayers(t *testing.T) {
	base := tarLayer(t, map[string]string{"base": strings.Repeat("b", 200000)})
	hash, err := base.Digest()
	if err != nil {
		t.Fatal(err)
	}
	digest := hash.String()
	one := newImage(t, nil, base, tarLayer(t, map[string]string{"one": "1"}))
	two := newImage(t, nil, base, tarLayer(t, map[string]string{"two": "2"}), base)
	type result struct {
		id  string
		err error
	}
	begin := func(ctx context.Context, s *Service, ref string) chan result {
		done := make(chan result, 1)
		go func() {
			id, err := tryPull(ctx, s, ref, nil)
			done <- result{id, err}
		}()
		return done
	}
	check := func(t *testing.T, s *Service, img v1.Image, r result) {
		t.Helper()
		if r.err != nil || r.id != configDigest(t, img) {
			t.Fatalf("pulled %s, %v", r.id, r.err)
		}
		if _, err := s.Disk(context.Background(), r.id); err != nil {
			t.Error(err)
		}
	}
	// pulls begins both, from one registry each; the second when the first has asked for the layer, and returns when both wait.
	pulls := func(t *testing.T, ctx context.Context, same bool) (s *Service, a, b *blobCounts, first, second chan result) {
		regA, regB := newRegistry(t, false), newRegistry(t, false)
		refA := regA.push(t, "one:1", one)
		if same {
			regB = regA
		}
		refB := regB.push(t, "two:1", two)
		s = newService(t, func(c *Config) { write(t, c.RegistriesConf, insecure(regA, regB)) })
		a = countRequests(t, regA, digest)
		if b = a; !same {
			b = countRequests(t, regB, "")
		}
		first = begin(ctx, s, refA)
		waitUntil(t, "the layer is asked for", func() bool { return a.of(digest) == 1 })
		second = begin(context.Background(), s, refB)
		waitUntil(t, "both wait for the layer", func() bool { return s.waiting(digest) >= 2 })
		return s, a, b, first, second
	}
	t.Run("both", func(t *testing.T) {
		s, a, _, first, second := pulls(t, context.Background(), true)
		close(a.release)
		check(t, s, one, <-first)
		check(t, s, two, <-second)
		for d, n := range a.requests {
			if n != 1 {
				t.Errorf("%s was asked for %d times", d, n)
			}
		}
		if n := countBlobs(t, s.config); n != 3 {
			t.Errorf("%d layers, want 3", n)
		}
		remove(t, s, configDigest(t, one))
		remove(t, s, configDigest(t, two))
		checkEmpty(t, s)
	})
	t.Run("first cancelled", func(t *testing.T) {
		ctx, cancel := context.WithCancel(context.Background())
		s, a, _, first, second := pulls(t, ctx, true)
		cancel()
		if r := <-first; !errors.Is(r.err, context.Canceled) {
			t.Errorf("cancelled pull: %v", r.err)
		}
		waitUntil(t, "only the second pull is left", func() bool {
			s.pulls.mu.Lock()
			defer s.pulls.mu.Unlock()
			return s.pulls.active == 1
		})
		close(a.release)
		check(t, s, two, <-second)
		if n := a.of(digest); n != 1 {
			t.Errorf("the layer was asked for %d times", n)
		}
		if n := countBlobs(t, s.config); n != 2 {
			t.Errorf("%d layers, want those of the second", n)
		}
		remove(t, s, configDigest(t, two))
		checkEmpty(t, s)
	})
	t.Run("first fails", func(t *testing.T) {
		s, a, b, first, second := pulls(t, context.Background(), false)
		a.broken = true
		close(a.release)
		if r := <-first; r.err == nil {
			t.Error("a pull from a broken registry succeeded")
		}
		check(t, s, two, <-second)
		if n := b.of(digest); n != 1 {
			t.Errorf("the layer was asked for %d times in the other registry", n)
		}
	})
	t.Run("nobody is left", func(t *testing.T) {
		ctx, cancel := context.WithCancel(context.Background())
		reg := newRegistry(t, false)
		ref := reg.push(t, "one:1", one)
		s := newService(t, func(c *Config) { write(t, c.RegistriesConf, insecure(reg)) })
		a := countRequests(t, reg, digest)
		done := begin(ctx, s, ref)
		waitUntil(t, "the layer is asked for", func() bool { return a.of(digest) == 1 })
		layers, err := one.Layers()
		if err != nil {
			t.Fatal(err)
		}
		other, err := layers[1].Digest()
		if err != nil {
			t.Fatal(err)
		}
		waitUntil(t, "the other layer is there", func() bool {
			_, err := os.Stat(s.config.Root + "/" + blobsDir + "/" + other.Hex)
			return err == nil
		})
		cancel()
		<-done
		s.pulls.wait()
		checkEmpty(t, s) // not even the layer that was there
	})
}
