package vmruntime

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	systemd "github.com/coreos/go-systemd/v22/dbus"
	"github.com/godbus/dbus/v5"
	"golang.org/x/sys/unix"
)

// cgroupXattr marks the cgroups that Launch made, so that empty ones can be removed with the last leaf and
// kubelet's are left alone. A leaf bears the directory that it was made for.
const cgroupXattr = "trusted.crivm"

// hierarchy is one mounted cgroup tree: the unified one, or a version 1 controller's.
type hierarchy struct {
	v2      bool
	mount   string
	options string // comma separated; a version 1 tree names its controllers here
}

// hierarchies lists the cgroup trees mounted on this host, each once.
func hierarchies() ([]hierarchy, error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, fmt.Errorf("cgroup mounts: %w", err)
	}
	defer f.Close()
	var (
		found []hierarchy
		seen  []string
	)
	for sc := bufio.NewScanner(f); sc.Scan(); {
		// 36 35 98:0 /root /mount/point opts optional... - type source superopts (proc_pid_mountinfo(5))
		left, right, ok := strings.Cut(sc.Text(), " - ")
		l, r := strings.Fields(left), strings.Fields(right)
		if !ok || len(l) < 6 || len(r) < 3 || (r[0] != "cgroup" && r[0] != "cgroup2") || slices.Contains(seen, l[2]) {
			continue
		}
		seen = append(seen, l[2])
		found = append(found, hierarchy{v2: r[0] == "cgroup2", mount: l[4], options: r[2]})
	}
	return found, nil
}

// cgroupDirs are the leaves of one cgroup in all hierarchies; the zero value is no cgroup.
type cgroupDirs struct {
	v2 *os.File // leaf in the unified hierarchy, for clone3
	v1 []string
}

func (d *cgroupDirs) close() {
	if d.v2 != nil {
		d.v2.Close()
	}
}

// enterV1 moves the calling thread into the version 1 leaves, for its children to be born there.
func (d *cgroupDirs) enterV1() error {
	for _, dir := range d.v1 {
		if err := os.WriteFile(filepath.Join(dir, "tasks"), []byte("0"), 0); err != nil {
			return fmt.Errorf("enter cgroup: %w", err)
		}
	}
	return nil
}

// leaf is the path of the cgroup below a hierarchy's mount point.
func (c Cgroup) leaf() (string, error) {
	if c.Name == "." || c.Name == ".." || strings.ContainsAny(c.Name, "/\x00") {
		return "", fmt.Errorf("cgroup name %q: %w", c.Name, errdefs.ErrInvalidArgument)
	}
	return path.Join("/", c.Parent, c.Name), nil
}

func (c Cgroup) scope() string { return "crivm-" + c.Name + ".scope" }

// makeCgroup makes the leaf in every hierarchy, marked with the directory that owns it. Nothing to do without a name, or when systemd makes it.
func makeCgroup(c Cgroup, owner string) (*cgroupDirs, error) {
	dirs := &cgroupDirs{}
	if c.Name == "" || c.Systemd {
		return dirs, nil
	}
	leaf, err := c.leaf()
	if err != nil {
		return nil, err
	}
	trees, err := hierarchies()
	if err != nil {
		return nil, err
	}
	for _, h := range trees {
		if err := makeLeaf(h, leaf, owner); err != nil {
			dirs.close()
			return nil, errors.Join(fmt.Errorf("make cgroup: %w", err), removeCgroup(context.Background(), c))
		}
		dir := filepath.Join(h.mount, leaf)
		weigh(h, filepath.Dir(dir), c.ParentWeight)
		if !h.v2 {
			dirs.v1 = append(dirs.v1, dir)
			continue
		}
		if dirs.v2, err = os.Open(dir); err != nil {
			return nil, errors.Join(fmt.Errorf("make cgroup: %w", err), removeCgroup(context.Background(), c))
		}
	}
	return dirs, nil
}

// weigh sets a cgroup's share of the CPUs. The hierarchy's root has none.
func weigh(h hierarchy, dir string, weight int) {
	if weight == 0 || dir == h.mount {
		return
	}
	file, value := "cpu.weight", weight
	if !h.v2 {
		file, value = "cpu.shares", max(2, weight*1024/100)
	}
	if _, err := os.Stat(filepath.Join(dir, file)); err == nil { // elsewhere is another controller
		_ = os.WriteFile(filepath.Join(dir, file), []byte(strconv.Itoa(value)), 0)
	}
}

// makeLeaf makes the directories down to leaf. Another VM's removal may take an empty parent away in
// between, so it starts over a few times.
func makeLeaf(h hierarchy, leaf, owner string) error {
	var err error
	for range 20 {
		if err = makeLeafOnce(h, leaf, owner); !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return err
}

func makeLeafOnce(h hierarchy, leaf, owner string) error {
	dir, end := h.mount, filepath.Join(h.mount, leaf)
	for name := range strings.SplitSeq(strings.Trim(leaf, "/"), "/") {
		if h.v2 {
			enableControllers(dir)
		}
		parent := dir
		dir = filepath.Join(dir, name)
		err := os.Mkdir(dir, 0o755)
		exists := errors.Is(err, os.ErrExist)
		if err != nil && !exists {
			return err
		}
		if !exists {
			// Without the mark the directory stays after its last leaf, which is harmless.
			mark := "made"
			if dir == end {
				mark = owner
			}
			_ = unix.Setxattr(dir, cgroupXattr, []byte(mark), 0)
		}
		if !h.v2 && slices.Contains(strings.Split(h.options, ","), "cpuset") {
			if err := inheritCPUSet(parent, dir); err != nil {
				return err
			}
		}
	}
	return nil
}

// enableControllers hands the controllers that dir has on to its children. Each by itself and without
// regard for errors: a controller that cannot be had (realtime processes, threads) leaves the VM without
// that one limit and is not a reason to fail.
func enableControllers(dir string) {
	b, err := os.ReadFile(filepath.Join(dir, "cgroup.controllers"))
	if err != nil {
		return
	}
	for _, c := range strings.Fields(string(b)) {
		_ = os.WriteFile(filepath.Join(dir, "cgroup.subtree_control"), []byte("+"+c), 0)
	}
}

// inheritCPUSet fills a version 1 cpuset that is empty, as new ones are: it takes no task. One that is there already may be
// another VM's parent that was made this moment, or by a daemon that was killed before it filled it.
func inheritCPUSet(parent, dir string) error {
	for _, f := range []string{"cpuset.cpus", "cpuset.mems"} {
		own, err := os.ReadFile(filepath.Join(dir, f))
		if err != nil {
			return err
		}
		if len(bytes.TrimSpace(own)) > 0 {
			continue
		}
		b, err := os.ReadFile(filepath.Join(parent, f))
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(dir, f), b, 0); err != nil {
			return err
		}
	}
	return nil
}

// removeCgroup removes the leaf and those of its parents that Launch made, when they are empty. A leaf
// stays busy for a moment after its last process ended, so it is tried again for about two seconds.
func removeCgroup(ctx context.Context, c Cgroup) error {
	if c.Name == "" {
		return nil
	}
	if c.Systemd {
		return leaveScope(ctx, c)
	}
	leaf, err := c.leaf()
	if err != nil {
		return err
	}
	trees, err := hierarchies()
	if err != nil {
		return err
	}
	var errs []error
	for _, h := range trees {
		errs = append(errs, removeLeaf(ctx, h, leaf))
	}
	return errors.Join(errs...)
}

// removeCgroups removes the cgroup of a process and the one that it was being moved from, if there is one.
func removeCgroups(ctx context.Context, c Cgroup, left *Cgroup) error {
	if left == nil {
		return removeCgroup(ctx, c)
	}
	return errors.Join(removeCgroup(ctx, c), removeCgroup(ctx, *left))
}

func removeLeaf(ctx context.Context, h hierarchy, leaf string) error {
	dir := filepath.Join(h.mount, leaf)
	if h.v2 { // whatever the VMM may have left behind in it
		_ = os.WriteFile(filepath.Join(dir, "cgroup.kill"), []byte("1"), 0)
	}
	var err error
	for try := range 100 {
		if try > 0 {
			select {
			case <-ctx.Done():
				return fmt.Errorf("remove cgroup: %w: %w", ctx.Err(), err)
			case <-time.After(20 * time.Millisecond):
			}
		}
		err = unix.Rmdir(dir)
		if err == nil || err == unix.ENOENT {
			break
		}
	}
	if err != nil && err != unix.ENOENT {
		return fmt.Errorf("remove cgroup %s: %w", dir, err)
	}
	removeMadeParents(dir)
	return nil
}

// enterScope asks systemd to move the process into a transient scope of the parent slice.
func enterScope(ctx context.Context, c Cgroup, pid int) error {
	if c.Name == "" || !c.Systemd {
		return nil
	}
	conn, err := systemd.NewSystemdConnectionContext(ctx)
	if err != nil {
		return fmt.Errorf("systemd scope %s: %w", c.scope(), err)
	}
	defer conn.Close()
	props := []systemd.Property{
		systemd.PropDescription("crivm VM " + c.Name),
		systemd.PropSlice(path.Base(c.Parent)),
		systemd.PropPids(uint32(pid)),
		{Name: "CollectMode", Value: dbus.MakeVariant("inactive-or-failed")},
		{Name: "DefaultDependencies", Value: dbus.MakeVariant(false)},
	}
	if c.ParentWeight > 0 { // a slice that is there already has its weight
		slice := []systemd.Property{systemd.PropDescription("crivm VMs without a pod"), {Name: "CPUWeight", Value: dbus.MakeVariant(uint64(c.ParentWeight))}}
		made := make(chan string, 1)
		if _, err := conn.StartTransientUnitContext(ctx, path.Base(c.Parent), "replace", slice, made); err == nil {
			select {
			case <-made:
			case <-ctx.Done():
			}
		}
	}
	result := make(chan string, 1)
	if _, err := conn.StartTransientUnitContext(ctx, c.scope(), "replace", props, result); err != nil {
		return fmt.Errorf("systemd scope %s: %w", c.scope(), err)
	}
	select {
	case s := <-result:
		if s != "done" {
			return fmt.Errorf("systemd scope %s: job %s", c.scope(), s)
		}
		return nil
	case <-ctx.Done():
		return fmt.Errorf("systemd scope %s: %w", c.scope(), ctx.Err())
	case <-time.After(30 * time.Second):
		return fmt.Errorf("systemd scope %s: no answer within 30 s", c.scope())
	}
}

// leaveScope ends a scope that outlived its process; normally systemd has dropped it already.
func leaveScope(ctx context.Context, c Cgroup) error {
	conn, err := systemd.NewSystemdConnectionContext(ctx)
	if err != nil {
		return fmt.Errorf("systemd scope %s: %w", c.scope(), err)
	}
	defer conn.Close()
	_, err = conn.StopUnitContext(ctx, c.scope(), "replace", nil)
	var derr dbus.Error
	if errors.As(err, &derr) && derr.Name == "org.freedesktop.systemd1.NoSuchUnit" {
		return nil
	}
	if err != nil {
		return fmt.Errorf("systemd scope %s: %w", c.scope(), err)
	}
	return nil
}
