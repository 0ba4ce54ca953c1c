package conf

import (
	"maps"
	"slices"
	"testing"
)

// TestMerging: later files win key by key, lists as a whole.
func TestMerging(t *testing.T) {
	c, err := Load(writeFiles(t, map[string]string{
		"config.toml":      "socket = \"/a.sock\"\n[cni]\nbin_dirs = [\"/a\", \"/b\"]\nconf_dir = \"/conf\"\n[image]\npinned = [\"a\"]\n[cloudhypervisor]\nseccomp = false\n[cri]\nmax_container_log_line_size = 1024\n",
		"conf.d/1.toml":    "[cni]\nbin_dirs = [\"/c\"]\n[image]\npinned = []\n[cri]\nstream_idle_timeout = \"0s\"\n",
		"conf.d/2.toml":    "socket = \"/c.sock\"\n[cri]\nmax_container_log_line_size = 0\n",
		"conf.d/10.toml":   "socket = \"/b.sock\"\n", // "10" sorts before "2"
		"conf.d/sub/a.txt": "",
	}), true)
	if err != nil {
		t.Fatal(err)
	}
	if c.Socket != "/c.sock" {
		t.Errorf("socket %s", c.Socket)
	}
	if !slices.Equal(c.CNI.BinDirs, []string{"/c"}) || c.CNI.ConfDir != "/conf" {
		t.Errorf("CNI %+v", c.CNI)
	}
	if len(c.Image.Pinned) != 0 || c.CloudHypervisor.Seccomp {
		t.Errorf("pinned %q, seccomp %v", c.Image.Pinned, c.CloudHypervisor.Seccomp)
	}
	if c.CRI.StreamIdleTimeout != 0 || c.CRI.MaxContainerLogLineSize != 0 {
		t.Errorf("zeroes that are set do not count: %+v", c.CRI)
	}
}

func TestInheritance(t *testing.T) {
	base := Default().VM
	with := func(vm VM, change func(*VM)) VM { change(&vm); return vm }
	for name, test := range map[string]struct {
		files map[string]string
		want  map[string]VM // besides those that are as by default
	}{
		"nothing": {},
		"vm changes all": {
			files: map[string]string{"config.toml": "[vm]\nvcpus = 2\n"},
			want: map[string]VM{
				"": with(base, func(v *VM) { v.VCPUs = 2 }), "crivm": with(base, func(v *VM) { v.VCPUs = 2 }),
				"clh":  with(base, func(v *VM) { v.VCPUs = 2; v.VMM = "cloudhypervisor" }),
				"qemu": with(base, func(v *VM) { v.VCPUs = 2; v.VMM = "qemu" }),
			},
		},
		"vmm of vm": {
			files: map[string]string{"config.toml": "[vm]\nvmm = \"qemu\"\n[handlers.a]\n"},
			want: map[string]VM{
				"": with(base, func(v *VM) { v.VMM = "qemu" }), "crivm": with(base, func(v *VM) { v.VMM = "qemu" }),
				"a": with(base, func(v *VM) { v.VMM = "qemu" }),
			},
		},
		"pools": {
			files: map[string]string{"config.toml": "[vm]\npool_size = 2\n[handlers.a]\n[handlers.b]\npool_size = 1\n[handlers.clh]\npool_size = 3\n"},
			want: map[string]VM{
				"": with(base, func(v *VM) { v.PoolSize = 2 }), "crivm": with(base, func(v *VM) { v.PoolSize = 2 }),
				"a": base, "b": with(base, func(v *VM) { v.PoolSize = 1 }), "clh": with(base, func(v *VM) { v.VMM = "cloudhypervisor"; v.PoolSize = 3 }),
			},
		},
		"handler before vm": {
			files: map[string]string{"config.toml": "[handlers.a]\nmemory = \"1GiB\"\n[vm]\ncmdline = \"quiet\"\n"},
			want: map[string]VM{
				"": with(base, func(v *VM) { v.Cmdline = "quiet" }), "crivm": with(base, func(v *VM) { v.Cmdline = "quiet" }),
				"clh":  with(base, func(v *VM) { v.Cmdline = "quiet"; v.VMM = "cloudhypervisor" }),
				"qemu": with(base, func(v *VM) { v.Cmdline = "quiet"; v.VMM = "qemu" }),
				"a":    with(base, func(v *VM) { v.Cmdline = "quiet"; v.Memory = GiB }),
			},
		},
		"zero counts": {
			files: map[string]string{"config.toml": "vm = {cmdline = \"quiet\", max_memory = \"8GiB\"}\nhandlers.a = {cmdline = \"\", max_memory = 0}\n"},
			want: map[string]VM{
				"":      with(base, func(v *VM) { v.Cmdline = "quiet"; v.MaxMemory = 8 * GiB }),
				"crivm": with(base, func(v *VM) { v.Cmdline = "quiet"; v.MaxMemory = 8 * GiB }),
				"clh":   with(base, func(v *VM) { v.Cmdline = "quiet"; v.MaxMemory = 8 * GiB; v.VMM = "cloudhypervisor" }),
				"qemu":  with(base, func(v *VM) { v.Cmdline = "quiet"; v.MaxMemory = 8 * GiB; v.VMM = "qemu" }),
				"a":     base,
			},
		},
		"a handler over files": {
			files: map[string]string{
				"config.toml":   "[handlers.a]\nvcpus = 2\nmemory = \"1GiB\"\n",
				"conf.d/1.toml": "[handlers.a]\nvcpus = 3\n[handlers.b]\n",
				"conf.d/2.toml": "[handlers]\na.vmm = \"qemu\"\nb.kernel = \"/b//vmlinux\"\n",
			},
			want: map[string]VM{
				"a": with(base, func(v *VM) { v.VCPUs = 3; v.Memory = GiB; v.VMM = "qemu" }),
				"b": with(base, func(v *VM) { v.Kernel = "/b/vmlinux" }),
			},
		},
		"built-in handlers": {
			files: map[string]string{"config.toml": "[handlers.clh]\nvcpus = 2\n[handlers.qemu]\nvmm = \"qemu\"\n[handlers.crivm]\nvmm = \"cloudhypervisor\"\n"},
			want: map[string]VM{
				"clh":   with(base, func(v *VM) { v.VCPUs = 2; v.VMM = "cloudhypervisor" }),
				"crivm": with(base, func(v *VM) { v.VMM = "cloudhypervisor" }),
			},
		},
	} {
		t.Run(name, func(t *testing.T) {
			c, err := Load(writeFiles(t, test.files), false)
			if err != nil {
				t.Fatal(err)
			}
			want := Default().Handlers
			maps.Copy(want, test.want)
			if !maps.Equal(c.Handlers, want) {
				t.Errorf("got  %+v\nwant %+v", c.Handlers, want)
			}
			if c.Handlers[""] != c.VM {
				t.Errorf("the default handler %+v is not [vm] %+v", c.Handlers[""], c.VM)
			}
		})
	}
}

func TestParentCgroup(t *testing.T) {
	for parent, want := range map[string][2]string{ // cgroupfs, systemd
		"/crivm":       {"/crivm", "crivm.slice"},
		"crivm":        {"/crivm", "crivm.slice"},
		"/a/b":         {"/a/b", "a-b.slice"},
		"/a-b/c":       {"/a-b/c", "a_b-c.slice"},
		"crivm.slice":  {"/crivm.slice", "crivm.slice"},
		"/crivm.slice": {"/crivm.slice", "crivm.slice"},
	} {
		c := CRI{CgroupParent: parent}
		if got := [2]string{c.ParentCgroup(false), c.ParentCgroup(true)}; got != want {
			t.Errorf("%s: got %q, want %q", parent, got, want)
		}
	}
}

func TestValidateByHand(t *testing.T) {
	c := Default()
	c.VM.VCPUs = 0
	c.Handlers["x"] = c.VM
	const want = "vm.vcpus: 0 is not between 1 and 254"
	if err := c.Validate(); err == nil || err.Error() != want {
		t.Errorf("got %v, want %s", err, want)
	}
}
