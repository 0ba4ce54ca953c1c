package imageservice

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/prometheus/client_golang/prometheus"
	"go.podman.io/image/v5/types"
	"golang.org/x/sys/unix"
)

const (
	// reserveShare of a file system, at most reserveMax, is left free by pulls and disk builds: pods that run write
	// logs and scratch disks to it, and the records of what they do.
	reserveShare = 50
	reserveMax   = 256 << 20
	// spacePoll is how often free space is looked at while something is written.
	spacePoll = 200 * time.Millisecond
)

// room is what a file system has, in bytes.
type room struct {
	free, size uint64
	device     uint64 // tells whether two directories share one
}

func (r room) reserve() uint64 { return min(r.size/reserveShare, reserveMax) }

// roomOf asks the kernel.
func roomOf(dir string) (room, error) {
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil {
		return room{}, fmt.Errorf("free space of %s: %w", dir, err)
	}
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		return room{}, fmt.Errorf("free space of %s: %w", dir, err)
	}
	unit := uint64(fs.Frsize)
	return room{free: fs.Bavail * unit, size: fs.Blocks * unit, device: st.Dev}, nil
}

// space admits what writes to the image store's file systems, and ends what fills them up. Safe for concurrent use.
type space struct {
	root, disks string
	room        func(dir string) (room, error)

	mu       sync.Mutex
	promised uint64 // bytes of blobs that pulls under way have still to receive
}

// check fails with ResourceExhausted when more bytes of blobs cannot be taken. It asks for what they need at least: a
// blob is received into a file below root, and then becomes part of a disk. What they unpack to is known only afterwards;
// guard is for that.
func (s *space) check(more uint64) error {
	root, err := s.room(s.root)
	if err != nil {
		return err
	}
	disks, err := s.room(s.disks)
	if err != nil {
		return err
	}
	s.mu.Lock()
	blobs := s.promised + more
	s.mu.Unlock()
	needs := map[string]uint64{s.root: blobs, s.disks: blobs}
	if root.device == disks.device {
		needs[s.root] += blobs
	}
	for dir, r := range map[string]room{s.root: root, s.disks: disks} {
		if need := needs[dir] + r.reserve(); r.free < need {
			return fmt.Errorf("%s has %d MiB free, and %d MiB are needed at least (%d MiB of them stay free for the pods that run): %w",
				dir, r.free>>20, (need+1<<20-1)>>20, r.reserve()>>20, errdefs.ErrResourceExhausted)
		}
	}
	return nil
}

// guard cancels, with check's error as the cause, as soon as no more than the reserve is free; stop ends it.
func (s *space) guard(cancel context.CancelCauseFunc) (stop func()) {
	done, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		tick := time.NewTicker(spacePoll)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				if err := s.full(); err != nil {
					cancel(err)
					return
				}
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

// full is check without what is still to come: that may fit, or not.
func (s *space) full() error {
	for _, dir := range []string{s.root, s.disks} {
		r, err := s.room(dir)
		if err != nil {
			return err
		}
		if r.free < r.reserve() {
			return fmt.Errorf("%s has %d MiB free, which are left to the pods that run: %w", dir, r.free>>20, errdefs.ErrResourceExhausted)
		}
	}
	return nil
}

// incoming follows the blobs of one pull. Of one goroutine.
type incoming struct {
	space *space
	bytes prometheus.Counter
	rest  map[string]uint64 // bytes to come, by digest
}

// note takes an event of a copy; ResourceExhausted when it announces a blob that does not fit.
func (in *incoming) note(e types.ProgressProperties) error {
	key, size := e.Artifact.Digest.String(), max(e.Artifact.Size, 0)
	switch e.Event {
	case types.ProgressEventNewArtifact:
		if err := in.space.check(uint64(size)); err != nil {
			return err
		}
		in.set(key, uint64(size))
	case types.ProgressEventRead:
		left := uint64(size) - min(uint64(size), e.Offset)
		if before := in.rest[key]; left < before {
			in.bytes.Add(float64(before - left))
		}
		in.set(key, left)
	case types.ProgressEventDone:
		in.set(key, 0)
	}
	return nil
}

func (in *incoming) set(key string, rest uint64) {
	if in.rest == nil {
		in.rest = map[string]uint64{}
	}
	in.space.mu.Lock()
	defer in.space.mu.Unlock()
	in.space.promised += rest - in.rest[key] // modulo 2^64, and never below 0 in sum
	if in.rest[key] = rest; rest == 0 {
		delete(in.rest, key)
	}
}

// end gives back what the pull did not receive.
func (in *incoming) end() {
	for key := range in.rest {
		in.set(key, 0)
	}
}
