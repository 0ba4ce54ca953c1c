package guest

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/crivm/crivm/agentproto"
)

// agentDir is the agent's directory in a guest.
const agentDir = "/run/crivm"

// Main is the agent's program; it returns the exit status. What it does depends on how it is called:
//
//	as PID 1            it boots the guest and serves the host, and does not return
//	pause               it is the first process of a shared PID namespace
//	-q -- MODULE        the kernel asks for a module
//	version             it prints its version
func Main(version string, args []string) int {
	switch {
	case len(args) == 2 && args[1] == PauseArgument:
		Pause()
	case os.Getpid() == 1:
		boot(version)
	case len(args) == 4 && args[1] == "-q":
		if err := modprobe(args[3]); err != nil {
			return 1
		}
	case len(args) == 2 && args[1] == "version":
		fmt.Println(version)
	default:
		fmt.Fprintln(os.Stderr, "crivm-agent is the first process of a crivm guest; there is nothing that it could do here")
		return 2
	}
	return 0
}

// A pod will want these, the first ones before it is a pod, the second ones for its first container, the last ones some
// time. They are loaded while the host is being served already, in that order: where there is only one CPU, all else
// that runs makes the pod wait.
var (
	setupModules     = []string{"virtio_net"}
	containerModules = []string{"virtio_blk", "ext4", "erofs", "overlay", "virtio_mem"}
	laterModules     = []string{"virtio_rng", "virtio_balloon", "af_packet"}
)

const (
	// loadDelay is how long a guest that is not made a pod waits before it makes ready for containers (a warm pool).
	loadDelay = time.Second
	// laterDelay keeps out of the way of a pod's first containers.
	laterDelay = 3 * time.Second
)

// loadAhead does what can wait until the pod is set up; containers wait for what they need of it.
func loadAhead(a *Agent, modules *moduleLoader, oci *ociRuntime) {
	modules.Load(setupModules...)
	select {
	case <-a.setUp:
	case <-time.After(loadDelay):
	}
	a.machine.prepare()
	oci.sealed() // an error is for the first container
	modules.Load(containerModules...)
	time.Sleep(laterDelay)
	modules.Load(laterModules...)
	if err := oci.AskVersion(context.Background()); err != nil {
		slog.Error("OCI runtime does not tell its version", "error", err)
	}
}

// boot runs a guest from its first instruction to its power-off. It never returns: a PID 1 that ends is a
// kernel panic.
func boot(version string) {
	defer func() {
		if p := recover(); p != nil {
			slog.Error("agent panicked", "panic", p, "stack", string(debug.Stack()))
		}
		powerOff()
	}()
	// The heap is small: collecting often costs little and keeps it so.
	debug.SetGCPercent(50)
	if err := runGuest(version); err != nil {
		slog.Error("agent", "error", err)
	}
}

// runGuest sets the guest up and serves the host. It returns when it cannot go on.
func runGuest(version string) error {
	slog.SetDefault(slog.New(slog.NewTextHandler(os.Stderr, nil)))
	createFixtures(initramfsFixtures)
	if err := leaveRootfs(); err != nil {
		slog.Warn("boot", "step", "new root", "error", err)
	}
	createFixtures(bootFixtures)
	if err := calmRuntime(); err != nil {
		slog.Warn("boot", "step", "monitor thread", "error", err)
	}
	reaper, err := NewReaper(true)
	if err != nil {
		return err
	}
	manifest, err := readManifest(agentproto.ManifestPath)
	if err != nil {
		return err
	}
	modules := newModuleLoader(manifest)
	kind, err := transportKind()
	if err != nil {
		return err
	}
	modules.Load(bootModules(manifest.Boot, kind)...)

	ctx := context.Background()
	l, err := openTransport(ctx, kind)
	if err != nil {
		return err
	}
	oci, err := newOCIRuntime(manifest.OCIRuntime, filepath.Join(agentDir, "runtime"), cgroupRoot, reaper)
	if err != nil {
		return err
	}
	agent, err := NewAgent(Options{
		Runtime: oci, Reaper: reaper, Dir: agentDir, Version: version,
		machine: newMachine(agentDir, modules), PowerOff: powerOff,
	})
	if err != nil {
		return err
	}
	go shutdownOnSignal(agent)
	go loadAhead(agent, modules, oci)
	return Serve(ctx, l, agent)
}

// prepare does what only containers need. It is called once.
func (m *machine) prepare() {
	defer close(m.prepared)
	setLimits()
	if err := enableControllers(cgroupRoot); err != nil {
		slog.Warn("boot", "step", "cgroups", "error", err)
	}
}

// setLimits sets the resource limits that containers inherit if their spec names none.
func setLimits() {
	for which, limit := range map[int]unix.Rlimit{
		unix.RLIMIT_NOFILE: {Cur: 65536, Max: 1 << 20},
		unix.RLIMIT_CORE:   {Cur: 0, Max: unix.RLIM_INFINITY},
		unix.RLIMIT_NPROC:  {Cur: unix.RLIM_INFINITY, Max: unix.RLIM_INFINITY},
	} {
		l := syscall.Rlimit{Cur: limit.Cur, Max: limit.Max}
		if err := syscall.Setrlimit(which, &l); err != nil {
			slog.Warn("boot", "step", "resource limit", "limit", which, "error", err)
		}
	}
}

// shutdownOnSignal ends the guest in order when it is told to by a signal (Ctrl-Alt-Del is SIGINT).
func shutdownOnSignal(a *Agent) {
	unix.Reboot(unix.LINUX_REBOOT_CMD_CAD_OFF)
	stop := make(chan os.Signal, 1)
	signal.Notify(stop, unix.SIGTERM, unix.SIGINT)
	<-stop
	a.shutdown()
}

// powerOff ends the guest. It does not return.
func powerOff() {
	unix.Sync()
	if err := unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF); err != nil {
		slog.Error("power off", "error", err)
		unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART)
	}
	time.Sleep(time.Minute) // the power goes meanwhile
}
