package server

import (
	"encoding/json"
	"fmt"
	"maps"
	"math"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/moby/profiles/seccomp"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	oci "github.com/opencontainers/runtime-spec/specs-go"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crivm/crivm/agentproto"
)

const defaultPath = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// ociSpec is the container as CRI describes it. What only the guest knows (root path, user by name, PID
// namespace, volumes, cgroup path) is left to the agent.
func ociSpec(config *cri.ContainerConfig, pod *cri.PodSandboxConfig, image ocispec.ImageConfig) (*oci.Spec, error) {
	sec := config.GetLinux().GetSecurityContext()
	args := commandLine(config, image)
	if len(args) == 0 {
		return nil, invalid("config.command", "neither the configuration nor the image has a command")
	}
	capabilities, err := capabilities(sec)
	if err != nil {
		return nil, err
	}
	spec := &oci.Spec{
		Version: "1.0.2", // crun 1.8 of Debian 12 refuses newer ones; nothing newer is used
		Root:    &oci.Root{Readonly: sec.GetReadonlyRootfs()},
		Process: &oci.Process{
			Terminal: config.GetTty(), Args: args, Env: environment(config, pod, image), Cwd: workingDir(config, image),
			NoNewPrivileges: sec.GetNoNewPrivs(), Capabilities: capabilities,
		},
		Mounts:      baseMounts(sec.GetPrivileged()),
		Annotations: map[string]string{},
		Linux: &oci.Linux{
			// Network, IPC and UTS are the guest's own: the pod's. The agent completes the PID namespace.
			Namespaces:    []oci.LinuxNamespace{{Type: oci.MountNamespace}, {Type: oci.CgroupNamespace}},
			Resources:     resources(config.GetLinux().GetResources()),
			MaskedPaths:   sec.GetMaskedPaths(),
			ReadonlyPaths: sec.GetReadonlyPaths(),
		},
	}
	if r := config.GetLinux().GetResources(); r != nil && r.GetOomScoreAdj() != 0 {
		adjust := int(r.GetOomScoreAdj())
		spec.Process.OOMScoreAdj = &adjust
	}
	spec.Linux.Resources.Devices = allowedDevices(sec.GetPrivileged())
	if sec.GetPrivileged() {
		spec.Linux.MaskedPaths, spec.Linux.ReadonlyPaths = nil, nil
	}
	if spec.Linux.Seccomp, err = seccompProfile(sec, spec); err != nil {
		return nil, err
	}
	return spec, nil
}

// commandLine merges as the image specification says: a command of the configuration drops the image's Cmd.
func commandLine(config *cri.ContainerConfig, image ocispec.ImageConfig) []string {
	command, args := config.GetCommand(), config.GetArgs()
	if len(command) == 0 {
		command = image.Entrypoint
		if len(args) == 0 {
			args = image.Cmd
		}
	}
	return append(slices.Clone(command), args...)
}

func environment(config *cri.ContainerConfig, pod *cri.PodSandboxConfig, image ocispec.ImageConfig) []string {
	env := []string{defaultPath, "HOSTNAME=" + pod.GetHostname()}
	if config.GetTty() {
		env = append(env, "TERM=xterm")
	}
	env = append(env, image.Env...)
	for _, e := range config.GetEnvs() {
		env = append(env, e.GetKey()+"="+string(e.GetValue()))
	}
	return lastOfEach(env)
}

// lastOfEach keeps the last value of each variable, in the order of first mention.
func lastOfEach(env []string) []string {
	index := map[string]int{}
	var out []string
	for _, e := range env {
		name, _, _ := strings.Cut(e, "=")
		if i, ok := index[name]; ok {
			out[i] = e
			continue
		}
		index[name] = len(out)
		out = append(out, e)
	}
	return out
}

func workingDir(config *cri.ContainerConfig, image ocispec.ImageConfig) string {
	switch {
	case config.GetWorkingDir() != "":
		return config.GetWorkingDir()
	case image.WorkingDir != "":
		return path.Join("/", image.WorkingDir)
	}
	return "/"
}

func baseMounts(privileged bool) []oci.Mount {
	access := "ro"
	if privileged {
		access = "rw"
	}
	return []oci.Mount{
		{Destination: "/proc", Type: "proc", Source: "proc", Options: []string{"nosuid", "noexec", "nodev"}},
		{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "strictatime", "mode=755", "size=65536k"}},
		{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"}},
		{Destination: "/dev/mqueue", Type: "mqueue", Source: "mqueue", Options: []string{"nosuid", "noexec", "nodev"}},
		{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: []string{"nosuid", "noexec", "nodev", access}},
		{Destination: "/sys/fs/cgroup", Type: "cgroup", Source: "cgroup", Options: []string{"nosuid", "noexec", "nodev", "relatime", access}},
	}
}

// allowedDevices lets a container make and use what the OCI runtime puts into /dev; a privileged one, every
// device of the guest.
func allowedDevices(privileged bool) []oci.LinuxDeviceCgroup {
	if privileged {
		return []oci.LinuxDeviceCgroup{{Allow: true, Access: "rwm"}}
	}
	return []oci.LinuxDeviceCgroup{{Allow: false, Access: "rwm"}}
}

// defaultCapabilities is what containers of this field have had since Docker.
var defaultCapabilities = []string{
	"CAP_AUDIT_WRITE", "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL", "CAP_MKNOD", "CAP_NET_BIND_SERVICE",
	"CAP_NET_RAW", "CAP_SETFCAP", "CAP_SETGID", "CAP_SETPCAP", "CAP_SETUID", "CAP_SYS_CHROOT",
}

// allCapabilities are those of Linux 6.1, the oldest guest kernel that is supported.
var allCapabilities = []string{
	"CAP_AUDIT_CONTROL", "CAP_AUDIT_READ", "CAP_AUDIT_WRITE", "CAP_BLOCK_SUSPEND", "CAP_BPF", "CAP_CHECKPOINT_RESTORE", "CAP_CHOWN",
	"CAP_DAC_OVERRIDE", "CAP_DAC_READ_SEARCH", "CAP_FOWNER", "CAP_FSETID", "CAP_IPC_LOCK", "CAP_IPC_OWNER", "CAP_KILL", "CAP_LEASE",
	"CAP_LINUX_IMMUTABLE", "CAP_MAC_ADMIN", "CAP_MAC_OVERRIDE", "CAP_MKNOD", "CAP_NET_ADMIN", "CAP_NET_BIND_SERVICE", "CAP_NET_BROADCAST",
	"CAP_NET_RAW", "CAP_PERFMON", "CAP_SETFCAP", "CAP_SETGID", "CAP_SETPCAP", "CAP_SETUID", "CAP_SYSLOG", "CAP_SYS_ADMIN", "CAP_SYS_BOOT",
	"CAP_SYS_CHROOT", "CAP_SYS_MODULE", "CAP_SYS_NICE", "CAP_SYS_PACCT", "CAP_SYS_PTRACE", "CAP_SYS_RAWIO", "CAP_SYS_RESOURCE",
	"CAP_SYS_TIME", "CAP_SYS_TTY_CONFIG", "CAP_WAKE_ALARM",
}

// capabilities applies add and drop, each of which may be "ALL"; a single name counts over ALL of the other list.
func capabilities(sec *cri.LinuxContainerSecurityContext) (*oci.LinuxCapabilities, error) {
	if sec.GetPrivileged() {
		return &oci.LinuxCapabilities{Bounding: allCapabilities, Effective: allCapabilities, Permitted: allCapabilities}, nil
	}
	asked := sec.GetCapabilities()
	add, addAll, err := capabilityNames("add_capabilities", asked.GetAddCapabilities())
	if err != nil {
		return nil, err
	}
	drop, dropAll, err := capabilityNames("drop_capabilities", asked.GetDropCapabilities())
	if err != nil {
		return nil, err
	}
	ambient, ambientAll, err := capabilityNames("add_ambient_capabilities", asked.GetAddAmbientCapabilities())
	if err != nil {
		return nil, err
	}
	if ambientAll {
		ambient = allCapabilities
	}
	set := defaultCapabilities
	if addAll {
		set = allCapabilities
	}
	if dropAll {
		set = nil
	}
	set = slices.Concat(set, add, ambient)
	set = slices.DeleteFunc(set, func(c string) bool { return slices.Contains(drop, c) })
	slices.Sort(set)
	set = slices.Compact(set)
	ambient = slices.DeleteFunc(slices.Clone(ambient), func(c string) bool { return slices.Contains(drop, c) })
	caps := &oci.LinuxCapabilities{Bounding: set, Effective: set, Permitted: set, Ambient: ambient}
	if len(ambient) > 0 {
		caps.Inheritable = ambient // the kernel wants ambient ones inheritable, capabilities(7)
	}
	return caps, nil
}

func capabilityNames(field string, names []string) (list []string, all bool, err error) {
	for _, name := range names {
		name = strings.ToUpper(name)
		if name == "ALL" {
			all = true
			continue
		}
		if !strings.HasPrefix(name, "CAP_") {
			name = "CAP_" + name
		}
		if !slices.Contains(allCapabilities, name) {
			return nil, false, invalid("config.linux.security_context.capabilities."+field, "%q is not a capability", name)
		}
		list = append(list, name)
	}
	return list, all, nil
}

// seccompProfile: nothing asked for means unconfined (CRI), and a privileged container always is.
func seccompProfile(sec *cri.LinuxContainerSecurityContext, spec *oci.Spec) (*oci.LinuxSeccomp, error) {
	const field = "config.linux.security_context.seccomp"
	profile := sec.GetSeccomp()
	//lint:ignore SA1019 older kubelets fill nothing else
	if old := sec.GetSeccompProfilePath(); profile == nil && old != "" {
		switch p := old; {
		case p == "unconfined":
		case p == "runtime/default" || p == "docker/default":
			profile = &cri.SecurityProfile{ProfileType: cri.SecurityProfile_RuntimeDefault}
		case strings.HasPrefix(p, "localhost/"):
			profile = &cri.SecurityProfile{ProfileType: cri.SecurityProfile_Localhost, LocalhostRef: strings.TrimPrefix(p, "localhost/")}
		default:
			return nil, invalid("config.linux.security_context.seccomp_profile_path", "%q is not a profile", p)
		}
	}
	if profile == nil || sec.GetPrivileged() {
		return nil, nil
	}
	switch profile.GetProfileType() {
	case cri.SecurityProfile_Unconfined:
		return nil, nil
	case cri.SecurityProfile_RuntimeDefault:
		p, err := seccomp.GetDefaultProfile(spec)
		if err != nil {
			return nil, fmt.Errorf("default seccomp profile: %w", err)
		}
		return p, nil
	case cri.SecurityProfile_Localhost:
		const limit = 1 << 20
		text, err := readBounded(profile.GetLocalhostRef(), limit)
		if err != nil {
			return nil, unusable(field+".localhost_ref", profile.GetLocalhostRef(), err)
		}
		if !json.Valid(text) {
			return nil, invalid(field+".localhost_ref", "%s is not JSON", profile.GetLocalhostRef())
		}
		p, err := seccomp.LoadProfile(string(text), spec)
		if err != nil {
			return nil, invalid(field+".localhost_ref", "%s: %v", profile.GetLocalhostRef(), err)
		}
		return p, nil
	}
	return nil, invalid(field+".profile_type", "%s is not a type of profile", profile.GetProfileType())
}

// resources are limits in the guest's cgroups. cpuset_cpus and cpuset_mems count the host's CPUs and say
// nothing about the guest's.
func resources(r *cri.LinuxContainerResources) *oci.LinuxResources {
	out := &oci.LinuxResources{Unified: r.GetUnified()}
	if r == nil {
		return out
	}
	cpu := &oci.LinuxCPU{}
	if v := r.GetCpuShares(); v > 0 {
		cpu.Shares = ptr(uint64(v))
	}
	if v := r.GetCpuPeriod(); v > 0 {
		cpu.Period = ptr(uint64(v))
	}
	if v := r.GetCpuQuota(); v > 0 {
		cpu.Quota = ptr(v)
	}
	out.CPU = cpu
	for _, h := range r.GetHugepageLimits() {
		out.HugepageLimits = append(out.HugepageLimits, oci.LinuxHugepageLimit{Pagesize: h.GetPageSize(), Limit: h.GetLimit()})
	}
	if limit := r.GetMemoryLimitInBytes(); !unlimitedMemory(limit) {
		out.Memory = &oci.LinuxMemory{Limit: ptr(limit), Swap: ptr(limit)}
	}
	return out
}

// changedResources are limits that take the place of others: what had a limit and has none any more is told
// so.
func changedResources(to, from *cri.LinuxContainerResources) *oci.LinuxResources {
	out := resources(to)
	out.Unified = maps.Clone(out.Unified)
	if out.Unified == nil {
		out.Unified = map[string]string{}
	}
	if to.GetCpuQuota() <= 0 && from.GetCpuQuota() > 0 {
		if out.CPU == nil {
			out.CPU = &oci.LinuxCPU{}
		}
		out.CPU.Quota = ptr(int64(-1))
	}
	if unlimitedMemory(to.GetMemoryLimitInBytes()) && !unlimitedMemory(from.GetMemoryLimitInBytes()) {
		out.Memory = &oci.LinuxMemory{Limit: ptr(int64(-1))}
	}
	defaults := map[string]string{
		"memory.min": "0", "memory.low": "0", "memory.high": "max", "memory.max": "max", "memory.oom.group": "0", "memory.swap.max": "max",
		"cpu.weight": "100", "cpu.max": "max", "cpu.max.burst": "0", "cpu.idle": "0", "pids.max": "max", "io.weight": "default 100",
	}
	if to.GetCpuShares() <= 0 && from.GetCpuShares() > 0 {
		out.Unified["cpu.weight"] = defaults["cpu.weight"]
	}
	for key := range from.GetUnified() {
		if value, ok := defaults[key]; ok && to.GetUnified()[key] == "" {
			out.Unified[key] = value
		}
	}
	return out
}

// unlimitedMemory: kubelet sends 0, or sums that are near the largest number.
func unlimitedMemory(n int64) bool { return n <= 0 || n > math.MaxInt64/2 }

func ptr[T any](v T) *T { return &v }

// guestUser is the user as asked for; the guest resolves names in the image's own files.
func guestUser(config *cri.ContainerConfig, image ocispec.ImageConfig) *agentproto.User {
	sec := config.GetLinux().GetSecurityContext()
	u := &agentproto.User{StrictGroups: sec.GetSupplementalGroupsPolicy() == cri.SupplementalGroupsPolicy_Strict}
	switch {
	case sec.GetRunAsUser() != nil:
		u.HasUid, u.Uid = true, sec.GetRunAsUser().GetValue()
	case sec.GetRunAsUsername() != "":
		u.Name = sec.GetRunAsUsername()
	default:
		u.Name = image.User
	}
	if sec.GetRunAsGroup() != nil {
		u.HasGid, u.Gid = true, sec.GetRunAsGroup().GetValue()
	}
	for _, g := range sec.GetSupplementalGroups() {
		u.SupplementalGroups = append(u.SupplementalGroups, uint32(g))
	}
	return u
}

// readBounded reads a regular file of the host that is not larger than limit.
func readBounded(name string, limit int64) ([]byte, error) {
	info, err := os.Stat(name)
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is not a regular file: %w", name, errdefs.ErrInvalidArgument)
	}
	if info.Size() > limit {
		return nil, fmt.Errorf("%s has %s bytes, more than %d: %w", name, strconv.FormatInt(info.Size(), 10), limit, errdefs.ErrInvalidArgument)
	}
	return os.ReadFile(name)
}
