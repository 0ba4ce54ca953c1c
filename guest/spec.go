package guest

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/crivm/crivm/agentproto"
)

// cgroupParent is the cgroup below which every container has one of its own.
const cgroupParent = "/crivm"

// parseSpec reads the host's OCI spec and refuses what the agent does not do.
func parseSpec(raw []byte) (*specs.Spec, error) {
	var s specs.Spec
	if err := json.Unmarshal(raw, &s); err != nil {
		return nil, fmt.Errorf("OCI spec: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	//lint:ignore SA1019 prestart hooks are old, not gone
	if h := s.Hooks; h != nil && len(h.Prestart)+len(h.CreateRuntime)+len(h.CreateContainer)+len(h.StartContainer)+len(h.Poststart)+len(h.Poststop) > 0 {
		return nil, fmt.Errorf("OCI spec: hooks are refused: %w", errdefs.ErrInvalidArgument)
	}
	if s.Process == nil || len(s.Process.Args) == 0 || s.Process.Args[0] == "" {
		return nil, fmt.Errorf("OCI spec: no command: %w", errdefs.ErrInvalidArgument)
	}
	if s.Process.Cwd == "" {
		s.Process.Cwd = "/"
	}
	if !filepath.IsAbs(s.Process.Cwd) {
		return nil, fmt.Errorf("OCI spec: working directory %q is not absolute: %w", s.Process.Cwd, errdefs.ErrInvalidArgument)
	}
	s.Annotations = nil // they steer the OCI runtime, and some of them come from users
	if s.Linux == nil {
		s.Linux = &specs.Linux{}
	}
	return &s, nil
}

// completeSpec adds what only the guest knows.
func (a *Agent) completeSpec(ctx context.Context, c *container, s *specs.Spec, root string, r *agentproto.CreateContainerRequest) (*agentproto.ResolvedUser, error) {
	acc, err := resolveUser(root, r.GetUser())
	if err != nil {
		return nil, err
	}
	s.Root = &specs.Root{Path: root, Readonly: r.GetRootfs().GetReadonly()}
	p := s.Process
	p.User.UID, p.User.GID, p.User.AdditionalGids, p.User.Username = acc.Uid, acc.Gid, acc.Groups, ""
	if !slices.ContainsFunc(p.Env, func(kv string) bool { return strings.HasPrefix(kv, "HOME=") }) {
		p.Env = append(p.Env, "HOME="+acc.home)
	}
	setTerminal(p, r.GetStdio())
	s.Linux.CgroupsPath = filepath.Join(cgroupParent, c.id)
	confineResources(s.Linux.Resources)
	if a.machine != nil {
		dropAbsentHugepages(s.Linux.Resources)
		limitReservations(s.Linux.Resources)
	}
	if err := a.addDevices(ctx, c, s, r.GetDevices()); err != nil {
		return nil, err
	}
	if err := a.setPIDNamespace(s, r); err != nil {
		return nil, err
	}
	mounts, err := a.volumeMounts(ctx, c, root, r.GetMounts())
	if err != nil {
		return nil, err
	}
	s.Mounts = append(s.Mounts, mounts...)
	// Parents before what is mounted below them; else in the host's order.
	slices.SortStableFunc(s.Mounts, func(x, y specs.Mount) int {
		return depth(x.Destination) - depth(y.Destination)
	})
	return &acc.ResolvedUser, nil
}

func depth(path string) int { return strings.Count(filepath.Clean(path), "/") }

// setTerminal says whether a process has a terminal and of which size.
func setTerminal(p *specs.Process, s *agentproto.Stdio) {
	p.Terminal, p.ConsoleSize = s.GetTty(), nil
	if s.GetTty() && s.GetRows() > 0 && s.GetColumns() > 0 {
		p.ConsoleSize = &specs.Box{Height: uint(s.GetRows()), Width: uint(s.GetColumns())}
	}
}

// confineResources drops what has no meaning in the guest: the host's CPU numbers and memory nodes.
func confineResources(r *specs.LinuxResources) {
	if r == nil || r.CPU == nil {
		return
	}
	r.CPU.Cpus, r.CPU.Mems = "", ""
	// cgroup v2 knows no real-time group scheduling.
	r.CPU.RealtimePeriod, r.CPU.RealtimeRuntime = nil, nil
}

// dropAbsentHugepages drops limits for sizes of pages that this kernel does not have: none can be used.
func dropAbsentHugepages(r *specs.LinuxResources) {
	if r == nil {
		return
	}
	r.HugepageLimits = slices.DeleteFunc(r.HugepageLimits, func(h specs.LinuxHugepageLimit) bool {
		_, err := os.Stat(filepath.Join(cgroupRoot, cgroupParent, "hugetlb."+filepath.Base(h.Pagesize)+".max"))
		return err != nil
	})
}

// setPIDNamespace gives the container a PID namespace of its own, the pod's, or another container's.
func (a *Agent) setPIDNamespace(s *specs.Spec, r *agentproto.CreateContainerRequest) error {
	ns := specs.LinuxNamespace{Type: specs.PIDNamespace}
	switch {
	case r.GetPidTarget() != "":
		target, err := a.container(r.GetPidTarget())
		if err != nil {
			return fmt.Errorf("target of the PID namespace: %w", err)
		}
		target.mu.Lock()
		defer target.mu.Unlock()
		if target.state != agentproto.State_STATE_RUNNING {
			return fmt.Errorf("target of the PID namespace: container %s is %s: %w", target.id, stateName(target.state), errdefs.ErrFailedPrecondition)
		}
		ns.Path = fmt.Sprintf("/proc/%d/ns/pid", target.main.child.PID)
	case r.GetPidPod():
		path, err := a.podPIDNamespace()
		if err != nil {
			return err
		}
		ns.Path = path
	}
	if a.machine == nil {
		return nil
	}
	s.Linux.Namespaces = slices.DeleteFunc(s.Linux.Namespaces, func(n specs.LinuxNamespace) bool {
		return n.Type == specs.PIDNamespace
	})
	s.Linux.Namespaces = append(s.Linux.Namespaces, ns)
	return nil
}
