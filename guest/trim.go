package guest

import (
	"errors"
	"fmt"
	"log/slog"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The guest's writable disks are sparse files of the host, and what is deleted on them is to come back to it. With the
// mount option "discard" ext4 gives it back at each deletion, which waits for it (without a journal) or at each commit
// of the journal; deleting small files takes up to four times as long that way. So it is given back behind the
// programs' backs: some seconds later, and when a container was removed.
const (
	// trimPeriod is how often is looked whether there is something to give back.
	trimPeriod = 10 * time.Second
	// trimWorth is how much has to have been freed, in bytes.
	trimWorth = 4 << 20
	// trimChunk is how much of a disk is looked through at a time, in bytes: a multiple of ext4's block groups, of which
	// the kernel remembers those that have nothing new. In between others get their turn.
	trimChunk = 4 << 30
	// trimAtEnd bounds the last look through a disk that is unmounted.
	trimAtEnd  = 2 * time.Second
	sectorSize = 512
	ioctlTrim  = 0xc0185879 // FITRIM of linux/fs.h
)

// trimmer gives freed space of mounted disks back to the host.
type trimmer struct {
	kicked chan struct{}

	mu      sync.Mutex
	running bool
	disks   map[string]*trimmedDisk // by where they are mounted
}

// trimmedDisk is a mounted disk. The host has at most as much of it as was in use after the last trim and
// was written since: if less is in use now, the rest can go back. Overwriting looks the same and costs a needless look.
type trimmedDisk struct {
	path, device string

	mu      sync.Mutex // held while it is trimmed
	gone    bool
	used    uint64 // bytes in use after the last trim
	written uint64 // bytes written to the device until then
}

func newTrimmer() *trimmer {
	return &trimmer{kicked: make(chan struct{}, 1), disks: map[string]*trimmedDisk{}}
}

// add begins with a disk that has just been mounted; the first starts the work.
func (t *trimmer) add(path, device string) {
	d := &trimmedDisk{path: path, device: filepath.Base(device)}
	used, written, err := d.figures()
	if err != nil {
		slog.Warn("freed space of a disk does not go back to the host", "disk", device, "error", err)
		return
	}
	d.used, d.written = used, written
	t.put(d)
}

func (t *trimmer) put(d *trimmedDisk) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.disks[d.path] = d
	if !t.running {
		t.running = true
		go t.run()
	}
}

// remove ends with a disk that is about to be unmounted: nothing holds it open when it returns. For up to limit it is
// looked through a last time. undo begins again.
func (t *trimmer) remove(path string, limit time.Duration) (undo func()) {
	t.mu.Lock()
	d := t.disks[path]
	delete(t.disks, path)
	t.mu.Unlock()
	if d == nil {
		return func() {}
	}
	if limit > 0 {
		d.trim(time.Now().Add(limit))
	}
	d.setGone(true)
	return func() {
		d.setGone(false)
		t.put(d)
	}
}

func (d *trimmedDisk) setGone(gone bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.gone = gone
}

// soon has the disks looked at right away.
func (t *trimmer) soon() {
	select {
	case t.kicked <- struct{}{}:
	default:
	}
}

// run ends with the last disk.
func (t *trimmer) run() {
	tick := time.NewTicker(trimPeriod)
	defer tick.Stop()
	for {
		select {
		case <-t.kicked:
		case <-tick.C:
		}
		t.mu.Lock()
		disks := make([]*trimmedDisk, 0, len(t.disks))
		for _, d := range t.disks {
			disks = append(disks, d)
		}
		t.running = len(disks) > 0
		t.mu.Unlock()
		if len(disks) == 0 {
			return
		}
		for _, d := range disks {
			d.trim(time.Time{})
		}
	}
}

// figures are bytes in use and bytes ever written.
func (d *trimmedDisk) figures() (used, written uint64, err error) {
	var fs unix.Statfs_t
	if err := unix.Statfs(d.path, &fs); err != nil {
		return 0, 0, &os.PathError{Op: "statfs", Path: d.path, Err: err}
	}
	b, err := os.ReadFile(filepath.Join("/sys/class/block", d.device, "stat"))
	if err != nil {
		return 0, 0, err
	}
	fields := strings.Fields(string(b))
	if len(fields) < 7 {
		return 0, 0, fmt.Errorf("disk %s: statistics are %q", d.device, b)
	}
	sectors, err := strconv.ParseUint(fields[6], 10, 64)
	return (fs.Blocks - fs.Bfree) * uint64(fs.Bsize), sectors * sectorSize, err
}

// trim gives back what is worth it, until a time, if there is one.
func (d *trimmedDisk) trim(until time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.gone {
		return
	}
	used, written, err := d.figures()
	if err != nil || !worthTrimming(d.used, written-d.written, used) {
		return
	}
	d.used, d.written = used, written
	for at := uint64(0); until.IsZero() || time.Now().Before(until); at += trimChunk {
		err := fitrim(d.path, at, trimChunk)
		if errors.Is(err, unix.EINVAL) && at > 0 { // behind the end
			return
		}
		if err != nil {
			slog.Warn("giving freed space back to the host", "disk", d.device, "error", err)
			return
		}
		if at > math.MaxUint64-2*trimChunk {
			return
		}
		d.mu.Unlock() // whoever wants to unmount it
		d.mu.Lock()
		if d.gone {
			return
		}
	}
}

// worthTrimming tells whether at least trimWorth of what the host has may be free.
func worthTrimming(usedThen, writtenSince, usedNow uint64) bool {
	return usedThen+writtenSince >= usedNow+trimWorth
}

// fitrim discards what is free in a range of a file system.
func fitrim(path string, start, length uint64) error {
	dir, err := os.Open(path)
	if err != nil {
		return err
	}
	defer dir.Close()
	r := struct{ start, length, minimum uint64 }{start, length, 0} // struct fstrim_range
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, dir.Fd(), ioctlTrim, uintptr(unsafe.Pointer(&r)))
	if errno != 0 {
		return &os.PathError{Op: "trim", Path: path, Err: errno}
	}
	return nil
}
