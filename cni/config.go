package cni

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containernetworking/cni/libcni"
	"github.com/fsnotify/fsnotify"
)

// settle is how long the directory must have been quiet before it is read again: installers write several
// files, and not all of them by rename.
const settle = 100 * time.Millisecond

// configuration is what the directory held when it was last read. Exactly one of list and err is set.
type configuration struct {
	file string // "" when there is none
	list *libcni.NetworkConfigList
	err  error
}

// loadConfiguration reads the first file of dir, by name, that ends in .conflist, .conf or .json, as other
// runtimes do. A broken first file is an error, not a reason to take the next: pods would land on another
// network without notice.
func loadConfiguration(dir string) configuration {
	files, err := libcni.ConfFiles(dir, []string{".conf", ".conflist", ".json"})
	if err != nil {
		return configuration{err: fmt.Errorf("network configuration in %s: %w", dir, err)}
	}
	if len(files) == 0 {
		return configuration{err: fmt.Errorf("no network configuration in %s: %w", dir, errdefs.ErrUnavailable)}
	}
	slices.Sort(files)
	c := configuration{file: files[0]}
	if c.list, err = readConfiguration(files[0]); err != nil {
		c.list, c.err = nil, fmt.Errorf("network configuration %s: %s: %w", files[0], err.Error(), errdefs.ErrFailedPrecondition)
	}
	return c
}

func readConfiguration(file string) (*libcni.NetworkConfigList, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	var list *libcni.NetworkConfigList
	if filepath.Ext(file) == ".conflist" {
		list, err = libcni.NetworkConfFromFile(file)
	} else {
		list, err = wrapPlugin(data)
	}
	if err != nil {
		return nil, err
	}
	if list.Bytes, err = inlined(list); err != nil {
		return nil, err
	}
	return parseConfiguration(list.Bytes) // as Del will read it
}

// wrapPlugin makes a list of the configuration of a single plugin, the form before .conflist. Some
// installers write a list into a .conf file all the same.
func wrapPlugin(data []byte) (*libcni.NetworkConfigList, error) {
	var plugin map[string]any
	if err := json.Unmarshal(data, &plugin); err != nil {
		return nil, err
	}
	if _, ok := plugin["plugins"]; ok {
		return libcni.NetworkConfFromBytes(data)
	}
	list, err := json.Marshal(map[string]any{
		"name": plugin["name"], "cniVersion": plugin["cniVersion"], "plugins": []any{plugin},
	})
	if err != nil {
		return nil, err
	}
	return libcni.NetworkConfFromBytes(list)
}

// inlined writes the list anew with all its plugins in it, including those that libcni has read from the
// directory named after the network: what is recorded with a pod must not depend on files.
func inlined(list *libcni.NetworkConfigList) ([]byte, error) {
	var raw map[string]any
	if err := json.Unmarshal(list.Bytes, &raw); err != nil {
		return nil, err
	}
	var plugins []json.RawMessage
	for _, plugin := range list.Plugins {
		plugins = append(plugins, plugin.Bytes)
	}
	raw["plugins"], raw["loadOnlyInlinedPlugins"] = plugins, true
	return json.Marshal(raw)
}

// parseConfiguration reads a list that inlined has written.
func parseConfiguration(data []byte) (*libcni.NetworkConfigList, error) {
	list, err := libcni.NetworkConfFromBytes(data)
	if err != nil {
		return nil, err
	}
	if list.Name == "" || strings.ContainsAny(list.Name, "/\x00") {
		return nil, fmt.Errorf("network name %q", list.Name)
	}
	for i, plugin := range list.Plugins {
		if plugin.Network.Type == "" {
			return nil, fmt.Errorf("plugin %d has no type", i)
		}
	}
	return list, nil
}

// configuredNetwork returns the loaded configuration or why there is none.
func (n *Network) configuredNetwork() (*libcni.NetworkConfigList, error) {
	c := n.current.Load()
	return c.list, c.err
}

// watcher reloads the configuration when its directory changes.
type watcher struct {
	notify *fsnotify.Watcher
	done   chan struct{}
}

// watch loads the configuration and starts following its directory. The parent is watched too, so that
// the directory may be removed and made again.
func (n *Network) watch() (*watcher, error) {
	dir := filepath.Clean(n.config.ConfDir)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	notify, err := fsnotify.NewWatcher()
	if err != nil {
		return nil, err
	}
	for _, d := range []string{filepath.Dir(dir), dir} {
		if err := notify.Add(d); err != nil {
			return nil, errors.Join(err, notify.Close())
		}
	}
	w := &watcher{notify: notify, done: make(chan struct{})}
	n.reload(w)
	go n.follow(w, dir)
	return w, nil
}

func (n *Network) follow(w *watcher, dir string) {
	defer close(w.done)
	quiet := time.NewTimer(settle)
	quiet.Stop()
	for {
		select {
		case event, ok := <-w.notify.Events:
			if !ok {
				return
			}
			if event.Name != dir && !strings.HasPrefix(event.Name, dir+"/") || event.Op == fsnotify.Chmod {
				continue
			}
			quiet.Reset(settle)
		case err, ok := <-w.notify.Errors:
			if !ok {
				return
			}
			slog.Warn("CNI configuration watch", "directory", dir, "error", err) // events were lost
			quiet.Reset(settle)
		case <-quiet.C:
			n.reload(w)
		}
	}
}

// reload reads the directory. No lock is held and no plugin runs, so nothing can delay it.
func (n *Network) reload(w *watcher) {
	dir := filepath.Clean(n.config.ConfDir)
	// Adding a watched directory again does nothing; one that was made again needs it.
	if err := w.notify.Add(dir); err != nil {
		slog.Warn("CNI configuration watch", "directory", dir, "error", err)
	}
	c := loadConfiguration(dir)
	if c.list != nil {
		if sub := filepath.Join(dir, c.list.Name); isDir(sub) { // plugins of the network in files of their own
			if err := w.notify.Add(sub); err != nil {
				slog.Warn("CNI configuration watch", "directory", sub, "error", err)
			}
		}
	}
	before := n.current.Swap(&c)
	switch {
	case c.err != nil && (before == nil || before.err == nil || before.err.Error() != c.err.Error()):
		slog.Warn("pod network not ready", "error", c.err)
	case c.list != nil && (before == nil || before.list == nil || string(before.list.Bytes) != string(c.list.Bytes)):
		slog.Info("pod network configured", "network", c.list.Name, "file", c.file)
	}
}

func (w *watcher) close() error {
	err := w.notify.Close()
	<-w.done
	return err
}

func isDir(path string) bool {
	st, err := os.Stat(path)
	return err == nil && st.IsDir()
}
