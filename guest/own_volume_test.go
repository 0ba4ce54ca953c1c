package guest

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestCopyTree(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("owners and device nodes need root")
	}
	from, to := t.TempDir(), t.TempDir()
	old := time.Unix(1_000_000_000, 5000)
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	in := func(name string) string { return filepath.Join(from, name) }
	check(os.Mkdir(in("dir"), 0o700))
	check(os.WriteFile(in("dir/file"), []byte("content"), 0o600))
	check(os.Chown(in("dir/file"), 12, 34))
	check(os.Chmod(in("dir/file"), 0o750|os.ModeSetuid|os.ModeSetgid))
	check(os.Link(in("dir/file"), in("other-name")))
	check(os.WriteFile(in("alone"), nil, 0o000))
	check(os.Symlink("/etc/passwd", in("link")))
	check(os.Lchown(in("link"), 56, 78))
	check(os.Symlink("dir", in("to-a-directory")))
	check(unix.Mkfifo(in("fifo"), 0o640))
	check(unix.Mknod(in("null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))))
	attributes := true
	if err := unix.Setxattr(in("alone"), "trusted.crivm", []byte("a\x00b"), 0); errors.Is(err, unix.ENOTSUP) || errors.Is(err, unix.EPERM) {
		attributes = false
		t.Logf("no extended attributes here: %v", err)
	} else {
		check(err)
	}
	check(os.Chown(from, 90, 12))
	check(os.Chmod(from, 0o770|os.ModeSticky))
	for _, name := range []string{"dir/file", "dir", "."} {
		check(os.Chtimes(in(name), old, old))
	}
	check(copyTree(t.Context(), from, to))

	seen := 0
	check(filepath.WalkDir(from, func(path string, _ fs.DirEntry, err error) error {
		check(err)
		rel, err := filepath.Rel(from, path)
		check(err)
		var a, b syscall.Stat_t
		check(syscall.Lstat(path, &a))
		check(syscall.Lstat(filepath.Join(to, rel), &b))
		if a.Mode != b.Mode || a.Uid != b.Uid || a.Gid != b.Gid || a.Rdev != b.Rdev || a.Nlink != b.Nlink || a.Size != b.Size && a.Mode&unix.S_IFMT != unix.S_IFDIR || a.Mtim != b.Mtim {
			t.Errorf("%s is %+v, its copy %+v", rel, a, b)
		}
		seen++
		return nil
	}))
	if seen != 9 {
		t.Errorf("%d entries were compared", seen)
	}
	if b, err := os.ReadFile(filepath.Join(to, "other-name")); string(b) != "content" {
		t.Errorf("file is %q (%v)", b, err)
	}
	if target, err := os.Readlink(filepath.Join(to, "link")); target != "/etc/passwd" {
		t.Errorf("link is %q (%v)", target, err)
	}
	if attributes {
		value := make([]byte, 10)
		if n, err := unix.Getxattr(filepath.Join(to, "alone"), "trusted.crivm", value); err != nil || string(value[:n]) != "a\x00b" {
			t.Errorf("attribute is %q (%v)", value[:max(n, 0)], err)
		}
	}

	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if err := copyTree(ended, from, t.TempDir()); !errors.Is(err, context.Canceled) {
		t.Errorf("a copy that nobody waits for: %v", err)
	}
}

// TestOwnVolume: the volume follows the root file system's links within it, and is a directory or an error.
func TestOwnVolume(t *testing.T) {
	a, _ := newTestAgent(t)
	root := t.TempDir()
	for _, dir := range []string{"run/data", "etc"} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(root, "run/data/seed"), []byte("x"), 0o644); err != nil {
		t.Fatal(err)
	}
	for name, target := range map[string]string{"var": "/", "out": "/../../../../tmp"} {
		if err := os.Symlink(target, filepath.Join(root, name)); err != nil {
			t.Fatal(err)
		}
	}
	c := &container{id: "c", dir: t.TempDir()}
	got := map[string]bool{}
	for destination, entries := range map[string]int{"/run/data": 1, "/var/run/data": 1, "/not/there": 0, "/out": 0} {
		dir, err := a.volumes.prepareOwn(t.Context(), c, root, destination)
		if err != nil {
			t.Errorf("%s: %v", destination, err)
			continue
		}
		found, err := os.ReadDir(dir)
		if err != nil || len(found) != entries || got[dir] {
			t.Errorf("%s is %s with %v (%v)", destination, dir, found, err)
		}
		got[dir] = true
	}
	if dir, err := a.volumes.prepareOwn(t.Context(), c, root, "/run/data/seed"); err == nil {
		t.Errorf("a file as a VOLUME is %s", dir)
	}
}
