package guest

import (
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/crivm/crivm/agentproto"
)

func TestCheckID(t *testing.T) {
	for id, ok := range map[string]bool{
		"a": true, "0": true, "a.b-c_d": true, strings.Repeat("a", maxIDLength): true,
		"": false, ".": false, "..": false, ".a": false, "-a": false, "_a": false, "a/b": false, "a b": false, "a\x00": false, "ä": false,
		strings.Repeat("a", maxIDLength+1): false,
	} {
		if err := checkID("id", id); (err == nil) != ok {
			t.Errorf("%q: %v", id, err)
		}
	}
}

func TestSysctlPath(t *testing.T) {
	for name, want := range map[string]string{
		"net.ipv4.ip_forward": "net/ipv4/ip_forward", "net/ipv4/conf/eth0.1/rp_filter": "net/ipv4/conf/eth0.1/rp_filter",
		"net.ipv4.conf.eth0/1.rp_filter": "net/ipv4/conf/eth0.1/rp_filter", "kernel.shm_rmid_forced": "kernel/shm_rmid_forced",
		"": "", "kernel": "", "../etc/passwd": "", "net/../../etc": "", "net..ipv4": "", ".net": "", "/net/ipv4": "", "net.": "", "net/./x": "",
		"kernel.//.x": "",
	} {
		got, err := sysctlPath(name)
		if got != want || (err == nil) != (want != "") {
			t.Errorf("%q: %q, %v", name, got, err)
		}
	}
	if err := setSysctls(map[string]string{"kernel.no_such_parameter": "1"}); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("unknown parameter: %v", err)
	}
}

func TestRuntimeError(t *testing.T) {
	for _, tc := range []struct {
		name, text string
		class      error
		want       string
	}{
		{"foo", "executable file `foo` not found in $PATH: No such file or directory", errdefs.ErrNotFound, `exec: "foo": executable file not found in $PATH`},
		{"/foo", "executable file `/foo` not found in $PATH: No such file or directory", errdefs.ErrNotFound, `exec: "/foo": stat /foo: no such file or directory`},
		{"foo", "open executable: Permission denied", errdefs.ErrPermissionDenied, `exec: "foo": permission denied`},
		{"/tmp", "open executable: Operation not permitted", errdefs.ErrPermissionDenied, `exec: "/tmp": permission denied`},
		{"foo", "exec: Exec format error", errdefs.ErrInvalidArgument, `exec: "foo": exec format error`},
		{"foo", `runc create failed: unable to start container process: error during container init: exec: "foo": executable file not found in $PATH`, errdefs.ErrNotFound, `exec: "foo": executable file not found in $PATH`},
		{"/foo", `unable to start container process: exec: "/foo": stat /foo: no such file or directory`, errdefs.ErrNotFound, `exec: "/foo": stat /foo: no such file or directory`},
		{"foo", "mount `x` to `y`: No such file or directory", errdefs.ErrUnknown, "OCI runtime: mount `x` to `y`: No such file or directory: unknown"},
		{"foo", "", errdefs.ErrUnknown, "OCI runtime: no message: unknown"},
	} {
		err := runtimeError(tc.name, tc.text)
		if !errors.Is(err, tc.class) || err.Error() != tc.want {
			t.Errorf("%q: %v", tc.text, err)
		}
		if isCommandFailure(err) != !errors.Is(tc.class, errdefs.ErrUnknown) {
			t.Errorf("%q: command failure %v", tc.text, isCommandFailure(err))
		}
	}
}

// hostileRoot is a root file system whose links lead out of it.
func hostileRoot(t *testing.T) (root, secret string) {
	t.Helper()
	dir := t.TempDir()
	root, secret = filepath.Join(dir, "root"), filepath.Join(dir, "secret")
	if err := errors.Join(
		os.MkdirAll(filepath.Join(root, "etc"), 0o755),
		os.WriteFile(secret, []byte("evil:x:0:0::/:/bin/sh\n"), 0o644),
		os.Symlink(secret, filepath.Join(root, "absolute")),
		os.Symlink("../../secret", filepath.Join(root, "etc", "relative")),
		os.Symlink(dir, filepath.Join(root, "dir")),
		os.Symlink("/etc", filepath.Join(root, "inside")),
		os.Symlink("/etc/loop", filepath.Join(root, "etc", "loop")),
		os.WriteFile(filepath.Join(root, "etc", "file"), []byte("content"), 0o644),
		unix.Mkfifo(filepath.Join(root, "etc", "fifo"), 0o644),
		os.WriteFile(filepath.Join(root, "etc", "large"), make([]byte, 100), 0o644),
	); err != nil {
		t.Fatal(err)
	}
	return root, secret
}

func TestReadIn(t *testing.T) {
	root, _ := hostileRoot(t)
	for path, want := range map[string]string{
		"/etc/file": "content", "inside/file": "content", "../../etc/file": "content",
		"absolute": "", "etc/relative": "", "dir/secret": "", "../secret": "", "etc/loop": "", "etc/fifo": "", "etc/large": "", "etc": "", "/proc/self/root/etc/file": "",
	} {
		b, err := readIn(root, path, 50)
		if string(b) != want || (err == nil) != (want != "") {
			t.Errorf("%s: %q, %v", path, b, err)
		}
	}
}

func TestWriteFilesConfined(t *testing.T) {
	dir := t.TempDir()
	reg := func(path string) *agentproto.File {
		return &agentproto.File{Path: path, Mode: 0o100644, Content: []byte("x")}
	}
	link := func(path, to string) *agentproto.File {
		return &agentproto.File{Path: path, Mode: 0o120777, LinkTarget: to}
	}
	for name, entries := range map[string][]*agentproto.File{
		"parent":            {reg("../x")},
		"absolute":          {reg("/x")},
		"hidden parent":     {reg("a/../../x")},
		"through a link":    {link("l", "../.."), reg("l/x")},
		"absolute link":     {link("l", dir), reg("l/x")},
		"onto a link":       {link("l", "../../x"), reg("l")},
		"twice":             {reg("x"), reg("x")},
		"device":            {{Path: "d", Mode: 0o020644}},
		"no type":           {{Path: "d", Mode: 0o644}},
		"a file with files": {{Path: "", Mode: 0o100644}, reg("x")},
	} {
		if err := writeFiles(filepath.Join(dir, "v", "v"), entries); err == nil {
			t.Errorf("%s: accepted", name)
		}
		left, err := os.ReadDir(dir)
		if err != nil || len(left) != 1 {
			t.Fatalf("%s: wrote outside: %v, %v", name, left, err)
		}
	}
	volume := filepath.Join(dir, "v", "v")
	err := writeFiles(volume, []*agentproto.File{
		{Path: "..data", Mode: 0o120777, LinkTarget: "..1"}, reg("..1/deep/key"), {Path: "empty", Mode: 0o041777}, link("anywhere", "/etc/passwd"), link("key", "..data/deep/key"),
	})
	if err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(filepath.Join(volume, fileContent, "key")); err != nil || string(b) != "x" {
		t.Errorf("content: %q, %v", b, err)
	}
	if st, err := os.Stat(filepath.Join(volume, fileContent, "empty")); err != nil || st.Mode() != os.ModeDir|os.ModeSticky|0o777 {
		t.Errorf("mode: %v, %v", st.Mode(), err)
	}
}

func TestResolveUser(t *testing.T) {
	root := t.TempDir()
	if err := errors.Join(
		os.Mkdir(filepath.Join(root, "etc"), 0o755),
		os.WriteFile(filepath.Join(root, "etc", "passwd"), []byte("root:x:0:0:root:/root:/bin/sh\napp:x:1000:1001::/home/app:\nbroken\n"), 0o644),
		os.WriteFile(filepath.Join(root, "etc", "group"), []byte("root:x:0:\napp:x:1001:\nextra:x:50000:other,app\nmore:x:50001:app\n"), 0o644),
	); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name     string
		user     *agentproto.User
		uid, gid uint32
		groups   []uint32
		home     string
	}{
		{"nothing", nil, 0, 0, []uint32{0}, "/root"},
		{"name", &agentproto.User{Name: "app"}, 1000, 1001, []uint32{1001, 50000, 50001}, "/home/app"},
		{"name and group", &agentproto.User{Name: "app:extra"}, 1000, 50000, []uint32{50000, 50001}, "/home/app"},
		{"numbers", &agentproto.User{Name: "77:88"}, 77, 88, []uint32{88}, "/"},
		{"known number", &agentproto.User{HasUid: true, Uid: 1000}, 1000, 1001, []uint32{1001, 50000, 50001}, "/home/app"},
		{"unknown number", &agentproto.User{HasUid: true, Uid: 5}, 5, 0, []uint32{0}, "/"},
		{"uid before name", &agentproto.User{HasUid: true, Uid: 5, Name: "app"}, 5, 0, []uint32{0}, "/"},
		{"gid", &agentproto.User{HasUid: true, Uid: 1000, HasGid: true, Gid: 5}, 1000, 5, []uint32{5, 50000, 50001}, "/home/app"},
		{"gid over the image's", &agentproto.User{Name: "app:extra", HasGid: true, Gid: 5}, 1000, 5, []uint32{5, 50000, 50001}, "/home/app"},
		{"supplemental", &agentproto.User{Name: "app", SupplementalGroups: []uint32{9, 50000}}, 1000, 1001, []uint32{1001, 50000, 50001, 9}, "/home/app"},
		{"strict", &agentproto.User{Name: "app", SupplementalGroups: []uint32{9}, StrictGroups: true}, 1000, 1001, []uint32{1001, 9}, "/home/app"},
	} {
		acc, err := resolveUser(root, tc.user)
		if err != nil {
			t.Errorf("%s: %v", tc.name, err)
			continue
		}
		if acc.Uid != tc.uid || acc.Gid != tc.gid || !slices.Equal(acc.Groups, tc.groups) || acc.home != tc.home {
			t.Errorf("%s: %d:%d %v %s", tc.name, acc.Uid, acc.Gid, acc.Groups, acc.home)
		}
	}
	for name, user := range map[string]*agentproto.User{
		"unknown": {Name: "nobody"}, "unknown group": {Name: "app:nogroup"}, "negative": {HasUid: true, Uid: -1},
		"too large": {HasUid: true, Uid: 1 << 32}, "gid too large": {HasUid: true, HasGid: true, Gid: 1 << 31},
	} {
		if _, err := resolveUser(root, user); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
	hostile, _ := hostileRoot(t)
	if err := os.Symlink("../../secret", filepath.Join(hostile, "etc", "passwd")); err != nil {
		t.Fatal(err)
	}
	if _, err := resolveUser(hostile, &agentproto.User{Name: "evil"}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("user of a file outside the root file system: %v", err)
	}
}

func TestCgroupWrites(t *testing.T) {
	for in, want := range map[string]string{
		`{}`:                                                   "",
		`{"cpu":{"shares":1024}}`:                              "cpu.weight=39",
		`{"cpu":{"shares":2}}`:                                 "cpu.weight=1",
		`{"cpu":{"shares":1000000}}`:                           "cpu.weight=10000",
		`{"cpu":{"quota":-1}}`:                                 "cpu.max=max 100000",
		`{"cpu":{"quota":5000,"period":20000}}`:                "cpu.max=5000 20000",
		`{"memory":{"limit":100}}`:                             "memory.max=100",
		`{"memory":{"limit":100,"swap":150}}`:                  "memory.max=100 memory.swap.max=50",
		`{"memory":{"limit":100,"swap":100}}`:                  "memory.max=100 memory.swap.max=0",
		`{"memory":{"limit":-1,"swap":-1}}`:                    "memory.max=max memory.swap.max=max",
		`{"pids":{"limit":5}}`:                                 "pids.max=5",
		`{"pids":{"limit":-1}}`:                                "pids.max=max",
		`{"unified":{"memory.high":"7"}}`:                      "memory.high=7",
		`{"unified":{"../../cgroup.procs":"1"}}`:               "cgroup.procs=1",
		`{"hugepageLimits":[{"pageSize":"2MB","limit":4096}]}`: "hugetlb.2MB.max=4096",
	} {
		var res specs.LinuxResources
		if err := json.Unmarshal([]byte(in), &res); err != nil {
			t.Fatal(err)
		}
		got := []string{}
		for _, w := range cgroupWrites(&res) {
			got = append(got, w.file+"="+w.value)
		}
		if strings.Join(got, " ") != want {
			t.Errorf("%s: %v, want %s", in, got, want)
		}
	}
}

func TestCountList(t *testing.T) {
	for list, want := range map[string]uint32{"0": 1, "0-3": 4, "0-3,5": 5, "0,2,4-5": 4, "": 0, "x": 0, "3-1": 0} {
		if got := countList(list); got != want {
			t.Errorf("%q: %d, want %d", list, got, want)
		}
	}
}

func TestParameter(t *testing.T) {
	for cmdline, want := range map[string]string{
		"quiet crivm.transport=serial x=y\n": "serial", "crivm.transport=vsock crivm.transport=serial": "serial", "xcrivm.transport=a": "", "": "",
	} {
		if got := parameter(cmdline, "crivm.transport"); got != want {
			t.Errorf("%q: %q, want %q", cmdline, got, want)
		}
	}
}

func TestParseSpecDropsAnnotations(t *testing.T) {
	s, err := parseSpec([]byte(`{"process":{"args":["x"]},"annotations":{"run.oci.seccomp_bpf_data":"AAAA"}}`))
	if err != nil || s.Annotations != nil || s.Process.Cwd != "/" {
		t.Errorf("%v, %v", s, err)
	}
}

func TestFilterCache(t *testing.T) {
	dir := t.TempDir()
	spec := func(name string) *specs.Spec {
		return &specs.Spec{Linux: &specs.Linux{Seccomp: &specs.LinuxSeccomp{Syscalls: []specs.LinuxSyscall{{Names: []string{name}}}}}}
	}
	var f filterCache
	cached := func(s *specs.Spec) string {
		f.apply(s)
		return s.Annotations[filterAnnotation]
	}
	if got := cached(spec("a")); got != "" {
		t.Errorf("empty cache: %q", got)
	}
	f.learn(spec("a"), dir) // nothing was left
	for _, size := range []int{0, 7, maxFilter + filterInstruction} {
		if err := os.WriteFile(filepath.Join(dir, "seccomp.bpf"), make([]byte, size), 0o600); err != nil {
			t.Fatal(err)
		}
		f.learn(spec("a"), dir)
		if got := cached(spec("a")); got != "" {
			t.Errorf("took a filter of %d bytes", size)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "seccomp.bpf"), make([]byte, filterInstruction), 0o600); err != nil {
		t.Fatal(err)
	}
	f.learn(spec("a"), dir)
	f.learn(&specs.Spec{Linux: &specs.Linux{}}, dir)
	if got := cached(spec("a")); got != "AAAAAAAAAAA=" {
		t.Errorf("cached: %q", got)
	}
	if got := cached(spec("b")) + cached(&specs.Spec{Linux: &specs.Linux{}}); got != "" {
		t.Errorf("filter of another profile: %q", got)
	}
	for i := range 3 * keptFilters {
		f.learn(spec(strings.Repeat("x", i+1)), dir)
	}
	if len(f.filters) > keptFilters {
		t.Errorf("keeps %d filters", len(f.filters))
	}
}
