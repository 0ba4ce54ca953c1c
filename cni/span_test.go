package cni

import (
	"os"
	"path/filepath"
	"slices"
	"testing"
)

// TestSpans: a plugin's ADD and DEL are told of while they run, whether they succeed or fail; other verbs are not.
func TestSpans(t *testing.T) {
	path := filepath.Join(t.TempDir(), "plug")
	if err := os.WriteFile(path, []byte("#!/bin/sh\ncat > /dev/null\n[ $CNI_COMMAND != DEL ]\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	var told []string
	ctx := WithSpans(t.Context(), func(plugin string) func() {
		told = append(told, "begin "+plugin)
		return func() { told = append(told, "end "+plugin) }
	})
	for _, c := range []struct {
		verb  string
		spans int
		fails bool
	}{{"ADD", 1, false}, {"DEL", 1, true}, {"VERSION", 0, false}, {"STATUS", 0, false}} {
		told = nil
		_, err := (&pluginExec{}).ExecPlugin(ctx, path, nil, []string{"PATH=" + os.Getenv("PATH"), "CNI_COMMAND=" + c.verb})
		if (err != nil) != c.fails || !slices.Equal(told, []string{"begin plug", "end plug"}[:2*c.spans]) {
			t.Errorf("%s: %v, spans %q", c.verb, err, told)
		}
	}
	if _, err := (&pluginExec{}).ExecPlugin(t.Context(), path, nil, []string{"PATH=" + os.Getenv("PATH"), "CNI_COMMAND=ADD"}); err != nil {
		t.Errorf("without spans: %v", err)
	}
}
