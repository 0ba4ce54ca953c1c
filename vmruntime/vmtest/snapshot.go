package vmtest

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
)

// A snapshot holds the configuration only: the guest of a restored VM starts anew.
const (
	snapshotConfig = "config.json"
	snapshotState  = "state.json"
	snapshotMemory = "memory-ranges"
)

func (m *machine) snapshot(r map[string]any, _ []int) response {
	const what = "The VM could not be snapshotted"
	dir, isFile := strings.CutPrefix(text(r, "destination_url"), "file://")
	switch {
	case m.guest == nil:
		return apiError(what, notRunning)
	case !m.paused:
		return apiError(what, "Cannot snapshot VM", "VM is not paused")
	case !isFile:
		return apiError(what, "Invalid destination URL")
	case !m.allowed(dir, false):
		return apiError(what, "Permission denied (os error 13)")
	}
	m.events.send("vm", "snapshotting", nil)
	b, err := json.Marshal(m.config)
	if err != nil {
		return apiError(what, err.Error())
	}
	for name, content := range map[string][]byte{snapshotConfig: b, snapshotState: []byte("{}"), snapshotMemory: nil} {
		f, err := os.OpenFile(filepath.Join(dir, name), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		if err != nil {
			return apiError(what, "Cannot send VM snapshot", err.Error())
		}
		_, err = f.Write(content)
		if f.Close(); err != nil {
			return apiError(what, "Cannot send VM snapshot", err.Error())
		}
	}
	m.events.send("vm", "snapshotted", nil)
	return noContent
}

func (m *machine) restore(r map[string]any, files []int) response {
	const what = "The VM could not be restored"
	nets := list(r, "net_fds")
	want := int64(0)
	for _, n := range nets {
		want += number(n, "num_fds")
	}
	if want != int64(len(files)) {
		return badBody
	}
	if m.config != nil {
		return apiError(what, "VM is already created")
	}
	dir, isFile := strings.CutPrefix(text(r, "source_url"), "file://")
	if !isFile {
		return apiError(what, "Invalid restore source URL")
	}
	b, err := os.ReadFile(filepath.Join(dir, snapshotConfig))
	if err != nil {
		return apiError(what, "Cannot restore VM", err.Error())
	}
	c, err := check("VmConfig", b)
	if err != nil {
		return apiError(what, "Cannot restore VM", err.Error())
	}
	m.events.send("vm", "restoring", nil)
	own, err := duplicate(files)
	if err != nil {
		return apiError(what, err.Error())
	}
	for _, n := range nets {
		count := number(n, "num_fds")
		m.taps[text(n, "id")], own = own[:count:count], own[count:]
	}
	m.config = c
	if err := m.bootLocked(); err != nil {
		m.delete()
		return apiError(what, "Cannot restore VM", err.Error())
	}
	m.guest.freeze(true)
	m.paused = true
	m.events.send("vm", "restored", nil)
	if flag(r, "resume") {
		return m.resume()
	}
	return noContent
}
