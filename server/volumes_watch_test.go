package server

import (
	"path/filepath"
	"testing"

	"github.com/fsnotify/fsnotify"
)

// What kubelet does in a volume calls for one upload, at once, when the link moved; what it clears away afterwards is
// no concern.
func TestMeaningOfEvents(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	writeVolume(t, dir, map[string]string{"key": "one", "below/key": "deep"})
	c := &hostCopy{source: dir, data: "..old"}
	swap := fsnotify.Event{Name: filepath.Join(dir, dataLink), Op: fsnotify.Create}
	concerned := func(name string) bool {
		return c.concerns(filepath.Dir(filepath.Join(dir, name)), filepath.Join(dir, name))
	}
	if !concerned("..old/key") {
		t.Error("a file behind the link is no concern")
	}
	c.swapped(fsnotify.Event{Name: filepath.Join(dir, "key"), Op: fsnotify.Create})
	if c.data != "..old" {
		t.Errorf("another link's event made the target %q", c.data)
	}
	c.swapped(swap)
	if c.data == "..old" || c.data == "" {
		t.Errorf("after the swap the target is %q", c.data)
	}
	for name, want := range map[string]bool{
		"..old": false, "..old/key": false, "..data_tmp": false, "..2026_11_22": false, dataLink: true, "key": true, c.data + "/below/key": true,
	} {
		if got := concerned(name); got != want {
			t.Errorf("%s concerns the copy: %v", name, got)
		}
	}
	for _, e := range []struct {
		name string
		op   fsnotify.Op
		want why
	}{
		{dataLink, fsnotify.Create, whySwap}, {dataLink, fsnotify.Remove, whyNames}, {"key", fsnotify.Create, whyNames}, {"key", fsnotify.Rename, whyNames},
		{"key", fsnotify.Write, whyContent}, {"key", fsnotify.Chmod, whyContent}, {c.data + "/key", fsnotify.Remove, whyContent},
	} {
		path := filepath.Join(dir, e.name)
		if got := c.meaning(filepath.Dir(path), fsnotify.Event{Name: path, Op: e.op}); got != e.want {
			t.Errorf("%s of %s means %d, want %d", e.op, e.name, got, e.want)
		}
	}
	file := &hostCopy{source: filepath.Join(dir, "key")}
	if got := file.meaning(dir, fsnotify.Event{Name: file.source, Op: fsnotify.Create}); got != whyContent {
		t.Errorf("a file that is replaced means %d", got)
	}
}
