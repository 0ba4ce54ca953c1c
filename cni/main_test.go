package cni

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containernetworking/cni/pkg/invoke"
	"github.com/vishvananda/netlink"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

// isolated marks the process that TestMain has started in namespaces of its own.
const isolated = "CNI_TEST_ISOLATED"

// As root the tests run in a network and a mount namespace of their own, which take the part of the node:
// no bridge, rule or mount of theirs ever reaches the machine.
func TestMain(m *testing.M) {
	if os.Geteuid() == 0 && os.Getenv(isolated) == "" {
		os.Exit(runIsolated())
	}
	if os.Getenv(isolated) != "" {
		if err := makeNode(); err != nil {
			fmt.Fprintln(os.Stderr, "node for the tests:", err)
			os.Exit(1)
		}
	}
	goleak.VerifyTestMain(m)
}

func runIsolated() int {
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Env = append(os.Environ(), isolated+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWNS, Pdeathsig: unix.SIGKILL,
	}
	err := cmd.Run()
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) && exit.ExitCode() > 0 {
		return exit.ExitCode()
	} else if err != nil {
		fmt.Fprintln(os.Stderr, "tests in own namespaces:", err)
		return 1
	}
	return 0
}

func makeNode() error {
	if err := unix.Mount("", "/", "", unix.MS_PRIVATE|unix.MS_REC, ""); err != nil {
		return err
	}
	if err := unix.Mount("tmpfs", "/run", "tmpfs", 0, ""); err != nil { // xtables.lock, netns
		return err
	}
	for _, sysctl := range []string{"net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"} {
		if err := os.WriteFile("/proc/sys/"+sysctl, []byte("1"), 0); err != nil {
			return err
		}
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	return netlink.LinkSetUp(lo)
}

func needRoot(t *testing.T) {
	t.Helper()
	if os.Getenv(isolated) == "" {
		t.Skip("needs root for network namespaces")
	}
}

// pluginDir has the real plugins, built by `go run ./integration/cmd/provision cni`.
func pluginDir(t *testing.T, plugins ...string) string {
	t.Helper()
	needRoot(t)
	dir, err := filepath.Abs("../build/bin/cni")
	if err != nil {
		t.Fatal(err)
	}
	for _, plugin := range plugins {
		if _, err := os.Stat(filepath.Join(dir, plugin)); err != nil {
			t.Skipf("plugin not built: %v; go run ./integration/cmd/provision cni builds it", err)
		}
	}
	return dir
}

// testNetwork makes a Network with directories of its own and checks at the end that it has left nothing.
// conf is written as 10-test.conflist unless empty; exec nil runs real plugins of binDir.
func testNetwork(t *testing.T, conf, binDir string, exec invoke.Exec, change ...func(*Config)) *Network {
	t.Helper()
	dir := t.TempDir()
	config := Config{
		ConfDir:    filepath.Join(dir, "net.d"),
		BinDirs:    []string{binDir},
		CacheDir:   filepath.Join(dir, "cache"),
		NetnsDir:   filepath.Join(dir, "netns"),
		AddTimeout: 30 * time.Second,
		DelTimeout: 30 * time.Second,
	}
	for _, c := range change {
		c(&config)
	}
	if conf != "" {
		writeConf(t, config.ConfDir, "10-test.conflist", conf)
	}
	if exec == nil {
		exec = &pluginExec{}
	}
	links := linkNames(t)
	n, err := newNetwork(config, exec)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := n.Close(); err != nil {
			t.Error(err)
		}
		if os.Getenv(isolated) != "" {
			checkLeaks(t, n, links)
		}
	})
	return n
}

func writeConf(t *testing.T, dir, name, conf string) {
	t.Helper()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	temp := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(temp, []byte(conf), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(temp, filepath.Join(dir, name)); err != nil {
		t.Fatal(err)
	}
}

// checkLeaks fails the test when something of a pod is left: namespaces, mounts, records, host links but
// the bridges, and threads in a wrong namespace. It takes away what tests share.
func checkLeaks(t *testing.T, n *Network, before map[string]bool) {
	t.Helper()
	for _, dir := range []string{n.config.NetnsDir, n.recordDir(), filepath.Join(n.config.CacheDir, "results")} {
		entries, err := os.ReadDir(dir)
		if err != nil && !os.IsNotExist(err) {
			t.Error(err)
		}
		for _, e := range entries {
			t.Errorf("left behind: %s", filepath.Join(dir, e.Name()))
		}
	}
	if err := unix.Unmount(n.config.NetnsDir, 0); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		t.Errorf("unmount %s: %v", n.config.NetnsDir, err)
	}
	for name := range linkNames(t) {
		if before[name] {
			continue
		}
		link, err := netlink.LinkByName(name)
		if err == nil && link.Type() == "bridge" {
			err = netlink.LinkDel(link)
		} else {
			t.Errorf("left behind: link %s", name)
		}
		if err != nil {
			t.Error(err)
		}
	}
	checkThreads(t)
}

// checkThreads fails the test when a thread of this process is not in the node's namespace.
func checkThreads(t *testing.T) {
	t.Helper()
	home, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	tasks, err := filepath.Glob("/proc/self/task/*/ns/net")
	if err != nil || len(tasks) == 0 {
		t.Fatalf("threads: %v, %d", err, len(tasks))
	}
	for _, task := range tasks {
		if ns, err := os.Readlink(task); err == nil && ns != home {
			t.Errorf("%s is %s, not %s", task, ns, home)
		}
	}
}

func linkNames(t *testing.T) map[string]bool {
	t.Helper()
	names := map[string]bool{}
	if os.Getenv(isolated) == "" {
		return names
	}
	links, err := netlink.LinkList()
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range links {
		names[l.Attrs().Name] = true
	}
	return names
}

func mountLines(t *testing.T, part string) int {
	t.Helper()
	data, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	count := 0
	for line := range strings.Lines(string(data)) {
		if strings.Contains(line, part) {
			count++
		}
	}
	return count
}

// eventually waits, at most 10 s, until check is nil.
func eventually(t *testing.T, check func() error) {
	t.Helper()
	var err error
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		if err = check(); err == nil {
			return
		}
	}
	t.Fatal(err)
}
