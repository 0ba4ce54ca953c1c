package node

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// Subnets of the default network.
const (
	SubnetIPv4 = "10.123.0.0/16"
	SubnetIPv6 = "fd00:c41b::/64"
)

func (n *Node) configPath() string { return filepath.Join(n.Dir, "config.toml") }

func (n *Node) state(name string) string { return filepath.Join(n.Dir, "state", name) }

// writeConfig writes all files that the node's crivm reads.
func (n *Node) writeConfig() error {
	network := n.CNI
	if network == "" {
		network = fmt.Sprintf(`{"cniVersion": "1.0.0", "name": "test", "plugins": [
  {"type": "bridge", "bridge": "crivm0", "isGateway": true, "ipMasq": false, "hairpinMode": true,
   "ipam": {"type": "host-local", "dataDir": %q, "ranges": [[{"subnet": %q}], [{"subnet": %q}]],
            "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]}},
  {"type": "portmap", "capabilities": {"portMappings": true}, "snat": true}]}
`, n.state("ipam"), SubnetIPv4, SubnetIPv6)
	}
	mirrors := ""
	if n.Registry != "" {
		mirrors = `unqualified-search-registries = ["docker.io"]
short-name-mode = "permissive"
`
		for _, name := range []string{"docker.io", "registry.k8s.io", "gcr.io", "k8s.gcr.io", "public.ecr.aws"} {
			mirrors += fmt.Sprintf("[[registry]]\nprefix = %[1]q\nlocation = %[1]q\n[[registry.mirror]]\nlocation = %[2]q\ninsecure = true\n", name, n.Registry+"/"+name)
		}
		mirrors += fmt.Sprintf("[[registry]]\nlocation = %q\ninsecure = true\n", n.Registry)
	}
	config := fmt.Sprintf(`socket = %[1]q
state_dir = %[2]q
run_dir = %[3]q

[log]
level = "debug"

[cri]
cgroup_driver = "cgroupfs"
cgroup_parent = %[4]q

[image]
registries_conf = %[5]q
registries_conf_dir = %[6]q
signature_policy = %[7]q

[cni]
conf_dir = %[8]q
bin_dirs = [%[9]q]

[vm]
kernel = %[10]q
initramfs = %[11]q
memory = "256MiB"
scratch_size = "1GiB"
boot_timeout = "230s"
`, strings.TrimPrefix(n.Socket, "unix://"), n.state(""), n.RunDir, CgroupParent, filepath.Join(n.Dir, "registries.conf"), filepath.Join(n.Dir, "registries.conf.d"),
		filepath.Join(n.Dir, "policy.json"), filepath.Join(n.Dir, "net.d"), filepath.Join(n.Build, "bin/cni"),
		filepath.Join(n.Guest, "vmlinux"), filepath.Join(n.Guest, "initramfs"))
	files := map[string]string{
		"config.toml":            config,
		"conf.d/50-test.toml":    n.Config,
		"registries.conf":        mirrors,
		"policy.json":            `{"default": [{"type": "insecureAcceptAnything"}]}` + "\n",
		"net.d/10-test.conflist": network,
	}
	for name, content := range files {
		path := filepath.Join(n.Dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o711); err != nil {
			return err
		}
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			return err
		}
	}
	return os.MkdirAll(filepath.Join(n.Dir, "registries.conf.d"), 0o755)
}
