package main

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// machine is what figures depend on.
type machine struct {
	CPU          string `json:"cpu"`
	CPUs         int    `json:"cpus"`
	MemoryMiB    uint64 `json:"memoryMiB"`
	Kernel       string `json:"kernel"`
	VMM          string `json:"vmm"`
	Acceleration string `json:"acceleration"`
	GuestKernel  string `json:"guestKernel"`
	Peer         string `json:"peer,omitempty"` // what is measured beside crivm
}

func describe(v vmm, guest string) machine {
	m := machine{CPU: "unknown CPU", CPUs: runtime.NumCPU(), VMM: v.Name, Acceleration: v.Acceleration}
	if text, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		for line := range strings.Lines(string(text)) {
			if name, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(name) == "model name" {
				m.CPU = strings.TrimSpace(value)
				break
			}
		}
	}
	var info unix.Sysinfo_t
	if unix.Sysinfo(&info) == nil {
		m.MemoryMiB = info.Totalram * uint64(info.Unit) >> 20
	}
	var uts unix.Utsname
	if unix.Uname(&uts) == nil {
		m.Kernel = unix.ByteSliceToString(uts.Release[:])
	}
	if out, err := exec.Command(v.args[0], "--version").Output(); err == nil {
		m.VMM, _, _ = strings.Cut(string(out), "\n")
	}
	var description struct{ Kernel string }
	if text, err := os.ReadFile(filepath.Join(guest, "guest.json")); err == nil && json.Unmarshal(text, &description) == nil {
		m.GuestKernel = description.Kernel
	}
	return m
}

// loadAverage is the machine's, of the last 1, 5 and 15 minutes.
func loadAverage() string {
	text, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return err.Error()
	}
	return strings.Join(strings.Fields(string(text))[:3], " ")
}

// cpuTime is what a process has used so far; /proc counts it in hundredths of a second.
func cpuTime(pid int) (time.Duration, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, fmt.Errorf("CPU time of the VMM: %w", err)
	}
	_, after, _ := strings.Cut(string(text), ") ") // the name may contain anything
	fields := strings.Fields(after)
	if len(fields) < 13 {
		return 0, fmt.Errorf("CPU time of process %d: %q", pid, text)
	}
	ticks := int64(0)
	for _, f := range fields[11:13] { // utime and stime
		n, err := strconv.ParseInt(f, 10, 64)
		if err != nil {
			return 0, fmt.Errorf("CPU time of process %d: %w", pid, err)
		}
		ticks += n
	}
	return time.Duration(ticks) * 10 * time.Millisecond, nil
}
