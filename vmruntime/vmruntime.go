// Package vmruntime runs one VMM process per VM: boot, hot-plug, resize, exit, re-adoption after a
// restart of the daemon, and the byte streams to the agent in the guest. It knows nothing of pods,
// images or CNI; a Spec is plain values.
//
// A VM's private directory (Spec.Dir) is all that a later daemon needs: the driver records the process
// there (pid, start time, boot id) and every VMM is started with that path on its command line, so that a
// process of which the record was not yet written is found too.
package vmruntime

import (
	"context"
	"net"
	"os"
	"time"
)

// Spec describes a VM to boot. Paths are absolute.
type Spec struct {
	ID  string // for logs and for names of things inside Dir; the sandbox ID
	Dir string // private to this VM, exists; sockets, console, process record. At most 60 bytes long (unix sockets)

	Kernel  string // ELF (PVH) image
	Initrd  string
	Cmdline string // appended to what the driver needs itself

	VCPUs          int
	MaxVCPUs       int   // ceiling for Resize; at least VCPUs
	MemoryBytes    int64 // multiple of 2 MiB
	MaxMemoryBytes int64 // ceiling for Resize; at least MemoryBytes

	Disks []Disk // plugged at boot
	NICs  []NIC  // plugged at boot; the taps exist and are up
	// SharedMemory makes guest memory shareable with a vhost-user process; needed for AddShare.
	SharedMemory bool
	// HotplugDirs are directories of this VM's own below which the disks and sockets lie that are plugged later.
	// A driver that confines its VMM to files lets it open no others, except those of all VMs (the driver's
	// configuration).
	HotplugDirs []string

	Process ProcessSpec
}

// ProcessSpec is how and where a VMM process runs on the host.
type ProcessSpec struct {
	NetnsPath string // network namespace to start in; "" for the daemon's
	UID, GID  int    // credentials of the process; 0 runs as root. Groups of device files are added by the driver
	Cgroup    Cgroup
	// OOMScoreAdj of the process; nil inherits the daemon's. Best effort: lowering needs CAP_SYS_RESOURCE.
	OOMScoreAdj *int
}

// Cgroup is where a VMM is accounted.
type Cgroup struct {
	Systemd bool   // Parent is a slice and the process goes into a transient scope; else cgroupfs paths
	Parent  string // CRI's cgroup_parent, such as "/kubepods/burstable/pod123"; made when missing
	Name    string // leaf below Parent, made by Launch and removed by Process.Kill; "" leaves the process where it is
	// ParentWeight is Parent's share of the CPUs against its neighbours: 1 to 10000, 100 is what others have
	// (cgroup v2's cpu.weight); 0 leaves it as it is. Best effort: a host may have no CPU controller.
	ParentWeight int
}

// Disk is a virtio-blk disk backed by a raw file, or by a block device of the host: then Device is its number
// (st_rdev), Path is empty, and the driver gives the VMM, whoever it runs as, a node of its own. Such disks are
// hot-plugged only.
type Disk struct {
	Serial   string // at most 20 bytes of [a-zA-Z0-9_-]; unique in the VM; how the guest finds it
	Path     string
	ReadOnly bool
	Device   uint64 `json:",omitempty"`
}

// NIC is a virtio-net device on an existing tap of the VM's network namespace.
type NIC struct {
	ID  string // unique in the VM
	Tap string
	MAC string // what the guest first sees; the agent may set another
	MTU int    // 0: the tap's
}

// Share is a virtio-fs device served by a vhost-user process that already listens.
type Share struct {
	Tag    string // at most 36 bytes
	Socket string
}

// Size is what Resize can change.
type Size struct {
	VCPUs       int
	MemoryBytes int64
}

// Exit tells how a VMM ended.
type Exit struct {
	At     time.Time
	Code   int    // exit status; -1 when unknown (the VMM was adopted from an earlier daemon)
	Signal int    // 0 unless killed by one
	Reason string // one line for people, such as "guest rebooted" or "VMM exited with status 1"
}

// Driver starts VMs of one kind of VMM.
type Driver interface {
	// Name is "cloudhypervisor" or "qemu".
	Name() string
	// Start launches a VMM and lets it boot; it returns when the VMM runs the guest, before the agent
	// answers. On error nothing is left but Dir. The VM outlives ctx.
	Start(ctx context.Context, s Spec) (VM, error)
	// Reattach adopts the VMM that an earlier daemon started with this Dir. errdefs.ErrNotFound when it
	// no longer runs; any remains have then been cleaned away as by Kill.
	Reattach(ctx context.Context, id, dir string) (VM, error)
	// Sweep ends whatever still runs with this Dir and removes what it left in it. Idempotent.
	Sweep(ctx context.Context, id, dir string) error
}

// VM is a running virtual machine. All methods are safe for concurrent use. Hot-plug calls return when
// the VMM has completed them (removals: when the guest has let go) and are serialised by the driver.
type VM interface {
	ID() string
	// Dial opens a stream to the agent. It waits for a guest that is still booting, until ctx ends;
	// fails at once with errdefs.ErrUnavailable when the VM is gone.
	Dial(ctx context.Context) (net.Conn, error)
	// Done is closed when the VM is dead: VMM exited, guest rebooted or panicked.
	Done() <-chan struct{}
	// Exit is valid after Done.
	Exit() Exit

	// AddDisk plugs a disk. Idempotent for an identical Disk; AlreadyExists for another with its serial;
	// ResourceExhausted when no slot is free.
	AddDisk(ctx context.Context, d Disk) error
	// RemoveDisk unplugs; the guest must have unmounted it. Idempotent.
	RemoveDisk(ctx context.Context, serial string) error
	// ShowFile lets the VMM open a file of the host, by a path below one of Spec.HotplugDirs: for a disk that lies
	// where the VMM's user cannot go. See Process.ShowFile.
	ShowFile(source *os.File, path string) error
	// ResizeDisk tells the guest that the block device behind a disk now has another size, in bytes. Idempotent;
	// NotFound when there is no such disk, NotImplemented when this VMM cannot for a read-only disk.
	ResizeDisk(ctx context.Context, serial string, bytes int64) error
	AddNIC(ctx context.Context, n NIC) error
	RemoveNIC(ctx context.Context, id string) error
	// AddShare plugs a virtio-fs device. FailedPrecondition without Spec.SharedMemory.
	AddShare(ctx context.Context, s Share) error
	RemoveShare(ctx context.Context, tag string) error
	// Resize asks for a new size and returns the size reached. The guest must then online CPUs and
	// memory (agent Online). OutOfRange beyond the Spec's ceilings.
	Resize(ctx context.Context, s Size) (Size, error)
	// Move accounts the VMM elsewhere: it leaves its cgroup, which is removed, for another, and has another OOM
	// score. Memory that it holds already may stay charged to the parents of the old one. Idempotent.
	Move(ctx context.Context, to Cgroup, oomScoreAdj int) error
	Pause(ctx context.Context) error
	Resume(ctx context.Context) error

	// Shutdown waits for a guest that was asked to power off (by the agent) until ctx ends, then kills.
	Shutdown(ctx context.Context) error
	// Kill ends the VMM now, waits until it is gone and removes what it left in Dir (not console.log),
	// and its cgroup leaf. Idempotent.
	Kill(ctx context.Context) error
	// Console is the tail of the guest's console (at most 4 KiB, printable), for error messages.
	Console() string
	// PID of the VMM, for accounting.
	PID() int
}
