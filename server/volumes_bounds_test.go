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

// A directory with a million names, as a guest can make one where it may write, is found out with little memory, and not
// read to its end.
func TestMillionEntries(t *testing.T) {
	if testing.Short() {
		t.Skip("makes a million names")
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
	if err := unix.Symlinkat("x", parent, "first"); err != nil {
		t.Fatal(err)
	}
	for i := range 1_000_000 { // hard links: names without inodes
		if err := unix.Linkat(parent, "first", parent, fmt.Sprint("name-", i), 0); err != nil {
			t.Fatal(err)
		}
	}
	// A million entries in memory are more than a hundred MiB; nothing else runs beside this test.
	allocates := func(what string, limit uint64, f func()) {
		t.Helper()
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		f()
		runtime.ReadMemStats(&after)
		t.Logf("%s allocates %d KiB", what, (after.TotalAlloc-before.TotalAlloc)>>10)
		if after.TotalAlloc-before.TotalAlloc > limit {
			t.Errorf("%s allocates %d KiB", what, (after.TotalAlloc-before.TotalAlloc)>>10)
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
	allocates("looking for files", 8<<20, func() {
		if onlyDirectories(dir) {
			t.Error("a million links are directories")
		}
	})
	elsewhere := t.TempDir()
	allocates("looking for a directory that is not there", 8<<20, func() {
		if sub, found := findBelow(dir, elsewhere); found {
			t.Errorf("another directory is found at %q", sub)
		}
	})
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
