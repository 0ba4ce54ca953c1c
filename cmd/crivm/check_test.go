package main

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/crivm/crivm/conf"
)

// writeFile makes a file with the directories above it and returns its path.
func writeFile(t *testing.T, content string, perm os.FileMode, parts ...string) string {
	t.Helper()
	name := filepath.Join(parts...)
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, []byte(content), perm); err != nil {
		t.Fatal(err)
	}
	return name
}

func TestReportText(t *testing.T) {
	r := newReport([]finding{
		ok("QEMU", "/usr/bin/qemu: 7.2"),
		warning("KVM", "enable it", "not there"),
		fail("space of state_dir", "make room", "0.1 GiB free\nat /var"),
	})
	var out bytes.Buffer
	if err := r.writeText(&out); err != nil {
		t.Fatal(err)
	}
	want := `ok       QEMU                /usr/bin/qemu: 7.2
warning  KVM                 not there
                             → enable it
FAIL     space of state_dir  0.1 GiB free; at /var
                             → make room

This node is NOT fit to run pods.
`
	if out.String() != want {
		t.Errorf("text is\n%s\nwant\n%s", out.String(), want)
	}
}

func TestReportJSON(t *testing.T) {
	for _, test := range []struct {
		findings []finding
		fit      bool
	}{
		{[]finding{ok("a", "x"), warning("b", "do <this>", "y")}, true},
		{[]finding{ok("a", "x"), fail("b", "do that", "y")}, false},
	} {
		var out bytes.Buffer
		if err := writeJSON(&out, newReport(test.findings)); err != nil {
			t.Fatal(err)
		}
		var got report
		d := json.NewDecoder(&out)
		d.DisallowUnknownFields()
		if err := d.Decode(&got); err != nil {
			t.Fatal(err)
		}
		if got.Fit != test.fit || got.Version != version || len(got.Findings) != 2 || got.Findings[1] != test.findings[1] {
			t.Errorf("%+v of %+v", got, test)
		}
	}
}

// run executes a crivm command line and returns what it prints.
func run(t *testing.T, args ...string) (string, error) {
	t.Helper()
	cmd := command()
	var out bytes.Buffer
	cmd.SetOut(&out)
	cmd.SetErr(&out)
	cmd.SetArgs(args)
	err := cmd.ExecuteContext(t.Context())
	return out.String(), err
}

func TestCheckCommandWithBrokenConfiguration(t *testing.T) {
	path := writeFile(t, "[vm]\nvcpu = 3\n", 0o644, t.TempDir(), "config.toml")
	out, err := run(t, "check", "--json", "--config", path)
	if err != errUnfit { //nolint:errorlint // must be just that, so that the exit status is 1 and the message short
		t.Fatalf("error %v, want %v", err, errUnfit)
	}
	var r report
	if err := json.Unmarshal([]byte(out), &r); err != nil {
		t.Fatalf("%v in %s", err, out)
	}
	if r.Fit || r.Findings[0].Status != statusFail || !strings.Contains(r.Findings[0].Detail, path+":2") {
		t.Errorf("report %+v", r)
	}
	for _, name := range []string{"KVM", "cloud-hypervisor", "QEMU", "guest image", "cgroups", "tap and redirect", "CNI", "mkfs.ext4", "virtiofsd", "overlay", "space of state_dir"} {
		if !strings.Contains(out, `"name": "`+name+`"`) {
			t.Errorf("nothing about %s in %s", name, out)
		}
	}
}

func TestConfigCommands(t *testing.T) {
	out, err := run(t, "config", "default")
	if err != nil || out != string(conf.DefaultTOML()) {
		t.Fatalf("%d bytes, %v", len(out), err)
	}
	good := writeFile(t, out, 0o644, t.TempDir(), "config.toml")
	if out, err := run(t, "config", "check", good); err != nil || !strings.HasPrefix(out, good+" is right") {
		t.Errorf("the default file: %q, %v", out, err)
	}
	bad := writeFile(t, "\n[log]\nlevel = \"loud\"\n", 0o644, t.TempDir(), "config.toml")
	if _, err := run(t, "config", "check", bad); err == nil || !strings.Contains(err.Error(), bad+":3") || !strings.Contains(err.Error(), "log.level") {
		t.Errorf("a bad file: %v", err)
	}
	if _, err := run(t, "config", "check", bad+"x"); err == nil || !strings.Contains(err.Error(), bad+"x") {
		t.Errorf("no file: %v", err)
	}
}

func TestGuestBuildCommandErrors(t *testing.T) {
	dir := t.TempDir()
	_, err := run(t, "guest", "build", "--agent", filepath.Join(dir, "agent"), "--kernel", filepath.Join(dir, "vmlinuz"), "--oci-runtime", "/bin/true", "--output", dir)
	if err == nil || !strings.Contains(err.Error(), "build guest image: kernel "+dir) {
		t.Errorf("error %v", err)
	}
}

func TestCheckCloudHypervisor(t *testing.T) {
	dir := t.TempDir()
	for name, test := range map[string]struct {
		script string
		status status
		works  bool
		detail string
	}{
		"recommended": {"echo cloud-hypervisor v53.0", statusOK, true, "v53.0"},
		"old but fit": {"echo cloud-hypervisor v51.2", statusWarning, true, "v51.2 works"},
		"holes":       {"echo cloud-hypervisor v51.1", statusWarning, false, "is refused"},
		"doubled":     {"echo cloud-hypervisor v52.0", statusWarning, false, "is refused"},
		"no version":  {"echo hello", statusWarning, false, "is refused"},
		"fails":       {"exit 3", statusWarning, false, "exit status 3"},
	} {
		binary := writeFile(t, "#!/bin/sh\n"+test.script+"\n", 0o755, dir, strings.ReplaceAll(name, " ", "-"))
		f, works := checkCloudHypervisor(t.Context(), binary)
		if f.Status != test.status || works != test.works || !strings.Contains(f.Detail, test.detail) {
			t.Errorf("%s: %+v, works %v", name, f, works)
		}
	}
	if f, works := checkCloudHypervisor(t.Context(), dir+"/absent"); works || f.Status != statusWarning || f.Advice == "" {
		t.Errorf("absent: %+v, works %v", f, works)
	}
}

func TestCheckHandlers(t *testing.T) {
	for name, test := range map[string]struct {
		vmm        string
		clh, qemu  bool
		wantLines  string
		wantUnfit  bool
		wantAdvice bool
	}{
		"all":        {"auto", true, true, "ok handlers: (default), clh, crivm: run by Cloud Hypervisor|ok handlers: qemu: run by QEMU", false, false},
		"qemu alone": {"auto", false, true, `warning handler clh: no VMM can run it (vmm = "cloudhypervisor"): pods that name it are refused|ok handlers: (default), crivm, qemu: run by QEMU`, false, false},
		"none":       {"auto", false, false, `FAIL handler (default): no VMM can run it (vmm = "auto")|warning handler clh: no VMM can run it (vmm = "cloudhypervisor"): pods that name it are refused|warning handler crivm: no VMM can run it (vmm = "auto"): pods that name it are refused|warning handler qemu: no VMM can run it (vmm = "qemu"): pods that name it are refused`, true, true},
		"fixed":      {"cloudhypervisor", false, true, `FAIL handler (default): no VMM can run it (vmm = "cloudhypervisor")|warning handler clh: no VMM can run it (vmm = "cloudhypervisor"): pods that name it are refused|warning handler crivm: no VMM can run it (vmm = "cloudhypervisor"): pods that name it are refused|ok handlers: qemu: run by QEMU`, true, true},
	} {
		config := conf.Default()
		for _, handler := range []string{"", "crivm"} {
			vm := config.Handlers[handler]
			vm.VMM = test.vmm
			config.Handlers[handler] = vm
		}
		findings := checkHandlers(config, test.clh, test.qemu)
		var lines []string
		for _, f := range findings {
			lines = append(lines, string(f.Status)+" "+f.Name+": "+f.Detail)
		}
		if got := strings.Join(lines, "|"); got != test.wantLines {
			t.Errorf("%s:\n%s\nwant\n%s", name, strings.Join(lines, "\n"), strings.ReplaceAll(test.wantLines, "|", "\n"))
		}
		if newReport(findings).Fit == test.wantUnfit {
			t.Errorf("%s: fit is %v", name, !test.wantUnfit)
		}
	}
}

func TestCheckGuestImage(t *testing.T) {
	dir := t.TempDir()
	kernel := writeFile(t, "k", 0o644, dir, "vmlinux")
	initramfs := filepath.Join(dir, "initramfs")
	if f := checkGuestImage("guest image", "build", kernel, initramfs); f.Status != statusFail || !strings.Contains(f.Detail, initramfs) {
		t.Errorf("no initramfs: %+v", f)
	}
	writeFile(t, "i", 0o644, initramfs)
	if f := checkGuestImage("guest image", "build", kernel, initramfs); f.Status != statusWarning {
		t.Errorf("no description: %+v", f)
	}
	// sha256 of "k" and of something else.
	writeFile(t, `{"version":1,"kernelSHA256":"8254c329a92850f6d539dd376f4816ee2764517da5e0235514af433164480d7a","initramfsSHA256":"00"}`, 0o644, dir, "guest.json")
	if f := checkGuestImage("guest image", "build", kernel, initramfs); f.Status != statusFail || !strings.Contains(f.Detail, "initramfs is not the file") {
		t.Errorf("other initramfs: %+v", f)
	}
}

func TestCheckGuestImagesOnce(t *testing.T) {
	config := conf.Default()
	own := config.VM
	own.Kernel = "/own/vmlinux"
	config.Handlers["own"] = own
	findings := checkGuestImages(config)
	if len(findings) != 2 || findings[0].Name != "guest image" || findings[1].Name != "guest image of handler own" {
		t.Errorf("findings %+v", findings)
	}
}

func TestCheckCgroups(t *testing.T) {
	root := t.TempDir()
	list := writeFile(t, "#subsys_name\thierarchy\tnum_cgroups\tenabled\ncpu\t1\t1\t1\nmemory\t2\t1\t1\npids\t3\t1\t0\n", 0o644, root, "list")
	writeFile(t, "", 0o644, root, "v2/cgroup.controllers")
	writeFile(t, "cpu io memory pids\n", 0o644, root, "v2full/cgroup.controllers")
	writeFile(t, "", 0o644, root, "v1/cpu/x")
	writeFile(t, "", 0o644, root, "v1/memory/x")
	writeFile(t, "", 0o644, root, "v1/pids/x")
	for name, test := range map[string]struct {
		driver, root string
		status       status
		detail       string
	}{
		"version 2":            {"auto", "v2full", statusOK, "version 2 with cpu, memory, pids"},
		"version 2, empty":     {"auto", "v2", statusFail, "without cpu, memory, pids"},
		"version 1":            {"auto", "v1", statusWarning, "version 1 without pids"},
		"version 1, systemd":   {"systemd", "v1", statusFail, "which needs version 2"},
		"nothing mounted":      {"cgroupfs", "none", statusFail, "no controller is mounted"},
		"version 2 cgroupfs":   {"cgroupfs", "v2full", statusOK, "version 2"},
		"version 2 by systemd": {"systemd", "v2full", statusOK, "version 2"},
	} {
		f := checkCgroups(test.driver, filepath.Join(root, test.root), list)
		if f.Status != test.status || !strings.Contains(f.Detail, test.detail) {
			t.Errorf("%s: %+v", name, f)
		}
	}
}

func TestCheckCNI(t *testing.T) {
	dir := t.TempDir()
	config := conf.CNI{ConfDir: dir + "/net.d", BinDirs: []string{dir + "/bin"}}
	if f := checkCNI(config); f.Status != statusWarning || !strings.Contains(f.Detail, "net.d") {
		t.Errorf("no directory: %+v", f)
	}
	if _, err := os.Stat(config.ConfDir); err == nil {
		t.Error("the check made the directory")
	}
	writeFile(t, `{"cniVersion":"1.0.0","name":"pods","plugins":[{"type":"wire"}]}`, 0o644, dir, "net.d/10-pods.conflist")
	if f := checkCNI(config); f.Status != statusWarning || !strings.Contains(f.Detail, "wire") {
		t.Errorf("no plugin: %+v", f)
	}
	writeFile(t, "#!/bin/sh\n", 0o755, dir, "bin/wire")
	if f := checkCNI(config); f.Status != statusOK {
		t.Errorf("all there: %+v", f)
	}
}

func TestCheckRedirect(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: makes a network namespace")
	}
	before, err := os.Readlink("/proc/thread-self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	if f := checkRedirect(); f.Status != statusOK || !strings.Contains(f.Detail, "classifier") {
		t.Errorf("finding %+v", f)
	}
	if after, err := os.Readlink("/proc/self/ns/net"); err != nil || after != before {
		t.Errorf("network namespace is %s, was %s (%v)", after, before, err)
	}
}

func TestJudgeSpace(t *testing.T) {
	for _, test := range []struct {
		bytes, free, inodes uint64
		want                status
	}{
		{100 << 30, 900, 1000, statusOK},
		{100 << 30, 0, 0, statusOK},
		{100 << 30, 9, 1000, statusWarning},
		{5 << 30, 900, 1000, statusWarning},
		{1 << 20, 900, 1000, statusFail},
	} {
		if f := judgeSpace("space", "/x", test.bytes, test.free, test.inodes); f.Status != test.want {
			t.Errorf("%+v: %+v", test, f)
		}
	}
	if f := checkSpace("state_dir", "/absent/below/absent"); !strings.HasSuffix(f.Detail, " at /") {
		t.Errorf("a directory that is not there: %+v", f)
	}
}

func TestCheckSysctlsAndFilesystems(t *testing.T) {
	root := t.TempDir()
	writeFile(t, "0\n", 0o644, root, "net/ipv4/ip_forward")
	writeFile(t, "8192\n", 0o644, root, "fs/inotify/max_user_instances")
	findings := checkSysctls(root)
	if len(findings) != 1 || findings[0].Status != statusWarning || !strings.Contains(findings[0].Advice, "sysctl -w net.ipv4.ip_forward=1") {
		t.Errorf("findings %+v", findings)
	}
	writeFile(t, "1\n", 0o644, root, "net/ipv4/ip_forward")
	if findings := checkSysctls(root); len(findings) != 1 || findings[0].Status != statusOK {
		t.Errorf("findings %+v", findings)
	}
	list := writeFile(t, "nodev\tproc\n\text4\n", 0o644, root, "filesystems")
	if f := checkFilesystems(list); f.Status != statusWarning {
		t.Errorf("without overlay: %+v", f)
	}
	writeFile(t, "nodev\toverlay\n", 0o644, list)
	if f := checkFilesystems(list); f.Status != statusOK {
		t.Errorf("with overlay: %+v", f)
	}
}
