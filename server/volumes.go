package server

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crivm/crivm/agentproto"
	"github.com/crivm/crivm/server/store"
	"github.com/crivm/crivm/vmruntime/virtiofsd"
)

// A directory or file of the host reaches the guest in one of three ways. What kubelet writes for containers to
// read is copied, and the copy kept up to date (volumes_copy.go); a termination log is a file of the guest whose
// content the host gets in the end (termination_log.go). Everything else is shared: the guest works on the host's
// own files, through the pod's virtiofsd.

// sharedVolume is what must be in the pod's share before a container can mount it.
type sharedVolume struct {
	entry  string
	source *os.File // O_PATH
	access virtiofsd.Access
}

func closeVolumes(volumes []sharedVolume) {
	for _, v := range volumes {
		v.source.Close()
	}
}

// addHostVolume adds the n-th mount of a configuration.
func (v *guestVolumes) addHostVolume(rec store.Container, podUID string, n int, m *cri.Mount) error {
	field := fmt.Sprintf("config.mounts[%d] (%s)", n, m.GetContainerPath())
	if err := validateMount(field, m); err != nil {
		return err
	}
	source, host, err := openHostPath(field, m.GetHostPath())
	if err != nil {
		return err
	}
	mount := &agentproto.Mount{Destination: path.Clean(m.GetContainerPath()), Readonly: m.GetReadonly(), Options: m.GetMountOptions()}
	if huge, err := hugepageVolume(field, source, host); huge != nil || err != nil {
		source.Close()
		mount.Source = &agentproto.Mount_Hugepages{Hugepages: huge}
		v.mounts = append(v.mounts, mount)
		return err
	}
	if v.addTerminationLog(rec, n, mount, source, host) || v.addCopy(rec.ID, podUID, n, m, mount, host) {
		source.Close()
		return nil
	}
	share, err := shareVolume(field, source, host, m, mount)
	if err != nil {
		source.Close()
		return err
	}
	v.mounts, v.shared = append(v.mounts, mount), append(v.shared, share)
	return nil
}

// shareVolume makes a mount one of a path that is shared.
func shareVolume(field string, source *os.File, host string, m *cri.Mount, mount *agentproto.Mount) (sharedVolume, error) {
	follow := m.GetPropagation() == cri.MountPropagation_PROPAGATION_HOST_TO_CONTAINER
	share, submounts, err := shareable(field, source, host, virtiofsd.Access{
		ReadOnly: m.GetReadonly(), Recursive: m.GetRecursiveReadOnly(), Follow: follow, IDs: mountMapping(m),
	})
	if err != nil {
		return sharedVolume{}, err
	}
	// The host enforces read-only. In the guest it is shown as well, except where mounts below it stay writable:
	// there they are mounted on demand and take after the mount that they are found in.
	mount.Readonly = m.GetReadonly() && (m.GetRecursiveReadOnly() || !submounts && !follow)
	mount.Source = &agentproto.Mount_Share{Share: &agentproto.Share{Tag: shareTag, Path: share.entry}}
	return share, nil
}

// validateMount checks everything of a mount but what is at its host path.
func validateMount(field string, m *cri.Mount) error {
	private := m.GetPropagation() == cri.MountPropagation_PROPAGATION_PRIVATE
	switch {
	case !path.IsAbs(m.GetContainerPath()) || path.Clean(m.GetContainerPath()) == "/":
		return invalid(field+".container_path", "is not an absolute path below /")
	case m.GetRecursiveReadOnly() && !m.GetReadonly():
		return invalid(field+".recursive_read_only", "needs readonly")
	case m.GetRecursiveReadOnly() && !private:
		return invalid(field+".recursive_read_only", "needs propagation PRIVATE: mounts that appear later would be writable")
	case m.GetPropagation() == cri.MountPropagation_PROPAGATION_BIDIRECTIONAL:
		return unsupported(field+".propagation", "BIDIRECTIONAL: mounts made in a VM cannot appear on the host; run such a pod with another runtime handler")
	case !private && m.GetPropagation() != cri.MountPropagation_PROPAGATION_HOST_TO_CONTAINER:
		return invalid(field+".propagation", "%s is not a mode of propagation", m.GetPropagation())
	case m.GetHostPath() == "" || !filepath.IsAbs(m.GetHostPath()):
		return invalid(field+".host_path", "%q is not an absolute path", m.GetHostPath())
	}
	return validateMountOptions(field, m)
}

// openHostPath resolves a path on the host, symlinks included, and opens what it names, O_PATH.
func openHostPath(field, hostPath string) (*os.File, string, error) {
	host, err := filepath.EvalSymlinks(hostPath)
	if err != nil {
		return nil, "", unusable(field+".host_path", hostPath, err)
	}
	for _, special := range []string{"/proc", "/sys", "/dev"} {
		if host == special || strings.HasPrefix(host, special+"/") {
			return nil, "", unsupported(field+".host_path", "%s is the host's; a pod in a VM has its own, mounted already. Run a pod that needs the host's with another runtime handler", special)
		}
	}
	// Whoever swaps a directory for a symlink meanwhile gets an error, not another directory.
	how := unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_NO_SYMLINKS}
	fd, err := unix.Openat2(unix.AT_FDCWD, host, &how)
	if err != nil {
		return nil, "", unusable(field+".host_path", host, err)
	}
	source := os.NewFile(uintptr(fd), host)
	info, err := source.Stat()
	if err != nil {
		source.Close()
		return nil, "", fmt.Errorf("%s.host_path: %w", field, err)
	}
	switch {
	case info.IsDir() || info.Mode().IsRegular():
		return source, host, nil
	case info.Mode()&fs.ModeSocket != 0:
		err = unsupported(field+".host_path", "%s is a socket: nothing in a VM can connect to it. Run the pod with another runtime handler, or offer the service over the network", host)
	case info.Mode()&fs.ModeDevice != 0:
		err = unsupported(field+".host_path", "%s is a device: a VM has devices of its own. For a disk use a volumeDevice; else run the pod with another runtime handler", host)
	default:
		err = unsupported(field+".host_path", "%s is a %s: a VM can share directories and regular files only", host, info.Mode().Type())
	}
	source.Close()
	return nil, "", err
}

// kernelFilesystems show the host's kernel and not data; they are not shared.
var kernelFilesystems = []string{
	"proc", "sysfs", "devtmpfs", "devpts", "cgroup", "cgroup2", "debugfs", "tracefs", "securityfs", "selinuxfs", "bpf", "configfs", "efivarfs",
	"pstore", "mqueue", "binfmt_misc", "fusectl", "resctrl",
}

// shareable looks at the mounts at and below an open path, and names it as an entry of the share: the same
// thing with the same access has the same name, whichever container asks, so that they share one.
func shareable(field string, source *os.File, host string, access virtiofsd.Access) (_ sharedVolume, submounts bool, _ error) {
	var st unix.Statx_t
	if err := unix.Statx(int(source.Fd()), "", unix.AT_EMPTY_PATH, unix.STATX_INO|unix.STATX_MNT_ID, &st); err != nil {
		return sharedVolume{}, false, fmt.Errorf("%s.host_path: %w", field, err)
	}
	mounts, err := mountTable()
	if err != nil {
		return sharedVolume{}, false, err
	}
	for _, m := range mounts {
		below := host == "/" && m.point != "/" || strings.HasPrefix(m.point, host+"/")
		if m.id != st.Mnt_id && !below {
			continue
		}
		if slices.Contains(kernelFilesystems, m.kind) {
			return sharedVolume{}, false, unsupported(field+".host_path", "%s would give the guest the host's %s, mounted at %s. Mount only the directories that are needed, or run the pod with another runtime handler",
				host, m.kind, m.point)
		}
		submounts = submounts || below
	}
	sum := sha256.Sum256(fmt.Appendf(nil, "%s\n%d %d:%d %d\n%+v", host, st.Mnt_id, st.Dev_major, st.Dev_minor, st.Ino, access))
	return sharedVolume{entry: hex.EncodeToString(sum[:16]), source: source, access: access}, submounts, nil
}

// mountPoint is a line of the mount table.
type mountPoint struct {
	id     uint64
	device string // major:minor
	root   string // what of the file system is mounted
	point  string
	kind   string // file system type
}

// mountTable lists the mounts of the daemon's namespace (proc_pid_mountinfo(5)).
func mountTable() ([]mountPoint, error) {
	text, err := os.ReadFile("/proc/thread-self/mountinfo")
	if err != nil {
		return nil, fmt.Errorf("mount table: %w", err)
	}
	unescape := strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)
	var mounts []mountPoint
	for line := range strings.Lines(string(text)) {
		left, right, ok := strings.Cut(line, " - ")
		l, r := strings.Fields(left), strings.Fields(right)
		if !ok || len(l) < 5 || len(r) < 1 {
			return nil, fmt.Errorf("mount table: unexpected line %q", line)
		}
		m := mountPoint{device: l[2], root: unescape.Replace(l[3]), point: unescape.Replace(l[4]), kind: r[0]}
		if _, err := fmt.Sscan(l[0], &m.id); err != nil {
			return nil, fmt.Errorf("mount table: unexpected line %q", line)
		}
		mounts = append(mounts, m)
	}
	return mounts, nil
}
