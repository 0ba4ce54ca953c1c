package guest

import (
	"errors"
	"io"
	"log/slog"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/crivm/crivm/agentproto"
)

// maxTerminationLog is how much of the end of a termination log the host gets, in bytes. kubelet reads the last
// 4,096.
const maxTerminationLog = 16 << 10

// prepareTerminationLog makes the file that a container leaves its last words in. It lies on the scratch disk, so
// that whoever fills it meets the pod's quota, and stays until the container is deleted: the host has what is in
// it by then.
func (v *volumes) prepareTerminationLog(c *container, f *agentproto.File) (string, error) {
	dir := c.dir
	if v.agent.machine != nil {
		scratch, err := v.agent.scratch()
		if err != nil {
			return "", err
		}
		dir = filepath.Join(scratch, "containers", c.id) // made with the root file system, and removed with it
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return "", err
	}
	defer root.Close()
	const name = "termination-log"
	if err := root.Remove(name); err != nil && !errors.Is(err, os.ErrNotExist) {
		return "", err
	}
	v.agent.namespaces.Load().ownFiles(f)
	if err := writeFile(root, name, f); err != nil {
		return "", err
	}
	path := filepath.Join(dir, name)
	c.mu.Lock()
	c.terminationLog = path
	c.mu.Unlock()
	return path, nil
}

// readTerminationLog returns the end of the container's termination log.
func (c *container) readTerminationLog() []byte {
	c.mu.Lock()
	path := c.terminationLog
	c.mu.Unlock()
	if path == "" {
		return nil
	}
	content, err := readEnd(path, maxTerminationLog)
	if err != nil {
		slog.Warn("termination log", "container", c.id, "error", err)
	}
	return content
}

// readEnd reads the last bytes of a regular file.
func readEnd(path string, limit int64) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil || !info.Mode().IsRegular() {
		return nil, err
	}
	from := max(0, info.Size()-limit)
	b, err := io.ReadAll(io.NewSectionReader(f, from, limit))
	return b, err
}
