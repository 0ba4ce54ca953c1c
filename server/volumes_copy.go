package server

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crivm/crivm/agentproto"
	"github.com/crivm/crivm/server/store"
)

// What kubelet writes for containers to read is copied into the guest's memory and kept up to date: one copy for
// each pod and directory or file, whichever containers mount it, so that a change is one for all of them. The
// daemon scans and watches the host's side; the agent applies what has changed.

// copiedVolumes are directories that kubelet writes and nobody else: its pods' volumes of these plugins.
var copiedVolumes = regexp.MustCompile(`/pods/([^/]+)/volumes/kubernetes\.io~(?:configmap|secret|projected|downward-api)/[^/]+$`)

// hostsFiles are the hosts files that kubelet writes. It mounts them writable, and rewrites them whenever it makes a
// container of the pod: what a container adds was never meant to stay.
var hostsFiles = regexp.MustCompile(`/pods/([^/]+)/etc-hosts$`)

const (
	// maxUpload bounds what one part of an upload carries of content, in bytes.
	maxUpload = 256 << 10
	// copyWorkers is how many volumes of a pod are uploaded at a time: more would hold other calls to its agent up, and
	// the daemon's memory.
	copyWorkers = 2
)

// hostCopy is the host's side of a copy.
type hostCopy struct {
	name, source string
	fixed        bool // it stays as it was when its container was made
	ctx          context.Context
	cancel       context.CancelFunc
	wake         func() // starts followCopy
	op           opLock // one at a time scans and uploads

	// Guarded by op.
	generation string // what the guest has; "" when that is not known
	stamps     string // the part of it that stamps tell; "" when that is not known
	upload     uint64 // the last that began

	// Guarded by hostWatch.mu.
	watches   map[string]bool
	data      string // what dataLink pointed to
	unwatched bool   // it is looked at now and then

	mu      sync.Mutex // guards the fields below, never held over I/O
	poked   bool
	why     why // the gravest since it was looked at
	running bool
	last    time.Time // of a poke
}

// addCopy adds a mount of a copy, if what is mounted is to be copied: what kubelet, and only kubelet, writes for
// this very pod. It must be read-only for the container, or be a hosts file. Everything else, a hostPath above all, and
// what is too large, is shared.
func (v *guestVolumes) addCopy(containerID, podUID string, n int, m *cri.Mount, mount *agentproto.Mount, host string) bool {
	if m.GetPropagation() != cri.MountPropagation_PROPAGATION_PRIVATE {
		return false
	}
	c := store.HostCopy{Name: copyName(host), Source: host}
	switch {
	case belongsTo(hostsFiles, host, podUID), m.GetReadonly() && belongsTo(copiedVolumes, host, podUID):
	case m.GetReadonly() && subPathOfCopied(host, podUID):
		c.Name, c.Fixed = fmt.Sprintf("sub-path-%s-%d", containerID[:16], n), true
	default:
		return false
	}
	if _, err := scanVolume(host, visitor{}); err != nil && !errors.Is(err, errTorn) {
		return false
	}
	if !slices.Contains(v.copies, c) {
		v.copies = append(v.copies, c)
	}
	mount.Source = &agentproto.Mount_HostCopy{HostCopy: &agentproto.HostCopy{Volume: c.Name}}
	v.mounts = append(v.mounts, mount)
	return true
}

func belongsTo(shape *regexp.Regexp, host, podUID string) bool {
	match := shape.FindStringSubmatch(host)
	return match != nil && match[1] == podUID
}

// subPaths are where kubelet binds the file or directory that a subPath names, once for each container.
var subPaths = regexp.MustCompile(`/pods/([^/]+)/volume-subpaths/[^/]+/[^/]+/[0-9]+$`)

// subPathOfCopied tells whether a host path is a subPath of a volume that would be copied. Which volume it is of,
// the kernel knows: the same part of the same file system is seen through another mount, at the volume's own path.
//
// Kubernetes says that such a mount does not follow the volume; on a node it does not because it is bound to the
// file that was there first.
func subPathOfCopied(host, podUID string) bool {
	if !belongsTo(subPaths, host, podUID) {
		return false
	}
	mounts, err := mountTable()
	if err != nil {
		return false
	}
	at := slices.IndexFunc(mounts, func(m mountPoint) bool { return m.point == host })
	if at < 0 {
		return false
	}
	part := strings.TrimSuffix(mounts[at].root, "//deleted")
	for _, m := range mounts {
		rel, err := filepath.Rel(m.root, part)
		if m.device != mounts[at].device || m.point == host || err != nil || !filepath.IsLocal(rel) {
			continue
		}
		origin := filepath.Join(m.point, rel)
		for dir := origin; dir != "/"; dir = filepath.Dir(dir) {
			if belongsTo(copiedVolumes, dir, podUID) {
				return true
			}
		}
	}
	return false
}

// copyName names the copy of a host path in its pod.
func copyName(host string) string {
	sum := sha256.Sum256([]byte(host))
	return "host-" + hex.EncodeToString(sum[:16])
}

// copyVolumes brings the copies that a container mounts up to date, making those that are not there. They are in
// the container's record before they are in the guest.
func (s *Server) copyVolumes(ctx context.Context, sb *sandbox, id string, volumes []store.HostCopy) error {
	if len(volumes) == 0 {
		return nil
	}
	if err := sb.copying.lock(ctx); err != nil {
		return fmt.Errorf("volumes: %w", err)
	}
	defer sb.copying.unlock()
	_, err := s.store.UpdateContainer(id, func(r *store.Container) error { r.Copies = volumes; return nil })
	if err != nil {
		return err
	}
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(copyWorkers)
	for _, v := range volumes {
		c := s.hostCopy(sb, v)
		group.Go(func() error {
			if err := s.upToDate(ctx, sb, c, whyNotice); err != nil {
				return fmt.Errorf("volume %s: %w", v.Source, err)
			}
			return nil
		})
	}
	return group.Wait()
}

// hostCopy finds the copy of a host path in a pod, or begins one.
func (s *Server) hostCopy(sb *sandbox, v store.HostCopy) *hostCopy {
	sb.mu.Lock()
	defer sb.mu.Unlock()
	if c := sb.copies[v.Name]; c != nil {
		return c
	}
	c := &hostCopy{name: v.Name, source: v.Source, fixed: v.Fixed, op: newOpLock(), watches: map[string]bool{}}
	c.ctx, c.cancel = context.WithCancel(s.life)
	c.wake = func() { s.goTask(func() { s.followCopy(sb, c) }) }
	if sb.copies == nil {
		sb.copies = map[string]*hostCopy{}
	}
	sb.copies[v.Name] = c
	if !v.Fixed {
		s.watches.begin(c)
	}
	return c
}

// releaseCopies drops what no other container of the pod mounts.
func (s *Server) releaseCopies(ctx context.Context, sb *sandbox, id string) error {
	rec, err := s.store.Container(id)
	if err != nil {
		return ignoreMissing(err)
	}
	if len(rec.Copies) == 0 {
		return nil
	}
	if err := sb.copying.lock(ctx); err != nil {
		return fmt.Errorf("volumes: %w", err)
	}
	defer sb.copying.unlock()
	used := map[string]bool{}
	for _, other := range s.store.Containers(rec.SandboxID) {
		for _, v := range other.Copies {
			used[v.Name] = used[v.Name] || other.ID != id
		}
	}
	agent, err := sb.client(ctx)
	if err != nil {
		return err
	}
	var errs []error
	for _, v := range rec.Copies {
		if used[v.Name] {
			continue
		}
		s.forgetCopy(sb, v.Name)
		if _, err := agent.DropVolume(ctx, &agentproto.DropVolumeRequest{Volume: v.Name}); err != nil {
			errs = append(errs, fmt.Errorf("volume %s: %w", v.Source, err))
		}
	}
	return errors.Join(errs...)
}

// forgetCopy ends the following of one copy; its guest may have it still.
func (s *Server) forgetCopy(sb *sandbox, name string) {
	sb.mu.Lock()
	c := sb.copies[name]
	delete(sb.copies, name)
	sb.mu.Unlock()
	if c != nil {
		c.cancel()
		s.watches.forget(c)
	}
}

// forgetCopies is for a guest that is no more.
func (s *Server) forgetCopies(sb *sandbox) {
	sb.mu.Lock()
	names := slices.Collect(maps.Keys(sb.copies))
	sb.mu.Unlock()
	for _, name := range names {
		s.forgetCopy(sb, name)
	}
}

const (
	// maxGeneration bounds what a guest may say that it has.
	maxGeneration = 64
	// maxStrays is how many copies of no record are dropped at a restart.
	maxStrays = 256
)

// adoptCopies follows again what an earlier daemon has followed, and finds out what has changed meanwhile. What the
// guest says it has is the guest's word: one that lies has old content.
func (s *Server) adoptCopies(sb *sandbox, containers []store.Container, infos []*agentproto.VolumeInfo) {
	has := map[string]*agentproto.VolumeInfo{}
	for _, info := range infos {
		has[info.GetVolume()] = info
	}
	for _, rec := range containers {
		for _, v := range rec.Copies {
			c := s.hostCopy(sb, v)
			if info := has[v.Name]; info != nil && len(info.GetGeneration()) <= maxGeneration {
				c.op <- struct{}{} // nobody has it yet, but for a container before this one that mounts it too
				c.generation, c.upload = info.GetGeneration(), info.GetUpload()
				c.op.unlock()
			}
			delete(has, v.Name)
			if !c.fixed {
				c.poke(whyNotice)
			}
		}
	}
}

// dropStrays removes copies that no record tells of: the daemon died after it had removed their container.
func (s *Server) dropStrays(ctx context.Context, sb *sandbox, agent *agentproto.Client, infos []*agentproto.VolumeInfo) {
	for n, info := range infos {
		sb.mu.Lock()
		_, known := sb.copies[info.GetVolume()]
		sb.mu.Unlock()
		if known || n >= maxStrays {
			continue
		}
		if _, err := agent.DropVolume(ctx, &agentproto.DropVolumeRequest{Volume: info.GetVolume()}); err != nil {
			s.log.Error("dropping a volume without a record", "sandbox", sb.id, "error", err)
		}
	}
}
