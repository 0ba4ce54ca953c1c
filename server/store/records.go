package store

import (
	"time"

	"google.golang.org/protobuf/encoding/protojson"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crivm/crivm/cni"
)

// SandboxState is where a sandbox is in its life:
//
//	CREATING ──▶ READY ──▶ STOPPING ──▶ NOTREADY ──▶ (record deleted)
//	    ▲ │        │                       ▲
//	    │ └────────┴── failure, dead VM ───┘
//	  claimed by a pod
//	    │
//	BOOTING ──▶ POOLED: slots of the warm pool; one that is of no use is deleted
//
// BOOTING, POOLED and CREATING are not listed. STOPPING refuses new containers while the teardown runs; CRI shows it, like
// NOTREADY, as SANDBOX_NOTREADY. Only RemovePodSandbox, or the roll-back of a RunPodSandbox that left
// nothing, deletes a record.
type SandboxState string

// The states of a sandbox.
const (
	SandboxBooting  SandboxState = "BOOTING"
	SandboxPooled   SandboxState = "POOLED"
	SandboxCreating SandboxState = "CREATING"
	SandboxReady    SandboxState = "READY"
	SandboxStopping SandboxState = "STOPPING"
	SandboxNotReady SandboxState = "NOTREADY"
)

// Shown tells whether clients see a sandbox in that state.
func (s SandboxState) Shown() bool { return !s.Slot() && s != SandboxCreating }

// Slot tells whether a sandbox in that state is a slot of the warm pool: a VM without a pod.
func (s SandboxState) Slot() bool { return s == SandboxBooting || s == SandboxPooled }

// Sandbox is the record of one pod sandbox. It is a value: what it points to is never changed in place.
type Sandbox struct {
	ID        string
	Name      string // reserved name: pod name, namespace, uid and attempt
	State     SandboxState
	CreatedAt time.Time // strictly increasing over all sandboxes and containers of the node
	Handler   string    // as asked for, "" included
	Driver    string    // VMM driver that runs it
	VMDir     string    // private directory of the VM
	Dir       string    // private directory of the sandbox: scratch disk, stream positions
	UID       int       // uid and gid of the VMM process
	MAC       string    // what the VMM gave the first NIC
	NetnsPath string
	Network   *cni.Attachment // nil until CNI ADD has returned
	Shared    bool            // the VM has, or is about to have, a share with the host
	BootID    string          // boot of the host in which the VM was started
	Reason    string          // why it is NOTREADY, for people
	VM        VMSize
	EmptyDirs []EmptyDir // those that containers of it have mounted
	Slot      *Slot      // nil when its VM was booted for this pod

	Config SandboxConfig
}

// EmptyDir is one empty directory of a pod and where it is for as long as the sandbox lives.
type EmptyDir struct {
	Dir    string // on the host, without symbolic links
	Kind   EmptyDirKind
	Serial string // of its disk, or the name of its tmpfs
}

// EmptyDirKind is where an empty directory is.
type EmptyDirKind string

// The places of an empty directory.
const (
	EmptyDirDisk   EmptyDirKind = "disk"   // a disk of the guest, its image below Dir
	EmptyDirMemory EmptyDirKind = "memory" // a tmpfs of the guest
	EmptyDirShared EmptyDirKind = "shared" // Dir itself
)

// Slot is what is known of a VM that was booted before there was a pod for it.
type Slot struct {
	Class string    // what the VM is made of; a pod takes slots of its handler's present class only
	Since time.Time // when its agent was there; zero before
}

// VMSize is how big a VM is and can become; memory in bytes.
type VMSize struct {
	BootVCPUs, VCPUs, MaxVCPUs    int
	BootMemory, Memory, MaxMemory int64 // VCPUs and Memory as last reached and seen by the guest
}

// ContainerState is where a container is in its life:
//
//	CREATING ──▶ CREATED ──▶ RUNNING ──▶ EXITED ──▶ (record deleted)
//	                 └── start failed ────▲
//
// CREATING is not listed.
type ContainerState string

// The states of a container.
const (
	ContainerCreating ContainerState = "CREATING"
	ContainerCreated  ContainerState = "CREATED"
	ContainerRunning  ContainerState = "RUNNING"
	ContainerExited   ContainerState = "EXITED"
)

// Container is the record of one container; a value, as Sandbox is.
type Container struct {
	ID          string
	SandboxID   string
	Name        string // reserved name
	State       ContainerState
	CreatedAt   time.Time
	StartedAt   time.Time // zero until started
	FinishedAt  time.Time // zero until exited
	ExitCode    int32
	Reason      string // Completed, Error, OOMKilled, StartError, ContainerStatusUnknown
	Message     string
	LogPath     string   // absolute, never empty; "/dev/null" stands for no log
	ImageID     string   // config digest, as PullImage returned it
	ImageRef    string   // repo digest, or the ID of an image without one
	ImageName   string   // reference for people
	ImageDisk   string   // serial of the image disk
	Shares      []string // entries of the pod's share that it uses
	VolumeDisks []string // serials of the disks of its image volumes and block devices
	Copies      []HostCopy
	// TerminationLog is the file of the host that gets the end of the container's termination log; "" none.
	TerminationLog string
	StopSignal     int32 // signal number
	User           User

	Config ContainerConfig
}

// HostCopy is a copy in the guest of a directory or file of the host.
type HostCopy struct {
	Name   string // in the guest
	Source string // on the host, without symlinks
	Fixed  bool   // it stays as it was when the container was made
}

// User is what the container's process runs as, resolved in the guest.
type User struct {
	UID, GID uint32
	Groups   []uint32
}

// SandboxConfig is a PodSandboxConfig in a record: protobuf JSON on disk, so that people can read the
// database, decoded once in memory. It must not be changed after it was stored.
type SandboxConfig struct{ *cri.PodSandboxConfig }

// MarshalJSON implements json.Marshaler.
func (c SandboxConfig) MarshalJSON() ([]byte, error) { return protojson.Marshal(c.PodSandboxConfig) }

// UnmarshalJSON implements json.Unmarshaler. Fields of a newer CRI are dropped.
func (c *SandboxConfig) UnmarshalJSON(b []byte) error {
	c.PodSandboxConfig = &cri.PodSandboxConfig{}
	return lenient.Unmarshal(b, c.PodSandboxConfig)
}

// ContainerConfig is SandboxConfig's like.
type ContainerConfig struct{ *cri.ContainerConfig }

// MarshalJSON implements json.Marshaler.
func (c ContainerConfig) MarshalJSON() ([]byte, error) { return protojson.Marshal(c.ContainerConfig) }

// UnmarshalJSON implements json.Unmarshaler. Fields of a newer CRI are dropped.
func (c *ContainerConfig) UnmarshalJSON(b []byte) error {
	c.ContainerConfig = &cri.ContainerConfig{}
	return lenient.Unmarshal(b, c.ContainerConfig)
}

var lenient = protojson.UnmarshalOptions{DiscardUnknown: true}
