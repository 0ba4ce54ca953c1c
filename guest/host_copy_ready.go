package guest

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"runtime/metrics"
	"time"

	"golang.org/x/sys/unix"

	"github.com/crivm/crivm/agentproto"
)

// A change that containers wait for finds the agent ready: the code for it has run before, so that it is in memory and,
// under software emulation, translated; and the garbage collector does not begin amid it.

const (
	// collectDelay leaves the CPU to those who have just been told of a change.
	collectDelay = 200 * time.Millisecond
	// rehearsedUploads: the first makes a copy, the others change it.
	rehearsedUploads = 3
)

// getReady follows each upload that was applied, and does what can be done before the next one.
func (h *hostCopies) getReady() {
	if h.agent.machine == nil { // nothing here takes longer the first time
		return
	}
	h.rehearsal.Do(func() {
		time.AfterFunc(laterDelay, func() {
			if err := h.rehearse(); err != nil {
				slog.Warn("rehearsing a change of a volume", "error", err)
			}
		})
	})
	if h.collecting.CompareAndSwap(false, true) {
		time.AfterFunc(collectDelay, func() {
			h.collecting.Store(false)
			if collectionNear() {
				runtime.GC()
			}
		})
	}
}

// collectionNear tells whether the next uploads would be what sets a collection off.
func collectionNear() bool {
	samples := []metrics.Sample{{Name: "/memory/classes/heap/objects:bytes"}, {Name: "/gc/heap/goal:bytes"}}
	metrics.Read(samples)
	return samples[0].Value.Uint64() > samples[1].Value.Uint64()/4*3
}

// rehearse makes a copy that nobody mounts, changes it as kubelet does while somebody waits for that, and removes it.
func (h *hostCopies) rehearse() (err error) {
	c := &hostCopy{dir: filepath.Join(h.agent.Dir, "volumes", "copies", rehearsalID)} // the host names none so
	if err := os.Mkdir(c.dir, 0o700); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(c.dir)) }()
	events, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return err
	}
	defer unix.Close(events)
	for n := range rehearsedUploads {
		stamped := fmt.Sprint("..", n)
		err := c.put(&agentproto.PutVolumeRequest{Upload: uint64(n + 1), Generation: stamped, Entries: []*agentproto.File{
			{Mode: unix.S_IFDIR | 0o755}, {Path: stamped, Mode: unix.S_IFDIR | 0o755},
			{Path: stamped + "/key", Mode: unix.S_IFREG | 0o644, Content: []byte(stamped), MtimeNanos: 1},
			{Path: dataLink, Mode: unix.S_IFLNK, LinkTarget: stamped}, {Path: "key", Mode: unix.S_IFLNK, LinkTarget: dataLink + "/key"},
		}})
		if err != nil {
			return err
		}
		content := filepath.Join(c.dir, copyContent)
		if n == 0 {
			if _, err := unix.InotifyAddWatch(events, content, unix.IN_CREATE|unix.IN_MOVED_TO|unix.IN_DELETE); err != nil {
				return err
			}
		}
		if found, err := os.ReadFile(filepath.Join(content, "key")); err != nil || string(found) != stamped {
			return fmt.Errorf("upload %d reads %q: %w", n, found, err)
		}
		if n == 0 {
			continue
		}
		if _, err := unix.Read(events, make([]byte, 4096)); err != nil {
			return fmt.Errorf("events of upload %d: %w", n, err)
		}
	}
	runtime.GC() // the first collection, too
	return nil
}
