package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/crivm/crivm/vmruntime/virtiofsd"
)

// checkCgroups tells the version and whether the controllers are there that account pods. root is
// /sys/fs/cgroup, list is /proc/cgroups.
func checkCgroups(driver, root, list string) finding {
	const name = "cgroups"
	const advice = "boot with systemd.unified_cgroup_hierarchy=1, and with the controllers enabled"
	wanted := []string{"cpu", "memory", "pids"}
	lacks := func(have []string) []string {
		return slices.DeleteFunc(slices.Clone(wanted), func(c string) bool { return slices.Contains(have, c) })
	}
	raw, err := os.ReadFile(filepath.Join(root, "cgroup.controllers"))
	if err == nil {
		if missing := lacks(strings.Fields(string(raw))); len(missing) > 0 {
			return fail(name, advice, "version 2 without %s", strings.Join(missing, ", "))
		}
		return ok(name, "version 2 with %s", strings.Join(wanted, ", "))
	}
	raw, err = os.ReadFile(list)
	if err != nil {
		return fail(name, advice, "%v", err)
	}
	var have []string
	for line := range strings.Lines(string(raw)) {
		fields := strings.Fields(line)
		if len(fields) < 4 || fields[3] != "1" {
			continue
		}
		if _, err := os.Stat(filepath.Join(root, fields[0])); err == nil {
			have = append(have, fields[0])
		}
	}
	missing := lacks(have)
	switch {
	case driver == "systemd":
		return fail(name, "use cgroup version 2, or cgroup_driver = \"cgroupfs\"", "cgroup_driver is systemd, which needs version 2; this is version 1")
	case len(missing) == len(wanted):
		return fail(name, advice, "no controller is mounted below %s", root)
	case len(missing) > 0:
		return warning(name, advice, "version 1 without %s: VMMs are not limited in these", strings.Join(missing, ", "))
	}
	return warning(name, "boot with systemd.unified_cgroup_hierarchy=1", "version 1, which kubelet is about to drop")
}

// programs that the daemon runs, and the packages that have them.
var programs = []struct{ name, pkg string }{
	{"mkfs.ext4", "e2fsprogs"}, // scratch disks of pods
}

func checkPrograms() []finding {
	var findings []finding
	for _, p := range programs {
		if path, err := lookProgram(p.name); err != nil {
			findings = append(findings, fail(p.name, "install the package "+p.pkg, "%v", err))
		} else {
			findings = append(findings, ok(p.name, "%s", path))
		}
	}
	if program, err := virtiofsd.Find(context.Background()); err != nil { // bounded by itself
		findings = append(findings, warning("virtiofsd", "", "%v; containers with writable host volumes are refused", err))
	} else {
		findings = append(findings, ok("virtiofsd", "%s", program.Path))
	}
	return findings
}

// lookProgram looks in PATH and where system programs are, which is not in everybody's PATH.
func lookProgram(name string) (string, error) {
	path, err := exec.LookPath(name)
	for _, dir := range []string{"/usr/sbin", "/sbin"} {
		if err == nil {
			break
		}
		if found, sbinErr := exec.LookPath(filepath.Join(dir, name)); sbinErr == nil {
			return found, nil
		}
	}
	return path, err
}

// checkFilesystems looks for overlay, by which the image store merges layers of images of unusual kinds. list is /proc/filesystems.
func checkFilesystems(list string) finding {
	const name = "overlay"
	raw, err := os.ReadFile(list)
	if err != nil {
		return warning(name, "", "%v", err)
	}
	for line := range strings.Lines(string(raw)) {
		if fields := strings.Fields(line); len(fields) > 0 && fields[len(fields)-1] == "overlay" {
			return ok(name, "known to the kernel")
		}
	}
	return warning(name, "modprobe overlay (and let it be loaded at boot, by a file in /etc/modules-load.d)",
		"not among the kernel's file systems yet: layers of images of unusual kinds (bzip2, xz, encrypted) are stored as full copies until it is loaded")
}

const (
	leastSpace  = 1 << 30
	enoughSpace = 10 << 30
)

// checkSpace tells how much room there is where key's directory is, or will be.
func checkSpace(key, dir string) finding {
	name := "space of " + key
	for {
		var st unix.Statfs_t
		err := unix.Statfs(dir, &st)
		if errors.Is(err, fs.ErrNotExist) && dir != "/" && dir != "." {
			dir = filepath.Dir(dir)
			continue
		}
		if err != nil {
			return fail(name, "", "%s: %v", dir, err)
		}
		return judgeSpace(name, dir, st.Bavail*uint64(st.Bsize), st.Ffree, st.Files)
	}
}

func judgeSpace(name, dir string, bytes, freeInodes, inodes uint64) finding {
	const advice = "make room, or put the directory on a larger file system"
	room := fmt.Sprintf("%.1f GiB free at %s", float64(bytes)/(1<<30), dir)
	switch {
	case bytes < leastSpace:
		return fail(name, advice, "%s", room)
	case inodes > 0 && freeInodes < inodes/100: // file systems without a fixed number say 0
		return warning(name, advice, "%s, but only %d inodes", room, freeInodes)
	case bytes < enoughSpace:
		return warning(name, advice, "%s", room)
	}
	return ok(name, "%s", room)
}

// sysctls that a node wants, with the least value.
var sysctls = []struct {
	key    string
	least  int64
	reason string
}{
	{"net.ipv4.ip_forward", 1, "traffic between pods and other machines is not forwarded (many CNI plugins set it)"},
	{"fs.inotify.max_user_instances", 128, "watching configuration and volumes fails on a busy node"},
	{"kernel.pid_max", 32768, "a node runs out of process ids"},
	{"user.max_net_namespaces", 1000, "each pod has a network namespace"},
}

// checkSysctls reads below root, /proc/sys. Those that a kernel lacks are of no use on it.
func checkSysctls(root string) []finding {
	var findings []finding
	for _, s := range sysctls {
		raw, err := os.ReadFile(filepath.Join(root, strings.ReplaceAll(s.key, ".", "/")))
		if err != nil {
			continue
		}
		value, err := strconv.ParseInt(strings.TrimSpace(string(raw)), 10, 64)
		if err != nil || value >= s.least {
			continue
		}
		findings = append(findings, warning("sysctl "+s.key, fmt.Sprintf("sysctl -w %s=%d, and put it in /etc/sysctl.d", s.key, s.least), "is %d: %s", value, s.reason))
	}
	if findings == nil {
		findings = append(findings, ok("sysctls", "as a node needs them"))
	}
	return findings
}
