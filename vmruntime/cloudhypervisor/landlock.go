package cloudhypervisor

import (
	"fmt"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// minLandlock is the version of the kernel's interface that the VMM insists on (Linux 6.2).
const minLandlock = 3

// landlockABI asks the kernel for its version of Landlock; 0 when it has none or it is switched off.
func landlockABI() int {
	v, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, 0, 0, unix.LANDLOCK_CREATE_RULESET_VERSION)
	if errno != 0 {
		return 0
	}
	return int(v)
}

func wantLandlock(mode string) (bool, error) {
	switch mode {
	case "", "auto":
		return landlockABI() >= minLandlock, nil
	case "off":
		return false, nil
	case "on":
		if v := landlockABI(); v < minLandlock {
			return false, fmt.Errorf("kernel has Landlock version %d, need %d: %w", v, minLandlock, errdefs.ErrFailedPrecondition)
		}
		return true, nil
	default:
		return false, fmt.Errorf("landlock %q, want auto, on or off: %w", mode, errdefs.ErrInvalidArgument)
	}
}
