package imageservice

import (
	"context"
	"errors"
	"testing"
)

func TestFlightsCancelWithLastCaller(t *testing.T) {
	g := flights[int]{life: context.Background()}
	started := make(chan struct{})
	ended := make(chan error, 1)
	work := func(ctx context.Context) (int, error) {
		close(started)
		<-ctx.Done()
		ended <- ctx.Err()
		return 0, ctx.Err()
	}
	ctx1, cancel1 := context.WithCancel(context.Background())
	ctx2, cancel2 := context.WithCancel(context.Background())
	results := make(chan error, 2)
	go func() { _, err := g.do(ctx1, "k", work); results <- err }()
	<-started
	go func() { _, err := g.do(ctx2, "k", work); results <- err }()
	waitUntil(t, "both wait", func() bool {
		g.mu.Lock()
		defer g.mu.Unlock()
		return g.running["k"].waiting == 2
	})
	cancel1()
	if err := <-results; !errors.Is(err, context.Canceled) {
		t.Errorf("first caller: %v", err)
	}
	select {
	case <-ended:
		t.Error("the work ended although a caller waits")
	default:
	}
	cancel2()
	<-results
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Errorf("work: %v", err)
	}
	g.wait()
	if n, err := g.do(context.Background(), "k", func(context.Context) (int, error) { return 7, nil }); n != 7 || err != nil {
		t.Errorf("a later call gave %d, %v", n, err)
	}
}

func TestFlightsEndWithLife(t *testing.T) {
	life, end := context.WithCancel(context.Background())
	g := flights[int]{life: life}
	started := make(chan struct{})
	result := make(chan error, 1)
	go func() {
		_, err := g.do(context.Background(), "k", func(ctx context.Context) (int, error) {
			close(started)
			<-ctx.Done()
			return 0, ctx.Err()
		})
		result <- err
	}()
	<-started
	end()
	g.wait()
	if err := <-result; !errors.Is(err, context.Canceled) {
		t.Errorf("call: %v", err)
	}
	if _, err := g.do(context.Background(), "k", nil); err == nil {
		t.Error("work was started after the end")
	}
}
