package virtiofsd

import (
	"errors"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Owners of a volume are shown, and taken, as the mapping says; the volume itself keeps its own.
func TestMappedIDs(t *testing.T) {
	s, view := start(t)
	volume := t.TempDir()
	for name, owner := range map[string]int{"root": 0, "user": 1000, "unmapped": 70000} {
		path := filepath.Join(volume, name)
		if err := errors.Join(os.WriteFile(path, nil, 0o600), os.Chown(path, owner, owner)); err != nil {
			t.Fatal(err)
		}
	}
	ids := IDMapping{FirstUID: 196608, UIDs: 65536, FirstGID: 262144, GIDs: 65536}
	err := s.Add("v", open(t, volume), Access{IDs: ids})
	if errdefs.IsNotImplemented(err) {
		t.Skipf("file system of %s: %v", volume, err)
	}
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string][2]uint32{"root": {196608, 262144}, "user": {197608, 263144}, "unmapped": {65534, 65534}} {
		if got := ownerOf(t, filepath.Join(view, "v", name)); got != want {
			t.Errorf("%s is %v's, want %v", name, got, want)
		}
	}
	if err := os.Chown(filepath.Join(view, "v", "user"), 196608+7, 262144+8); err != nil {
		t.Error(err)
	}
	if got := ownerOf(t, filepath.Join(volume, "user")); got != [2]uint32{7, 8} {
		t.Errorf("on the host it is %v's", got)
	}
	if err := os.Chown(filepath.Join(view, "v", "root"), 0, 0); err == nil {
		t.Error("an ID that is not mapped was taken")
	}

	// What cannot map IDs is refused, with a word that says why.
	proc, err := os.OpenFile("/proc/self", unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer proc.Close()
	if err := s.Add("p", proc, Access{IDs: ids}); !errdefs.IsNotImplemented(err) {
		t.Errorf("a file system that cannot: %v", err)
	}
}

func ownerOf(t *testing.T, path string) [2]uint32 {
	t.Helper()
	info, err := os.Lstat(path)
	if err != nil {
		t.Fatal(err)
	}
	st := info.Sys().(*syscall.Stat_t)
	return [2]uint32{st.Uid, st.Gid}
}
