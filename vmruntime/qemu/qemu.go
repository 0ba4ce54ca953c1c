// Package qemu is the vmruntime driver for QEMU: a q35 machine booted by qboot, with hardware
// virtualisation or software emulation, 32 PCIe root ports to plug into, and the agent behind a
// virtio-serial port.
//
// It owns QEMU's command line and its monitor (QMP). It never touches what a disk, a share or a tap
// leads to; their makers see to it that QEMU's user may open them.
//
// The microvm machine is not used: it has no PCI hot-plug, and hangs in software emulation. vhost-vsock and
// vhost-net are not used either.
package qemu

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/errdefs"

	"github.com/crivm/crivm/vmruntime"
)

// Name of the driver.
const Name = "qemu"

// Accelerations.
const (
	Auto = "auto" // KVM where it is proved to run a guest, else TCG
	KVM  = "kvm"
	TCG  = "tcg" // software emulation
)

const (
	// startWait bounds how long QEMU may take from its start to its monitor's greeting.
	startWait = 30 * time.Second
	// monitorWait bounds a connection to the monitor of a QEMU that runs.
	monitorWait = 10 * time.Second
)

// Config of the driver; the zero value suits Debian.
type Config struct {
	Binary   string // absolute path; "" means /usr/bin/qemu-system-x86_64
	Firmware string // absolute path of qboot; "" means /usr/share/qemu/qboot.rom
	Accel    string // Auto, KVM or TCG; "" means Auto
}

// Driver starts QEMU processes. Safe for concurrent use.
type Driver struct {
	config Config

	mu    sync.Mutex
	accel string // what Auto came to, "" before
}

var _ vmruntime.Driver = (*Driver)(nil)

// New returns a driver. It looks at nothing yet; Probe tells whether the configuration works.
func New(c Config) *Driver {
	if c.Binary == "" {
		c.Binary = "/usr/bin/qemu-system-x86_64"
	}
	if c.Firmware == "" {
		c.Firmware = "/usr/share/qemu/qboot.rom"
	}
	if c.Accel == "" {
		c.Accel = Auto
	}
	return &Driver{config: c}
}

// Name is "qemu".
func (d *Driver) Name() string { return Name }

// Start boots a VM. It returns once QEMU's monitor answers, which is when the guest runs.
func (d *Driver) Start(ctx context.Context, s vmruntime.Spec) (_ vmruntime.VM, retErr error) {
	vm, err := d.start(ctx, s)
	if err != nil {
		return nil, fmt.Errorf("VM %s: %w", s.ID, err)
	}
	return vm, nil
}

func (d *Driver) start(ctx context.Context, s vmruntime.Spec) (_ *VM, retErr error) {
	if err := validateSpec(s); err != nil {
		return nil, err
	}
	accel, err := d.acceleration(ctx)
	if err != nil {
		return nil, err
	}
	st, err := newState(s)
	if err != nil {
		return nil, err
	}
	args, err := d.arguments(st, accel)
	if err != nil {
		return nil, err
	}
	defer func() {
		if retErr != nil {
			removeFiles(s.Dir)
		}
	}()
	files, err := inherited(s)
	defer closeAll(files)
	if err != nil {
		return nil, err
	}
	if err := makeFifos(s.Dir, s.Process.UID, s.Process.GID); err != nil {
		return nil, err
	}
	if err := st.save(); err != nil {
		return nil, err
	}
	proc, err := vmruntime.Launch(ctx, vmruntime.LaunchSpec{
		Dir: s.Dir, Path: d.config.Binary, Args: args, ExtraFiles: files,
		Process: s.Process, Groups: deviceGroups(accel), Mounts: func() error { return vmruntime.MountDevices(s.Dir) },
	})
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, startWait)
	defer cancel()
	vm, err := attach(ctx, st, proc)
	if err != nil {
		killErr := proc.Kill(context.WithoutCancel(ctx))
		if said := lastWords(s.Dir); said != "" {
			err = fmt.Errorf("%w: %s", err, said)
		}
		return nil, errors.Join(err, killErr)
	}
	vm.agent.fresh = true // nobody else has seen the VM yet
	return vm, nil
}

// Reattach adopts a VM of an earlier daemon.
func (d *Driver) Reattach(ctx context.Context, id, dir string) (vmruntime.VM, error) {
	proc, err := vmruntime.Adopt(dir)
	if errdefs.IsNotFound(err) {
		return nil, errors.Join(fmt.Errorf("VM %s: %w", id, err), d.Sweep(ctx, id, dir))
	}
	if err != nil {
		return nil, fmt.Errorf("VM %s: %w", id, err)
	}
	st := &state{}
	if err := vmruntime.LoadState(filepath.Join(dir, stateName), st); err != nil {
		return nil, fmt.Errorf("VM %s: %w", id, err)
	}
	st.Spec.Dir, st.Spec.ID = dir, id // what the caller says is what counts
	ctx, cancel := context.WithTimeout(ctx, monitorWait)
	defer cancel()
	vm, err := attach(ctx, st, proc)
	if err != nil {
		select {
		case <-proc.Done(): // it ended just now
			return nil, errors.Join(fmt.Errorf("VM %s: %w", id, errdefs.ErrNotFound), d.Sweep(context.WithoutCancel(ctx), id, dir))
		default:
			return nil, fmt.Errorf("VM %s: %w", id, err)
		}
	}
	return vm, nil
}

// Sweep ends whatever still runs with this directory.
func (d *Driver) Sweep(ctx context.Context, id, dir string) error {
	if err := vmruntime.SweepDir(ctx, dir); err != nil {
		return fmt.Errorf("VM %s: %w", id, err)
	}
	removeFiles(dir)
	return nil
}

// acceleration decides what VMs are run with. The answer of a probe is kept: it costs up to seconds, and
// the hardware does not change.
func (d *Driver) acceleration(ctx context.Context) (string, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.accel != "" {
		return d.accel, nil
	}
	accel, reason, err := chooseAccel(ctx, d.config.Accel)
	if err != nil {
		return "", err
	}
	if reason != "" {
		slog.WarnContext(ctx, "VMs run in software emulation", "reason", reason)
	}
	d.accel = accel
	return accel, nil
}

// inherited opens what QEMU gets by descriptor: the listening sockets of monitor and agent, and the taps.
// The files opened so far are returned with an error, too.
func inherited(s vmruntime.Spec) ([]*os.File, error) {
	var files []*os.File
	for _, name := range []string{qmpName, agentName} {
		f, err := listen(filepath.Join(s.Dir, name))
		if err != nil {
			return files, err
		}
		files = append(files, f)
	}
	for _, n := range s.NICs {
		f, err := vmruntime.OpenTap(s.Process.NetnsPath, n.Tap)
		if err != nil {
			return files, err
		}
		files = append(files, f)
	}
	return files, nil
}

// listen makes a unix socket to which only this user can connect.
func listen(path string) (*os.File, error) {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("socket: %w", err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("socket %s: %w", path, err)
	}
	defer l.Close()
	l.SetUnlinkOnClose(false)
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, fmt.Errorf("socket %s: %w", path, err)
	}
	f, err := l.File()
	if err != nil {
		return nil, fmt.Errorf("socket %s: %w", path, err)
	}
	return f, nil
}

func closeAll(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}

// deviceGroups are the groups whose members may open the devices that QEMU opens itself. Root's group is
// left out: it may open much else.
func deviceGroups(accel string) []int {
	if accel != KVM {
		return nil
	}
	fi, err := os.Stat("/dev/kvm")
	if err != nil {
		return nil
	}
	if st, ok := fi.Sys().(*syscall.Stat_t); ok && st.Gid != 0 {
		return []int{int(st.Gid)}
	}
	return nil
}

// removeFiles removes what a VM left in its directory, except its console and QEMU's messages.
func removeFiles(dir string) {
	vmruntime.RemoveState(filepath.Join(dir, stateName))
	for _, name := range []string{qmpName, agentName, fifoIn, fifoOut} {
		_ = os.Remove(filepath.Join(dir, name))
	}
	_ = os.Remove(vmruntime.DeviceDir(dir))
}

// lastWords is what QEMU and the guest said last, for the error of a failed start.
func lastWords(dir string) string {
	var parts []string
	if t := vmruntime.TailFile(filepath.Join(dir, "vmm.log")); t != "" {
		parts = append(parts, "QEMU said: "+t)
	}
	if t := tail(dir); t != "" {
		parts = append(parts, "console: "+t)
	}
	return strings.Join(parts, "; ")
}
