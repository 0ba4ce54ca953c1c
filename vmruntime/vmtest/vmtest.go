// Package vmtest is a Cloud Hypervisor for tests: a process with the same command line, API, event monitor,
// serial socket and hybrid vsock, whose "guest" is the real agent (package guest) with its plain-process runtime.
// It starts in milliseconds, needs no KVM, and is stricter than the real one where that finds mistakes: a field
// that the real one ignores, it refuses. What it does was compared with the real v53.0.
//
// The test binary itself is the program: TestMain calls Main first, and Binary makes a link to the test binary
// that, run under this name, becomes the VMM.
//
//	func TestMain(m *testing.M) {
//		vmtest.Main() // does not return in a VMM
//		os.Exit(m.Run())
//	}
//
// This package is for tests only. That is why it may import guest, which vmruntime itself must not.
//
// The guest is a child process in a PID namespace of its own where that is allowed, so that the containers of a
// killed VMM are gone as those of a VM are. Disks are checked and locked as by the real one, and then lead nowhere:
// a plain-process runtime mounts nothing.
package vmtest

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"syscall"
	"testing"
)

const (
	// vmmName and guestName are what the test binary is called when it is to be something else.
	vmmName   = "cloud-hypervisor"
	guestName = "crivm-fake-guest"
	// faultsName is where Faults lie: in a VM's directory, or beside the program for all VMs.
	faultsName = "faults.json"
)

// Main makes this process a VMM or a guest if that is what it was started as; then it does not return.
func Main() {
	switch filepath.Base(os.Args[0]) {
	case vmmName:
		exitNow(vmmMain(os.Args[1:]))
	case guestName:
		exitNow(guestMain())
	}
}

// Binary is the path of a fake cloud-hypervisor. Main must be called by this package's TestMain.
func Binary(t testing.TB) string {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatalf("fake cloud-hypervisor: %v", err)
	}
	path := filepath.Join(t.TempDir(), vmmName)
	if err := os.Symlink(self, path); err != nil {
		t.Fatalf("fake cloud-hypervisor: %v", err)
	}
	return path
}

// Faults is what goes wrong in a VMM. The zero value is a healthy one.
type Faults struct {
	// Version that the program says it is; "" is v53.0.
	Version string `json:"version,omitempty"`
	// ExitAtStart ends the process with this status before it serves; 0 does not.
	ExitAtStart int `json:"exitAtStart,omitempty"`
	// CrashAfter kills the process with SIGKILL amid the n-th API request; 0 does not.
	CrashAfter int `json:"crashAfter,omitempty"`
	// Hang names an action, such as "vm.boot", that is never answered. As in the real one nothing else is then.
	Hang string `json:"hang,omitempty"`
	// Garbage names an action that is answered with what is no HTTP; "*" are all.
	Garbage string `json:"garbage,omitempty"`
	// Drop names an action that is carried out and not answered.
	Drop string `json:"drop,omitempty"`
	// Fail names an action that is refused with status 500.
	Fail string `json:"fail,omitempty"`
	// NoHello is a guest that never gets as far as its agent. Connections to it wait.
	NoHello bool `json:"noHello,omitempty"`
	// NoReady is an agent that serves and does not say so.
	NoReady bool `json:"noReady,omitempty"`
	// VsockReply is what CONNECT is answered with instead of "OK <port>\n".
	VsockReply string `json:"vsockReply,omitempty"`
	// BootDelay in milliseconds is how long the guest takes to serve, beyond what it really takes.
	BootDelay int `json:"bootDelay,omitempty"`
	// RemovalDelay in milliseconds is how long the guest takes to let a device go; 0 is 10, -1 for ever.
	RemovalDelay int `json:"removalDelay,omitempty"`
	// LoseRemovalEvent keeps the event of a removal back, not the removal.
	LoseRemovalEvent bool `json:"loseRemovalEvent,omitempty"`
	// MemoryStuck is a guest that plugs no memory.
	MemoryStuck bool `json:"memoryStuck,omitempty"`
	// Console is what the guest writes to its serial port when it starts.
	Console string `json:"console,omitempty"`
	// EventGarbage is written to the event monitor after vm/booted.
	EventGarbage string `json:"eventGarbage,omitempty"`
	// EventFlood is how many virtio-device/reset events the guest makes when it gets SIGWINCH.
	EventFlood int `json:"eventFlood,omitempty"`
	// IgnorePowerOff keeps the VMM running when its guest has powered off.
	IgnorePowerOff bool `json:"ignorePowerOff,omitempty"`
}

// Inject makes faults happen in the VM of this directory, from its next request on if it runs already; in all VMs
// of a program when dir is the program's. A VM's own take the place of the program's.
func Inject(t testing.TB, dir string, f Faults) {
	t.Helper()
	b, err := json.Marshal(f)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, faultsName)
	if err := os.WriteFile(path+".new", b, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
}

// loadFaults reads what Inject wrote. The VMM works in its VM's directory.
func loadFaults() Faults {
	for _, path := range []string{faultsName, filepath.Join(filepath.Dir(os.Args[0]), faultsName)} {
		b, err := os.ReadFile(path)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		var f Faults
		if err == nil {
			err = json.Unmarshal(b, &f)
		}
		if err != nil {
			fatal("faults: " + err.Error())
		}
		return f
	}
	return Faults{}
}

// Signals that make a guest or VMM do what cannot be asked for by its API.
const (
	// SignalReboot is a guest that reboots or triple-faults.
	SignalReboot = syscall.SIGUSR1
	// SignalPanic is a guest kernel that panics and hangs.
	SignalPanic = syscall.SIGUSR2
	// SignalVCPUError is a vCPU that KVM refuses to run: the VMM ends with status 0, as after a power-off.
	SignalVCPUError = syscall.SIGHUP
	// SignalFlood is a guest that resets its devices over and over (Faults.EventFlood).
	SignalFlood = syscall.SIGWINCH
)

// exitNow ends the process. os.Exit would wait for a second in a binary with the race detector.
func exitNow(code int) { syscall.Exit(code) }
