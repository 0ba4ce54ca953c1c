package imageservice

import (
	"context"
	"errors"
	"time"

	"github.com/opencontainers/go-digest"
	"go.podman.io/image/v5/types"
)

var errStalled = errors.New("no data from the registry")

// progressInterval makes a copy report every read.
const progressInterval = 1

// watchProgress cancels a pull that waits for the registry for longer than timeout. It waits from the
// beginning until the first blob, and while any blob has not been received whole. A blob is reported as done
// only after it was unpacked, which may take long and is not waiting. The returned channel is for the copy;
// stop, called after the copy has ended, ends the watching. Each event goes to note, whose error ends the pull.
func watchProgress(cancel context.CancelCauseFunc, timeout time.Duration, note func(types.ProgressProperties) error) (events chan types.ProgressProperties, stop func()) {
	events = make(chan types.ProgressProperties)
	done, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		timer := time.NewTimer(timeout)
		defer timer.Stop()
		receiving, begun := map[digest.Digest]bool{}, false
		for {
			select {
			case e := <-events:
				begun = true
				if err := note(e); err != nil {
					cancel(err)
				}
				blob := e.Artifact
				switch {
				case e.Event == types.ProgressEventNewArtifact:
					receiving[blob.Digest] = true
				case e.Event == types.ProgressEventDone, blob.Size >= 0 && e.Offset >= uint64(blob.Size):
					delete(receiving, blob.Digest)
				}
				timer.Reset(timeout)
			case <-timer.C:
				if !begun || len(receiving) > 0 {
					cancel(errStalled)
				}
				timer.Reset(timeout)
			case <-done:
				return
			}
		}
	}()
	return events, func() {
		close(done)
		<-ended
	}
}
