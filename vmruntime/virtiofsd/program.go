package virtiofsd

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os/exec"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Program is an installed virtiofsd. There are two that share a name and hardly an option: the one in C that
// came with QEMU up to 7.2 (Debian 12), and the one in Rust.
type Program struct {
	Path string
	c    bool
}

// places are where distributions put it.
var places = []string{"/usr/libexec/virtiofsd", "/usr/lib/virtiofsd", "/usr/lib/qemu/virtiofsd", "/usr/local/libexec/virtiofsd", "/usr/local/bin/virtiofsd"}

// Find looks for an installed virtiofsd that runs here. errdefs.ErrNotFound says what to install; a lack of descriptors,
// memory or processes to try one with is told as such.
func Find(ctx context.Context) (Program, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	for _, path := range places {
		out, err := exec.CommandContext(ctx, path, "--version").CombinedOutput()
		switch {
		case errors.Is(err, fs.ErrNotExist), errors.As(err, new(*exec.ExitError)):
			continue // not there, or made for another libc
		case err != nil:
			return Program{}, fmt.Errorf("virtiofsd %s: %w", path, err)
		}
		return Program{Path: path, c: strings.Contains(string(out), "QEMU")}, nil
	}
	return Program{}, fmt.Errorf("no virtiofsd in %s; install the package virtiofsd, or qemu-system-common on Debian 12: %w", strings.Join(places, ", "), errdefs.ErrNotFound)
}

// args serve root on the socket that is descriptor 3, to one client.
//
// Nothing is cached in the guest. Mounts below a volume are mounts in the guest too. The server changes its
// root to the share, keeps few capabilities and filters its system calls; making device nodes is not among
// what it may do.
func (p Program) args(root string) []string {
	files := strconv.FormatUint(maxFiles(), 10)
	if p.c {
		return []string{
			"--fd=3", "-f", "-o", "source=" + root, "-o", "cache=none", "-o", "announce_submounts", "-o", "sandbox=chroot",
			"-o", "modcaps=-mknod", "-o", "log_level=warn", "--rlimit-nofile=" + files,
		}
	}
	return []string{
		"--fd=3", "--shared-dir=" + root, "--cache=never", "--announce-submounts", "--sandbox=chroot",
		"--modcaps=-mknod", "--log-level=warn", "--rlimit-nofile=" + files,
	}
}

// maxFiles is how many files the server may hold open: one for each that the guest remembers. Raising the
// limit takes CAP_SYS_RESOURCE, without which the daemon's own is the limit.
func maxFiles() uint64 {
	const want = 1 << 20
	var l unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &l); err != nil {
		return 4096
	}
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&hdr, &data[0]); err == nil && data[0].Effective&(1<<unix.CAP_SYS_RESOURCE) != 0 {
		return max(l.Max, want)
	}
	return l.Max
}
