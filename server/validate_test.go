package server

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestValidateSandboxRefuses(t *testing.T) {
	for name, c := range map[string]struct {
		change func(*cri.PodSandboxConfig)
		text   string // "" accepts
	}{
		"nothing":               {func(*cri.PodSandboxConfig) {}, ""},
		"a zero byte":           {func(c *cri.PodSandboxConfig) { c.Labels = map[string]string{"a": "b\x00"} }, "config.labels"},
		"an unknown protocol":   {func(c *cri.PodSandboxConfig) { c.PortMappings = []*cri.PortMapping{{Protocol: 7}} }, "config.port_mappings[0].protocol"},
		"a host IP":             {func(c *cri.PodSandboxConfig) { c.PortMappings = []*cri.PortMapping{{HostIp: "localhost"}} }, "config.port_mappings.host_ip"},
		"IPv6 as host IP":       {func(c *cri.PodSandboxConfig) { c.PortMappings = []*cri.PortMapping{{HostIp: "::1"}} }, ""},
		"a sysctl of two lines": {func(c *cri.PodSandboxConfig) { c.Linux.Sysctls = map[string]string{"kernel.x": "1\n2"} }, "config.linux.sysctls"},
		"a negative user": {func(c *cri.PodSandboxConfig) {
			c.Linux.SecurityContext.RunAsUser = &cri.Int64Value{Value: -1}
		}, "config.linux.security_context.run_as_user"},
		"an unknown policy": {func(c *cri.PodSandboxConfig) { c.Linux.SecurityContext.SupplementalGroupsPolicy = 9 }, "supplemental_groups_policy"},
		"a period":          {func(c *cri.PodSandboxConfig) { c.Linux.Resources = &cri.LinuxContainerResources{CpuPeriod: 1} }, "config.linux.resources.cpu_period"},
		"what kubelet sends": {func(c *cri.PodSandboxConfig) {
			c.Linux.Resources = &cri.LinuxContainerResources{
				CpuPeriod: 100000, CpuQuota: -1001, CpuShares: 2, MemoryLimitInBytes: 9223372036837994496, Unified: map[string]string{"memory.oom.group": "1"},
				HugepageLimits: []*cri.HugepageLimit{{PageSize: "2MB"}, {PageSize: "1GB"}},
			}
		}, ""},
	} {
		config := &cri.PodSandboxConfig{
			Metadata: &cri.PodSandboxMetadata{Name: "a", Namespace: "b", Uid: "c"},
			Linux:    &cri.LinuxPodSandboxConfig{SecurityContext: &cri.LinuxSandboxSecurityContext{}},
		}
		c.change(config)
		checkRefusal(t, name, validateSandbox(config), c.text)
	}
}

func TestValidateContainerRefuses(t *testing.T) {
	sec := func(change func(*cri.LinuxContainerSecurityContext)) func(*cri.ContainerConfig) {
		return func(c *cri.ContainerConfig) { change(c.Linux.SecurityContext) }
	}
	resources := func(r *cri.LinuxContainerResources) func(*cri.ContainerConfig) {
		return func(c *cri.ContainerConfig) { c.Linux.Resources = r }
	}
	for name, c := range map[string]struct {
		change func(*cri.ContainerConfig)
		text   string // "" accepts
	}{
		"nothing":                    {func(*cri.ContainerConfig) {}, ""},
		"a zero byte in an argument": {func(c *cri.ContainerConfig) { c.Args = []string{"a", "b\x00c"} }, "config.args[1]"},
		"an unknown signal":          {func(c *cri.ContainerConfig) { c.StopSignal = 1000 }, "config.stop_signal"},
		"an unknown propagation":     {func(c *cri.ContainerConfig) { c.Mounts = []*cri.Mount{{Propagation: 9}} }, "config.mounts[0].propagation"},
		"a group beyond 32 bits":     {sec(func(s *cri.LinuxContainerSecurityContext) { s.SupplementalGroups = []int64{1, 1 << 32} }), "supplemental_groups"},
		"a negative group":           {sec(func(s *cri.LinuxContainerSecurityContext) { s.SupplementalGroups = []int64{-1} }), "supplemental_groups"},
		"the highest group":          {sec(func(s *cri.LinuxContainerSecurityContext) { s.SupplementalGroups = []int64{0, 1<<32 - 2} }), ""},
		"a user beyond 32 bits":      {sec(func(s *cri.LinuxContainerSecurityContext) { s.RunAsUser = &cri.Int64Value{Value: 1<<32 - 1} }), "run_as_user"},
		"a user by both":             {sec(func(s *cri.LinuxContainerSecurityContext) { s.RunAsUser, s.RunAsUsername = &cri.Int64Value{}, "x" }), "run_as_username"},
		"a relative masked path":     {sec(func(s *cri.LinuxContainerSecurityContext) { s.MaskedPaths = []string{"proc/x"} }), "masked_paths"},
		"a relative read-only path":  {sec(func(s *cri.LinuxContainerSecurityContext) { s.ReadonlyPaths = []string{"x"} }), "readonly_paths"},
		"a target without TARGET": {sec(func(s *cri.LinuxContainerSecurityContext) {
			s.NamespaceOptions = &cri.NamespaceOption{Pid: cri.NamespaceMode_CONTAINER, TargetId: "x"}
		}), "target_id"},
		"TARGET without a target": {sec(func(s *cri.LinuxContainerSecurityContext) {
			s.NamespaceOptions = &cri.NamespaceOption{Pid: cri.NamespaceMode_TARGET}
		}), "namespace_options.pid"},
		"a target": {sec(func(s *cri.LinuxContainerSecurityContext) {
			s.NamespaceOptions = &cri.NamespaceOption{Pid: cri.NamespaceMode_TARGET, TargetId: "x"}
		}), ""},
		"a small quota":                   {resources(&cri.LinuxContainerResources{CpuQuota: 999}), "cpu_quota"},
		"negative shares":                 {resources(&cri.LinuxContainerResources{CpuShares: -1}), "cpu_shares"},
		"an oom_score_adj":                {resources(&cri.LinuxContainerResources{OomScoreAdj: 1001}), "oom_score_adj"},
		"CPUs that are none":              {resources(&cri.LinuxContainerResources{CpusetCpus: "0-x"}), "cpuset_cpus"},
		"nodes that are none":             {resources(&cri.LinuxContainerResources{CpusetMems: "-1"}), "cpuset_mems"},
		"CPUs":                            {resources(&cri.LinuxContainerResources{CpusetCpus: "0-2,7", CpusetMems: "0"}), ""},
		"the guest's CPUs":                {resources(&cri.LinuxContainerResources{Unified: map[string]string{"cpuset.cpus": "0"}}), "unified"},
		"no cgroup file":                  {resources(&cri.LinuxContainerResources{Unified: map[string]string{"memory.max/../../cgroup.kill": "1"}}), "unified"},
		"an empty value":                  {resources(&cri.LinuxContainerResources{Unified: map[string]string{"memory.max": ""}}), "unified"},
		"files of the cgroup":             {resources(&cri.LinuxContainerResources{Unified: map[string]string{"memory.high": "max", "io.bfq.weight": "5", "hugetlb.2MB.max": "0"}}), ""},
		"swap up to the limit":            {resources(&cri.LinuxContainerResources{MemoryLimitInBytes: 5, MemorySwapLimitInBytes: 5}), ""},
		"swap without a limit":            {resources(&cri.LinuxContainerResources{MemorySwapLimitInBytes: 5}), "memory_swap_limit_in_bytes"},
		"privileged in a pod that is not": {sec(func(s *cri.LinuxContainerSecurityContext) { s.Privileged = true }), "privileged"},
	} {
		config := &cri.ContainerConfig{
			Metadata: &cri.ContainerMetadata{Name: "c"}, Image: &cri.ImageSpec{Image: "image"},
			Linux: &cri.LinuxContainerConfig{SecurityContext: &cri.LinuxContainerSecurityContext{}},
		}
		c.change(config)
		checkRefusal(t, name, validateContainer(config, &cri.PodSandboxConfig{}), c.text)
	}
}

func checkRefusal(t *testing.T, name string, err error, text string) {
	t.Helper()
	switch {
	case text == "" && err != nil:
		t.Errorf("%s: %v", name, err)
	case text != "" && (err == nil || !strings.Contains(err.Error(), text+":") || !errdefs.IsInvalidArgument(err) && !errdefs.IsNotImplemented(err)):
		t.Errorf("%s: error is %v; want one that names %s", name, err, text)
	}
}

func TestIgnoredAloud(t *testing.T) {
	var out bytes.Buffer
	s := &Server{log: slog.New(slog.NewTextHandler(&out, nil)), opts: Options{Handlers: map[string]Handler{"": {}, "big": {}}}}
	for range 3 {
		s.tellIgnored(&cri.ContainerConfig{Mounts: []*cri.Mount{{ContainerPath: "/x"}, {ContainerPath: "/y", SelinuxRelabel: true}}})
	}
	if n := strings.Count(out.String(), "selinux_relabel"); n != 1 || !strings.Contains(out.String(), "/y") {
		t.Errorf("log is %q", out.String())
	}
	for handler, ok := range map[string]bool{"": true, "big": true, "other": false} {
		if err := s.validateImage("config.image", &cri.ImageSpec{RuntimeHandler: handler}); (err == nil) != ok {
			t.Errorf("image for handler %q: %v", handler, err)
		}
	}
}
