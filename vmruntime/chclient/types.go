package chclient

import "encoding/json"

// PingReply is what vmm.ping tells.
type PingReply struct {
	BuildVersion string   `json:"build_version"` // "v53.0", also of builds between releases
	Version      string   `json:"version"`       // of the crate, "53.0.0"
	PID          int64    `json:"pid"`           // as the process itself sees it
	Features     []string `json:"features"`      // of the build, such as "kvm", "io_uring"
}

// State of a VM.
type State string

// States that vm.info shows.
const (
	StateCreated State = "Created" // also after a shutdown
	StateRunning State = "Running"
	StatePaused  State = "Paused"
)

// VMInfo is what vm.info tells.
type VMInfo struct {
	Config VMConfig `json:"config"`
	State  State    `json:"state"`
	// MemoryActualSize in bytes: boot memory, plus what virtio-mem has plugged, less the balloon.
	MemoryActualSize int64 `json:"memory_actual_size"`
	// DeviceTree by ID; empty when not booted. A removed device stays until the guest has let it go.
	DeviceTree map[string]DeviceNode `json:"device_tree"`
}

// DeviceNode is a device of a booted VM.
type DeviceNode struct {
	ID       string   `json:"id"`
	Parent   string   `json:"parent"`
	Children []string `json:"children"`
	PCIBDF   string   `json:"pci_bdf"` // "0000:00:05.0" of what is a PCI function
}

// PCIDevice is where a hot-plugged device sits; empty when the VM has not been booted yet.
type PCIDevice struct {
	ID  string `json:"id"`
	BDF string `json:"bdf"`
}

// VMConfig is the whole VM. Absent parts have the VMM's defaults, of which some do not suit a daemon: give
// Console (default: the terminal) and CPUs.Nested (default: on in the VMM, off here).
type VMConfig struct {
	Payload       *PayloadConfig  `json:"payload,omitempty"`
	CPUs          *CPUsConfig     `json:"cpus,omitempty"`
	Memory        *MemoryConfig   `json:"memory,omitempty"`
	Disks         []DiskConfig    `json:"disks,omitempty"`
	Net           []NetConfig     `json:"net,omitempty"`
	RNG           *RNGConfig      `json:"rng,omitempty"`
	Balloon       *BalloonConfig  `json:"balloon,omitempty"`
	FS            []FSConfig      `json:"fs,omitempty"`
	Pmem          []PmemConfig    `json:"pmem,omitempty"`
	Serial        *SerialConfig   `json:"serial,omitempty"`
	Console       *ConsoleConfig  `json:"console,omitempty"`
	Devices       []DeviceConfig  `json:"devices,omitempty"`
	Vsock         *VsockConfig    `json:"vsock,omitempty"`
	Watchdog      bool            `json:"watchdog,omitempty"`
	PVPanic       bool            `json:"pvpanic,omitempty"`
	Platform      *PlatformConfig `json:"platform,omitempty"`
	Landlock      bool            `json:"landlock_enable,omitempty"`
	LandlockRules []LandlockRule  `json:"landlock_rules,omitempty"`
}

// PayloadConfig is what boots.
type PayloadConfig struct {
	Kernel    string `json:"kernel,omitempty"`
	Initramfs string `json:"initramfs,omitempty"`
	Cmdline   string `json:"cmdline,omitempty"`
}

// CPUsConfig counts vCPUs.
type CPUsConfig struct {
	Boot   int  `json:"boot_vcpus"`
	Max    int  `json:"max_vcpus"`
	Nested bool `json:"nested"` // always sent: the VMM's default is true
	// CoreScheduling "Vm", "Vcpu" or "Off" (v52); "" is "Vm".
	CoreScheduling string `json:"core_scheduling,omitempty"`
}

// HotplugVirtioMem grows and shrinks; the other method, "Acpi", only grows.
const HotplugVirtioMem = "VirtioMem"

// MemoryConfig sizes are in bytes.
type MemoryConfig struct {
	Size           int64        `json:"size"`
	HotplugMethod  string       `json:"hotplug_method,omitempty"`
	HotplugSize    int64        `json:"hotplug_size,omitempty"`    // on top of Size
	HotpluggedSize int64        `json:"hotplugged_size,omitempty"` // of it, in use or asked for
	Shared         bool         `json:"shared,omitempty"`          // memfd; virtio-fs needs it
	Hugepages      bool         `json:"hugepages,omitempty"`
	Prefault       bool         `json:"prefault,omitempty"`
	THP            *bool        `json:"thp,omitempty"` // default true
	Zones          []MemoryZone `json:"zones,omitempty"`
}

// MemoryZone is memory from a file, for clones of a template.
type MemoryZone struct {
	ID          string `json:"id"`
	Size        int64  `json:"size"`
	File        string `json:"file,omitempty"`
	Shared      bool   `json:"shared,omitempty"`
	HotplugSize int64  `json:"hotplug_size,omitempty"`
}

// ImageRaw is the type of all our disks. Never leave the type to detection: it reads what the guest wrote.
const ImageRaw = "Raw"

// DiskConfig is a virtio-blk disk.
type DiskConfig struct {
	ID           string `json:"id,omitempty"`
	Path         string `json:"path"`
	ReadOnly     bool   `json:"readonly"`
	Direct       bool   `json:"direct,omitempty"`
	NumQueues    int    `json:"num_queues,omitempty"` // default 1
	QueueSize    int    `json:"queue_size,omitempty"` // default 128
	Serial       string `json:"serial,omitempty"`     // at most 20 bytes
	BackingFiles bool   `json:"backing_files"`
	Sparse       *bool  `json:"sparse,omitempty"` // default true: discard punches holes
	ImageType    string `json:"image_type"`
	PCISegment   int    `json:"pci_segment,omitempty"`
}

// NetConfig is a NIC on a tap, found by name or given as files.
type NetConfig struct {
	ID         string `json:"id,omitempty"`
	Tap        string `json:"tap,omitempty"`
	MAC        string `json:"mac,omitempty"`
	HostMAC    string `json:"host_mac,omitempty"` // never sent by us: setting it needs privileges
	MTU        int    `json:"mtu,omitempty"`      // at least 1280; set on the tap, which needs CAP_NET_ADMIN
	NumQueues  int    `json:"num_queues,omitempty"`
	QueueSize  int    `json:"queue_size,omitempty"`
	PCISegment int    `json:"pci_segment,omitempty"`
}

// RNGConfig is the source of the entropy device.
type RNGConfig struct {
	Src string `json:"src"`
}

// BalloonConfig with FreePageReporting gives freed guest memory back without being asked.
type BalloonConfig struct {
	Size              int64 `json:"size"`
	DeflateOnOOM      bool  `json:"deflate_on_oom,omitempty"`
	FreePageReporting bool  `json:"free_page_reporting,omitempty"`
}

// FSConfig is a virtio-fs device whose daemon already listens.
type FSConfig struct {
	ID         string `json:"id,omitempty"`
	Tag        string `json:"tag"`
	Socket     string `json:"socket"`
	NumQueues  int    `json:"num_queues"`
	QueueSize  int    `json:"queue_size"`
	PCISegment int    `json:"pci_segment,omitempty"`
}

// PmemConfig is a persistent memory device; Size a multiple of 2 MiB.
type PmemConfig struct {
	ID            string `json:"id,omitempty"`
	File          string `json:"file"`
	Size          int64  `json:"size,omitempty"`
	DiscardWrites bool   `json:"discard_writes,omitempty"`
	PCISegment    int    `json:"pci_segment,omitempty"`
}

// Modes of consoles. A mode that lacks its file or socket ends the VMM.
const (
	ConsoleOff    = "Off"
	ConsoleNull   = "Null"
	ConsoleFile   = "File"
	ConsoleSocket = "Socket" // serial port only
)

// SerialConfig is the emulated serial port.
type SerialConfig struct {
	Mode   string `json:"mode"`
	File   string `json:"file,omitempty"`
	Socket string `json:"socket,omitempty"`
}

// ConsoleConfig is the virtio console.
type ConsoleConfig struct {
	Mode string `json:"mode"`
	File string `json:"file,omitempty"`
}

// DeviceConfig is a VFIO device.
type DeviceConfig struct {
	ID         string `json:"id,omitempty"`
	Path       string `json:"path,omitempty"`
	PCISegment int    `json:"pci_segment,omitempty"`
}

// VsockConfig is the vsock device, of which the host's end are unix sockets.
type VsockConfig struct {
	ID     string `json:"id,omitempty"`
	CID    uint32 `json:"cid"`
	Socket string `json:"socket"`
}

// PlatformConfig is what concerns the whole machine. UUID and serial number have their old names, which all
// releases read; v53 answers with the new ones.
type PlatformConfig struct {
	NumPCISegments int      `json:"num_pci_segments,omitempty"`
	SerialNumber   string   `json:"serial_number,omitempty"`
	UUID           string   `json:"uuid,omitempty"`
	OEMStrings     []string `json:"oem_strings,omitempty"`
}

// UnmarshalJSON reads the names of v53 as well.
func (p *PlatformConfig) UnmarshalJSON(b []byte) error {
	type plain PlatformConfig // without this method
	v := struct {
		*plain
		SystemSerialNumber string `json:"system_serial_number"`
		SystemUUID         string `json:"system_uuid"`
	}{plain: (*plain)(p)}
	if err := json.Unmarshal(b, &v); err != nil {
		return err
	}
	if v.SystemSerialNumber != "" {
		p.SerialNumber = v.SystemSerialNumber
	}
	if v.SystemUUID != "" {
		p.UUID = v.SystemUUID
	}
	return nil
}

// LandlockRule allows access ("r", "w", "rw") below a path, in addition to what the configuration names.
type LandlockRule struct {
	Path   string `json:"path"`
	Access string `json:"access"`
}

// Resize asks for sizes; nil keeps one.
type Resize struct {
	VCPUs   *int   `json:"desired_vcpus,omitempty"`
	RAM     *int64 `json:"desired_ram,omitempty"` // bytes, all of the guest's memory
	Balloon *int64 `json:"desired_balloon,omitempty"`
}

// ResizeZone asks for the size of a memory zone.
type ResizeZone struct {
	ID  string `json:"id"`
	RAM int64  `json:"desired_ram"`
}

// ResizeDisk asks for the size of a disk, a multiple of 512 bytes.
type ResizeDisk struct {
	ID   string `json:"id"`
	Size int64  `json:"desired_size"`
}

// RestoreConfig tells where a snapshot is and how to load it.
type RestoreConfig struct {
	SourceURL         string        `json:"source_url"` // "file:///dir"
	Prefault          bool          `json:"prefault,omitempty"`
	MemoryRestoreMode string        `json:"memory_restore_mode,omitempty"` // "Copy" (default) or "OnDemand"; v52
	Resume            bool          `json:"resume,omitempty"`              // v52
	NetFDs            []RestoredNet `json:"net_fds,omitempty"`
}

// RestoredNet is a NIC of the snapshot that gets new taps.
type RestoredNet struct {
	ID     string `json:"id"`
	NumFDs int    `json:"num_fds"`
}
