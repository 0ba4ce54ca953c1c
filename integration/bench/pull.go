package main

import (
	"context"
	"fmt"
	"os"
	"strings"
	"time"
)

// measurePull measures PullImage until the image can be used: crivm's answer means that its root disk is there, containerd's that
// its layers are unpacked.
func (b *bench) measurePull(ctx context.Context, s *section) error {
	sizes, err := pushPullImages(b.registry)
	if err != nil {
		return err
	}
	t := s.table("PullImage until it can be used")
	steps := newStepTables()
	for _, image := range pullImages {
		ref := b.registry.Addr() + "/" + image.repository
		var ours, other []time.Duration
		logged := b.logSize()
		for i := range b.o.pulls {
			turns := []func() error{
				func() (err error) { ours, err = b.pullOnce(ctx, b.crivm, ref, ours); return err },
			}
			if b.peer != nil {
				turns = append(turns, func() (err error) { other, err = b.pullOnce(ctx, &b.peer.system, ref, other); return err })
			}
			for n := range turns {
				if err := turns[(i+n)%len(turns)](); err != nil {
					return err
				}
			}
			fmt.Fprintf(os.Stderr, "pull of %s: round %d of %d, load %s\n", image.name, i+1, b.o.pulls, loadAverage())
		}
		t.add(image.name, "ms", times(ours), times(other))
		s.compare("PullImage, "+image.name+" / containerd", times(ours), times(other), 1, false)
		log, err := logFrom(b.n.LogPath(), logged)
		if err != nil {
			return err
		}
		if err := steps.readPulls(log, image.name); err != nil {
			return err
		}
		s.Notes = append(s.Notes, image.name+": "+sizes[image.name])
	}
	s.Tables = append(s.Tables, steps.tables()...)
	return nil
}

func (b *bench) pullOnce(ctx context.Context, sys *system, ref string, samples []time.Duration) ([]time.Duration, error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	took, err := sys.pull(ctx, ref)
	if err != nil {
		return nil, err
	}
	return append(samples, took), sys.removeImage(ctx, ref)
}

// readPulls takes what crivm's log says of pulls: copy=1s disk=200ms.
func (t *stepTables) readPulls(log, name string) error {
	for line := range strings.Lines(log) {
		fields := attributes(line)
		if fields["msg"] != "pulled image" {
			continue
		}
		copied, err := time.ParseDuration(fields["copy"])
		if err != nil {
			return fmt.Errorf("log line %q: %w", line, err)
		}
		disk, err := time.ParseDuration(fields["disk"])
		if err != nil {
			return fmt.Errorf("log line %q: %w", line, err)
		}
		t.add("PullImage, "+name, copied+disk, []step{{"fetch", 0, copied}, {"root disk", copied, disk}})
	}
	return nil
}
