package server

import (
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/fsnotify/fsnotify"
)

const (
	// rescanPeriod is how often what cannot be watched is looked at.
	rescanPeriod = 10 * time.Second
	// maxWatches bounds the watched directories of one volume; kubelet's have two and one for each directory below.
	maxWatches = 4096
)

// hostWatch follows directories of the host for the volumes that are copied from them: one inotify instance for
// all. What the kernel does not let it watch (fs.inotify.max_user_watches, max_user_instances) is looked at
// again every period instead.
type hostWatch struct {
	log    *slog.Logger
	period time.Duration
	notify *fsnotify.Watcher // nil when there is none to be had
	add    func(dir string) error
	lost   chan struct{} // events were lost
	done   sync.WaitGroup
	end    chan struct{}

	mu      sync.Mutex // guards the fields below and watches of copies
	dirs    map[string]map[*hostCopy]bool
	copies  map[*hostCopy]bool
	limited bool // it was logged that the kernel's limit is reached
}

func newHostWatch(log *slog.Logger) *hostWatch { return newHostWatchEvery(log, rescanPeriod) }

func newHostWatchEvery(log *slog.Logger, period time.Duration) *hostWatch {
	w := &hostWatch{
		log: log, period: period, lost: make(chan struct{}, 1), end: make(chan struct{}),
		dirs: map[string]map[*hostCopy]bool{}, copies: map[*hostCopy]bool{},
	}
	notify, err := fsnotify.NewWatcher()
	if err != nil {
		w.add = func(string) error { return err }
	} else {
		w.notify, w.add = notify, notify.Add
		w.done.Go(w.followErrors)
	}
	w.done.Go(w.follow)
	return w
}

func (w *hostWatch) close() {
	close(w.end)
	if w.notify != nil {
		w.notify.Close()
	}
	w.done.Wait()
}

// follow hands events on. It never waits for a volume.
func (w *hostWatch) follow() {
	var events chan fsnotify.Event
	if w.notify != nil {
		events = w.notify.Events
	}
	rescan := time.NewTicker(w.period)
	defer rescan.Stop()
	for {
		select {
		case <-w.end:
			return
		case event, ok := <-events:
			if !ok {
				events = nil
				continue
			}
			w.tell(event)
		case <-w.lost:
			w.look(func(*hostCopy) bool { return true })
		case <-rescan.C:
			w.look(func(c *hostCopy) bool { return c.unwatched })
		}
	}
}

// followErrors is apart from follow, which may wait for fsnotify while that waits to be rid of an error.
func (w *hostWatch) followErrors() {
	for err := range w.notify.Errors {
		w.log.Warn("events of host volumes were lost; all are looked at anew", "error", err)
		select {
		case w.lost <- struct{}{}:
		default:
		}
	}
}

// look lets copies find out whether something has changed.
func (w *hostWatch) look(which func(*hostCopy) bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for c := range w.copies {
		if which(c) {
			c.poke(whyNotice)
		}
	}
}

// tell lets the volumes know that an event concerns.
func (w *hostWatch) tell(event fsnotify.Event) {
	if event.Name == "" {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	dir := filepath.Dir(event.Name)
	for c := range w.dirs[dir] {
		c.swapped(event)
		if c.concerns(dir, event.Name) {
			c.poke(c.meaning(dir, event))
		}
	}
	self := w.dirs[event.Name]
	for c := range self {
		if c.concerns(event.Name, event.Name) {
			c.poke(whyContent)
		}
	}
	if self != nil && event.Has(fsnotify.Remove|fsnotify.Rename) {
		delete(w.dirs, event.Name) // the watch went with the directory
		for c := range self {
			delete(c.watches, event.Name)
			c.unwatched = c.unwatched || event.Name == c.source
		}
	}
}

// watch follows one more directory for a copy. What cannot be watched makes the copy one that is looked at.
func (w *hostWatch) watch(c *hostCopy, dir string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.copies[c] || c.watches[dir] {
		return
	}
	if len(c.watches) >= maxWatches {
		c.unwatched = true
		return
	}
	if w.dirs[dir] == nil {
		if err := w.add(dir); err != nil {
			c.unwatched = true
			if !w.limited {
				w.limited = true
				w.log.Warn("a volume's directory cannot be watched; it is looked at now and then. Raising fs.inotify.max_user_watches or max_user_instances may help",
					"directory", dir, "period", w.period, "error", err)
			}
			return
		}
		w.dirs[dir] = map[*hostCopy]bool{}
	}
	w.dirs[dir][c], c.watches[dir] = true, true
}

// begin makes a copy known. Its directories are watched from its next scan on.
func (w *hostWatch) begin(c *hostCopy) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.copies[c] = true
}

// forget lets go of a copy.
func (w *hostWatch) forget(c *hostCopy) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.copies, c)
	for dir := range c.watches {
		w.unwatchLocked(c, dir)
	}
}

// settled follows a scan: directories that it did not meet are not watched any more.
func (w *hostWatch) settled(c *hostCopy, met map[string]bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	c.data, _ = os.Readlink(filepath.Join(c.source, dataLink)) // not what the scan saw: it may have moved since
	c.unwatched = false
	for dir := range met {
		c.unwatched = c.unwatched || !c.watches[dir]
	}
	for dir := range c.watches {
		if !met[dir] {
			w.unwatchLocked(c, dir)
		}
	}
}

func (w *hostWatch) unwatchLocked(c *hostCopy, dir string) {
	delete(c.watches, dir)
	delete(w.dirs[dir], c)
	if len(w.dirs[dir]) > 0 {
		return
	}
	delete(w.dirs, dir)
	if w.notify == nil {
		return
	}
	if err := w.notify.Remove(dir); err != nil && !errors.Is(err, fsnotify.ErrNonExistentWatch) && !errors.Is(err, fsnotify.ErrClosed) {
		w.log.Debug("ending a watch", "directory", dir, "error", err)
	}
}

// swapped takes note of where dataLink points to now: what goes on behind the old target is no concern any more, and
// kubelet takes that away next. The watch's lock is held.
func (c *hostCopy) swapped(event fsnotify.Event) {
	if !event.Has(fsnotify.Create) || event.Name != filepath.Join(c.source, dataLink) {
		return
	}
	if data, err := os.Readlink(event.Name); err == nil {
		c.data = data
	}
}

// meaning tells what an event that concerns a copy says about it. The watch's lock is held.
func (c *hostCopy) meaning(dir string, event fsnotify.Event) why {
	switch {
	case dir != c.source || c.data == "":
		return whyContent
	case event.Name == filepath.Join(dir, dataLink) && event.Has(fsnotify.Create):
		return whySwap
	case event.Has(fsnotify.Create) || event.Has(fsnotify.Remove) || event.Has(fsnotify.Rename):
		return whyNames
	}
	return whyContent
}

// concerns tells whether an event in a watched directory is about the copy: not the writer's own names on their
// way in and out, nor other files beside a file. The watch's lock is held.
func (c *hostCopy) concerns(dir, name string) bool {
	if dir != c.source && !strings.HasPrefix(dir, c.source+"/") {
		return name == c.source // the copy is of a file
	}
	rel := strings.TrimPrefix(strings.TrimPrefix(name, c.source), "/")
	first, _, _ := strings.Cut(rel, "/")
	return !strings.HasPrefix(first, "..") || first == dataLink || first == c.data
}

// lookAgain makes a copy one that is looked at now and then.
func (w *hostWatch) lookAgain(c *hostCopy) {
	w.mu.Lock()
	defer w.mu.Unlock()
	c.unwatched = true
}
