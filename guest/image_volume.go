package guest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/crivm/crivm/agentproto"
)

// prepareImage mounts an image disk, if it is not yet, and returns the path of what is wanted of it.
func (v *volumes) prepareImage(ctx context.Context, c *container, m *agentproto.ImageVolume) (string, error) {
	if v.agent.machine == nil {
		return "", fmt.Errorf("image disk %s: this agent has no devices: %w", m.GetSerial(), errdefs.ErrFailedPrecondition)
	}
	images := v.agent.machine.images
	root, err := images.acquire(ctx, m.GetSerial(), v.agent.machine.modules, v.agent.namespaces.Load())
	if err != nil {
		return "", err
	}
	c.undo = append(c.undo, func(context.Context) error { return images.release(m.GetSerial()) })
	path, err := resolveIn(root, m.GetSubPath())
	if err != nil {
		return "", fmt.Errorf("ImageVolumeMountFailed: %w", err) // CRI's name for it
	}
	return path, nil
}

// resolveIn finds a path in a directory that nobody changes. Symbolic links are followed as if the directory
// were the root: images come from strangers.
func resolveIn(root, path string) (string, error) {
	if strings.Contains(path, "\x00") {
		return "", fmt.Errorf("sub path %q: %w", path, errdefs.ErrInvalidArgument)
	}
	dir, err := os.Open(root)
	if err != nil {
		return "", err
	}
	defer dir.Close()
	how := unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS}
	fd, err := unix.Openat2(int(dir.Fd()), "./"+path, &how)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) {
		return "", fmt.Errorf("sub path %q does not exist in the image: %w", path, errdefs.ErrNotFound)
	}
	if err != nil {
		return "", fmt.Errorf("sub path %q: %w: %w", path, errdefs.ErrInvalidArgument, err)
	}
	defer unix.Close(fd)
	return os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd))
}
