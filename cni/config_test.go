package cni

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containernetworking/cni/pkg/types"
)

func TestLoadConfiguration(t *testing.T) {
	const list = `{"cniVersion":"1.0.0","name":"%s","plugins":[{"type":"p"}]}`
	tests := []struct {
		name    string
		files   map[string]string
		network string // "" expects an error with says
		plugins int
		says    string
	}{
		{"first by name", map[string]string{"20-b.conflist": fmt.Sprintf(list, "b"), "10-a.conflist": fmt.Sprintf(list, "a")}, "a", 1, ""},
		{"a single plugin", map[string]string{"10-a.conf": `{"cniVersion":"0.3.1","name":"single","type":"p"}`, "20-b.conflist": fmt.Sprintf(list, "b")}, "single", 1, ""},
		{"json", map[string]string{"10-a.json": `{"cniVersion":"0.3.1","name":"j","type":"p"}`}, "j", 1, ""},
		{"a list in a .conf", map[string]string{"10-a.conf": fmt.Sprintf(list, "sloppy")}, "sloppy", 1, ""},
		{"plugins in files", map[string]string{"10-a.conflist": fmt.Sprintf(list, "a"), "a/10-more.conf": `{"type":"q"}`}, "a", 2, ""},
		{"only inlined", map[string]string{"10-a.conflist": `{"cniVersion":"1.0.0","name":"a","loadOnlyInlinedPlugins":true,"plugins":[{"type":"p"}]}`, "a/10-more.conf": `{"type":"q"}`}, "a", 1, ""},
		{"other files", map[string]string{"README": "x", "10-a.conflist.bak": "x", "20-b.conflist": fmt.Sprintf(list, "b")}, "b", 1, ""},
		{"none", map[string]string{"README": "x"}, "", 0, "no network configuration in "},
		{"broken first", map[string]string{"10-a.conflist": `{"name":`, "20-b.conflist": fmt.Sprintf(list, "b")}, "", 0, "10-a.conflist"},
		{"empty file", map[string]string{"10-a.conflist": ``}, "", 0, "10-a.conflist"},
		{"no name", map[string]string{"10-a.conflist": `{"cniVersion":"1.0.0","plugins":[{"type":"p"}]}`}, "", 0, "10-a.conflist"},
		{"a path as name", map[string]string{"10-a.conflist": `{"cniVersion":"1.0.0","name":"../x","plugins":[{"type":"p"}]}`}, "", 0, "../x"},
		{"no type", map[string]string{"10-a.conflist": `{"cniVersion":"1.0.0","name":"a","plugins":[{}]}`}, "", 0, "10-a.conflist"},
		{"no plugins", map[string]string{"10-a.conflist": `{"cniVersion":"1.0.0","name":"a","plugins":[]}`}, "", 0, "10-a.conflist"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			dir := t.TempDir()
			for name, text := range test.files {
				path := filepath.Join(dir, name)
				if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text), 0o644)); err != nil {
					t.Fatal(err)
				}
			}
			c := loadConfiguration(dir)
			if test.network == "" {
				if c.err == nil || c.list != nil || !strings.Contains(c.err.Error(), test.says) || !strings.Contains(c.err.Error(), dir) {
					t.Errorf("%+v, %v", c.list, c.err)
				}
				return
			}
			if c.err != nil || c.list.Name != test.network || len(c.list.Plugins) != test.plugins {
				t.Fatalf("%+v, %v", c.list, c.err)
			}
			again, err := parseConfiguration(c.list.Bytes) // what is recorded is the whole
			if err != nil || len(again.Plugins) != test.plugins || again.CNIVersion != c.list.CNIVersion {
				t.Errorf("recorded %s: %v", c.list.Bytes, err)
			}
		})
	}
}

func FuzzParseConfiguration(f *testing.F) {
	f.Add([]byte(oneplugin))
	f.Add([]byte(`{"name":"a","plugins":[{"type":"p","ipam":{"type":"x"}}],"disableCheck":"true"}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		list, err := parseConfiguration(data)
		if err == nil && (list.Name == "" || strings.Contains(list.Name, "/")) {
			t.Errorf("name %q", list.Name)
		}
	})
}

func TestStatusFollowsTheDirectory(t *testing.T) {
	fake := &fakePlugins{act: func(context.Context, call) (string, error) { return "", nil }}
	n := testNetwork(t, "", "/plugins", fake)
	expect := func(says string) {
		t.Helper()
		eventually(t, func() error {
			err := n.Status()
			if says == "" && err != nil || says != "" && (err == nil || !strings.Contains(err.Error(), says)) {
				return fmt.Errorf("status %v, want %q", err, says)
			}
			return nil
		})
	}
	dir := n.config.ConfDir
	expect("no network configuration in " + dir)
	writeConf(t, dir, "20-b.conflist", `{"cniVersion":"1.0.0","name":"b","plugins":[{"type":"p"}]}`)
	expect("")
	writeConf(t, dir, "10-a.conflist", `{"cniVersion":"1.0.0","name":"a","plugins":[{"type":"p","ipam":{"type":"absent"}}]}`)
	expect(`plugin "absent" not found in /plugins`)
	if err := os.WriteFile(filepath.Join(dir, "10-a.conflist"), []byte(`{"cni`), 0o644); err != nil {
		t.Fatal(err)
	}
	expect("10-a.conflist")
	if err := os.Remove(filepath.Join(dir, "10-a.conflist")); err != nil {
		t.Fatal(err)
	}
	expect("")
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	expect("no network configuration in " + dir)
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	writeConf(t, dir, "10-a.conf", `{"cniVersion":"0.4.0","name":"again","type":"p"}`)
	expect("")
	if calls := fake.take(); len(calls) != 0 {
		t.Errorf("plugins before CNI 1.1 were asked: %v", calls)
	}
}

func TestStatusAsksPlugins(t *testing.T) {
	release := make(chan struct{})
	fake := &fakePlugins{act: func(ctx context.Context, c call) (string, error) {
		select {
		case <-release:
			return "", types.NewError(types.ErrPluginNotAvailable, "agent is not running", "")
		case <-ctx.Done():
			return "", ctx.Err()
		}
	}}
	n := testNetwork(t, strings.Replace(oneplugin, "1.0.0", "1.1.0", 1), "/plugins", fake)
	start := time.Now()
	if err := n.Status(); !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "no answer yet") {
		t.Errorf("status while the plugin hangs: %v", err)
	}
	if took := time.Since(start); took > 5*time.Second {
		t.Errorf("status waited %v for a plugin", took)
	}
	close(release)
	eventually(t, func() error {
		if err := n.Status(); !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "agent is not running") {
			return fmt.Errorf("status %v", err)
		}
		return nil
	})
	for range 20 {
		_ = n.Status()
	}
	if calls := fake.take(); len(calls) != 1 || calls[0].verb != "STATUS" {
		t.Errorf("calls %v, want one STATUS", verbs(calls))
	}
	// An old plugin that does not know the verb is no reason against it.
	fake.answer(func(context.Context, call) (string, error) {
		return "", types.NewError(types.ErrInvalidEnvironmentVariables, "unknown CNI_COMMAND: STATUS", "")
	})
	writeConf(t, n.config.ConfDir, "00-new.conflist", `{"cniVersion":"1.1.0","name":"new","plugins":[{"type":"p"}]}`)
	eventually(t, func() error { return n.Status() })
}

func TestNewRefuses(t *testing.T) {
	dir := t.TempDir()
	good := Config{ConfDir: dir + "/a", BinDirs: []string{"/b"}, CacheDir: dir + "/c", NetnsDir: dir + "/d"}
	for name, change := range map[string]func(*Config){
		"relative ConfDir": func(c *Config) { c.ConfDir = "net.d" },
		"no CacheDir":      func(c *Config) { c.CacheDir = "" },
		"no BinDirs":       func(c *Config) { c.BinDirs = nil },
	} {
		config := good
		change(&config)
		if _, err := New(config); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
	n, err := New(good)
	if err != nil {
		t.Fatal(err)
	}
	if n.config.AddTimeout != time.Minute || n.config.DelTimeout != time.Minute {
		t.Errorf("time limits %v, %v", n.config.AddTimeout, n.config.DelTimeout)
	}
	for _, id := range []string{"", "../x", "a/b", "-a", strings.Repeat("a", 250)} {
		if _, err := n.Prepare(t.Context(), id, 0, 0); !errdefs.IsInvalidArgument(err) {
			t.Errorf("id %.20q: %v", id, err)
		}
	}
	if err := n.Close(); err != nil {
		t.Fatal(err)
	}
}

func TestKeyedLock(t *testing.T) {
	k := keyedLock{held: map[string]*heldLock{}}
	unlock, err := k.lock(t.Context(), "a")
	if err != nil {
		t.Fatal(err)
	}
	other, err := k.lock(t.Context(), "b")
	if err != nil {
		t.Fatal(err)
	}
	other()
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := k.lock(ended, "a"); !errors.Is(err, context.Canceled) {
		t.Errorf("a taken lock: %v", err)
	}
	got := make(chan func())
	go func() {
		unlock, _ := k.lock(context.Background(), "a")
		got <- unlock
	}()
	unlock()
	(<-got)()
	if len(k.held) != 0 {
		t.Errorf("%d locks remembered", len(k.held))
	}
}
