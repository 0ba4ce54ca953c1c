package node

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
)

// leakLimit bounds waiting for what ends a moment after a call has returned, such as a process that is
// being reaped.
const leakLimit = 5 * time.Second

// CheckLeaks compares the node with what it was before its first pod: processes, network namespaces and
// links, mounts, cgroups, files and records. All pods must have been removed.
func (n *Node) CheckLeaks(ctx context.Context) error {
	var errs []error
	if pods, err := n.Runtime.ListPodSandbox(ctx, nil); err != nil || len(pods) > 0 {
		errs = append(errs, fmt.Errorf("%d sandboxes are still listed (%v)", len(pods), err))
	}
	if containers, err := n.Runtime.ListContainers(ctx, nil); err != nil || len(containers) > 0 {
		errs = append(errs, fmt.Errorf("%d containers are still listed (%v)", len(containers), err))
	}
	deadline := time.NewTimer(leakLimit)
	defer deadline.Stop()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		now, err := n.snapshot()
		if err != nil {
			return errors.Join(append(errs, err)...)
		}
		var left []string
		for thing := range now {
			if !n.baseline[thing] {
				left = append(left, thing)
			}
		}
		if len(left) == 0 {
			return errors.Join(errs...)
		}
		slices.Sort(left)
		select {
		case <-deadline.C:
			return errors.Join(append(errs, fmt.Errorf("left behind: %s", strings.Join(left, "; ")))...)
		case <-tick.C:
		}
	}
}

// snapshot lists what a pod can leave behind.
func (n *Node) snapshot() (map[string]bool, error) {
	found := map[string]bool{}
	for _, look := range []func(map[string]bool) error{n.processes, n.links, n.mounts, n.cgroups, n.files} {
		if err := look(found); err != nil {
			return nil, err
		}
	}
	return found, nil
}

// processes of this node, the daemon aside: their command line or working directory names one of its
// directories.
func (n *Node) processes(found map[string]bool) error {
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return err
	}
	for _, dir := range dirs {
		line, err := os.ReadFile(filepath.Join(dir, "cmdline"))
		if err != nil {
			continue // it has ended
		}
		pid := filepath.Base(dir)
		text := string(bytes.ReplaceAll(line, []byte{0}, []byte{' '}))
		if pid == fmt.Sprint(n.PID()) || pid == fmt.Sprint(os.Getpid()) || !strings.Contains(text, n.RunDir) {
			continue
		}
		found[fmt.Sprintf("process %s %.100s", pid, text)] = true
	}
	return nil
}

// links of the node's network namespace; a bridge stays with the node, as with any CNI plugin.
func (n *Node) links(found map[string]bool) error {
	links, err := netlink.LinkList()
	if err != nil {
		return err
	}
	for _, l := range links {
		if l.Type() != "bridge" {
			found["link "+l.Attrs().Name] = true
		}
	}
	return nil
}

func (n *Node) mounts(found map[string]bool) error {
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(text)) {
		if fields := strings.Fields(line); len(fields) > 4 {
			found["mount "+fields[4]] = true
		}
	}
	delete(found, "mount /run/netns") // is a mount point of its own since the first pod, as ip-netns(8) makes it
	return nil
}

func (n *Node) cgroups(found map[string]bool) error {
	parents, err := filepath.Glob("/sys/fs/cgroup/*" + CgroupParent)
	if err != nil {
		return err
	}
	pools, err := filepath.Glob("/sys/fs/cgroup/*" + CgroupParent + "_pool")
	if err != nil {
		return err
	}
	for _, parent := range append(append(parents, pools...), "/sys/fs/cgroup"+CgroupParent, "/sys/fs/cgroup"+CgroupParent+"_pool") {
		entries, err := os.ReadDir(parent)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		for _, e := range entries {
			if e.IsDir() {
				found["cgroup "+filepath.Join(parent, e.Name())] = true
			}
		}
	}
	return nil
}

// files of pods; images, templates and the database stay.
func (n *Node) files(found map[string]bool) error {
	for _, dir := range []string{"/run/netns", filepath.Join(n.RunDir, "vm"), filepath.Join(n.RunDir, "fs"), n.state("pods"), n.state("positions"), n.state("cni/results"), n.state("cni/pods"), n.state("ipam/test")} {
		entries, err := os.ReadDir(dir)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		for _, e := range entries {
			if e.Name() == "lock" || strings.HasPrefix(e.Name(), "last_reserved_ip") { // host-local keeps these
				continue
			}
			found["file "+filepath.Join(dir, e.Name())] = true
		}
	}
	return nil
}

// RemoveCgroups deletes the node's own cgroup; called when the node has stopped.
func RemoveCgroups() error {
	parents, err := filepath.Glob("/sys/fs/cgroup/*" + CgroupParent)
	if err != nil {
		return err
	}
	var errs []error
	for _, parent := range append(parents, "/sys/fs/cgroup"+CgroupParent) {
		if err := os.Remove(parent); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}
