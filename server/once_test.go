package server

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/errdefs"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestOnceSharesAndHandsOver(t *testing.T) {
	always := func(string) bool { return true }
	result := func(id string, err error) func() (string, error) {
		return func() (string, error) { return id, err }
	}
	never := func() (string, error) { t.Error("a second call was made"); return "", nil }
	synctest.Test(t, func(t *testing.T) {
		s := &Server{}
		// Three at a time share one result, be it an error.
		for _, failure := range []error{nil, errdefs.ErrUnavailable} {
			hold := make(chan struct{})
			ids := make(chan string, 3)
			for i := range 3 {
				go func() {
					time.Sleep(time.Duration(i) * time.Second)
					do := never
					if i == 0 {
						do = func() (string, error) { <-hold; return "a", failure }
					}
					id, err := s.once(t.Context(), "name", always, do)
					if !errors.Is(err, failure) {
						t.Errorf("call %d: %v", i, err)
					}
					ids <- id
				}()
			}
			if id, err := s.once(t.Context(), "other", always, result("b", nil)); id != "b" || err != nil {
				t.Errorf("another name: %s, %v", id, err)
			}
			time.Sleep(time.Minute)
			if len(ids) > 0 {
				t.Error("a call did not wait")
			}
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			if _, err := s.once(ctx, "name", always, never); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("a call that waited too long: %v", err)
			}
			cancel()
			close(hold)
			for range 3 {
				if id := <-ids; id != "a" {
					t.Errorf("ID is %q", id)
				}
			}
		}
		// A failure that came of the first client's leaving is not the others'.
		ctx, cancel := context.WithCancel(t.Context())
		first := make(chan error)
		go func() {
			_, err := s.once(ctx, "name", always, func() (string, error) { <-ctx.Done(); return "", ctx.Err() })
			first <- err
		}()
		synctest.Wait()
		second := make(chan string)
		go func() {
			id, err := s.once(t.Context(), "name", always, result("second", nil))
			if err != nil {
				t.Error(err)
			}
			second <- id
		}()
		synctest.Wait()
		cancel()
		if err := <-first; !errors.Is(err, context.Canceled) {
			t.Errorf("the first one's error is %v", err)
		}
		if id := <-second; id != "second" {
			t.Errorf("the second one's ID is %q", id)
		}
		// A result that came too late is the next one's, once, while it is good.
		for _, c := range []struct {
			valid func(string) bool
			pause time.Duration
			want  string
		}{{always, 0, "late"}, {func(id string) bool { return id != "late" }, 0, "new"}, {always, 2 * lateKept, "new"}} {
			if id, err := s.once(ctx, "name", always, result("late", nil)); id != "late" || err != nil { // ctx has ended
				t.Errorf("a late call: %s, %v", id, err)
			}
			time.Sleep(c.pause)
			if _, err := s.once(t.Context(), "unrelated", always, result("x", nil)); err != nil {
				t.Error(err)
			}
			for _, want := range []string{c.want, "new"} {
				if id, err := s.once(t.Context(), "name", c.valid, result("new", nil)); id != want || err != nil {
					t.Errorf("after a late call: %q, %v; want %q", id, err, want)
				}
			}
		}
		if len(s.calls.running)+len(s.calls.late) > 0 {
			t.Errorf("left are %v", s.calls)
		}
	})
}

// heldImages makes CreateContainer wait for its root disk.
type heldImages struct {
	oneImage
	asked, hold chan struct{}
}

func (i heldImages) Disk(ctx context.Context, id string) (string, error) {
	i.asked <- struct{}{}
	select {
	case <-i.hold:
	case <-ctx.Done():
		return "", ctx.Err()
	}
	return i.oneImage.Disk(ctx, id)
}

func TestSecondCreateWaitsForTheFirst(t *testing.T) {
	r := newRig(t)
	held := heldImages{r.img, make(chan struct{}, 4), make(chan struct{})}
	r.images = held
	pod := r.runPod("a")
	req := &cri.CreateContainerRequest{PodSandboxId: pod, Config: &cri.ContainerConfig{
		Metadata: &cri.ContainerMetadata{Name: "c"}, Image: &cri.ImageSpec{Image: "image"},
	}}
	type result struct {
		id  string
		err error
	}
	create := func(ctx context.Context, results chan<- result) {
		resp, err := r.CreateContainer(ctx, req)
		results <- result{resp.GetContainerId(), err}
	}
	// A client that leaves: what it asked for is undone, and the one that waited makes it anew.
	ctx, cancel := context.WithCancel(t.Context())
	first, others := make(chan result, 1), make(chan result, 2)
	go create(ctx, first)
	<-held.asked
	for range 2 {
		go create(t.Context(), others)
	}
	cancel()
	if got := <-first; !errors.Is(got.err, context.Canceled) {
		t.Errorf("the first one got %v", got)
	}
	<-held.asked
	close(held.hold)
	a, b := <-others, <-others
	switch {
	case a.err == nil && b.err == nil && a.id == b.id:
	case a.err == nil && errdefs.IsAlreadyExists(b.err), b.err == nil && errdefs.IsAlreadyExists(a.err): // it came after the other's end
	default:
		t.Errorf("the others got %v and %v", a, b)
	}
	list, err := r.ListContainers(t.Context(), &cri.ListContainersRequest{})
	if err != nil || len(list.GetContainers()) != 1 {
		t.Errorf("containers are %v (%v)", list, err)
	}
}
