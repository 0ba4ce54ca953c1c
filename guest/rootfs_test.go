package guest

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"
)

// A writable layer is measured without having a directory's names in memory, however many there are.
func TestLayerSize(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "nr_inodes=0"); err != nil {
		t.Skipf("no tmpfs for so many names: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	})
	const names = 300_000
	many, deep := filepath.Join(dir, "many"), filepath.Join(dir, "a/b")
	for _, d := range []string{many, deep} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(deep, "file"), make([]byte, 8192), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/", filepath.Join(many, "0")); err != nil {
		t.Fatal(err)
	}
	for i := 1; i < names; i++ { // hard links: names without inodes
		if err := unix.Link(filepath.Join(many, "0"), filepath.Join(many, fmt.Sprint(i))); err != nil {
			t.Fatal(err)
		}
	}
	l := &layerSize{dirs: []string{dir, filepath.Join(dir, "never made")}}
	var bytes, inodes uint64
	if high := peakHeap(func() { bytes, inodes = l.get() }); high > 24<<20 {
		t.Errorf("measuring %d names takes %d MiB", names, high>>20)
	}
	if bytes != 8192 || inodes != names+5 {
		t.Errorf("the layer has %d bytes and %d inodes", bytes, inodes)
	}
}

// peakHeap is the most that the heap had while f ran.
func peakHeap(f func()) uint64 {
	runtime.GC()
	most, end := make(chan uint64, 1), make(chan struct{})
	go func() {
		var m runtime.MemStats
		high := uint64(0)
		for {
			runtime.ReadMemStats(&m)
			high = max(high, m.HeapAlloc)
			select {
			case <-end:
				most <- high
				return
			default:
				runtime.Gosched()
			}
		}
	}()
	f()
	close(end)
	return <-most
}
