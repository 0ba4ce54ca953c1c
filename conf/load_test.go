package conf

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
)

// TestErrors gives, for every kind of mistake, the messages wanted: all of them, in order, and no other. A
// message is "line: key: " and part of the text.
func TestErrors(t *testing.T) {
	long := strings.Repeat("x", 120)
	for name, test := range map[string]struct {
		text string
		want []string
	}{
		"unknown key":                 {"\nsockets = \"/x\"", []string{"2: sockets: unknown key"}},
		"unknown key in a table":      {"[vm]\nmemroy = \"1GiB\"", []string{"2: vm.memroy: unknown key"}},
		"unknown dotted key":          {"vm.memroy = \"1GiB\"", []string{"1: vm.memroy: unknown key"}},
		"unknown key, inline":         {"\nvm = {memroy = 1, vcpus = \"2\"}", []string{"2: vm.memroy: unknown key", "2: vm.vcpus: takes an integer, not a string"}},
		"unknown key of a handler":    {"[handlers.big]\nvcpus = 2\ncpus = 2", []string{"3: handlers.big.cpus: unknown key"}},
		"unknown table, once":         {"[vmm]\na = 1\nb = 2\n[log]\nlevel = 3", []string{"1: vmm: unknown table", "5: log.level: takes a string, not an integer"}},
		"unknown table of a table":    {"[vm.disk]", []string{"1: vm.disk: unknown table"}},
		"table of a handler":          {"[handlers.big.disk]", []string{"1: handlers.big.disk: unknown table"}},
		"key below a key":             {"log.level.x = 1", []string{"1: log.level.x: unknown key"}},
		"quoted key":                  {"\"sock et\" = 1", []string{`1: "sock et": unknown key`}},
		"escaped key":                 {`"\u0073ocket" = 1`, []string{"1: socket: takes a string"}},
		"table for a key":             {"[log.level]\nx = 1", []string{"1: log.level: is not a table; it takes a string"}},
		"inline table for a key":      {"socket = {}", []string{"1: socket: takes a string, not a table"}},
		"key for a table":             {"log = \"debug\"", []string{"1: log: is a table, not a key that takes a string"}},
		"key for a handler":           {"[handlers]\nbig = 1", []string{"2: handlers.big: is a table, not a key that takes an integer"}},
		"array of tables":             {"[[vm]]\nvcpus = 1", []string{"1: vm: no key takes an array of tables"}},
		"array of handlers":           {"[[handlers]]\nvcpus = 1", []string{"1: handlers: no key takes an array of tables"}},
		"string for a number":         {"[vm]\nvcpus = \"1\"", []string{"2: vm.vcpus: takes an integer, not a string"}},
		"float for a number":          {"[vm]\nvcpus = 1.5", []string{"2: vm.vcpus: takes an integer, not a float"}},
		"number for a string":         {"socket = 1", []string{"1: socket: takes a string, not an integer"}},
		"boolean for a string":        {"socket = true", []string{"1: socket: takes a string, not a boolean"}},
		"array for a string":          {"socket = []", []string{"1: socket: takes a string, not an array"}},
		"date for a string":           {"socket = 2020-01-01", []string{"1: socket: takes a string, not a date or time"}},
		"string for a boolean":        {"[cloudhypervisor]\nseccomp = \"true\"", []string{"2: cloudhypervisor.seccomp: takes true or false, not a string"}},
		"string for a list":           {"[cni]\nbin_dirs = \"/x\"", []string{"2: cni.bin_dirs: takes an array of strings, not a string"}},
		"number in a list":            {"[cni]\nbin_dirs = [\"/x\",\n 2]", []string{"2: cni.bin_dirs: element 2 takes a string, not an integer"}},
		"number for a duration":       {"[vm]\nboot_timeout = 60", []string{`2: vm.boot_timeout: takes a duration such as "30s", not an integer`}},
		"duration without unit":       {"[vm]\nboot_timeout = \"60\"", []string{`2: vm.boot_timeout: "60" is not a duration`}},
		"duration with a bad unit":    {"[vm]\nboot_timeout = \"1d\"", []string{`2: vm.boot_timeout: "1d" is not a duration`}},
		"negative duration":           {"[vm]\nboot_timeout = \"-1s\"", []string{`2: vm.boot_timeout: "-1s" is not a duration`}},
		"duration beyond":             {"[vm]\nboot_timeout = \"9999999999h\"", []string{`2: vm.boot_timeout: "9999999999h" is not a duration`}},
		"size with a bad unit":        {"[vm]\nmemory = \"512MB\"", []string{`2: vm.memory: "512MB" is not a size`}},
		"size with a fraction":        {"[vm]\nmemory = \"1.5GiB\"", []string{`2: vm.memory: "1.5GiB" is not a size`}},
		"size beyond":                 {"[vm]\nmemory = \"9999999TiB\"", []string{`2: vm.memory: "9999999TiB" is not a size`}},
		"size of a float":             {"[vm]\nmemory = 1e9", []string{`2: vm.memory: takes a size such as "512MiB", not a float`}},
		"empty size":                  {"[vm]\nmemory = \"\"", []string{`2: vm.memory: "" is not a size`}},
		"negative size":               {"[vm]\nmemory = -1", []string{"2: vm.memory: -1 is negative"}},
		"negative size, text":         {"[vm]\nmemory = \"-1GiB\"", []string{`2: vm.memory: "-1GiB" is not a size`}},
		"negative unsigned":           {"[image]\nmax_parallel_downloads = -1", []string{"2: image.max_parallel_downloads: -1 is negative"}},
		"number of more than 64 bits": {"[vm]\nvcpus = 99999999999999999999", []string{"2: vm.vcpus: 99999999999999999999 is not an integer of 64 bits"}},

		"key twice":                  {"socket = \"/a\"\n\nsocket = \"/b\"", []string{"3: socket: is already set in line 1"}},
		"key twice, dotted":          {"log.level = \"info\"\nlog.level = \"warn\"", []string{"2: log.level: is already set in line 1"}},
		"key twice, inline":          {"log = {level = \"info\", level = \"warn\"}", []string{"1: log.level: is already set in line 1"}},
		"table twice":                {"[vm]\n[log]\n[vm]", []string{"3: vm: is already set in line 1"}},
		"table after inline table":   {"vm = {}\n[vm]", []string{"2: vm: is already set in line 1"}},
		"table after dotted key":     {"vm.vcpus = 1\nlog.level = \"info\"\n\n[vm]\nmemory = \"1GiB\"", []string{"4: vm: table vm already exists"}},
		"dotted key in a table":      {"[handlers.big]\nvcpus = 1\n[handlers]\nbig.memory = \"1GiB\"", []string{"4: handlers.big.memory: cannot redefine table big"}},
		"leading zero":               {"[vm]\nvcpus = 01", []string{"2: vm.vcpus: leading zero"}},
		"no value":                   {"[vm]\nvcpus =\nmemory = 1", []string{"2: "}},
		"no end of a string":         {"[vm]\nvcpus = 2\nkernel = \"/x\nmemory = 1", []string{"3: "}},
		"no key":                     {"= 1", []string{"1: "}},
		"no end of an array":         {"[cni]\nbin_dirs = [\"/a\",", []string{"2: "}},
		"not text":                   {"socket = \"\xff\xfe\"", []string{"1: "}},
		"not TOML at all":            {"{\"socket\": \"/x\"}", []string{"1: "}},
		"errors before the syntax":   {"x = 1\nsocket = 2\n]", []string{"1: x: unknown key", "2: socket: takes a string", "3: "}},
		"no validation after syntax": {"[vm]\nmemory = 1\n]", []string{"3: "}},

		"relative socket":          {"socket = \"x\"", []string{`1: socket: "x" is not an absolute path`}},
		"empty path":               {"[cni]\nnetns_dir = \"\"", []string{`2: cni.netns_dir: "" is not an absolute path`}},
		"NUL in a path":            {"state_dir = \"/a\\u0000\"", []string{`1: state_dir: "/a\x00" is not an absolute path`}},
		"relative state_dir, once": {"state_dir = \"lib\"", []string{`1: state_dir: "lib" is not an absolute path`}},
		"long socket":              {"socket = \"/" + long + "\"", []string{"1: socket: is 121 bytes long"}},
		"long run_dir":             {"run_dir = \"/" + long[:40] + "\"", []string{"1: run_dir: is 41 bytes long; at most 40"}},
		"state in run":             {"state_dir = \"/run/crivm/state\"", []string{"1: state_dir: /run/crivm/state is within run_dir /run/crivm"}},
		"run around state":         {"run_dir = \"/var/lib\"", []string{"1: run_dir: /var/lib/crivm is within run_dir /var/lib"}},
		"level":                    {"[log]\nlevel = \"trace\"", []string{`2: log.level: "trace" is not one of debug, info, warn, error`}},
		"format":                   {"[log]\nformat = \"xml\"", []string{`2: log.format: "xml" is not one of text, json`}},
		"cgroup driver":            {"[cri]\ncgroup_driver = \"v2\"", []string{`2: cri.cgroup_driver: "v2" is not one of auto, systemd, cgroupfs`}},
		"cgroup parent":            {"[cri]\ncgroup_parent = \"/a/../b\"", []string{`2: cri.cgroup_parent: "/a/../b" is neither a cgroup`}},
		"no cgroup parent":         {"[cri]\ncgroup_parent = \"\"", []string{`2: cri.cgroup_parent: "" is neither a cgroup`}},
		"path of slices":           {"[cri]\ncgroup_parent = \"/a.slice/a-b.slice\"", []string{"2: cri.cgroup_parent: \"/a.slice/a-b.slice\" is a path of slices"}},
		"slice without systemd":    {"[cri]\ncgroup_parent = \"a.slice\"\ncgroup_driver = \"cgroupfs\"", []string{"2: cri.cgroup_parent: \"a.slice\" is a slice"}},
		"stream host":              {"[cri]\nstream_address = \"localhost:0\"", []string{`2: cri.stream_address: "localhost:0" is not an IP address and a port`}},
		"stream port":              {"[cri]\nstream_address = \"127.0.0.1:65536\"", []string{`2: cri.stream_address: "127.0.0.1:65536" is not an IP address and a port`}},
		"stream idle":              {"[cri]\nstream_idle_timeout = \"1ms\"", []string{"2: cri.stream_idle_timeout: 1ms is neither 0"}},
		"log line":                 {"[cri]\nmax_container_log_line_size = 1", []string{"2: cri.max_container_log_line_size: 1 is neither 0"}},
		"log line, large":          {"[cri]\nmax_container_log_line_size = \"1GiB\"", []string{"2: cri.max_container_log_line_size: 1GiB is neither 0"}},
		"host namespaces":          {"[cri]\nhost_namespace_pods = \"host\"", []string{`2: cri.host_namespace_pods: "host" needs the host handler, which this version does not have`}},
		"host namespaces, other":   {"[cri]\nhost_namespace_pods = \"yes\"", []string{`2: cri.host_namespace_pods: "yes" is not one of reject`}},
		"relative registries":      {"[image]\nregistries_conf = \"x\"\ncerts_dir = \"y\"", []string{`2: image.registries_conf: "x" is not`, `3: image.certs_dir: "y" is not`}},
		"roots":                    {"[image]\nroot = \"/a\"\nrun_root = \"/a/\"", []string{"3: image.run_root: /a is both"}},
		"disks in the store":       {"[image]\nroot = \"/a\"\ndisk_dir = \"/a/b\"", []string{"3: image.disk_dir: /a/b is within image.root /a"}},
		"store around the disks":   {"[image]\nroot = \"/var/lib/crivm\"", []string{"2: image.root: /var/lib/crivm/disks is within image.root /var/lib/crivm"}},
		"progress":                 {"[image]\npull_progress_timeout = \"0s\"", []string{"2: image.pull_progress_timeout: 0s is less than 1s"}},
		"downloads":                {"[image]\nmax_parallel_downloads = 0", []string{"2: image.max_parallel_downloads: 0 is not between 1 and 64"}},
		"pinned":                   {"[image]\npinned = [\"a\", \"\", \"b c\"]", []string{`2: image.pinned: "" is not`, `2: image.pinned: "b c" is not`}},
		"no plugins":               {"[cni]\nbin_dirs = []", []string{"2: cni.bin_dirs: is empty"}},
		"relative plugins":         {"[cni]\nbin_dirs = [\"bin\"]", []string{`2: cni.bin_dirs: "bin" is not an absolute path`}},
		"CNI timeouts":             {"[cni]\nadd_timeout = \"0s\"\ndel_timeout = \"1ms\"", []string{"2: cni.add_timeout: 0s is less than 1s", "3: cni.del_timeout: 1ms is less than 1s"}},
		"vmm":                      {"[vm]\nvmm = \"firecracker\"", []string{`2: vm.vmm: "firecracker" is not one of auto, cloudhypervisor, qemu`}},
		"kernel":                   {"[vm]\nkernel = \"vmlinux\"\ninitramfs = \"\"", []string{`2: vm.kernel: "vmlinux" is not`, `3: vm.initramfs: "" is not`}},
		"cmdline of two lines":     {"[vm]\ncmdline = \"a\\nb\"", []string{"2: vm.cmdline: is not one line"}},
		"long cmdline":             {"[vm]\ncmdline = \"" + strings.Repeat("x", 1025) + "\"", []string{"2: vm.cmdline: is not one line of at most 1024 bytes"}},
		"crivm's own parameter":    {"[vm]\ncmdline = \"quiet crivm.transport=x\"", []string{`2: vm.cmdline: "crivm.transport=x": parameters of crivm`}},
		"vcpus":                    {"[vm]\nvcpus = 0", []string{"2: vm.vcpus: 0 is not between 1 and 254"}},
		"many vcpus":               {"[vm]\nvcpus = 255\nmax_vcpus = 255", []string{"2: vm.vcpus: 255 is not", "3: vm.max_vcpus: 255 is neither"}},
		"max_vcpus":                {"[vm]\nmax_vcpus = 1\nvcpus = 2", []string{"2: vm.max_vcpus: max_vcpus 1 is less than vcpus 2"}},
		"negative max_vcpus":       {"[vm]\nmax_vcpus = -1", []string{"2: vm.max_vcpus: -1 is neither"}},
		"memory":                   {"[vm]\nmemory = \"64MiB\"", []string{"2: vm.memory: 64MiB is not a multiple of 2MiB of at least 128MiB"}},
		"odd memory":               {"[vm]\nmemory = 268435457", []string{"2: vm.memory: 268435457 is not a multiple of 2MiB"}},
		"max_memory":               {"[vm]\nmax_memory = \"128MiB\"", []string{"2: vm.max_memory: max_memory 128MiB is less than memory 256MiB"}},
		"memory above the maximum": {"vm.memory = \"1GiB\"\n\n[handlers.x]\nmax_memory = \"512MiB\"", []string{"4: handlers.x.max_memory: max_memory 512MiB is less than memory 1GiB"}},
		"odd max_memory":           {"[vm]\nmax_memory = \"1025MiB\"", []string{"2: vm.max_memory: 1025MiB is neither"}},
		"scratch":                  {"[vm]\nscratch_size = 0", []string{"2: vm.scratch_size: 0 is not a multiple of 4KiB between 16MiB and 16TiB"}},
		"pool":                     {"[vm]\npool_size = -1\n[pool]\nparallel_boots = 0\ncpu_weight = 0", []string{"2: vm.pool_size: -1 is not between 0 and 1000", "4: pool.parallel_boots: 0 is not between 1 and 64", "5: pool.cpu_weight: 0 is not between 1 and 10000"}},
		"health":                   {"[vm]\nhealth_timeout = \"0s\"", []string{"2: vm.health_timeout: 0s is less than 1s"}},
		"boot":                     {"[vm]\nboot_timeout = \"0s\"", []string{"2: vm.boot_timeout: 0s is less than 1s"}},
		"users of the host":        {"[vm_users]\nbase = 1000", []string{"2: vm_users.base: 1000 is not between 65536 and 4294967294"}},
		"users beyond":             {"[vm_users]\nbase = 4294967294\ncount = 2", []string{"3: vm_users.count: 2 users from 4294967294 on go beyond"}},
		"users beyond by base":     {"[vm_users]\nbase = 4294967294", []string{"2: vm_users.base: 65536 users from 4294967294 on go beyond"}},
		"negative users":           {"[vm_users]\ncount = -1", []string{"2: vm_users.count: -1 is neither"}},
		"programs":                 {"[cloudhypervisor]\nbinary = \"bin/ch\"\n[qemu]\nbinary = \"\"", []string{`2: cloudhypervisor.binary: "bin/ch" is neither`, `4: qemu.binary: "" is neither`}},
		"landlock":                 {"[cloudhypervisor]\nlandlock = \"yes\"", []string{`2: cloudhypervisor.landlock: "yes" is not one of auto, on, off`}},
		"firmware and accel":       {"[qemu]\nfirmware = \"qboot.rom\"\naccel = \"hvf\"", []string{`2: qemu.firmware: "qboot.rom" is not an absolute path`, `3: qemu.accel: "hvf" is not one of auto, kvm, tcg`}},

		"the host handler":               {"[handlers.host]", []string{"1: handlers.host: the host handler does not exist in this version"}},
		"the default handler":            {"[handlers.\"\"]\nvcpus = 2", []string{`1: handlers."": the default handler is written as [vm]`}},
		"handler's name":                 {"[handlers.Big]\n[handlers.\"a.b\"]\n[handlers.-a]", []string{"3: handlers.-a: \"-a\" is not the name", "1: handlers.Big: \"Big\" is not the name", "2: handlers.\"a.b\": \"a.b\" is not the name"}},
		"handler's name, by a key":       {"\nhandlers.A.vcpus = 2", []string{"2: handlers.A: \"A\" is not the name of a handler"}},
		"clh is not qemu":                {"[handlers.clh]\nvmm = \"qemu\"", []string{`2: handlers.clh.vmm: "qemu": handler clh is always cloudhypervisor`}},
		"qemu is not auto":               {"[handlers.qemu]\nvmm = \"auto\"", []string{`2: handlers.qemu.vmm: "auto": handler qemu is always qemu`}},
		"bad value of [vm] is said once": {"[vm]\nvcpus = 0\n[handlers.a]\n[handlers.b]\nmemory = \"1GiB\"", []string{"2: vm.vcpus: 0 is not"}},
		"the same in a handler is said":  {"[vm]\nvcpus = 0\n[handlers.a]\nvcpus = 0", []string{"2: vm.vcpus: 0 is not", "4: handlers.a.vcpus: 0 is not"}},
		"handler against [vm]":           {"[vm]\nmax_memory = \"1GiB\"\n[handlers.a]\nmemory = \"2GiB\"", []string{"4: handlers.a.memory: max_memory 1GiB is less than memory 2GiB"}},
		"nothing follows from bad types": {"[vm]\nmemory = \"2G\"\nmax_memory = \"128MiB\"\nvcpus = 0", []string{`2: vm.memory: "2G" is not a size`, "4: vm.vcpus: 0 is not"}},
	} {
		t.Run(name, func(t *testing.T) {
			path := writeFiles(t, map[string]string{"config.toml": test.text})
			c, err := Load(path, true)
			if err == nil {
				t.Fatalf("no error; want %q", test.want)
			}
			if !reflect.DeepEqual(c, Config{}) {
				t.Error("a configuration comes with the error")
			}
			if !errdefs.IsInvalidArgument(err) {
				t.Errorf("%v is no InvalidArgument", err)
			}
			got := strings.Split(err.Error(), "\n")
			if len(got) != len(test.want) {
				t.Fatalf("got %d problems, want %d:\n%v", len(got), len(test.want), err)
			}
			for i, want := range test.want {
				if !strings.HasPrefix(got[i], path+":"+want) {
					t.Errorf("got %q\nwant %q", got[i], want)
				}
			}
		})
	}
}

// TestErrorsOfFragments checks that a problem is reported where its value was set last.
func TestErrorsOfFragments(t *testing.T) {
	path := writeFiles(t, map[string]string{
		"config.toml":          "[vm]\nmemory = \"1GiB\"\nvcpus = 3\n[log]\nlevel = \"x\"\n",
		"conf.d/10-a.toml":     "[vm]\n\nmax_memory = \"512MiB\"\nmax_vcpus = 2\n",
		"conf.d/20-b.toml":     "x = 1\n[log]\nlevel = \"y\"\n[handlers.h]\nscratch_size = 1\n",
		"conf.d/30-c.toml":     "[vm]\nvcpus = 5\n",
		"conf.d/.hidden.toml":  "not toml",
		"conf.d/40-other.conf": "not toml",
	})
	_, err := Load(path, true)
	if err == nil {
		t.Fatal("no error")
	}
	dir := filepath.Dir(path)
	want := []string{
		"/conf.d/20-b.toml:1: x: unknown key",
		"/conf.d/20-b.toml:3: log.level: \"y\" is not one of",
		"/conf.d/10-a.toml:4: vm.max_vcpus: max_vcpus 2 is less than vcpus 5",
		"/conf.d/10-a.toml:3: vm.max_memory: max_memory 512MiB is less than memory 1GiB",
		"/conf.d/20-b.toml:5: handlers.h.scratch_size: 1 is not",
	}
	got := strings.Split(err.Error(), "\n")
	if len(got) != len(want) {
		t.Fatalf("got %d problems, want %d:\n%v", len(got), len(want), err)
	}
	for i := range want {
		if !strings.HasPrefix(got[i], dir+want[i]) {
			t.Errorf("got %q\nwant %q", got[i], want[i])
		}
	}
}

func TestManyErrorsAreBounded(t *testing.T) {
	var text strings.Builder
	for i := range 1000 {
		fmt.Fprintf(&text, "x%d = 1\n", i)
	}
	_, err := loadText(t, text.String())
	if err == nil || strings.Count(err.Error(), "\n") != maxProblems || !strings.HasSuffix(err.Error(), "and 900 more: invalid argument") {
		t.Errorf("got %v", err)
	}
}

// TestLongInput: nesting and numbers of keys up to the limit of a file take neither a crash nor minutes.
func TestLongInput(t *testing.T) {
	for name, text := range map[string]string{
		"nested arrays": "socket = " + strings.Repeat("[", maxFileSize-10),
		"nested tables": "a=" + strings.Repeat("{a=", maxFileSize/3-10),
		"dotted key":    strings.Repeat("a.", maxFileSize/2-10) + "a = 1",
		"keys":          strings.Repeat("a=1\n", maxFileSize/4),
		"tables":        strings.Repeat("[a]\n", maxFileSize/4),
		"handlers":      "handlers={" + strings.Repeat("a={},", maxFileSize/5-10) + "a={}}",
	} {
		start := time.Now()
		if _, err := loadText(t, text); err == nil || len(err.Error()) > 2*maxFileSize {
			t.Errorf("%s: got an error of %d bytes", name, len(fmt.Sprint(err)))
		}
		if d := time.Since(start); d > 20*time.Second {
			t.Errorf("%s: took %v", name, d)
		}
	}
}

func TestFiles(t *testing.T) {
	t.Run("none", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "none", "config.toml")
		c, err := Load(path, false)
		if err != nil || !reflect.DeepEqual(c, Default()) {
			t.Errorf("got %+v, %v", c, err)
		}
		if _, err := Load(path, true); !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), path) {
			t.Errorf("got %v", err)
		}
	})
	t.Run("fragment alone", func(t *testing.T) {
		path := writeFiles(t, map[string]string{"conf.d/a.toml": "[vm]\nvcpus = 7\n"})
		c, err := Load(path, false)
		if err != nil || c.VM.VCPUs != 7 {
			t.Errorf("got %+v, %v", c.VM, err)
		}
	})
	t.Run("empty", func(t *testing.T) {
		for _, text := range []string{"", "\n", "# nothing", "\r\n[vm]\r\n", "[handlers]\n"} {
			if c, err := loadText(t, text); err != nil || !reflect.DeepEqual(c, Default()) {
				t.Errorf("%q: got %+v, %v", text, c, err)
			}
		}
	})
	t.Run("directory", func(t *testing.T) {
		path := writeFiles(t, map[string]string{"config.toml/x": "", "conf.d/a.toml/x": ""})
		_, err := Load(path, false)
		if err == nil || strings.Count(err.Error(), "not a regular file") != 2 {
			t.Errorf("got %v", err)
		}
	})
	t.Run("too long", func(t *testing.T) {
		if _, err := loadText(t, "#"+strings.Repeat("x", maxFileSize-1)); err != nil {
			t.Errorf("got %v", err)
		}
		if _, err := loadText(t, "#"+strings.Repeat("x", maxFileSize)); !errdefs.IsInvalidArgument(err) {
			t.Errorf("got %v", err)
		}
	})
	t.Run("fragment by a dangling link", func(t *testing.T) {
		path := writeFiles(t, map[string]string{"conf.d/a.toml": ""})
		link := filepath.Join(filepath.Dir(path), "conf.d", "b.toml")
		if err := os.Symlink("/nonexistent", link); err != nil {
			t.Fatal(err)
		}
		if _, err := Load(path, false); err == nil || !strings.Contains(err.Error(), link) {
			t.Errorf("got %v", err)
		}
	})
}

// TestNotations loads the same values in the ways in which TOML writes them.
func TestNotations(t *testing.T) {
	want, err := loadText(t, "[vm]\nmemory = \"1GiB\"\nvcpus = 16\n[handlers.big]\nvcpus = 32\n")
	if err != nil {
		t.Fatal(err)
	}
	if want.VM.Memory != GiB || want.VM.VCPUs != 16 || want.Handlers["big"].VCPUs != 32 {
		t.Fatalf("got %+v", want.VM)
	}
	for _, text := range []string{
		"vm.memory = 1073741824\nvm.vcpus = 0x10\nhandlers.big.vcpus = 0b100000",
		"vm = {memory = 1_073_741_824, vcpus = 0o20}\nhandlers = {big = {vcpus = +32}}",
		"[handlers]\nbig = {vcpus = 32}\n[\"vm\"]\n'memory' = '1024MiB'\n\"\\u0076cpus\" = 16",
		"[ handlers . big ]\r\nvcpus = 32 # as many\r\n[vm]\r\nmemory = \"\"\"\\\r\n   1GiB\"\"\"\r\nvcpus = 16\r\n",
		"[vm]\nmemory = \"1048576 KiB\"\nvcpus = 16\n[handlers]\nbig.vcpus = 32",
	} {
		if got, err := loadText(t, text); err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%s: got %+v, %v", text, got, err)
		}
	}
}

// TestNode loads a file such as the integration tests write.
func TestNode(t *testing.T) {
	c, err := loadText(t, `socket = "/tmp/node/crivm.sock"
state_dir = "/tmp/node/state"
run_dir = "/run/crivm-test"
[log]
level = "debug"
[cri]
cgroup_driver = "cgroupfs"
cgroup_parent = "/crivm-test"
[image]
registries_conf = "/tmp/node/registries.conf"
registries_conf_dir = "/tmp/node/registries.conf.d"
signature_policy = "/tmp/node/policy.json"
[cni]
conf_dir = "/tmp/node/net.d/"
bin_dirs = ["/tmp/node/bin//cni"]
[vm]
kernel = "/tmp/node/vmlinux"
initramfs = "/tmp/node/initramfs"
memory = "256MiB"
scratch_size = "1GiB"
boot_timeout = "180s"
`)
	if err != nil {
		t.Fatal(err)
	}
	want := Default()
	want.Socket, want.StateDir, want.RunDir = "/tmp/node/crivm.sock", "/tmp/node/state", "/run/crivm-test"
	want.Log.Level = "debug"
	want.CRI.CgroupDriver, want.CRI.CgroupParent = "cgroupfs", "/crivm-test"
	want.Image.Root, want.Image.RunRoot, want.Image.DiskDir = "/tmp/node/state/storage", "/run/crivm-test/storage", "/tmp/node/state/disks"
	want.Image.RegistriesConf, want.Image.RegistriesConfDir = "/tmp/node/registries.conf", "/tmp/node/registries.conf.d"
	want.Image.SignaturePolicy = "/tmp/node/policy.json"
	want.CNI.ConfDir, want.CNI.BinDirs, want.CNI.CacheDir = "/tmp/node/net.d", []string{"/tmp/node/bin/cni"}, "/tmp/node/state/cni"
	want.VM.Kernel, want.VM.Initramfs, want.VM.ScratchSize, want.VM.BootTimeout = "/tmp/node/vmlinux", "/tmp/node/initramfs", GiB, Duration(3*time.Minute)
	clh, qemu := want.VM, want.VM
	clh.VMM, qemu.VMM = "cloudhypervisor", "qemu"
	want.Handlers = map[string]VM{"": want.VM, "crivm": want.VM, "clh": clh, "qemu": qemu}
	if !reflect.DeepEqual(c, want) {
		t.Errorf("got  %+v\nwant %+v", c, want)
	}
}
