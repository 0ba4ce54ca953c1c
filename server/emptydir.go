package server

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/crivm/crivm/agentproto"
	"github.com/crivm/crivm/server/store"
)

// An empty directory of a pod is on a disk of the guest. Its image is a sparse file in the directory that kubelet made on
// the host, so that a later sandbox of the pod finds it, kubelet's scan counts it, and it goes when kubelet removes
// the volume. One with medium Memory, where kubelet has mounted a tmpfs, is a tmpfs of the guest. One in which there
// is something already is shared with the host, as is every one where the configuration says so.

const (
	// maxEmptyDisks is how many empty directories of a pod get disks; a VM has slots for 32 devices. The rest are shared.
	maxEmptyDisks = 16
	// maxEmptyEntries bounds looking into an empty directory. kubelet makes directories there, for sub paths.
	maxEmptyEntries, maxEmptyDepth = 4096, 64
	// detachLimit bounds writing out the disks of a pod that is stopped.
	detachLimit = 30 * time.Second
)

// emptyDirPath is a path of a volume of kubelet's empty-dir plugin, or of a sub path of any volume: the pod's directory,
// the pod's UID, then one of the two.
var emptyDirPath = regexp.MustCompile(`^(.*/pods/([^/]+))/(?:volumes/kubernetes\.io~empty-dir/([^/]+)((?:/[^/]+)*)|volume-subpaths/.+)$`)

// emptyDirs finds which of a container's mounts are empty directories that are in the guest, makes their disks and
// plugs them. What is in none of the results is a mount of the host.
func (s *Server) emptyDirs(ctx context.Context, sb *sandbox, rec store.Container, sandboxRec store.Sandbox) (map[int]*agentproto.Mount, error) {
	mounts := map[int]*agentproto.Mount{}
	for n, m := range rec.Config.GetMounts() {
		host, err := filepath.EvalSymlinks(m.GetHostPath())
		match := emptyDirPath.FindStringSubmatch(host)
		if err != nil || match == nil || match[2] != sandboxRec.Config.GetMetadata().GetUid() {
			continue
		}
		field := fmt.Sprintf("config.mounts[%d] (%s)", n, m.GetContainerPath())
		if err := validateMount(field, m); err != nil {
			return nil, err
		}
		mount, err := s.emptyDir(ctx, sb, sandboxRec, host, match)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", field, err)
		}
		if mount != nil {
			mounts[n] = &agentproto.Mount{
				Destination: path.Clean(m.GetContainerPath()), Readonly: m.GetReadonly(), Options: m.GetMountOptions(), Source: &agentproto.Mount_EmptyDir{EmptyDir: mount},
			}
		}
	}
	return mounts, nil
}

// emptyDir makes one mount; nil when it is not one of the guest. One at a time in a sandbox: two containers must not
// decide differently about one volume.
func (s *Server) emptyDir(ctx context.Context, sb *sandbox, sandboxRec store.Sandbox, host string, match []string) (*agentproto.EmptyDir, error) {
	if err := sb.plug.lock(ctx); err != nil {
		return nil, fmt.Errorf("emptyDir: %w", err)
	}
	defer sb.plug.unlock()
	base := filepath.Join(match[1], "volumes/kubernetes.io~empty-dir")
	candidates, sub := []string{match[3]}, match[4]
	if match[3] == "" { // kubelet has bound a directory below the volume to this path
		entries, err := os.ReadDir(base)
		if err != nil {
			return nil, ignoreNotExist(err)
		}
		candidates = candidates[:0]
		for _, e := range entries {
			candidates = append(candidates, e.Name())
		}
	}
	for _, name := range candidates {
		dir := filepath.Join(base, name)
		if match[3] == "" {
			var found bool
			if sub, found = findBelow(dir, host); !found {
				continue
			}
		}
		place, err := s.placeEmptyDir(sandboxRec.ID, dir)
		if err != nil || place.Kind == store.EmptyDirShared {
			return nil, err
		}
		if place.Kind == store.EmptyDirDisk {
			if err := s.plugEmptyDir(ctx, sb, sandboxRec, place); err != nil {
				return nil, fmt.Errorf("emptyDir %s: %w", name, err)
			}
		}
		return emptyDirMount(place, sub)
	}
	return nil, nil
}

// placeEmptyDir decides where an empty directory is, once in the life of a sandbox. Its decision is in the record when
// it returns.
func (s *Server) placeEmptyDir(sandboxID, dir string) (store.EmptyDir, error) {
	rec, err := s.store.Sandbox(sandboxID)
	if err != nil {
		return store.EmptyDir{}, err
	}
	disks := 0
	for _, e := range rec.EmptyDirs {
		if e.Dir == dir {
			return e, nil
		}
		if e.Kind == store.EmptyDirDisk {
			disks++
		}
	}
	sum := sha256.Sum256([]byte(dir))
	place := store.EmptyDir{Dir: dir, Kind: store.EmptyDirShared, Serial: "ed-" + hex.EncodeToString(sum[:8])}
	medium, err := fileSystemAt(dir)
	if err != nil {
		return store.EmptyDir{}, err
	}
	_, imageErr := os.Lstat(filepath.Join(dir, emptyDirImage))
	why := ""
	switch {
	case medium == "" && imageErr == nil: // an earlier sandbox of the pod has written to it
		place.Kind = store.EmptyDirDisk
	case s.opts.Handlers[rec.Handler].ShareEmptyDirs:
	case medium == "hugetlbfs": // the guest has one of its own: hugepageVolume
	case medium != "" && medium != "tmpfs":
		why = "it is a " + medium
	case !onlyDirectories(dir):
		why = "there are files in it on the host"
	case medium == "tmpfs":
		place.Kind = store.EmptyDirMemory
	case disks >= maxEmptyDisks:
		why = fmt.Sprintf("the pod has %d others on disks", disks)
	default:
		place.Kind = store.EmptyDirDisk
	}
	if why != "" {
		s.log.Info("an emptyDir is shared with the host", "sandbox", sandboxID, "dir", dir, "reason", why)
	}
	_, err = s.store.UpdateSandbox(sandboxID, func(r *store.Sandbox) error {
		r.EmptyDirs = append(slices.Clone(r.EmptyDirs), place)
		return nil
	})
	return place, err
}

// fileSystemAt is the type of the file system that is mounted on a directory; "" when none is.
func fileSystemAt(dir string) (string, error) {
	mounts, err := mountTable()
	if err != nil {
		return "", err
	}
	kind := ""
	for _, m := range mounts {
		if m.point == dir {
			kind = m.kind // the last one is on top
		}
	}
	return kind, nil
}

// onlyDirectories tells whether nothing but directories, and an image that was not finished, is below a directory.
func onlyDirectories(dir string) bool {
	only := true
	complete := walkEmptyDir(dir, func(rel string, d fs.DirEntry) bool {
		only = d.IsDir() || rel == emptyDirImage+newImage
		return only
	})
	return complete && only
}

// findBelow looks for the directory below dir, or dir itself, that is mounted at host. It returns its path below dir.
func findBelow(dir, host string) (sub string, found bool) {
	want, err := os.Lstat(host)
	if err != nil || !want.IsDir() {
		return "", false
	}
	if top, err := os.Lstat(dir); err == nil && os.SameFile(top, want) {
		return "", true
	}
	walkEmptyDir(dir, func(rel string, d fs.DirEntry) bool {
		if info, err := d.Info(); err == nil && d.IsDir() && os.SameFile(info, want) {
			sub, found = "/"+rel, true
		}
		return !found
	})
	return sub, found
}

// walkEmptyDir visits what is below a directory, parents first, until visit has seen enough. It tells whether it has met
// everything, without an error. A guest may have made any number of names there, in any depth: no more than scanBatch
// names of a directory and maxEmptyEntries in all are ever in memory.
func walkEmptyDir(dir string, visit func(rel string, d fs.DirEntry) (goOn bool)) (complete bool) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return false
	}
	defer root.Close()
	met, complete := 0, true
	for queue := []string{"."}; len(queue) > 0; queue = queue[1:] {
		rel := queue[0]
		if strings.Count(rel, "/") >= maxEmptyDepth {
			complete = false
			continue
		}
		err := readBatches(root, rel, func(d fs.DirEntry) bool {
			if met++; met > maxEmptyEntries {
				return false
			}
			below := path.Join(rel, d.Name())
			if d.IsDir() {
				queue = append(queue, below)
			}
			return visit(below, d)
		})
		if errors.Is(err, errSeenEnough) {
			return false
		}
		complete = complete && err == nil
	}
	return complete
}

var errSeenEnough = errors.New("seen enough")

// readBatches hands on what is in a directory, few entries at a time; errSeenEnough when take has seen enough.
func readBatches(root *os.Root, rel string, take func(fs.DirEntry) (goOn bool)) error {
	f, err := root.OpenFile(rel, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	for {
		entries, err := f.ReadDir(scanBatch)
		for _, d := range entries {
			if !take(d) {
				return errSeenEnough
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// emptyDirMount describes an empty directory to the guest: its attributes, and those of the directories of a sub path, are
// those on the host.
func emptyDirMount(place store.EmptyDir, sub string) (*agentproto.EmptyDir, error) {
	var st unix.Stat_t
	if err := unix.Lstat(place.Dir, &st); err != nil {
		return nil, fmt.Errorf("emptyDir: %w", &fs.PathError{Op: "stat", Path: place.Dir, Err: err})
	}
	m := &agentproto.EmptyDir{Volume: place.Serial, Mode: st.Mode & 0o7777, Uid: st.Uid, Gid: st.Gid}
	if place.Kind == store.EmptyDirDisk {
		m.Serial = place.Serial
	} else {
		var size unix.Statfs_t
		if err := unix.Statfs(place.Dir, &size); err != nil {
			return nil, fmt.Errorf("emptyDir: %w", &fs.PathError{Op: "statfs", Path: place.Dir, Err: err})
		}
		m.Memory, m.SizeBytes = true, int64(size.Blocks)*size.Bsize
	}
	at := place.Dir
	for element := range strings.SplitSeq(strings.Trim(sub, "/"), "/") {
		if element == "" {
			continue
		}
		at = filepath.Join(at, element)
		info, err := os.Lstat(at)
		if err != nil {
			return nil, fmt.Errorf("emptyDir: %w", err)
		}
		st := info.Sys().(*syscall.Stat_t)
		m.SubPath = append(m.SubPath, &agentproto.SubDir{Name: element, Mode: st.Mode & 0o7777, Uid: st.Uid, Gid: st.Gid})
	}
	return m, nil
}

// plugEmptyDir makes the disk of an empty directory, if there is none, and plugs it; sb.plug is held.
func (s *Server) plugEmptyDir(ctx context.Context, sb *sandbox, rec store.Sandbox, place store.EmptyDir) error {
	vm, err := sb.machine()
	if err != nil {
		return err
	}
	image, err := s.emptyDirDisk(ctx, rec, place.Dir)
	if err != nil {
		return err
	}
	defer image.Close()
	shown := filepath.Join(rec.Dir, place.Serial+".img") // kubelet's directories are closed to the VMM's user
	if err := vm.ShowFile(image, shown); err != nil {
		return vmFailure(vm, err)
	}
	if err := vm.AddDisk(ctx, emptyDisk(place.Serial, shown)); err != nil {
		return vmFailure(vm, fmt.Errorf("plugging its disk: %w", err))
	}
	return nil
}

// detachEmptyDirs has the guest of a pod that is stopped write out and unmount the disks of its empty directories: a
// later sandbox of the pod finds what this one has written, synced or not. A guest that does not is killed all the same.
func (s *Server) detachEmptyDirs(ctx context.Context, sb *sandbox, rec store.Sandbox) {
	if !slices.ContainsFunc(rec.EmptyDirs, func(e store.EmptyDir) bool { return e.Kind == store.EmptyDirDisk }) {
		return
	}
	if _, err := sb.machine(); err != nil {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, detachLimit)
	defer cancel()
	agent, err := sb.client(ctx)
	for _, e := range rec.EmptyDirs {
		if e.Kind != store.EmptyDirDisk {
			continue
		}
		if err == nil {
			_, err = agent.DetachDisk(ctx, &agentproto.DetachDiskRequest{Serial: e.Serial})
		}
		if err != nil && !errdefs.IsFailedPrecondition(err) { // in use, but written out
			s.log.Warn("what was written last to an emptyDir may be lost", "sandbox", rec.ID, "dir", e.Dir, "error", err)
		}
		err = nil
	}
}
