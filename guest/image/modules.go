package image

import (
	"bytes"
	"debug/elf"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/crivm/crivm/agentproto"
)

// bootModules are loaded before the agent opens its transport, in this order: the PCI transport of all
// virtio devices, then both ways to the host.
var bootModules = []string{"virtio_pci", "virtio_console", "vmw_vsock_virtio_transport"}

// neededModules are without which no pod runs; each is a module or built into the kernel.
var neededModules = []string{
	"virtio_blk", "virtio_net", "vsock", "virtio_balloon", "virtio_mem",
	"ext4", "erofs", "overlay", "fuse", "virtiofs",
	"af_packet", "ipv6",
}

// usefulModules are taken when the kernel has them: devices, and what programs in containers ask
// the kernel for (bridges and tunnels, iptables in both kinds, ss(8)).
var usefulModules = []string{
	"virtio_rng", "pvpanic_pci",
	"bridge", "tun", "veth", "dummy", "macvlan", "8021q", "vxlan", "loop",
	"inet_diag", "tcp_diag", "udp_diag", "unix_diag",
	"ip_tables", "iptable_filter", "iptable_nat", "iptable_mangle", "iptable_raw",
	"ip6_tables", "ip6table_filter", "ip6table_nat", "ip6table_mangle", "ip6table_raw",
	"ipt_REJECT", "ip6t_REJECT",
	"xt_MASQUERADE", "xt_REDIRECT", "xt_addrtype", "xt_comment", "xt_conntrack", "xt_limit", "xt_mark",
	"xt_multiport", "xt_nat", "xt_owner", "xt_state", "xt_statistic", "xt_tcpudp", "xt_TPROXY", "xt_socket",
	"nf_tables", "nft_compat", "nft_chain_nat", "nft_ct", "nft_limit", "nft_log", "nft_masq", "nft_nat",
	"nft_redir", "nft_reject_inet", "nft_reject_ipv4", "nft_reject_ipv6", "nft_fib_inet",
}

const maxModule = 64 << 20 // decompressed

// moduleSet is a modules directory of one kernel.
type moduleSet struct {
	dir     string
	release string
	files   map[string]string // name → path below dir
	builtin map[string]bool
	read    map[string]*module // what was read so far
}

type module struct {
	path    string // in the guest
	content []byte
	depends []string // direct ones
	wants   []string // "softdep pre": loaded before when they are there
}

// modulesBeside finds the modules of a kernel in KERNELDIR/../lib/modules, which for /boot is
// /lib/modules and for an unpacked package its own.
func modulesBeside(kernel, release string) (string, error) {
	if release == "" {
		return "", fmt.Errorf("kernel %s does not tell its release: name its modules directory: %w", kernel, errdefs.ErrInvalidArgument)
	}
	tried := []string{
		filepath.Join(filepath.Dir(kernel), "..", "lib", "modules", release),
		filepath.Join("/lib/modules", release),
	}
	for _, dir := range tried {
		if info, err := os.Stat(dir); err == nil && info.IsDir() {
			return dir, nil
		}
	}
	return "", fmt.Errorf("modules of kernel %s (release %s) are not in %s: %w", kernel, release, strings.Join(tried, " or "), errdefs.ErrNotFound)
}

// openModules lists a modules directory. release is the kernel's, "" when not known.
func openModules(dir, release string) (*moduleSet, error) {
	s := &moduleSet{dir: dir, release: release, files: map[string]string{}, builtin: map[string]bool{}, read: map[string]*module{}}
	builtin, err := os.ReadFile(filepath.Join(dir, "modules.builtin"))
	if err != nil {
		return nil, fmt.Errorf("modules directory %s: its list of built-in modules: %w", dir, missing(err))
	}
	for line := range strings.Lines(string(builtin)) {
		if name := moduleName(path.Base(strings.TrimSpace(line))); name != "" {
			s.builtin[name] = true
		}
	}
	err = filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name := moduleName(d.Name())
		if name == "" || !d.Type().IsRegular() {
			return nil
		}
		rel, err := filepath.Rel(dir, p)
		if err != nil {
			return err
		}
		if old, ok := s.files[name]; !ok || modulePrecedence(rel) < modulePrecedence(old) {
			s.files[name] = rel
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("modules directory %s: %w", dir, missing(err))
	}
	if len(s.files) == 0 {
		return nil, fmt.Errorf("modules directory %s has no modules: %w", dir, errdefs.ErrNotFound)
	}
	return s, nil
}

// modulePrecedence orders files of one name: depmod(8) lets "updates" and "extra" win.
func modulePrecedence(rel string) int {
	switch top, _, _ := strings.Cut(filepath.ToSlash(rel), "/"); top {
	case "updates":
		return 0
	case "extra":
		return 1
	}
	return 2
}

// addTo puts all modules that are wanted with their dependencies into the archive and the manifest.
func (s *moduleSet) addTo(a *archive, d *Description) error {
	inBoot := map[string]bool{}
	for _, name := range bootModules {
		order, err := s.loadOrder(name)
		if err != nil {
			return err
		}
		for _, n := range order {
			if !inBoot[n] {
				inBoot[n] = true
				d.Boot = append(d.Boot, n)
			}
		}
	}
	wanted := slices.Concat(bootModules, neededModules)
	for _, name := range usefulModules {
		if s.files[name] == "" && !s.builtin[name] {
			d.MissingModules = append(d.MissingModules, name)
			continue
		}
		wanted = append(wanted, name)
	}
	for _, name := range wanted {
		order, err := s.loadOrder(name)
		if err != nil {
			return err
		}
		for _, n := range order {
			deps, err := s.loadOrder(n)
			if err != nil {
				return err
			}
			m := s.read[n]
			a.addFile(m.path, 0o644, m.content)
			d.Modules[n] = agentproto.Module{Path: m.path, Deps: deps[:len(deps)-1]}
		}
	}
	if d.Kernel == "" {
		d.Kernel = s.release
	}
	return nil
}

// loadOrder lists a module and all that has to be loaded before it, dependencies first and the module last.
// It is empty for a built-in module.
func (s *moduleSet) loadOrder(name string) ([]string, error) {
	var order []string
	const visiting, done = 1, 2
	state := map[string]int{}
	var visit func(name string) error
	visit = func(name string) error {
		switch {
		case s.builtin[name] && s.files[name] == "", state[name] == done:
			return nil
		case state[name] == visiting:
			return fmt.Errorf("kernel module %s depends on itself: %w", name, errdefs.ErrInvalidArgument)
		}
		state[name] = visiting
		m, err := s.module(name)
		if err != nil {
			return err
		}
		for _, dep := range m.wants {
			if s.files[dep] != "" && state[dep] != visiting {
				if err := visit(dep); err != nil {
					return fmt.Errorf("wanted by %s: %w", name, err)
				}
			}
		}
		for _, dep := range m.depends {
			if err := visit(dep); err != nil {
				return fmt.Errorf("needed by %s: %w", name, err)
			}
		}
		state[name] = done
		order = append(order, name)
		return nil
	}
	return order, visit(name)
}

// module reads a module's file and what it says about itself.
func (s *moduleSet) module(name string) (*module, error) {
	if m, ok := s.read[name]; ok {
		return m, nil
	}
	rel, ok := s.files[name]
	if !ok {
		return nil, fmt.Errorf("kernel module %s is neither in %s nor built in: %w", name, s.dir, errdefs.ErrNotFound)
	}
	content, err := os.ReadFile(filepath.Join(s.dir, rel))
	if err != nil {
		return nil, missing(err)
	}
	if !strings.HasSuffix(rel, ".ko") {
		if content, err = decompress(content, maxModule); err != nil {
			return nil, fmt.Errorf("kernel module %s: %w", rel, err)
		}
		rel = strings.TrimSuffix(rel, filepath.Ext(rel))
	}
	info, err := modinfo(content)
	if err != nil {
		return nil, fmt.Errorf("kernel module %s: %w", rel, err)
	}
	m := &module{content: content}
	for _, field := range info {
		key, value, _ := strings.Cut(field, "=")
		switch key {
		case "depends":
			for dep := range strings.SplitSeq(value, ",") {
				if dep != "" {
					m.depends = append(m.depends, strings.ReplaceAll(dep, "-", "_"))
				}
			}
		case "softdep":
			m.wants = append(m.wants, softDependencies(value)...)
		case "vermagic":
			release, _, _ := strings.Cut(value, " ")
			if s.release == "" {
				s.release = release
			}
			if release != s.release {
				return nil, fmt.Errorf("kernel module %s is for kernel %s, not for %s: %w", rel, release, s.release, errdefs.ErrInvalidArgument)
			}
		}
	}
	m.path = path.Join("/lib/modules", s.release, filepath.ToSlash(rel))
	s.read[name] = m
	return m, nil
}

// softDependencies takes the names after "pre:" in modprobe.d(5)'s "softdep" value.
func softDependencies(value string) []string {
	var names []string
	pre := false
	for _, word := range strings.Fields(value) {
		switch word {
		case "pre:":
			pre = true
		case "post:":
			pre = false
		default:
			if pre {
				names = append(names, strings.ReplaceAll(word, "-", "_"))
			}
		}
	}
	return names
}

// modinfo gives the "key=value" strings of a module's .modinfo section.
func modinfo(content []byte) ([]string, error) {
	file, err := elf.NewFile(bytes.NewReader(content))
	if err != nil {
		return nil, fmt.Errorf("not an ELF file: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	section := file.Section(".modinfo")
	if section == nil {
		return nil, fmt.Errorf("no .modinfo section: %w", errdefs.ErrInvalidArgument)
	}
	raw, err := section.Data()
	if err != nil {
		return nil, fmt.Errorf(".modinfo section: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	return strings.FieldsFunc(string(raw), func(r rune) bool { return r == 0 }), nil
}
