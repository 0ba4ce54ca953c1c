package conf

import (
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"
)

const (
	maxSocket    = 107 // bytes of a unix socket's path
	maxVMDir     = 60  // bytes of a VM's directory, so that paths of sockets in it fit
	vmDirName    = 16  // bytes of the name of a VM's directory
	maxVCPUs     = 254 // of one VM, without interrupt remapping in the guest
	minMemory    = 128 * MiB
	memoryUnit   = 2 * MiB // what VMMs take
	minScratch   = 16 * MiB
	maxScratch   = 16 * TiB
	minLogLine   = 256
	maxLogLine   = 16 * MiB
	maxCmdline   = 1024 // of the kernel's 2048; the rest is for what crivm passes itself
	maxDownloads = 64
	minUID       = 65536 // below are users of the host, and 65534 and 65535 mean nobody and none
	maxUID       = 1<<32 - 2
	maxHandlers  = 100
	maxPool      = 1000
	maxBoots     = 64
	maxWeight    = 10000
)

var (
	handlerName = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$`)
	cgroupPath  = regexp.MustCompile(`^/?[a-zA-Z0-9_][a-zA-Z0-9_.-]*(/[a-zA-Z0-9_][a-zA-Z0-9_.-]*)*$`)
)

// Validate tells everything that is wrong with a complete configuration, one "key: text" a line; each is an
// errdefs.ErrInvalidArgument. It does not look at the machine: whether files exist is for `crivm check`.
func (c Config) Validate() error {
	var errs []error
	for _, p := range c.problems(func(string) bool { return false }) {
		errs = append(errs, p)
	}
	return errors.Join(errs...)
}

// checks collects problems.
type checks []*problem

// require notes a problem with keys unless ok; the first key is the one to blame.
func (cs *checks) require(ok bool, keys []string, format string, args ...any) {
	if !ok {
		*cs = append(*cs, &problem{keys: slices.Clone(keys), text: fmt.Sprintf(format, args...)})
	}
}

func (cs *checks) oneOf(key, value string, allowed ...string) {
	cs.require(slices.Contains(allowed, value), of(key), "%.40q is not one of %s", value, strings.Join(allowed, ", "))
}

func (cs *checks) absolute(key, path string) {
	cs.require(isAbsolute(path), of(key), "%.200q is not an absolute path", path)
}

func (cs *checks) collector(key, endpoint string) {
	u, err := url.Parse(endpoint)
	ok := endpoint == "" || err == nil && (u.Scheme == "http" || u.Scheme == "https") && u.Hostname() != "" && u.Port() != "" &&
		(u.Path == "" || u.Path == "/") && u.User == nil && u.RawQuery == "" && u.Fragment == ""
	cs.require(ok, of(key), "%.200q is not http://HOST:PORT or https://HOST:PORT", endpoint)
}

func (cs *checks) program(key, name string) {
	cs.require(isAbsolute(name) || (name != "" && !strings.ContainsAny(name, "/\x00\n")), of(key), "%.200q is neither an absolute path nor a name to look up in PATH", name)
}

func (cs *checks) atLeast(key string, d Duration, least time.Duration) {
	cs.require(time.Duration(d) >= least, of(key), "%v is less than %v", d, least)
}

func of(keys ...string) []string { return keys }

func isAbsolute(path string) bool {
	return filepath.IsAbs(path) && !strings.ContainsAny(path, "\x00\n") && len(path) < 4096
}

// configPath is a key that takes a path.
type configPath struct {
	key   string
	path  *string
	empty bool    // "" stands for a default of another program
	below *string // "" stands for a path below this one
}

// paths are all single paths but those of VM.
func (c *Config) paths() []configPath {
	return []configPath{
		{key: "socket", path: &c.Socket},
		{key: "state_dir", path: &c.StateDir},
		{key: "run_dir", path: &c.RunDir},
		{key: "image.root", path: &c.Image.Root, below: &c.StateDir},
		{key: "image.run_root", path: &c.Image.RunRoot, below: &c.RunDir},
		{key: "image.disk_dir", path: &c.Image.DiskDir, below: &c.StateDir},
		{key: "image.registries_conf", path: &c.Image.RegistriesConf, empty: true},
		{key: "image.registries_conf_dir", path: &c.Image.RegistriesConfDir, empty: true},
		{key: "image.signature_policy", path: &c.Image.SignaturePolicy, empty: true},
		{key: "image.auth_file", path: &c.Image.AuthFile, empty: true},
		{key: "image.certs_dir", path: &c.Image.CertsDir, empty: true},
		{key: "image.short_name_aliases", path: &c.Image.ShortNameAliases, empty: true},
		{key: "cni.conf_dir", path: &c.CNI.ConfDir},
		{key: "cni.cache_dir", path: &c.CNI.CacheDir, below: &c.StateDir},
		{key: "cni.netns_dir", path: &c.CNI.NetnsDir},
		{key: "qemu.firmware", path: &c.QEMU.Firmware, empty: true},
	}
}

// problems is Validate, in the order of the reference. isSet tells of a key whether a file sets it: what a
// handler inherits from [vm] is reported there only.
func (c *Config) problems(isSet func(key string) bool) []*problem {
	var cs checks
	c.checkPaths(&cs)
	cs.oneOf("log.level", c.Log.Level, "debug", "info", "warn", "error")
	cs.oneOf("log.format", c.Log.Format, "text", "json")
	cs.collector("tracing.endpoint", c.Tracing.Endpoint)
	if a := c.Metrics.Address; a != "" {
		at, err := netip.ParseAddrPort(a)
		cs.require(err == nil && at.Addr().Zone() == "", of("metrics.address"), `%.80q is not an IP address and a port such as "127.0.0.1:9631" or "[::1]:9631"`, a)
	}
	cs.require(c.Tracing.SamplesPerMillion >= 0 && c.Tracing.SamplesPerMillion <= 1_000_000, of("tracing.samples_per_million"),
		"%d is not between 0 and 1000000", c.Tracing.SamplesPerMillion)
	c.CRI.check(&cs)
	cs.atLeast("image.pull_progress_timeout", c.Image.PullProgressTimeout, time.Second)
	cs.require(c.Image.MaxParallelDownloads >= 1 && c.Image.MaxParallelDownloads <= maxDownloads, of("image.max_parallel_downloads"), "%d is not between 1 and %d", c.Image.MaxParallelDownloads, maxDownloads)
	for _, name := range c.Image.Pinned {
		cs.require(name != "" && !strings.ContainsAny(name, " \t\r\n\x00"), of("image.pinned"), "%.200q is not a reference to an image", name)
	}
	cs.require(len(c.CNI.BinDirs) > 0, of("cni.bin_dirs"), "is empty: without plugins no pod has a network")
	for _, dir := range c.CNI.BinDirs {
		cs.absolute("cni.bin_dirs", dir)
	}
	cs.atLeast("cni.add_timeout", c.CNI.AddTimeout, time.Second)
	cs.atLeast("cni.del_timeout", c.CNI.DelTimeout, time.Second)
	vm := c.VM.check("vm")
	cs = append(cs, vm...)
	cs.require(c.Pool.ParallelBoots >= 1 && c.Pool.ParallelBoots <= maxBoots, of("pool.parallel_boots"), "%d is not between 1 and %d", c.Pool.ParallelBoots, maxBoots)
	cs.require(c.Pool.CPUWeight >= 1 && c.Pool.CPUWeight <= maxWeight, of("pool.cpu_weight"), "%d is not between 1 and %d", c.Pool.CPUWeight, maxWeight)
	c.VMUsers.check(&cs)
	cs.program("cloudhypervisor.binary", c.CloudHypervisor.Binary)
	cs.oneOf("cloudhypervisor.landlock", c.CloudHypervisor.Landlock, "auto", "on", "off")
	cs.program("qemu.binary", c.QEMU.Binary)
	cs.oneOf("qemu.accel", c.QEMU.Accel, "auto", "kvm", "tcg")
	c.checkHandlers(&cs, vm, isSet)
	return cs
}

func (c *Config) checkPaths(cs *checks) {
	for _, p := range c.paths() {
		if (p.empty && *p.path == "") || (p.below != nil && !isAbsolute(*p.below)) {
			continue // a default, or one that follows from a path that is reported
		}
		cs.absolute(p.key, *p.path)
	}
	cs.require(len(c.Socket) <= maxSocket, of("socket"), "is %d bytes long; the path of a unix socket has at most %d", len(c.Socket), maxSocket)
	most := maxVMDir - len("/vm/") - vmDirName
	cs.require(len(c.RunDir) <= most, of("run_dir"), "is %d bytes long; at most %d leave room for the sockets of VMs below it", len(c.RunDir), most)
	if isAbsolute(c.StateDir) && isAbsolute(c.RunDir) {
		cs.require(!within(c.StateDir, c.RunDir), of("state_dir", "run_dir"), "%s is within run_dir %s, which does not survive a reboot", c.StateDir, c.RunDir)
		cs.require(c.Image.Root != c.Image.RunRoot, of("image.run_root", "image.root"), "%s is both image.root and image.run_root", c.Image.RunRoot)
		cs.require(!within(c.Image.DiskDir, c.Image.Root), of("image.disk_dir", "image.root"), "%s is within image.root %s, which belongs to containers/storage", c.Image.DiskDir, c.Image.Root)
	}
}

// within tells whether path is dir or below it; both are clean.
func within(path, dir string) bool {
	return path == dir || strings.HasPrefix(path, strings.TrimSuffix(dir, "/")+"/")
}

func (c *CRI) check(cs *checks) {
	cs.oneOf("cri.cgroup_driver", c.CgroupDriver, "auto", "systemd", "cgroupfs")
	cs.require(cgroupPath.MatchString(c.CgroupParent) && len(c.CgroupParent) <= 200, of("cri.cgroup_parent"), `%.200q is neither a cgroup such as "/crivm" nor a slice such as "crivm.slice"`, c.CgroupParent)
	if strings.HasSuffix(c.CgroupParent, ".slice") {
		cs.require(!strings.Contains(strings.Trim(c.CgroupParent, "/"), "/"), of("cri.cgroup_parent"), `%.200q is a path of slices; write the last alone, its name has the others`, c.CgroupParent)
		cs.require(c.CgroupDriver != "cgroupfs", of("cri.cgroup_parent", "cri.cgroup_driver"), `%.200q is a slice, which cri.cgroup_driver = "cgroupfs" cannot make`, c.CgroupParent)
	}
	stream, err := netip.ParseAddrPort(c.StreamAddress)
	cs.require(err == nil && stream.Addr().Zone() == "", of("cri.stream_address"), `%.80q is not an IP address and a port such as "127.0.0.1:0" or "[::1]:0"`, c.StreamAddress)
	cs.require(c.StreamIdleTimeout == 0 || time.Duration(c.StreamIdleTimeout) >= time.Second, of("cri.stream_idle_timeout"), "%v is neither 0 (never) nor at least 1s", c.StreamIdleTimeout)
	size := c.MaxContainerLogLineSize
	cs.require(size == 0 || (size >= minLogLine && size <= maxLogLine), of("cri.max_container_log_line_size"), "%v is neither 0 (never split) nor between %v and %v", size, Size(minLogLine), Size(maxLogLine))
	if c.HostNamespacePods == "host" {
		cs.require(false, of("cri.host_namespace_pods"), `"host" needs the host handler, which this version does not have; only "reject" can be set`)
	} else {
		cs.oneOf("cri.host_namespace_pods", c.HostNamespacePods, "reject")
	}
}

func (v *VM) check(table string) checks {
	var cs checks
	key := func(names ...string) []string {
		for i := range names {
			names[i] = table + "." + names[i]
		}
		return names
	}
	cs.oneOf(table+".vmm", v.VMM, "auto", "cloudhypervisor", "qemu")
	cs.absolute(table+".kernel", v.Kernel)
	cs.absolute(table+".initramfs", v.Initramfs)
	cs.require(len(v.Cmdline) <= maxCmdline && !strings.ContainsFunc(v.Cmdline, func(r rune) bool { return r < ' ' || r == 0x7f }), key("cmdline"), "is not one line of at most %d bytes", maxCmdline)
	for word := range strings.FieldsSeq(v.Cmdline) {
		cs.require(!strings.HasPrefix(strings.Trim(word, `"`), "crivm."), key("cmdline"), "%.80q: parameters of crivm are set by crivm itself", word)
	}
	cs.require(v.VCPUs >= 1 && v.VCPUs <= maxVCPUs, key("vcpus"), "%d is not between 1 and %d", v.VCPUs, maxVCPUs)
	cs.require(v.MaxVCPUs >= 0 && v.MaxVCPUs <= maxVCPUs, key("max_vcpus"), "%d is neither 0 (the host's number) nor between 1 and %d", v.MaxVCPUs, maxVCPUs)
	cs.require(v.MaxVCPUs <= 0 || v.MaxVCPUs >= v.VCPUs, key("max_vcpus", "vcpus"), "max_vcpus %d is less than vcpus %d", v.MaxVCPUs, v.VCPUs)
	cs.require(v.Memory >= minMemory && v.Memory%memoryUnit == 0, key("memory"), "%v is not a multiple of %v of at least %v", v.Memory, memoryUnit, minMemory)
	cs.require(v.MaxMemory >= 0 && v.MaxMemory%memoryUnit == 0, key("max_memory"), "%v is neither 0 (the host's memory) nor a multiple of %v", v.MaxMemory, memoryUnit)
	cs.require(v.MaxMemory <= 0 || v.MaxMemory >= v.Memory, key("max_memory", "memory"), "max_memory %v is less than memory %v", v.MaxMemory, v.Memory)
	cs.require(v.ScratchSize >= minScratch && v.ScratchSize <= maxScratch && v.ScratchSize%(4*KiB) == 0, key("scratch_size"), "%v is not a multiple of 4KiB between %v and %v", v.ScratchSize, minScratch, Size(maxScratch))
	cs.oneOf(table+".empty_dir", v.EmptyDir, "guest", "shared")
	cs.require(v.EmptyDirSize >= minScratch && v.EmptyDirSize <= maxScratch && v.EmptyDirSize%(4*KiB) == 0, key("empty_dir_size"), "%v is not a multiple of 4KiB between %v and %v", v.EmptyDirSize, minScratch, Size(maxScratch))
	cs.atLeast(table+".boot_timeout", v.BootTimeout, time.Second)
	cs.atLeast(table+".health_timeout", v.HealthTimeout, time.Second)
	cs.require(v.PoolSize >= 0 && v.PoolSize <= maxPool, key("pool_size"), "%d is not between 0 and %d", v.PoolSize, maxPool)
	return cs
}

func (u *VMUsers) check(cs *checks) {
	cs.require(u.Count >= 0 && u.Count <= maxUID, of("vm_users.count"), "%d is neither 0 (run as root) nor a number of users", u.Count)
	if u.Count <= 0 {
		return
	}
	cs.require(u.Base >= minUID && u.Base <= maxUID, of("vm_users.base"), "%d is not between %d and %d", u.Base, minUID, maxUID)
	cs.require(u.Base > maxUID || u.Count > maxUID || u.Base+u.Count-1 <= maxUID, of("vm_users.count", "vm_users.base"), "%d users from %d on go beyond %d", u.Count, u.Base, maxUID)
}

// checkHandlers checks each handler; vm is what is wrong with [vm].
func (c *Config) checkHandlers(cs *checks, vm checks, isSet func(key string) bool) {
	cs.require(len(c.Handlers) <= maxHandlers, of("handlers"), "%d handlers are more than %d", len(c.Handlers), maxHandlers)
	names := make([]string, 0, len(c.Handlers))
	for name := range c.Handlers {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		table := dotted([]string{"handlers", name})
		handler := c.Handlers[name]
		switch fixed := fixedVMM[name]; {
		case name == "":
			cs.require(!isSet(table), of(table), "the default handler is written as [vm]")
		case name == "host":
			cs.require(false, of(table), "the host handler does not exist in this version")
			continue
		case !handlerName.MatchString(name):
			cs.require(false, of(table), "%.80q is not the name of a handler: at most 63 of a-z, 0-9 and -, no - at either end", name)
			continue
		case fixed != "":
			cs.require(handler.VMM == fixed, of(table+".vmm"), "%q: handler %s is always %s; use another name", handler.VMM, name, fixed)
		}
		for _, p := range handler.check(table) {
			inherited := slices.Clone(p.keys)
			for i, key := range inherited {
				inherited[i] = "vm" + strings.TrimPrefix(key, table)
			}
			known := slices.ContainsFunc(vm, func(q *problem) bool { return q.text == p.text && slices.Equal(q.keys, inherited) })
			if known && !slices.ContainsFunc(p.keys, isSet) {
				continue
			}
			p.keys = append(p.keys, inherited...)
			*cs = append(*cs, p)
		}
	}
}
