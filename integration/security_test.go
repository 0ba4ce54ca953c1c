//go:build integration

package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// TestConfiguration runs one pod and, for each field, a container that shows what the field does.
func TestConfiguration(t *testing.T) {
	dir := t.TempDir()
	profile := filepath.Join(dir, "deny-mkdir.json")
	if err := os.WriteFile(profile, []byte(`{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO"}]}`), 0o644); err != nil {
		t.Fatal(err)
	}
	volume := filepath.Join(dir, "volume")
	if err := os.MkdirAll(filepath.Join(volume, "..data_1"), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, err := range []error{
		os.WriteFile(filepath.Join(volume, "..data_1", "key"), []byte("value"), 0o440), os.Symlink("..data_1", filepath.Join(volume, "..data")),
		os.Symlink("..data/key", filepath.Join(volume, "key")), os.WriteFile(filepath.Join(dir, "hosts"), []byte("192.0.2.1 given\n"), 0o644),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	p := runPod(t, shared, func(c *cri.PodSandboxConfig) {
		c.DnsConfig = &cri.DNSConfig{Servers: []string{"192.0.2.53"}, Searches: []string{"example.test"}, Options: []string{"ndots:5"}}
		c.Linux.Sysctls = map[string]string{"kernel.shm_rmid_forced": "1", "net.ipv4.ip_local_port_range": "1024 65000"}
		c.Linux.SecurityContext.Privileged = true
	})
	sec := func(f func(*cri.LinuxContainerSecurityContext)) func(*cri.ContainerConfig) {
		return func(c *cri.ContainerConfig) { f(c.Linux.SecurityContext) }
	}
	for _, test := range []struct {
		name, script string
		change       func(*cri.ContainerConfig)
		want         string // in the output; "!text" must not be in it
	}{
		{"args follow the command", "", func(c *cri.ContainerConfig) { c.Command, c.Args = []string{"echo"}, []string{"a", "b"} }, "a b"},
		{"environment", "echo $ONE $HOSTNAME", func(c *cri.ContainerConfig) { c.Envs = []*cri.KeyValue{{Key: "ONE", Value: []byte("1")}} }, "1 pod"},
		{"working directory", "pwd", func(c *cri.ContainerConfig) { c.WorkingDir = "/made/on/the/way" }, "/made/on/the/way"},
		{"DNS", "cat /etc/resolv.conf", nil, "search example.test\nnameserver 192.0.2.53\noptions ndots:5\n"},
		{"sysctl", "cat /proc/sys/kernel/shm_rmid_forced /proc/sys/net/ipv4/ip_local_port_range", nil, "1\n1024\t65000"},
		{"hosts of its own", "cat /etc/hosts", nil, "localhost"},
		{"hosts given", "cat /etc/hosts", func(c *cri.ContainerConfig) {
			c.Mounts = []*cri.Mount{{ContainerPath: "/etc/hosts", HostPath: filepath.Join(dir, "hosts")}}
		}, "192.0.2.1 given"},
		{"small volume", "cat /v/key; readlink /v/..data; touch /v/x", func(c *cri.ContainerConfig) {
			c.Mounts = []*cri.Mount{{ContainerPath: "/v", HostPath: volume, Readonly: true}}
		}, "value..data_1\ntouch: /v/x: Read-only file system"},
		{"shared memory", "df /dev/shm | tail -n 1", nil, "65536"},
		{"user and group", "id", sec(func(s *cri.LinuxContainerSecurityContext) {
			s.RunAsUser, s.RunAsGroup, s.SupplementalGroups = &cri.Int64Value{Value: 1234}, &cri.Int64Value{Value: 2345}, []int64{3456}
		}), "uid=1234 gid=2345 groups=2345,3456"},
		{"user by name", "id -u", sec(func(s *cri.LinuxContainerSecurityContext) { s.RunAsUsername = "www-data" }), "33"},
		{"default capabilities", "grep CapEff /proc/self/status", nil, "00000000a80425fb"},
		{"capabilities", "grep CapEff /proc/self/status", sec(func(s *cri.LinuxContainerSecurityContext) {
			s.Capabilities = &cri.Capability{AddCapabilities: []string{"NET_ADMIN"}, DropCapabilities: []string{"ALL"}}
		}), "0000000000001000"},
		{"privileged", "grep CapEff /proc/self/status; grep Seccomp: /proc/self/status", sec(func(s *cri.LinuxContainerSecurityContext) {
			s.Privileged = true
			s.Seccomp = &cri.SecurityProfile{ProfileType: cri.SecurityProfile_RuntimeDefault}
		}), "000001ffffffffff\nSeccomp:\t0"},
		{"seccomp default", "grep Seccomp: /proc/self/status", sec(func(s *cri.LinuxContainerSecurityContext) {
			s.Seccomp = &cri.SecurityProfile{ProfileType: cri.SecurityProfile_RuntimeDefault}
		}), "Seccomp:\t2"},
		{"seccomp unconfined", "grep Seccomp: /proc/self/status", nil, "Seccomp:\t0"},
		{"seccomp of its own", "mkdir /tmp/x", sec(func(s *cri.LinuxContainerSecurityContext) {
			s.Seccomp = &cri.SecurityProfile{ProfileType: cri.SecurityProfile_Localhost, LocalhostRef: profile}
		}), "Operation not permitted"},
		{"no new privileges", "grep NoNewPrivs /proc/self/status", sec(func(s *cri.LinuxContainerSecurityContext) { s.NoNewPrivs = true }), "NoNewPrivs:\t1"},
		{"read-only root", "touch /x", sec(func(s *cri.LinuxContainerSecurityContext) { s.ReadonlyRootfs = true }), "Read-only file system"},
		{"writable root", "touch /x && echo fine", nil, "fine"},
		{"masked path", "cat /proc/uptime | wc -c; ls /sys/firmware | wc -l", sec(func(s *cri.LinuxContainerSecurityContext) {
			s.MaskedPaths = []string{"/proc/uptime", "/sys/firmware"}
		}), "0\n0\n"},
		{"read-only path", "echo 1 > /proc/sys/net/ipv4/ip_forward", sec(func(s *cri.LinuxContainerSecurityContext) {
			s.ReadonlyPaths = []string{"/proc/sys"}
		}), "Read-only file system"},
		{"limits", "cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/cpu.max /sys/fs/cgroup/pids.max", func(c *cri.ContainerConfig) {
			c.Linux.Resources = &cri.LinuxContainerResources{
				MemoryLimitInBytes: 64 << 20, CpuQuota: 50_000, CpuPeriod: 100_000, CpuShares: 512, Unified: map[string]string{"pids.max": "77"},
			}
		}, "67108864\n50000 100000\n77\n"},
		{"init process of its own PID namespace", "echo $$", nil, "1\n"},
	} {
		t.Run(test.name, func(t *testing.T) {
			_, out := p.run(test.script, func(c *cri.ContainerConfig) {
				if test.change != nil {
					test.change(c)
				}
			})
			if !strings.Contains(out, test.want) {
				t.Errorf("output is %q, want %q in it", out, test.want)
			}
		})
	}
}

func TestUserInStatus(t *testing.T) {
	p := runPod(t, shared)
	c := p.start("sleep 1000", func(c *cri.ContainerConfig) {
		c.Linux.SecurityContext.RunAsUser = &cri.Int64Value{Value: 33}
		c.Linux.SecurityContext.SupplementalGroups = []int64{4567}
	})
	resp, err := shared.Runtime.ContainerStatus(t.Context(), c, false)
	if err != nil {
		t.Fatal(err)
	}
	if u := resp.Status.User.GetLinux(); u.GetUid() != 33 || u.GetGid() != 33 || !strings.Contains(fmt.Sprint(u.GetSupplementalGroups()), "4567") {
		t.Errorf("user in status is %v", u)
	}
}
