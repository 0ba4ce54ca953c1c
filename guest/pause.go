package guest

import (
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	// PauseArgument makes the agent's binary the first process of a shared PID namespace.
	PauseArgument = "pause"
	// emptyDir is all that this process can see.
	emptyDir = agentDir + "/empty"
)

// Pause is that process: it reaps orphans until it is killed. Containers of the pod see it in their /proc, so
// it gives up everything that one of them could take from it.
func Pause() {
	if err := renounce(); err != nil {
		fmt.Fprintln(os.Stderr, "first process of the shared PID namespace:", err)
	}
	children := make(chan os.Signal, 1)
	signal.Ignore() // what can be ignored
	signal.Notify(children, unix.SIGCHLD)
	for {
		for {
			pid, err := unix.Wait4(-1, nil, unix.WNOHANG, nil)
			if err != nil && err != unix.EINTR || err == nil && pid == 0 {
				break
			}
		}
		<-children
	}
}

// renounce leaves the guest's files behind, forbids to trace this process, and drops all capabilities.
func renounce() error {
	if err := unix.Chroot(emptyDir); err != nil {
		return fmt.Errorf("chroot: %w", err)
	}
	if err := unix.Chdir("/"); err != nil {
		return fmt.Errorf("chdir: %w", err)
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("no new privileges: %w", err)
	}
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var none [2]unix.CapUserData
	if _, _, errno := syscall.AllThreadsSyscall(unix.SYS_CAPSET, uintptr(unsafe.Pointer(&header)), uintptr(unsafe.Pointer(&none)), 0); errno != 0 {
		return fmt.Errorf("drop capabilities: %w", errno)
	}
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("forbid tracing: %w", err)
	}
	return nil
}
