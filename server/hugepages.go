package server

import (
	"context"
	"fmt"
	"math"
	"os"
	"path"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crivm/crivm/agentproto"
	"github.com/crivm/crivm/server/store"
)

// Huge pages of a pod are its guest's: taken out of the memory that the VM has for its pod, as many as the limits of
// the pod, or of its containers together, allow. The VM does not grow for them: the pod's cgroup on the host does not
// either. The guest's cgroups hold each container to its limit.
const (
	hugepageSize  = "2MB" // as CRI and the kernel's cgroup files spell it
	hugepageBytes = 2 << 20
)

// validateHugepages checks limits; kubelet sends all sizes that the host has, with 0.
func validateHugepages(field string, limits []*cri.HugepageLimit) error {
	field += ".hugepage_limits"
	for _, h := range limits {
		switch {
		case h.GetLimit() == 0:
		case h.GetPageSize() != hugepageSize:
			return unsupported(field, "pages of %s: a guest has huge pages of %s only, as larger ones need as much memory in one piece", h.GetPageSize(), hugepageSize)
		case h.GetLimit()%hugepageBytes != 0 || h.GetLimit() > math.MaxInt64/2:
			return invalid(field, "%d is not a number of pages of %s", h.GetLimit(), hugepageSize)
		}
	}
	return nil
}

// hugepages is the limit of huge pages in bytes; 0 for none.
func hugepages(r *cri.LinuxContainerResources) int64 {
	for _, h := range r.GetHugepageLimits() {
		if h.GetPageSize() == hugepageSize {
			return int64(h.GetLimit())
		}
	}
	return 0
}

// neededHugepages is how many bytes of huge pages the guest must have ready: the pod's limit where it has one, else
// what the limits of its containers add up to.
func neededHugepages(pod *cri.LinuxContainerResources, containers []store.Container) int64 {
	if limit := hugepages(pod); limit > 0 {
		return limit
	}
	sum := int64(0)
	for _, c := range containers {
		if c.State != store.ContainerExited {
			sum += min(hugepages(c.Config.GetLinux().GetResources()), math.MaxInt64/2-sum)
		}
	}
	return sum
}

// fitHugepages refuses more huge pages than the pod has memory.
func fitHugepages(field string, need, vmMemory int64) error {
	if room := vmMemory - guestReserve; need > 0 && need > room {
		return fmt.Errorf("%s.hugepage_limits: %d bytes of huge pages do not fit into the %d bytes of memory that the pod has, out of which they come; raise its memory limit by as much: %w",
			field, need, max(room, 0), errdefs.ErrOutOfRange)
	}
	return nil
}

// settleHugepages gives the guest the huge pages that its containers may use now.
func (s *Server) settleHugepages(ctx context.Context, sb *sandbox) error {
	if err := sb.size.lock(ctx); err != nil {
		return fmt.Errorf("huge pages: %w", err)
	}
	defer sb.size.unlock()
	rec, err := s.store.Sandbox(sb.id)
	if err != nil {
		return err
	}
	need := neededHugepages(rec.Config.GetLinux().GetResources(), s.store.Containers(sb.id))
	if err := fitHugepages("config.linux.resources", need, rec.VM.Memory); err != nil {
		return err
	}
	return s.setHugepages(ctx, sb, need)
}

// setHugepages is called with sb.size held.
func (s *Server) setHugepages(ctx context.Context, sb *sandbox, need int64) error {
	if sb.hugepages == need {
		return nil
	}
	agent, err := sb.client(ctx)
	if err != nil {
		return err
	}
	_, err = agent.ReserveHugepages(ctx, &agentproto.ReserveHugepagesRequest{PageBytes: hugepageBytes, Pages: need / hugepageBytes})
	if errdefs.IsNotImplemented(err) && need == 0 { // an agent or kernel without them
		err = nil
	}
	if err != nil {
		return fmt.Errorf("hugepage_limits: %w", err)
	}
	sb.hugepages = need
	return nil
}

// releaseHugepages gives the memory back that a container which is no more could have used; what fails is done with the
// next container.
func (s *Server) releaseHugepages(ctx context.Context, rec store.Container) {
	if hugepages(rec.Config.GetLinux().GetResources()) == 0 || !s.lives(rec.SandboxID) {
		return
	}
	if err := s.settleHugepages(ctx, s.sandbox(rec.SandboxID)); err != nil {
		s.log.Warn("giving huge pages back", "sandbox", rec.SandboxID, "error", err)
	}
}

// hugepageVolume recognises a directory of a hugetlbfs, as kubelet mounts it for an emptyDir of medium HugePages: nil
// for any other. Its containers get one of the guest's instead, which is empty at first. Directories of one hugetlbfs
// of the host are directories of one of the guest.
func hugepageVolume(field string, source *os.File, host string) (*agentproto.HugepageVolume, error) {
	var kind unix.Statfs_t
	if err := unix.Fstatfs(int(source.Fd()), &kind); err != nil {
		return nil, fmt.Errorf("%s.host_path: %w", field, err)
	}
	if kind.Type != unix.HUGETLBFS_MAGIC {
		return nil, nil
	}
	var st unix.Statx_t
	if err := unix.Statx(int(source.Fd()), "", unix.AT_EMPTY_PATH, unix.STATX_BASIC_STATS|unix.STATX_MNT_ID, &st); err != nil {
		return nil, fmt.Errorf("%s.host_path: %w", field, err)
	}
	switch {
	case st.Mode&unix.S_IFMT != unix.S_IFDIR:
		return nil, unsupported(field+".host_path", "%s is a file of the host's huge pages, and the guest has its own; mount a directory", host)
	case kind.Bsize != hugepageBytes:
		return nil, unsupported(field+".host_path", "%s has pages of %d bytes: a guest has huge pages of %s only", host, kind.Bsize, hugepageSize)
	}
	mounts, err := mountTable()
	if err != nil {
		return nil, err
	}
	for _, m := range mounts {
		if m.id == st.Mnt_id {
			return &agentproto.HugepageVolume{
				Volume: fmt.Sprintf("huge-%d-%d", st.Dev_major, st.Dev_minor), PageBytes: hugepageBytes,
				SubPath: strings.TrimPrefix(path.Join(m.root, strings.TrimPrefix(host, m.point)), "/"),
				Mode:    uint32(st.Mode) & 0o7777, Uid: st.Uid, Gid: st.Gid,
			}, nil
		}
	}
	return nil, fmt.Errorf("%s.host_path: %s is in no mount of this process: %w", field, host, errdefs.ErrUnavailable)
}

// mergeHugepages are limits after a change, which leaves sizes that it does not name as they are.
func mergeHugepages(limits, change []*cri.HugepageLimit) []*cri.HugepageLimit {
	merged := slices.Clone(limits)
	for _, c := range change {
		i := slices.IndexFunc(merged, func(h *cri.HugepageLimit) bool { return h.GetPageSize() == c.GetPageSize() })
		if i < 0 {
			merged = append(merged, c)
		} else {
			merged[i] = c
		}
	}
	return merged
}

// pagesBack gives a guest the huge pages that it had before a change that failed. Called with sb.size held.
func (s *Server) pagesBack(ctx context.Context, sb *sandbox, rec store.Sandbox) {
	ctx, cancel := detached(ctx, shrinkLimit)
	defer cancel()
	if err := s.setHugepages(ctx, sb, neededHugepages(rec.Config.GetLinux().GetResources(), s.store.Containers(rec.ID))); err != nil && s.lives(sb.id) {
		s.log.Error("giving a guest its huge pages back", "sandbox", sb.id, "error", err)
	}
}

// plausibleHugepages drops figures of sizes that no guest has; of others the limit's hits do not fall.
func (c ceilings) plausibleHugepages(now, before []*agentproto.HugepageStats) []*agentproto.HugepageStats {
	var kept []*agentproto.HugepageStats
	for _, size := range []string{hugepageSize, "1GB"} {
		of := func(h *agentproto.HugepageStats) bool { return h.GetPageSize() == size }
		i, was := slices.IndexFunc(now, of), slices.IndexFunc(before, of)
		if i < 0 {
			continue
		}
		h := now[i]
		h.UsageBytes, h.LimitHits = min(h.UsageBytes, c.memory), min(h.LimitHits, maxCount)
		if was >= 0 {
			h.LimitHits = max(h.LimitHits, before[was].LimitHits)
		}
		kept = append(kept, h)
	}
	return kept
}
