package imageservice

import (
	"context"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/google/go-containerregistry/pkg/v1/random"
)

// endless is a file system that never fills.
func endless(string) (room, error) { return room{free: 1 << 60, size: 1 << 60}, nil }

// disk is a file system whose free space a test sets; its reserve is 20 KiB.
type disk struct{ free atomic.Uint64 }

func (d *disk) room(string) (room, error) { return room{free: d.free.Load(), size: 1 << 20}, nil }

// TestPullAdmission: free space is looked at before a pull, before each blob, and while one is received. What does not
// fit is refused with the figures, leaves nothing, and can be pulled as soon as there is room.
func TestPullAdmission(t *testing.T) {
	sequential(t)
	reg := newRegistry(t, false)
	img, err := random.Image(100<<10, 1)
	if err != nil {
		t.Fatal(err)
	}
	ref := reg.push(t, "app:1", img)
	layers, err := img.Layers()
	if err != nil {
		t.Fatal(err)
	}
	digest, err := layers[0].Digest()
	if err != nil {
		t.Fatal(err)
	}
	layer := func(r *http.Request) bool { return isBlob(r) && strings.HasSuffix(r.URL.Path, digest.String()) }
	s := newService(t, func(c *Config) { write(t, c.RegistriesConf, insecure(reg)) })
	var fs disk
	s.space.room = fs.room
	refused := func(t *testing.T, err error, text string) {
		t.Helper()
		if !errdefs.IsResourceExhausted(err) || !strings.Contains(err.Error(), text) {
			t.Errorf("error is %v", err)
		}
		checkEmpty(t, s)
		if s.space.promised != 0 {
			t.Errorf("%d bytes are still counted on", s.space.promised)
		}
	}
	t.Run("before", func(t *testing.T) {
		var requests atomic.Int64
		reg.intercept(func(w http.ResponseWriter, r *http.Request, next http.Handler) { requests.Add(1); next.ServeHTTP(w, r) })
		fs.free.Store(10 << 10)
		_, err := tryPull(context.Background(), s, ref, nil)
		refused(t, err, "are needed at least")
		if n := requests.Load(); n > 0 {
			t.Errorf("the registry was asked %d times", n)
		}
	})
	t.Run("blob", func(t *testing.T) {
		reg.intercept(nil)
		fs.free.Store(200 << 10) // twice the layer: no room for the disk
		_, err := tryPull(context.Background(), s, ref, nil)
		refused(t, err, "are needed at least")
	})
	t.Run("two at a time", func(t *testing.T) {
		reached := hang(t, reg, layer)
		fs.free.Store(400 << 10)
		ctx, cancel := context.WithCancel(context.Background())
		first := make(chan error, 1)
		go func() {
			_, err := tryPull(ctx, s, ref, nil)
			first <- err
		}()
		<-reached
		waitUntil(t, "the first one's layer is counted on", func() bool {
			s.space.mu.Lock()
			defer s.space.mu.Unlock()
			return s.space.promised > 90<<10
		})
		other, err := random.Image(100<<10, 1)
		if err != nil {
			t.Fatal(err)
		}
		_, err = tryPull(context.Background(), s, reg.push(t, "other:1", other), nil)
		if !errdefs.IsResourceExhausted(err) {
			t.Errorf("second pull: %v", err)
		}
		cancel()
		<-first
		s.pulls.wait()
		refused(t, err, "are needed at least")
	})
	t.Run("during", func(t *testing.T) {
		reached := hang(t, reg, layer)
		fs.free.Store(1 << 20)
		result := make(chan error, 1)
		go func() {
			_, err := tryPull(context.Background(), s, ref, nil)
			result <- err
		}()
		<-reached
		fs.free.Store(19 << 10)
		refused(t, <-result, "left to the pods")
	})
	reg.intercept(nil)
	fs.free.Store(1 << 20)
	id := pull(t, s, ref)
	// The disk of an image is built anew when it is damaged, which takes room, too.
	write(t, s.diskPath(strings.TrimPrefix(id, "sha256:")), "damaged")
	fs.free.Store(19 << 10)
	if _, err := s.Disk(context.Background(), id); !errdefs.IsResourceExhausted(err) {
		t.Errorf("disk: %v", err)
	}
	fs.free.Store(1 << 20)
	if _, err := s.Disk(context.Background(), id); err != nil {
		t.Error(err)
	}
}
