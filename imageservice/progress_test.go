package imageservice

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/opencontainers/go-digest"
	"go.podman.io/image/v5/types"
)

func TestWatchProgress(t *testing.T) {
	const timeout = time.Minute
	blob := func(name string, size int64) types.BlobInfo {
		return types.BlobInfo{Digest: digest.FromString(name), Size: size}
	}
	event := func(e types.ProgressEvent, b types.BlobInfo, offset uint64) types.ProgressProperties {
		return types.ProgressProperties{Event: e, Artifact: b, Offset: offset}
	}
	a, b, unknown := blob("a", 100), blob("b", 100), blob("unknown", -1)
	const (
		begin = types.ProgressEventNewArtifact
		read  = types.ProgressEventRead
		ready = types.ProgressEventDone
		skip  = types.ProgressEventSkipped
	)
	for _, tt := range []struct {
		name    string
		events  []types.ProgressProperties // 50 s apart
		stalled bool                       // when nothing follows
	}{
		{"before anything", nil, true},
		{"blob without data", []types.ProgressProperties{event(begin, a, 0)}, true},
		{"blob in part", []types.ProgressProperties{event(begin, a, 0), event(read, a, 40), event(read, a, 99)}, true},
		{"blob of unknown size", []types.ProgressProperties{event(begin, unknown, 0), event(read, unknown, 40)}, true},
		{"one of two", []types.ProgressProperties{event(begin, a, 0), event(begin, b, 0), event(read, a, 100)}, true},
		{"unpacking", []types.ProgressProperties{event(begin, a, 0), event(read, a, 40), event(read, a, 100)}, false},
		{"unpacked", []types.ProgressProperties{event(begin, unknown, 0), event(ready, unknown, 100)}, false},
		{"nothing to receive", []types.ProgressProperties{event(skip, a, 0)}, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ctx, cancel := context.WithCancelCause(context.Background())
				events, stop := watchProgress(cancel, timeout, func(types.ProgressProperties) error { return nil })
				for _, e := range tt.events {
					time.Sleep(50 * time.Second)
					events <- e
				}
				synctest.Wait()
				if ctx.Err() != nil {
					t.Fatal("cancelled while there was progress")
				}
				time.Sleep(5 * timeout)
				synctest.Wait()
				if stalled := context.Cause(ctx) == errStalled; stalled != tt.stalled {
					t.Errorf("stalled: %v, want %v", stalled, tt.stalled)
				}
				stop()
			})
		})
	}
}
