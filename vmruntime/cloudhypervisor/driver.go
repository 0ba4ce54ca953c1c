// Package cloudhypervisor runs VMs with Cloud Hypervisor, one process each: it is a vmruntime.Driver. It owns
// the process, its API, its event stream, its console and the vsock to the agent; what a VM is for, whom its
// taps belong to and what its disks hold are the callers' business.
//
// # What is in a VM's directory
//
//	api.sock     the API. The daemon makes and binds the listening socket and the VMM inherits it: requests
//	             queue from the first moment on, and a later daemon finds it by its path
//	events       FIFO that the VMM opens as its event monitor, see below
//	console.log  the guest's serial port, bounded; stays after Kill
//	vmm.log      what the VMM writes to stderr, bounded; stays after Kill
//	vmm.json     package vmruntime's record of the process
//	run/         the only directory that belongs to the VMM's uid:
//	    vsock    hybrid vsock, where the host connects to the guest
//	    vsock_1025  where the guest's agent says that it serves; the daemon listens until then
//	    serial   the serial port
//
// All but run/ belongs to the daemon, so that a VMM which its guest has taken over cannot make the daemon follow
// links. To be sure that it talks to the right VMM, the daemon compares the process at the other end of each
// socket in run/ with the one that it started.
//
// # Events across a restart of the daemon
//
// The VMM's own file descriptors are all that outlives the daemon. A regular file as event monitor would let a
// guest fill the host's disk by resetting its devices again and again while no daemon truncates it; the pipe of a
// daemon that has died makes writes fail. So the event monitor is a FIFO by path, and the VMM inherits one
// more descriptor, open for reading and writing, that keeps the FIFO alive: what it writes while no daemon
// reads stays in the kernel, 256 KiB at most, and the next daemon reads it. Writes never block. When nearly that
// much waits, events may have been lost, among them a reboot of the guest: the VM is then ended.
//
// # Console
//
// The serial port in socket mode: the VMM keeps the last 1 MiB while nobody is connected, and its vCPUs never
// wait for the reader. Console files would be truncated at each boot, have no bound while no daemon watches
// them, and the virtio console is found only after the guest has loaded its driver, too late for most failed boots.
// The kernel is told to be quiet, so the port costs nothing in a boot that goes well.
package cloudhypervisor

import (
	"context"
	"debug/elf"
	"fmt"
	"log/slog"
	"os/exec"
	"path/filepath"
	"slices"
	"time"

	"github.com/containerd/errdefs"

	"github.com/crivm/crivm/vmruntime"
	"github.com/crivm/crivm/vmruntime/chclient"
)

// Config of a Driver.
type Config struct {
	Binary string // path, or name that is looked up in PATH; "" is "cloud-hypervisor"
	// Seccomp is the VMM's filter for system calls: "" or "true" kills at a violation, "log" and "false" are
	// for finding out what a new kernel needs.
	Seccomp string
	// Landlock confines the VMM to the files it has been given: "" or "auto" where the kernel has it (Linux 6.2),
	// "on" or fail, "off".
	Landlock string
	// Landlock forbids all files but those of the Spec. ReadDirs are where read-only disks lie that are plugged into
	// any VM, HotplugDirs where any VM may write. Better than the latter is Spec.HotplugDirs: one pod's VMM then
	// cannot reach another's disks.
	ReadDirs    []string
	HotplugDirs []string
	// PCISegments of a VM, of 31 devices each; 0 is 2. The first holds some six devices of the VMM's own.
	PCISegments int
}

// Driver starts Cloud Hypervisor VMs.
type Driver struct {
	config   Config
	landlock bool
	version  string
}

var _ vmruntime.Driver = (*Driver)(nil)

// versionTimeout bounds the first run of the program.
const versionTimeout = 10 * time.Second

// New finds the program and refuses unfit versions. errdefs.ErrNotFound when there is no such program,
// ErrFailedPrecondition for a version or a missing Landlock, ErrInvalidArgument for the configuration.
func New(c Config) (*Driver, error) {
	if c.Binary == "" {
		c.Binary = "cloud-hypervisor"
	}
	path, err := exec.LookPath(c.Binary)
	if err != nil {
		return nil, fmt.Errorf("cloud-hypervisor: %w: %w", err, errdefs.ErrNotFound)
	}
	if c.Binary, err = filepath.Abs(path); err != nil {
		return nil, fmt.Errorf("cloud-hypervisor: %w", err)
	}
	switch c.Seccomp {
	case "":
		c.Seccomp = "true"
	case "true", "false", "log":
	default:
		return nil, fmt.Errorf("cloud-hypervisor: seccomp %q, want true, false or log: %w", c.Seccomp, errdefs.ErrInvalidArgument)
	}
	if c.PCISegments == 0 {
		c.PCISegments = 2
	}
	if c.PCISegments < 1 || c.PCISegments > maxSegments {
		return nil, fmt.Errorf("cloud-hypervisor: %d PCI segments, want 1 to %d: %w", c.PCISegments, maxSegments, errdefs.ErrInvalidArgument)
	}
	if c.Seccomp == "true" && dynamic(c.Binary) {
		// The filters allow what musl does. glibc's allocator makes other calls, now and then.
		slog.Warn("cloud-hypervisor is dynamically linked: its seccomp filter may kill running VMs; use the official static binary", "binary", c.Binary)
	}
	d := &Driver{config: c}
	if d.landlock, err = wantLandlock(c.Landlock); err != nil {
		return nil, fmt.Errorf("cloud-hypervisor: %w", err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), versionTimeout)
	defer cancel()
	out, err := exec.CommandContext(ctx, c.Binary, "--version").Output()
	if err != nil {
		return nil, fmt.Errorf("%s --version: %w", c.Binary, err)
	}
	d.version = string(out)
	if err := chclient.CheckVersion(d.version); err != nil {
		return nil, fmt.Errorf("%s: %w", c.Binary, err)
	}
	if v, err := chclient.ParseVersion(d.version); err == nil && v.Less(chclient.Recommended) {
		slog.Warn("cloud-hypervisor is older than recommended", "version", v, "recommended", chclient.Recommended)
	}
	return d, nil
}

// dynamic tells whether a program needs a dynamic linker.
func dynamic(path string) bool {
	f, err := elf.Open(path)
	if err != nil {
		return false // a script
	}
	defer f.Close()
	return slices.ContainsFunc(f.Progs, func(p *elf.Prog) bool { return p.Type == elf.PT_INTERP })
}

// Name implements vmruntime.Driver.
func (d *Driver) Name() string { return "cloudhypervisor" }

// Reattach implements vmruntime.Driver. A VM that an earlier daemon did not get to boot is ended.
func (d *Driver) Reattach(ctx context.Context, id, dir string) (vmruntime.VM, error) {
	p, err := vmruntime.Adopt(dir)
	if err != nil {
		if errdefs.IsNotFound(err) {
			if err := d.Sweep(ctx, id, dir); err != nil {
				return nil, err
			}
		}
		return nil, fmt.Errorf("VM %s: %w", id, err)
	}
	v := newVM(id, dir, p)
	close(v.ready) // or never: Dial finds out
	info, err := v.client.Info(ctx)
	if err == nil && info.State == chclient.StateCreated || errdefs.IsNotFound(err) {
		if err := d.Sweep(ctx, id, dir); err != nil {
			return nil, err
		}
		return nil, fmt.Errorf("VM %s was never booted: %w", id, errdefs.ErrNotFound)
	}
	if err != nil {
		select {
		case <-p.Done(): // between Adopt and Info
			err = fmt.Errorf("%w: %w", err, errdefs.ErrNotFound)
		default:
		}
		return nil, fmt.Errorf("VM %s: %w", id, err)
	}
	events, err := openEvents(dir)
	if err != nil {
		return nil, fmt.Errorf("VM %s: %w", id, err)
	}
	console, err := v.openConsole(ctx, true)
	if err != nil { // not worth the VM
		slog.WarnContext(ctx, "VM has no console any more", "sandbox", id, "error", err)
	}
	v.watch(events, true, console)
	return v, nil
}

// Sweep implements vmruntime.Driver.
func (d *Driver) Sweep(ctx context.Context, id, dir string) error {
	if err := vmruntime.SweepDir(ctx, dir); err != nil {
		return fmt.Errorf("VM %s: %w", id, err)
	}
	if err := removeFiles(dir); err != nil {
		return fmt.Errorf("VM %s: %w", id, err)
	}
	return nil
}
