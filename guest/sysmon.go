package guest

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
)

// monitorSlack is how late the Go runtime's monitor thread may wake up, in nanoseconds.
const monitorSlack = 1_000_000

// calmRuntime makes the Go runtime's monitor thread wake up less often. It looks every 20 µs, while the program is
// busy, for goroutines that are to be preempted, and each look takes the CPU from what boots the guest: in software
// emulation a fifth of the agent's time until the pod is ready. A thread's timer slack bounds that; the price is that
// a goroutine waits up to a millisecond longer for one that is in a long system call.
func calmRuntime() error {
	entries, err := os.ReadDir("/proc/self/task")
	if err != nil {
		return err
	}
	monitor, own := 0, os.Getpid()
	for _, e := range entries { // the runtime starts it before any other thread
		if tid, err := strconv.Atoi(e.Name()); err == nil && tid != own && (monitor == 0 || tid < monitor) {
			monitor = tid
		}
	}
	if monitor == 0 {
		return nil
	}
	path := filepath.Join("/proc", strconv.Itoa(monitor), "timerslack_ns")
	if err := os.WriteFile(path, []byte(strconv.Itoa(monitorSlack)), 0); err != nil {
		return fmt.Errorf("timer slack of the Go runtime's monitor: %w", err)
	}
	return nil
}
