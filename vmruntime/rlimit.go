package vmruntime

import (
	"errors"
	"fmt"
	"sync"

	"golang.org/x/sys/unix"
)

// minOpenFiles is the least RLIMIT_NOFILE of a VMM: disks, taps, eventfds and vhost queues.
const minOpenFiles = 4096

// A VMM's core would hold the guest's memory, secrets included, and fill the disk: its core limit is 0.
// Limits of a process of another user can only be set with CAP_SYS_RESOURCE, which a daemon in a container
// may lack. Then the daemon takes the limits itself, once, and its children inherit them.
var limitSelf = sync.OnceValue(func() error {
	if hasSysResource() {
		return nil
	}
	for _, resource := range []int{unix.RLIMIT_CORE, unix.RLIMIT_NOFILE} {
		var l unix.Rlimit
		if err := unix.Getrlimit(resource, &l); err != nil {
			return fmt.Errorf("read resource limit: %w", err)
		}
		if resource == unix.RLIMIT_CORE {
			l.Cur = 0
		}
		// Go raised the soft limit of open files at its start and gives children the former one, unless
		// the program sets the limit, be it to what it is.
		if err := unix.Setrlimit(resource, &l); err != nil {
			return fmt.Errorf("set resource limit: %w", err)
		}
	}
	return nil
})

// limitChild sets the limits of a new VMM, except where limitSelf has done so.
func limitChild(pid int) error {
	for resource, change := range map[int]func(*unix.Rlimit){
		unix.RLIMIT_CORE: func(l *unix.Rlimit) { l.Cur, l.Max = 0, 0 },
		unix.RLIMIT_NOFILE: func(l *unix.Rlimit) {
			l.Cur = max(l.Cur, minOpenFiles)
			l.Max = max(l.Cur, l.Max)
		},
	} {
		var l unix.Rlimit
		err := unix.Prlimit(pid, resource, nil, &l)
		if err == nil {
			change(&l)
			err = unix.Prlimit(pid, resource, &l, nil)
		}
		if errors.Is(err, unix.EPERM) && !hasSysResource() || errors.Is(err, unix.ESRCH) {
			continue // inherited; or it has ended already, which its exit will tell
		}
		if err != nil {
			return fmt.Errorf("set resource limit of process %d: %w", pid, err)
		}
	}
	return nil
}

func hasSysResource() bool {
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&hdr, &data[0]); err != nil {
		return false
	}
	return data[0].Effective&(1<<unix.CAP_SYS_RESOURCE) != 0
}
