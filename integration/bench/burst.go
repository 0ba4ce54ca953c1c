package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"time"
)

// burstLimit is when burst begins nothing more: alone on two CPUs in software emulation it takes about 10 minutes.
const burstLimit = 20 * time.Minute

// measureBurst starts 10 and 30 sandboxes at once, of crivm and of containerd in turns, and counts pods a second.
func (b *bench) measureBurst(ctx context.Context, s *section) error {
	t, begin := s.table("RunPodSandbox, many at once"), time.Now()
	for _, width := range []int{10, 30} {
		rounds := b.o.bursts
		if width > 10 {
			rounds = 1
		}
		var cold, warm, other []float64
		for i := range rounds {
			turns := []func() error{
				func() (err error) { cold, err = b.burst(ctx, b.crivm, "", width, cold); return err },
			}
			if b.peer != nil {
				turns = append(turns, func() (err error) { other, err = b.burst(ctx, &b.peer.system, "", width, other); return err })
			}
			if width <= b.slots {
				turns = append(turns, func() error {
					before, err := b.pool(ctx)
					if err != nil {
						return err
					}
					if warm, err = b.burst(ctx, b.crivm, warmHandler, width, warm); err != nil {
						return err
					}
					after, err := b.pool(ctx)
					if err == nil && after.Hits-before.Hits != width {
						err = fmt.Errorf("%d of %d pods took a slot", after.Hits-before.Hits, width)
					}
					return err
				})
			}
			for n := range turns {
				if took := time.Since(begin); took > burstLimit {
					s.Notes = append(s.Notes, fmt.Sprintf("Not measured: turn %d of round %d, %d wide: the section had taken %s.", n+1, i+1, width, took.Round(time.Second)))
					continue
				}
				if err := b.awaitPool(ctx); err != nil {
					return err
				}
				err := turns[(i+n)%len(turns)]()
				if err != nil { // a machine that cannot start so many is no reason to measure nothing else
					line, _, _ := strings.Cut(err.Error(), "\n")
					s.Notes = append(s.Notes, "Not measured: "+line)
					err := b.crivm.removeAllPods(ctx)
					if b.peer != nil {
						err = errors.Join(err, b.peer.removeAllPods(ctx))
					}
					if err != nil {
						return err
					}
				}
				fmt.Fprintf(os.Stderr, "burst of %d: turn %d of %d, load %s\n", width, n+1, len(turns), loadAverage())
			}
		}
		t.add(fmt.Sprintf("%d at once, cold", width), "pods/s", newDist(cold), newDist(other))
		t.add(fmt.Sprintf("%d at once, %d warm slots", width, b.slots), "pods/s", newDist(warm), newDist(other))
		if width == 10 {
			s.compare("10 at once with 10 warm slots / containerd", newDist(warm), newDist(other), 1, true)
		}
	}
	return nil
}

// burst is one of them; its pods are removed again.
func (b *bench) burst(ctx context.Context, sys *system, handler string, width int, samples []float64) ([]float64, error) {
	ctx, cancel := context.WithTimeout(ctx, callLimit)
	defer cancel()
	errs := make([]error, width)
	var wait sync.WaitGroup
	begin := time.Now()
	for i := range width {
		config := sys.podConfig()
		wait.Go(func() { _, errs[i] = sys.runtime.RunPodSandbox(ctx, config, handler) })
	}
	wait.Wait()
	took := time.Since(begin)
	if err := errors.Join(errs...); err != nil {
		return nil, fmt.Errorf("%s: %d sandboxes at once: %w", sys.name, width, err)
	}
	return append(samples, float64(width)/took.Seconds()), sys.removeAllPods(ctx)
}
