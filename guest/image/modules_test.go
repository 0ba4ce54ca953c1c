package image

import (
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

// modulesDir makes a modules directory with modules by "path below kernel/" → .modinfo fields.
func modulesDir(t *testing.T, modules map[string][]string) string {
	t.Helper()
	dir := t.TempDir()
	writeFile(t, []byte("kernel/fs/ext4/ext4.ko\nkernel/net/ipv6/ipv6.ko\nkernel/net/packet/af-packet.ko\n"), dir, "modules.builtin")
	for name, fields := range modules {
		content := testModule(t, testRelease, fields...)
		switch {
		case strings.HasSuffix(name, ".xz"):
			packed := pack(t, "xz", content)
			content = packed[:len(packed)-4]
		case strings.HasSuffix(name, ".zst"):
			packed := pack(t, "zstd", content)
			content = packed[:len(packed)-4]
		case strings.HasSuffix(name, ".gz"):
			content = pack(t, "gzip", content)
		}
		writeFile(t, content, dir, name)
	}
	return dir
}

func TestLoadOrder(t *testing.T) {
	dir := modulesDir(t, map[string][]string{
		"kernel/a.ko":              {"depends=b,c-dash"},
		"kernel/b.ko.xz":           {"depends=d"},
		"kernel/c-dash.ko.zst":     {"depends=d,ext4"},
		"kernel/d.ko.gz":           {"depends="},
		"kernel/alone.ko":          {"license=GPL"},
		"kernel/soft.ko":           {"softdep=pre: alone absent post: a", "depends=d"},
		"kernel/loop1.ko":          {"depends=loop2"},
		"kernel/loop2.ko":          {"depends=loop1"},
		"kernel/dangling.ko":       {"depends=nowhere"},
		"kernel/softloop.ko":       {"softdep=pre: softloop2"},
		"kernel/softloop2.ko":      {"softdep=pre: softloop"},
		"kernel/net/xt_MARK.ko":    {"depends="},
		"kernel/net/xt-CAPS.ko":    {"depends=xt_MARK"},
		"updates/dkms/twice.ko":    {"depends=d"},
		"kernel/extra/aa/twice.ko": {"depends=b"},
	})
	s, err := openModules(dir, testRelease)
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{
		"a":        "d b c_dash a",
		"d":        "d",
		"alone":    "alone",
		"soft":     "alone d soft",
		"softloop": "softloop2 softloop",
		"xt_CAPS":  "xt_MARK xt_CAPS",
		"twice":    "d twice",
		"ext4":     "",
		"loop1":    "error: kernel module loop1 depends on itself",
		"dangling": "error: kernel module nowhere is neither in",
		"unknown":  "error: kernel module unknown is neither in",
	} {
		order, err := s.loadOrder(name)
		got := strings.Join(order, " ")
		if err != nil {
			got = "error: " + err.Error()
		}
		if reason, isError := strings.CutPrefix(want, "error: "); got != want && !(isError && strings.Contains(got, reason)) {
			t.Errorf("load order of %s is %q, want %q", name, got, want)
		}
	}
}

func TestModulesErrors(t *testing.T) {
	if _, err := openModules(t.TempDir(), ""); !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), "modules.builtin") {
		t.Errorf("without modules.builtin: %v", err)
	}
	empty := modulesDir(t, nil)
	if _, err := openModules(empty, ""); !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), "has no modules") {
		t.Errorf("without modules: %v", err)
	}
	dir := modulesDir(t, map[string][]string{"kernel/a.ko": nil})
	writeFile(t, []byte("not ELF"), dir, "kernel/text.ko")
	writeFile(t, []byte("\xfd7zXZ\x00cut"), dir, "kernel/cut.ko.xz")
	writeFile(t, buildELF(t, nil, nil), dir, "kernel/plain.ko")
	s, err := openModules(dir, "5.10.0")
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{
		"a":     "is for kernel " + testRelease + ", not for 5.10.0",
		"text":  "not an ELF file",
		"cut":   "decompress",
		"plain": "no .modinfo section",
	} {
		if _, err := s.loadOrder(name); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), want) {
			t.Errorf("module %s: error %v, want %q", name, err, want)
		}
	}
}

func TestModulesReleaseFromModules(t *testing.T) {
	s, err := openModules(modulesDir(t, map[string][]string{"kernel/a.ko.xz": nil}), "")
	if err != nil {
		t.Fatal(err)
	}
	m, err := s.module("a")
	if err != nil {
		t.Fatal(err)
	}
	if want := "/lib/modules/" + testRelease + "/kernel/a.ko"; m.path != want {
		t.Errorf("path %s, want %s", m.path, want)
	}
}

func TestSoftDependencies(t *testing.T) {
	for value, want := range map[string][]string{
		"pre: crc32c":               {"crc32c"},
		"pre: a-b c post: d pre: e": {"a_b", "c", "e"},
		"post: x":                   nil,
		"":                          nil,
		"stray":                     nil,
	} {
		if got := softDependencies(value); !slices.Equal(got, want) {
			t.Errorf("softDependencies(%q) = %q, want %q", value, got, want)
		}
	}
}
