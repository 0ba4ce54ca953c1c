package main

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestStepsAreDoneOnce(t *testing.T) {
	p := &provisioner{build: t.TempDir()}
	if err := os.MkdirAll(p.stamps(), 0o755); err != nil {
		t.Fatal(err)
	}
	key, there, made := "v1", false, 0
	var fail error
	s := step{
		name: "thing",
		key:  func(context.Context) (string, error) { return key, nil },
		have: func(context.Context) bool { return there },
		make: func(context.Context) error { made++; there = fail == nil; return fail },
	}
	do := func(wantMade int, wantErr error) {
		t.Helper()
		if err := p.do(t.Context(), s); !errors.Is(err, wantErr) {
			t.Fatalf("%v, want %v", err, wantErr)
		}
		if made != wantMade {
			t.Fatalf("made %d times, want %d", made, wantMade)
		}
	}
	do(1, nil)
	do(1, nil)
	key = "v2"
	do(2, nil)
	there = false // someone has deleted the result
	do(3, nil)
	key, fail = "v3", errors.New("broken")
	do(4, fail)
	key, fail, there = "v2", nil, true // what failed for v3 may have spoilt v2
	do(5, nil)
	p.force = true
	do(6, nil)
}

func TestRunNamesWhatFailed(t *testing.T) {
	err := run(t.Context(), t.TempDir(), []string{"WORD=hello"}, "sh", "-c", "echo out; echo $WORD >&2; exit 3")
	if err == nil {
		t.Fatal("no error")
	}
	for _, part := range []string{"sh -c", "exit status 3", "out", "hello"} {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("%q does not say %q", err, part)
		}
	}
}

func TestReplace(t *testing.T) {
	dir := t.TempDir()
	for _, version := range []string{"1", "2"} {
		from := filepath.Join(dir, "new")
		if err := errors.Join(os.Mkdir(from, 0o755), os.WriteFile(filepath.Join(from, "version"), []byte(version), 0o644)); err != nil {
			t.Fatal(err)
		}
		if err := replace(from, filepath.Join(dir, "deep/er/result")); err != nil {
			t.Fatal(err)
		}
		if got, err := os.ReadFile(filepath.Join(dir, "deep/er/result/version")); err != nil || string(got) != version {
			t.Errorf("%q, %v", got, err)
		}
	}
}

func TestUnknownStep(t *testing.T) {
	err := (&provisioner{}).run(t.Context(), t.TempDir(), []string{"kernle"})
	if err == nil || !strings.Contains(err.Error(), `no step "kernle"`) {
		t.Errorf("%v", err)
	}
}
