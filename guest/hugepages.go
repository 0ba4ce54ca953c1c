package guest

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/crivm/crivm/agentproto"
)

// hugepageTries bounds how often the kernel is asked for huge pages while memory is compacted for them.
const hugepageTries = 3

// hugepageRoot has a directory for each size of huge pages that the kernel knows.
const hugepageRoot = "/sys/kernel/mm/hugepages"

var hugepageMu sync.Mutex // one at a time changes the number of pages

// ReserveHugepages implements agentproto.AgentService.
func (a *Agent) ReserveHugepages(_ context.Context, r *agentproto.ReserveHugepagesRequest) (*agentproto.ReserveHugepagesResponse, error) {
	if r.GetPageBytes() <= 0 || r.GetPages() < 0 {
		return nil, fmt.Errorf("%d pages of %d bytes: %w", r.GetPages(), r.GetPageBytes(), errdefs.ErrInvalidArgument)
	}
	if a.machine == nil { // the kernel is somebody else's
		return &agentproto.ReserveHugepagesResponse{}, nil
	}
	hugepageMu.Lock()
	defer hugepageMu.Unlock()
	pool := filepath.Join(hugepageRoot, fmt.Sprintf("hugepages-%dkB", r.GetPageBytes()>>10), "nr_hugepages")
	if _, err := os.Stat(pool); errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("the guest's kernel has no huge pages of %d bytes: %w", r.GetPageBytes(), errdefs.ErrNotImplemented)
	}
	if err := setHugepages(pool, r.GetPages()); err != nil {
		return nil, err
	}
	return &agentproto.ReserveHugepagesResponse{}, nil
}

// setHugepages makes the pool have so many pages. Pages in use stay beyond a lower number until they are freed.
func setHugepages(pool string, pages int64) error {
	before := readNumber(pool)
	for try := 1; ; try++ {
		if err := os.WriteFile(pool, []byte(strconv.FormatInt(pages, 10)), 0); err != nil {
			return fmt.Errorf("reserving %d huge pages: %w", pages, err)
		}
		got := readNumber(pool)
		if got >= uint64(pages) {
			return nil
		}
		if try == hugepageTries {
			undo := os.WriteFile(pool, []byte(strconv.FormatUint(before, 10)), 0)
			return errors.Join(fmt.Errorf("the guest has memory for %d of %d huge pages: %w", got, pages, errdefs.ErrResourceExhausted), undo)
		}
		// What fills the memory is mostly clean page cache in the way of large pages.
		for file, value := range map[string]string{"drop_caches": "3", "compact_memory": "1"} {
			if err := os.WriteFile(filepath.Join("/proc/sys/vm", file), []byte(value), 0); err != nil {
				return fmt.Errorf("making room for huge pages: %w", err)
			}
		}
	}
}

// prepareHugepages mounts a hugetlbfs, once in the pod's life.
func (v *volumes) prepareHugepages(h *agentproto.HugepageVolume) (string, error) {
	if err := checkID("volume", h.GetVolume()); err != nil {
		return "", err
	}
	if v.agent.machine == nil {
		return "", fmt.Errorf("huge pages: this agent has no memory of its own: %w", errdefs.ErrFailedPrecondition)
	}
	path := filepath.Join(v.agent.Dir, "volumes", "hugepages", h.GetVolume())
	v.mu.Lock()
	defer v.mu.Unlock()
	if err := os.MkdirAll(path, 0o755); err != nil {
		return "", err
	}
	fresh := !mounted(path)
	if fresh {
		options := fmt.Sprintf("pagesize=%d", h.GetPageBytes())
		if err := unix.Mount("hugetlbfs", path, "hugetlbfs", unix.MS_NOSUID|unix.MS_NODEV, options); err != nil {
			return "", fmt.Errorf("mount of huge pages of %d bytes: %w", h.GetPageBytes(), errors.Join(err, os.Remove(path)))
		}
	}
	root, err := os.OpenRoot(path)
	if err != nil {
		return "", err
	}
	defer root.Close()
	sub := filepath.Clean("./" + h.GetSubPath())
	if _, err := root.Stat(sub); errors.Is(err, fs.ErrNotExist) {
		fresh = true
		if err := root.MkdirAll(sub, 0o755); err != nil {
			return "", err
		}
	} else if err != nil {
		return "", err
	}
	if fresh { // as the host has it; later a container may have changed it
		uid, gid := v.agent.namespaces.Load().owner(int(h.GetUid()), int(h.GetGid()))
		if err := errors.Join(root.Chown(sub, uid, gid), root.Chmod(sub, fileMode(h.GetMode()))); err != nil {
			return "", err
		}
	}
	return resolveIn(path, sub)
}

// limitReservations makes a limit of huge pages hold for their reservation too, so that a process that wants more is
// told by mmap(2) rather than killed when it touches them.
func limitReservations(r *specs.LinuxResources) {
	if r == nil || len(r.HugepageLimits) == 0 {
		return
	}
	if r.Unified == nil {
		r.Unified = map[string]string{}
	}
	for _, h := range r.HugepageLimits {
		file := "hugetlb." + h.Pagesize + ".rsvd.max"
		if _, given := r.Unified[file]; !given {
			r.Unified[file] = strconv.FormatUint(h.Limit, 10)
		}
	}
}

// hugepageStats reads the figures of a cgroup, for each size of pages that the kernel has.
func hugepageStats(dir string) []*agentproto.HugepageStats {
	files, _ := filepath.Glob(filepath.Join(dir, "hugetlb.*.current"))
	stats := []*agentproto.HugepageStats{}
	for _, file := range files {
		size := strings.TrimSuffix(strings.TrimPrefix(filepath.Base(file), "hugetlb."), ".current")
		if strings.Contains(size, ".") { // rsvd.current
			continue
		}
		stats = append(stats, &agentproto.HugepageStats{
			PageSize: size, UsageBytes: readNumber(file), LimitHits: readTable(filepath.Join(dir, "hugetlb."+size+".events"))["max"],
		})
	}
	return stats
}
