// Package conf is crivm's configuration: one TOML file and the fragments in conf.d beside it, merged,
// checked and completed to plain values. A Config that Load returned needs no further defaulting: derived
// paths are filled in and every handler is written out. The one exception are the values whose meaning
// depends on the machine ("auto", and 0 for a ceiling); they are left to the part that looks at the machine.
//
// The package reads no environment variable and imports nothing of crivm; only cmd/crivm imports it.
package conf

import (
	"path/filepath"
	"strings"
	"time"
)

// Config is everything that can be configured. The TOML key of a field is in its tag; docs/configuration.md
// is the reference of all keys.
type Config struct {
	Socket   string `toml:"socket"`    // unix socket of the CRI service
	StateDir string `toml:"state_dir"` // survives a reboot: database, images, scratch disks
	RunDir   string `toml:"run_dir"`   // does not survive a reboot; sockets of VMs live below it, so it must be short

	Log             Log             `toml:"log"`
	Tracing         Tracing         `toml:"tracing"`
	Metrics         Metrics         `toml:"metrics"`
	CRI             CRI             `toml:"cri"`
	Image           Image           `toml:"image"`
	CNI             CNI             `toml:"cni"`
	VM              VM              `toml:"vm"`
	Pool            Pool            `toml:"pool"`
	VMUsers         VMUsers         `toml:"vm_users"`
	CloudHypervisor CloudHypervisor `toml:"cloudhypervisor"`
	QEMU            QEMU            `toml:"qemu"`

	// Handlers are the runtime handlers by name, each complete. After Load (and in Default) there is always
	// "" and "crivm" (both as VM unless [handlers.crivm] says otherwise), "clh" and "qemu".
	Handlers map[string]VM `toml:"handlers"`
}

// Log is where and how much the daemon logs; it always logs to standard error.
type Log struct {
	Level  string `toml:"level"`  // debug, info, warn or error
	Format string `toml:"format"` // text or json
}

// Tracing is where spans of calls go.
type Tracing struct {
	Endpoint          string `toml:"endpoint"`            // http(s)://host:port of an OTLP/gRPC collector; empty: nowhere
	SamplesPerMillion int    `toml:"samples_per_million"` // of calls whose client has not decided
}

// Metrics is where Prometheus finds the daemon's figures.
type Metrics struct {
	Address string `toml:"address"` // IP address and port of an HTTP server; empty: none
}

// CRI is the behaviour of the CRI service.
type CRI struct {
	CgroupDriver            string   `toml:"cgroup_driver"` // auto, systemd or cgroupfs; auto is systemd on a cgroup v2 host that runs systemd
	CgroupParent            string   `toml:"cgroup_parent"` // of sandboxes that name none; see ParentCgroup
	StreamAddress           string   `toml:"stream_address"`
	StreamIdleTimeout       Duration `toml:"stream_idle_timeout"`         // 0: never
	MaxContainerLogLineSize Size     `toml:"max_container_log_line_size"` // longer lines are split; 0: never split
	HostNamespacePods       string   `toml:"host_namespace_pods"`         // reject
}

// Image is the image store and how images are pulled. An empty path stands for the default of the
// containers-*(5) libraries unless said otherwise.
type Image struct {
	Root    string `toml:"root"`     // containers/storage; <state_dir>/storage
	RunRoot string `toml:"run_root"` // containers/storage; <run_dir>/storage
	DiskDir string `toml:"disk_dir"` // read-only disks made from images; <state_dir>/disks

	RegistriesConf    string `toml:"registries_conf"`
	RegistriesConfDir string `toml:"registries_conf_dir"`
	SignaturePolicy   string `toml:"signature_policy"`
	AuthFile          string `toml:"auth_file"`
	CertsDir          string `toml:"certs_dir"`
	ShortNameAliases  string `toml:"short_name_aliases"`

	PullProgressTimeout  Duration `toml:"pull_progress_timeout"` // a pull without a new byte for so long fails
	MaxParallelDownloads uint     `toml:"max_parallel_downloads"`
	Pinned               []string `toml:"pinned"` // image references that kubelet must not collect
}

// CNI is where networks are configured and their plugins are.
type CNI struct {
	ConfDir    string   `toml:"conf_dir"`
	BinDirs    []string `toml:"bin_dirs"`
	CacheDir   string   `toml:"cache_dir"` // results of ADD; <state_dir>/cni
	NetnsDir   string   `toml:"netns_dir"`
	AddTimeout Duration `toml:"add_timeout"`
	DelTimeout Duration `toml:"del_timeout"`
}

// VM is what a pod's virtual machine is made of: the [vm] section and, complete, each handler.
type VM struct {
	VMM         string `toml:"vmm"`          // auto, cloudhypervisor or qemu
	Kernel      string `toml:"kernel"`       // ELF image with a PVH entry
	Initramfs   string `toml:"initramfs"`    //
	Cmdline     string `toml:"cmdline"`      // appended to what crivm passes to the guest kernel itself
	VCPUs       int    `toml:"vcpus"`        // of a pod without CPU limits
	MaxVCPUs    int    `toml:"max_vcpus"`    // ceiling of any resize; 0: number of the host's CPUs
	Memory      Size   `toml:"memory"`       // of a pod without memory limits
	MaxMemory   Size   `toml:"max_memory"`   // ceiling of any resize; 0: memory of the host
	ScratchSize Size   `toml:"scratch_size"` // of the sparse disk that holds what containers write

	EmptyDir     string `toml:"empty_dir"`      // guest (a disk of the guest) or shared (the host's directory)
	EmptyDirSize Size   `toml:"empty_dir_size"` // of the sparse disk of an emptyDir

	BootTimeout Duration `toml:"boot_timeout"` // from the start of the VMM to the agent's hello

	HealthTimeout Duration `toml:"health_timeout"` // of a guest that does not answer any more

	PoolSize int `toml:"pool_size"` // VMs kept booted ahead; what [vm] says counts for the handlers "" and "crivm" only
}

// Pool is how VMs are booted ahead of their pods; how many is VM.PoolSize.
type Pool struct {
	ParallelBoots int `toml:"parallel_boots"` // at the same time, for all handlers; none while so many pods boot their own VM
	CPUWeight     int `toml:"cpu_weight"`     // of all of them together, as cgroup v2's cpu.weight
}

// VMUsers is the range of user (and group) ids that VMMs run as, one a VM.
type VMUsers struct {
	Base  int `toml:"base"`
	Count int `toml:"count"` // 0: VMMs run as root
}

// CloudHypervisor is about the VMM of that name.
type CloudHypervisor struct {
	Binary   string `toml:"binary"`   // a name is looked up in PATH
	Seccomp  bool   `toml:"seccomp"`  // its own system call filters
	Landlock string `toml:"landlock"` // auto (where the kernel has it), on or off
}

// QEMU is about the VMM of that name.
type QEMU struct {
	Binary   string `toml:"binary"`   // a name is looked up in PATH
	Firmware string `toml:"firmware"` // empty: qboot.rom is looked for where distributions put it
	Accel    string `toml:"accel"`    // auto, kvm or tcg
}

// Default is the configuration of a node that has no configuration file.
func Default() Config {
	c := defaults()
	c.resolve(nil)
	return c
}

// defaults is what the files are applied to: no derived value is filled in yet.
func defaults() Config {
	return Config{
		Socket:   "/run/crivm/crivm.sock",
		StateDir: "/var/lib/crivm",
		RunDir:   "/run/crivm",
		Log:      Log{Level: "info", Format: "text"},
		Tracing:  Tracing{SamplesPerMillion: 1_000_000},
		CRI: CRI{
			CgroupDriver:            "auto",
			CgroupParent:            "/crivm",
			StreamAddress:           "127.0.0.1:0",
			StreamIdleTimeout:       Duration(4 * time.Hour),
			MaxContainerLogLineSize: 16 * KiB,
			HostNamespacePods:       "reject",
		},
		Image: Image{
			PullProgressTimeout:  Duration(5 * time.Minute),
			MaxParallelDownloads: 3,
			Pinned:               []string{},
		},
		CNI: CNI{
			ConfDir:    "/etc/cni/net.d",
			BinDirs:    []string{"/opt/cni/bin", "/usr/lib/cni"},
			NetnsDir:   "/run/netns",
			AddTimeout: Duration(time.Minute),
			DelTimeout: Duration(time.Minute),
		},
		VM: VM{
			VMM:         "auto",
			Kernel:      "/usr/lib/crivm/vmlinux",
			Initramfs:   "/usr/lib/crivm/initramfs",
			VCPUs:       1,
			Memory:      256 * MiB,
			ScratchSize: 10 * GiB,

			EmptyDir:     "guest",
			EmptyDirSize: 64 * GiB,

			BootTimeout: Duration(time.Minute),

			HealthTimeout: Duration(10 * time.Second),
		},
		Pool:            Pool{ParallelBoots: 1, CPUWeight: 10},
		VMUsers:         VMUsers{Base: 0x70000000, Count: 65536},
		CloudHypervisor: CloudHypervisor{Binary: "cloud-hypervisor", Seccomp: true, Landlock: "auto"},
		QEMU:            QEMU{Binary: "qemu-system-x86_64", Accel: "auto"},
	}
}

// resolve fills in derived paths and completes the handlers: each starts as [vm], built-in ones with their
// VMM fixed, then what its own section sets is applied in order. A key that is set counts, whatever its value.
// pool_size is not passed on: VMs that wait cost memory, so each further pool is asked for by name.
func (c *Config) resolve(handlers map[string][]func(*VM)) {
	for _, p := range c.paths() {
		clean(p.path)
	}
	for i := range c.CNI.BinDirs {
		clean(&c.CNI.BinDirs[i])
	}
	for _, derived := range []struct {
		path      *string
		dir, name string
	}{
		{&c.Image.Root, c.StateDir, "storage"},
		{&c.Image.RunRoot, c.RunDir, "storage"},
		{&c.Image.DiskDir, c.StateDir, "disks"},
		{&c.CNI.CacheDir, c.StateDir, "cni"},
	} {
		if *derived.path == "" {
			*derived.path = filepath.Join(derived.dir, derived.name)
		}
	}
	clean(&c.VM.Kernel)
	clean(&c.VM.Initramfs)
	c.Handlers = map[string]VM{"": c.VM, "crivm": c.VM}
	for name, vmm := range fixedVMM {
		vm := c.VM
		vm.VMM, vm.PoolSize = vmm, 0
		c.Handlers[name] = vm
	}
	for name, set := range handlers {
		vm, ok := c.Handlers[name]
		if !ok {
			vm = c.VM
			vm.PoolSize = 0
		}
		for _, apply := range set {
			apply(&vm)
		}
		clean(&vm.Kernel)
		clean(&vm.Initramfs)
		c.Handlers[name] = vm
	}
}

// fixedVMM are the built-in handlers that differ from [vm].
var fixedVMM = map[string]string{"clh": "cloudhypervisor", "qemu": "qemu"}

// clean makes equal paths compare equal. What is no absolute path is left for Validate to quote.
func clean(path *string) {
	if filepath.IsAbs(*path) {
		*path = filepath.Clean(*path)
	}
}

// ParentCgroup is CgroupParent as the cgroup driver wants it: a slice's name for systemd ("/crivm" becomes
// "crivm.slice", "/a/b" becomes "a-b.slice", by systemd's naming of nested slices), else a path.
func (c CRI) ParentCgroup(systemd bool) string {
	name := strings.Trim(c.CgroupParent, "/")
	if !systemd {
		return "/" + name
	}
	if strings.HasSuffix(name, ".slice") {
		return filepath.Base(name)
	}
	return strings.ReplaceAll(strings.ReplaceAll(name, "-", "_"), "/", "-") + ".slice"
}
