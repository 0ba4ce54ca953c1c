package server

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"
)

// A directory with more entries than are copied is found out with little memory, and not walked to its end.
func TestScanOfTooManyEntries(t *testing.T) {
	if testing.Short() {
		t.Skip("makes a quarter of a million names")
	}
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "nr_inodes=0"); err != nil {
		t.Skipf("no tmpfs for so many names: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	parent, err := unix.Open(dir, unix.O_DIRECTORY|unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(parent)
	for i := range maxCopiedFiles + 1000 {
		if err := unix.Symlinkat("x", parent, fmt.Sprint("name-", i)); err != nil {
			t.Fatal(err)
		}
	}
	heap := func() uint64 {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	before, late, seen := heap(), uint64(0), 0
	_, err = scanVolume(dir, visitor{file: func(*os.Root, hostFile) error {
		if seen++; seen == maxCopiedFiles-10 {
			late = heap()
		}
		return nil
	}})
	if !errors.Is(err, errTooLarge) || seen != maxCopiedFiles {
		t.Errorf("after %d entries: %v", seen, err)
	}
	if late > before+(16<<20) {
		t.Errorf("a scan of %d entries holds %d KiB", seen, (late-before)>>10)
	}
}

// A volume takes a bounded number of watches; what is beyond is looked at now and then.
func TestWatchesAreBounded(t *testing.T) {
	dir := t.TempDir()
	for i := range maxWatches + 10 {
		if err := os.Mkdir(filepath.Join(dir, fmt.Sprint(i)), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	w := newHostWatch(slog.New(slog.DiscardHandler))
	defer w.close()
	added := 0
	w.add = func(string) error { added++; return nil }
	c := &hostCopy{source: dir, watches: map[string]bool{}}
	w.begin(c)
	met := map[string]bool{}
	found, err := scanVolume(dir, visitor{directory: func(d string) { met[d] = true; w.watch(c, d) }})
	if err != nil {
		t.Fatal(err)
	}
	w.settled(c, met)
	if added != maxWatches || len(c.watches) != maxWatches || !c.unwatched {
		t.Errorf("%d directories (%v): %d watches, looked at now and then: %v", len(met), found.data, added, c.unwatched)
	}
}
