package server

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

func TestEmptyDirPath(t *testing.T) {
	for path, want := range map[string][3]string{ // UID, volume, rest
		"/var/lib/kubelet/pods/u/volumes/kubernetes.io~empty-dir/data":     {"u", "data", ""},
		"/data/pods/u/volumes/kubernetes.io~empty-dir/data/a/b":            {"u", "data", "/a/b"},
		"/var/lib/kubelet/pods/u/volume-subpaths/data/main/0":              {"u", "", ""},
		"/var/lib/kubelet/pods/u/volumes/kubernetes.io~secret/data":        {},
		"/var/lib/kubelet/pods/u/volumes/kubernetes.io~empty-dir":          {},
		"/var/lib/kubelet/pods/u/x/volumes/kubernetes.io~empty-dir/data":   {},
		"/var/lib/kubelet/pods/u/volumes/kubernetes.io~empty-dir-not/data": {},
	} {
		var got [3]string
		if m := emptyDirPath.FindStringSubmatch(path); m != nil {
			got = [3]string(m[2:5])
		}
		if got != want {
			t.Errorf("%s: %q, want %q", path, got, want)
		}
	}
}

func TestOnlyDirectories(t *testing.T) {
	dir := t.TempDir()
	if err := os.MkdirAll(filepath.Join(dir, "a/b"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, emptyDirImage+newImage), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if !onlyDirectories(dir) {
		t.Error("directories for sub paths, and a disk that was not finished, count as content")
	}
	if sub, found := findBelow(dir, filepath.Join(dir, "a/b")); !found || sub != "/a/b" {
		t.Errorf("found %q, %v", sub, found)
	}
	if sub, found := findBelow(filepath.Join(dir, "a/b"), filepath.Join(dir, "a")); found {
		t.Errorf("found %q outside", sub)
	}
	deep := t.TempDir()
	if err := os.MkdirAll(filepath.Join(deep, strings.Repeat("d/", maxEmptyDepth+1)), 0o755); err != nil {
		t.Fatal(err)
	}
	if onlyDirectories(deep) {
		t.Error("directories deeper than anybody looks count as empty")
	}
	if sub, found := findBelow(deep, filepath.Join(deep, "d/d/d")); !found || sub != "/d/d/d" {
		t.Errorf("in deep directories found %q, %v", sub, found)
	}
	if err := os.Symlink("nowhere", filepath.Join(dir, "a/b/link")); err != nil {
		t.Fatal(err)
	}
	if onlyDirectories(dir) {
		t.Error("a symbolic link counts as a directory")
	}
}

// What lies under the name of a disk and cannot be one that crivm made is not opened as one.
func TestOpenImage(t *testing.T) {
	for name, c := range map[string]struct {
		make func(path string) error
		ok   bool
	}{
		"file":   {func(p string) error { return os.WriteFile(p, nil, 0o600) }, true},
		"link":   {func(p string) error { return os.Symlink("/etc/passwd", p) }, false},
		"linked": {func(p string) error { return errors.Join(os.WriteFile(p, nil, 0o600), os.Link(p, p+"2")) }, false},
		"fifo":   {func(p string) error { return unix.Mkfifo(p, 0o600) }, false},
		"dir":    {func(p string) error { return os.Mkdir(p, 0o700) }, false},
		"setuid": {func(p string) error { return errors.Join(os.WriteFile(p, nil, 0o600), unix.Chmod(p, 0o4755)) }, false},
	} {
		dir := t.TempDir()
		if err := c.make(filepath.Join(dir, emptyDirImage)); err != nil {
			t.Fatal(err)
		}
		parent, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY, 0)
		if err != nil {
			t.Fatal(err)
		}
		image, err := openImage(parent, dir)
		unix.Close(parent)
		if (err == nil) != c.ok || errdefs.IsNotFound(err) {
			t.Errorf("%s: %v", name, err)
		}
		if err == nil {
			image.Close()
		}
	}
}
