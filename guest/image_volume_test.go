package guest

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
)

func TestResolveIn(t *testing.T) {
	base := t.TempDir()
	root := filepath.Join(base, "root")
	err := errors.Join(
		os.MkdirAll(filepath.Join(root, "a/b"), 0o755), os.WriteFile(filepath.Join(root, "a/file"), nil, 0o644), os.WriteFile(filepath.Join(base, "outside"), nil, 0o644),
		os.Symlink("/a", filepath.Join(root, "absolute")), os.Symlink("../../outside", filepath.Join(root, "a/up")),
		os.Symlink("/proc/self/exe", filepath.Join(root, "exe")), os.Symlink("loop", filepath.Join(root, "loop")),
	)
	if err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{
		"": "", "a": "a", "a/b/": "a/b", "a/file": "a/file", "/a": "a", "absolute/b": "a/b", "../../a": "a", "a/../../../a/b": "a/b",
	} {
		if got, err := resolveIn(root, path); err != nil || got != filepath.Join(root, want) {
			t.Errorf("%q: %q (%v), want %q", path, got, err, want)
		}
	}
	for _, path := range []string{"missing", "a/up", "exe", "a/file/x", "../outside"} {
		if got, err := resolveIn(root, path); !errdefs.IsNotFound(err) {
			t.Errorf("%q: %q (%v), want not found", path, got, err)
		}
	}
	for _, path := range []string{"loop", "a\x00"} {
		if got, err := resolveIn(root, path); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %q (%v), want invalid", path, got, err)
		}
	}
}
