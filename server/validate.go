package server

import (
	"fmt"
	"net/netip"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/containerd/errdefs"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Every field of a configuration is honoured or refused here with an error that names it and says why.

var (
	nameForm   = regexp.MustCompile(`^[a-zA-Z0-9]([-_.a-zA-Z0-9]{0,251}[a-zA-Z0-9])?$`)
	sysctlForm = regexp.MustCompile(`^[a-zA-Z0-9_-]+([./][a-zA-Z0-9_*-]+)+$`)
	dnsForm    = regexp.MustCompile(`^[-_.:%a-zA-Z0-9]+$`)
)

func invalid(field, why string, args ...any) error {
	return fmt.Errorf("%s: %s: %w", field, fmt.Sprintf(why, args...), errdefs.ErrInvalidArgument)
}

// unusable is about a path of the request that cannot be used: invalid, unless it is the node that has no descriptor or memory
// left to look at it.
func unusable(field, path string, err error) error {
	if usedUp(err) {
		return fmt.Errorf("%s: %s: %w", field, path, err)
	}
	return invalid(field, "%s: %v", path, err)
}

func unsupported(field, why string, args ...any) error {
	return fmt.Errorf("%s: %s: %w", field, fmt.Sprintf(why, args...), errdefs.ErrNotImplemented)
}

func validateSandbox(config *cri.PodSandboxConfig) error {
	m := config.GetMetadata()
	switch {
	case m == nil:
		return invalid("config.metadata", "is missing")
	case !nameForm.MatchString(m.GetName()):
		return invalid("config.metadata.name", "%q is not a pod name", m.GetName())
	case !nameForm.MatchString(m.GetNamespace()):
		return invalid("config.metadata.namespace", "%q is not a namespace name", m.GetNamespace())
	case m.GetUid() == "" || len(m.GetUid()) > 253 || strings.ContainsAny(m.GetUid(), "/\x00;="):
		return invalid("config.metadata.uid", "%q is not a UID", m.GetUid())
	case len(config.GetHostname()) > 64 || strings.ContainsAny(config.GetHostname(), "/\x00\n "):
		return invalid("config.hostname", "%q is not a hostname of at most 64 bytes", config.GetHostname())
	case config.GetLogDirectory() != "" && !filepath.IsAbs(config.GetLogDirectory()):
		return invalid("config.log_directory", "%q is not absolute", config.GetLogDirectory())
	case config.GetWindows() != nil:
		return unsupported("config.windows", "crivm runs Linux pods only")
	}
	if err := validateForm("config", config); err != nil {
		return err
	}
	for key, value := range config.GetLinux().GetSysctls() {
		if strings.ContainsAny(value, "\n") {
			return invalid("config.linux.sysctls", "%s has a value of several lines", key)
		}
		if !sysctlForm.MatchString(key) || strings.Contains(key, "..") {
			return invalid("config.linux.sysctls", "%q is not a sysctl", key)
		}
	}
	for _, text := range append(append([]string{}, config.GetDnsConfig().GetServers()...), config.GetDnsConfig().GetSearches()...) {
		if !dnsForm.MatchString(text) {
			return invalid("config.dns_config", "%q is neither an address nor a domain", text)
		}
	}
	for _, text := range config.GetDnsConfig().GetOptions() {
		if strings.ContainsAny(text, "\n\x00") {
			return invalid("config.dns_config.options", "%q has a control character", text)
		}
	}
	for _, p := range config.GetPortMappings() {
		if p.GetContainerPort() < 0 || p.GetContainerPort() > 65535 || p.GetHostPort() < 0 || p.GetHostPort() > 65535 || p.GetHostPort() > 0 && p.GetContainerPort() == 0 {
			return invalid("config.port_mappings", "%s %d to %d is not a pair of ports", p.GetProtocol(), p.GetHostPort(), p.GetContainerPort())
		}
		if _, err := netip.ParseAddr(p.GetHostIp()); p.GetHostIp() != "" && err != nil {
			return invalid("config.port_mappings.host_ip", "%q is not an address", p.GetHostIp())
		}
	}
	for _, key := range []string{"kubernetes.io/ingress-bandwidth", "kubernetes.io/egress-bandwidth"} {
		if _, err := bandwidth(config, key); err != nil {
			return err
		}
	}
	if p := config.GetLinux().GetCgroupParent(); strings.Contains(p, "..") {
		return invalid("config.linux.cgroup_parent", "%q is not a cgroup", p)
	}
	for field, r := range map[string]*cri.LinuxContainerResources{"overhead": config.GetLinux().GetOverhead(), "resources": config.GetLinux().GetResources()} {
		if err := validateResources("config.linux."+field, r); err != nil {
			return err
		}
	}
	if hugepages(config.GetLinux().GetOverhead()) > 0 {
		return unsupported("config.linux.overhead.hugepage_limits", "a VM costs no huge pages beyond its pod's")
	}
	sec := config.GetLinux().GetSecurityContext()
	if sec.GetRunAsGroup() != nil && sec.GetRunAsUser() == nil {
		return invalid("config.linux.security_context.run_as_group", "needs run_as_user")
	}
	if err := validateIDs("config.linux.security_context", sec.GetRunAsUser(), sec.GetRunAsGroup(), sec.GetSupplementalGroups()); err != nil {
		return err
	}
	// run_as_user, run_as_group, supplemental_groups, seccomp and readonly_rootfs speak of a pause process, which
	// a pod of crivm does not have; nothing is left that they could change.
	if err := validateConfinement("config.linux.security_context", sec.GetSelinuxOptions(), sec.GetApparmor(), ""); err != nil {
		return err
	}
	return validateNamespaces("config.linux.security_context.namespace_options", sec.GetNamespaceOptions(), false)
}

func validateNamespaces(field string, o *cri.NamespaceOption, container bool) error {
	const hostWay = "a pod in a VM cannot share it with the host; run such a pod with another runtime handler"
	switch {
	case o.GetNetwork() == cri.NamespaceMode_NODE:
		return unsupported(field+".network", "NODE: "+hostWay)
	case o.GetPid() == cri.NamespaceMode_NODE:
		return unsupported(field+".pid", "NODE: "+hostWay)
	case o.GetIpc() == cri.NamespaceMode_NODE:
		return unsupported(field+".ipc", "NODE: "+hostWay)
	case o.GetNetwork() != cri.NamespaceMode_POD:
		return invalid(field+".network", "%s is not a mode of a network", o.GetNetwork())
	case o.GetIpc() != cri.NamespaceMode_POD:
		return invalid(field+".ipc", "%s is not a mode of IPC", o.GetIpc())
	case o.GetPid() == cri.NamespaceMode_TARGET && (!container || o.GetTargetId() == ""):
		return invalid(field+".pid", "TARGET needs target_id and is for containers")
	case o.GetPid() != cri.NamespaceMode_TARGET && o.GetTargetId() != "":
		return invalid(field+".target_id", "is for pid TARGET only, not %s", o.GetPid())
	}
	return validateUserNamespace(field+".userns_options", o.GetUsernsOptions())
}

// validateConfinement refuses what needs the host's security module inside a guest that has its own kernel.
func validateConfinement(field string, selinux *cri.SELinuxOption, apparmor *cri.SecurityProfile, deprecated string) error {
	if selinux.GetUser() != "" || selinux.GetRole() != "" || selinux.GetType() != "" || selinux.GetLevel() != "" {
		return unsupported(field+".selinux_options", "the guest kernel has no SELinux")
	}
	if apparmor.GetProfileType() == cri.SecurityProfile_Localhost {
		return unsupported(field+".apparmor", "the guest kernel has no AppArmor, so profile %q cannot be enforced", apparmor.GetLocalhostRef())
	}
	if deprecated != "" && deprecated != "runtime/default" && deprecated != "unconfined" {
		return unsupported(field+".apparmor_profile", "the guest kernel has no AppArmor, so profile %q cannot be enforced", deprecated)
	}
	return nil
}

func validateContainer(config *cri.ContainerConfig, pod *cri.PodSandboxConfig) error {
	sec := config.GetLinux().GetSecurityContext()
	switch {
	case !nameForm.MatchString(config.GetMetadata().GetName()):
		return invalid("config.metadata.name", "%q is not a container name", config.GetMetadata().GetName())
	case config.GetImage().GetImage() == "" && config.GetImage().GetImageRef() == "":
		return invalid("config.image.image", "is missing")
	case config.GetWindows() != nil:
		return unsupported("config.windows", "crivm runs Linux containers only")
	case len(config.GetCDIDevices()) > 0:
		return unsupported("config.CDI_devices", "CDI devices are not supported yet (%s)", config.GetCDIDevices()[0].GetName())
	case config.GetLogPath() != "" && (filepath.IsAbs(config.GetLogPath()) || !filepath.IsLocal(config.GetLogPath())):
		return invalid("config.log_path", "%q is not relative to the log directory", config.GetLogPath())
	case config.GetLogPath() != "" && pod.GetLogDirectory() == "":
		return invalid("config.log_path", "is given, but the sandbox has no log_directory")
	case config.GetWorkingDir() != "" && !filepath.IsAbs(config.GetWorkingDir()):
		return invalid("config.working_dir", "%q is not absolute", config.GetWorkingDir())
	case sec.GetRunAsGroup() != nil && sec.GetRunAsUser() == nil && sec.GetRunAsUsername() == "":
		return invalid("config.linux.security_context.run_as_group", "needs run_as_user or run_as_username")
	case sec.GetRunAsUser() != nil && sec.GetRunAsUsername() != "":
		return invalid("config.linux.security_context.run_as_username", "is given, and run_as_user as well")
	case sec.GetPrivileged() && !pod.GetLinux().GetSecurityContext().GetPrivileged():
		return invalid("config.linux.security_context.privileged", "the sandbox is not privileged")
	case config.GetStdinOnce() && !config.GetStdin():
		return invalid("config.stdin_once", "needs stdin")
	}
	if err := validateForm("config", config); err != nil {
		return err
	}
	if err := validateIDs("config.linux.security_context", sec.GetRunAsUser(), sec.GetRunAsGroup(), sec.GetSupplementalGroups()); err != nil {
		return err
	}
	if err := validatePaths("config.linux.security_context.masked_paths", sec.GetMaskedPaths()); err != nil {
		return err
	}
	if err := validatePaths("config.linux.security_context.readonly_paths", sec.GetReadonlyPaths()); err != nil {
		return err
	}
	for _, e := range config.GetEnvs() {
		if e.GetKey() == "" || strings.ContainsAny(e.GetKey(), "=\x00") || strings.Contains(string(e.GetValue()), "\x00") {
			return invalid("config.envs", "%q is not a variable", e.GetKey())
		}
	}
	if err := validateDevices(config.GetDevices()); err != nil {
		return err
	}
	if err := validateResources("config.linux.resources", config.GetLinux().GetResources()); err != nil {
		return err
	}
	//lint:ignore SA1019 older kubelets fill nothing else
	if err := validateConfinement("config.linux.security_context", sec.GetSelinuxOptions(), sec.GetApparmor(), sec.GetApparmorProfile()); err != nil {
		return err
	}
	if err := validateNamespaces("config.linux.security_context.namespace_options", sec.GetNamespaceOptions(), true); err != nil {
		return err
	}
	return validateUserNamespaceOf(config, pod)
}
