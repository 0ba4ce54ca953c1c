package vmruntime

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestStateOfAnotherHand(t *testing.T) {
	type value struct{ N int }
	for name, forge := range map[string]func(t *testing.T, path string){
		"symbolic link": func(t *testing.T, path string) {
			target := path + ".target"
			if err := errors.Join(os.Rename(path, target), os.Symlink(target, path)); err != nil {
				t.Fatal(err)
			}
		},
		"hard link": func(t *testing.T, path string) {
			if err := os.Link(path, path+".link"); err != nil {
				t.Fatal(err)
			}
		},
		"writable by others": func(t *testing.T, path string) {
			if err := os.Chmod(path, 0o622); err != nil {
				t.Fatal(err)
			}
		},
		"fifo": func(t *testing.T, path string) {
			if err := errors.Join(os.Remove(path), unix.Mkfifo(path, 0o600)); err != nil {
				t.Fatal(err)
			}
		},
		"endless": func(t *testing.T, path string) {
			if err := os.WriteFile(path, []byte(`{"N":1,"x":"`+strings.Repeat("x", stateBytes)+`"}`), 0o600); err != nil {
				t.Fatal(err)
			}
		},
		"missing": func(t *testing.T, path string) { RemoveState(path) },
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "state.json")
			var v value
			if err := SaveState(path, value{7}); err != nil {
				t.Fatal(err)
			}
			if err := LoadState(path, &v); err != nil || v.N != 7 {
				t.Fatalf("loaded %+v, %v", v, err)
			}
			forge(t, path)
			err := LoadState(path, &v)
			if err == nil {
				t.Error("accepted")
			}
			if errors.Is(err, os.ErrNotExist) != (name == "missing") {
				t.Errorf("got %v", err)
			}
		})
	}
}

// A link planted where the new state is written is not followed.
func TestSaveStateFollowsNothing(t *testing.T) {
	dir := t.TempDir()
	victim, path := filepath.Join(dir, "victim"), filepath.Join(dir, "state.json")
	if err := os.WriteFile(victim, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, planted := range []string{path, path + ".new"} {
		if err := os.Symlink(victim, planted); err != nil {
			t.Fatal(err)
		}
	}
	if err := SaveState(path, 1); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(victim); err != nil || string(b) != "precious" {
		t.Errorf("victim is %q, %v", b, err)
	}
}
