package server

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crivm/crivm/agentproto"
	"github.com/crivm/crivm/server/store"
	"github.com/crivm/crivm/vmruntime"
)

// A block device of the host that a container asks for (kubelet's volumeDevices) is a further disk of the pod's VM.
// Its serial says which device it is and whether the VM may write, so that records of serials are all that a
// later daemon needs.
const (
	writableDevice = "blk-%d-%d"
	readOnlyDevice = "blkro-%d-%d"
	// syncLimit bounds writing back what a stopped pod's guest has cached of block devices.
	syncLimit = 30 * time.Second
)

// hostDevice is a block device of the host, as a container wants it.
type hostDevice struct {
	field         string
	number        uint64 // st_rdev
	containerPath string
	access        string // of "rwm"
	mode          uint32
	uid, gid      uint32
	readOnly      bool // by the permissions, or as the device itself is
}

// serial of the disk that the device is in the guest.
func (d hostDevice) serial(readOnly bool) string {
	form := writableDevice
	if readOnly {
		form = readOnlyDevice
	}
	return fmt.Sprintf(form, unix.Major(d.number), unix.Minor(d.number))
}

// deviceNumber is what serial was made from; false for the disks of images.
func deviceNumber(serial string) (number uint64, ok bool) {
	for _, form := range []string{writableDevice, readOnlyDevice} {
		var major, minor uint32
		if n, err := fmt.Sscanf(serial, form, &major, &minor); n == 2 && err == nil {
			return unix.Mkdev(major, minor), true
		}
	}
	return 0, false
}

// validateDevices checks everything of devices but what is at their host paths.
func validateDevices(devices []*cri.Device) error {
	seen := map[string]bool{}
	for n, d := range devices {
		field := fmt.Sprintf("config.devices[%d]", n)
		switch p := path.Clean(d.GetContainerPath()); {
		case !path.IsAbs(d.GetContainerPath()) || p == "/":
			return invalid(field+".container_path", "%q is not an absolute path below /", d.GetContainerPath())
		case seen[p]:
			return invalid(field+".container_path", "%s is given twice", p)
		case !filepath.IsAbs(d.GetHostPath()):
			return invalid(field+".host_path", "%q is not an absolute path", d.GetHostPath())
		case d.GetPermissions() == "" || strings.Trim(d.GetPermissions(), "rwm") != "":
			return invalid(field+".permissions", `%q is not one or more of "r", "w", "m"`, d.GetPermissions())
		default:
			seen[p] = true
		}
	}
	return nil
}

// hostDevices looks at the devices of a configuration on the host.
func hostDevices(devices []*cri.Device) ([]hostDevice, error) {
	var found []hostDevice
	for n, d := range devices {
		device, err := findHostDevice(fmt.Sprintf("config.devices[%d] (%s)", n, d.GetContainerPath()), d)
		if err != nil {
			return nil, err
		}
		found = append(found, device)
	}
	return found, nil
}

func findHostDevice(field string, d *cri.Device) (hostDevice, error) {
	host, err := filepath.EvalSymlinks(d.GetHostPath())
	if err != nil {
		return hostDevice{}, unusable(field+".host_path", d.GetHostPath(), err)
	}
	var st unix.Stat_t
	if err := unix.Lstat(host, &st); err != nil {
		return hostDevice{}, unusable(field+".host_path", host, err)
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFBLK:
	case unix.S_IFCHR:
		return hostDevice{}, unsupported(field+".host_path", "%s is a character device, which cannot be given to a VM; run a pod that needs it with another runtime handler", host)
	case unix.S_IFREG:
		return hostDevice{}, unsupported(field+".host_path", "%s is a regular file, not a block device: attach it to a loop device, or mount it as a volume", host)
	default:
		return hostDevice{}, unsupported(field+".host_path", "%s is a %s, not a block device", host, fs.FileMode(kindOf(st.Mode)))
	}
	readOnly, err := usableDevice(host, st.Rdev)
	if err != nil {
		return hostDevice{}, unusable(field+".host_path", host, err)
	}
	return hostDevice{
		field: field, number: st.Rdev, containerPath: path.Clean(d.GetContainerPath()), access: d.GetPermissions(),
		mode: st.Mode & 0o777, uid: st.Uid, gid: st.Gid, readOnly: readOnly || !strings.Contains(d.GetPermissions(), "w"),
	}, nil
}

// kindOf is the type in st_mode as package fs spells it.
func kindOf(mode uint32) fs.FileMode {
	switch mode & unix.S_IFMT {
	case unix.S_IFDIR:
		return fs.ModeDir
	case unix.S_IFIFO:
		return fs.ModeNamedPipe
	case unix.S_IFSOCK:
		return fs.ModeSocket
	}
	return fs.ModeIrregular
}

// usableDevice opens a block device to see that there is something behind it, and whether it can be written to.
func usableDevice(host string, number uint64) (readOnly bool, _ error) {
	f, err := os.OpenFile(host, os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOFOLLOW, 0)
	if err != nil {
		return false, err
	}
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return false, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFBLK || st.Rdev != number {
		return false, errors.New("another file has taken its place")
	}
	if size, err := unix.Seek(int(f.Fd()), 0, unix.SEEK_END); err != nil || size == 0 {
		return false, errors.Join(errors.New("the device has no size: nothing is attached to it"), err)
	}
	ro, err := unix.IoctlGetInt(int(f.Fd()), unix.BLKROGET)
	return ro != 0, err
}

// plugDevices makes block devices disks of the VM. Which ones is in the container's record before. A device that the
// pod can write to already serves those that only read; what the guest caches would differ between two disks.
func (s *Server) plugDevices(ctx context.Context, sb *sandbox, rec store.Container, devices []hostDevice) ([]*agentproto.BlockDevice, error) {
	if len(devices) == 0 {
		return nil, nil
	}
	agent, err := sb.client(ctx)
	if err != nil {
		return nil, err
	}
	if _, err := agent.SyncDevices(ctx, &agentproto.SyncDevicesRequest{}); errdefs.IsNotImplemented(err) { // it would ignore them silently
		return nil, fmt.Errorf("config.devices: the pod's agent is of an earlier version of crivm, which has no devices; a new pod has them: %w", errdefs.ErrFailedPrecondition)
	}
	if err := sb.plug.lock(ctx); err != nil {
		return nil, fmt.Errorf("devices: %w", err)
	}
	defer sb.plug.unlock()
	vm, err := sb.machine()
	if err != nil {
		return nil, err
	}
	writable := map[uint64]bool{}
	for _, d := range devices {
		writable[d.number] = writable[d.number] || !d.readOnly
	}
	var wanted []*agentproto.BlockDevice
	for _, d := range devices {
		serial, err := s.deviceSerial(rec, d, writable[d.number])
		if err != nil {
			return nil, err
		}
		if err := s.plugDevice(ctx, sb, vm, rec.ID, d.number, serial); err != nil {
			return nil, fmt.Errorf("%s: %w", d.field, err)
		}
		wanted = append(wanted, &agentproto.BlockDevice{
			Serial: serial, Path: d.containerPath, Access: d.access, Mode: d.mode, Uid: d.uid, Gid: d.gid,
		})
	}
	return wanted, nil
}

// deviceSerial chooses the disk for a device among what other containers of the pod have. Called with sb.plug held.
func (s *Server) deviceSerial(rec store.Container, d hostDevice, write bool) (string, error) {
	for _, other := range s.store.Containers(rec.SandboxID) {
		switch {
		case other.ID == rec.ID:
		case slices.Contains(other.VolumeDisks, d.serial(false)):
			return d.serial(false), nil
		case write && slices.Contains(other.VolumeDisks, d.serial(true)):
			return "", fmt.Errorf("%s.permissions: container %s of the pod has the device read-only; a pod cannot have it both ways, unless the first container may write: %w",
				d.field, other.Config.GetMetadata().GetName(), errdefs.ErrFailedPrecondition)
		}
	}
	return d.serial(!write), nil
}

// plugDevice is called with sb.plug held.
func (s *Server) plugDevice(ctx context.Context, sb *sandbox, vm vmruntime.VM, containerID string, number uint64, serial string) error {
	_, err := s.store.UpdateContainer(containerID, func(r *store.Container) error {
		if !slices.Contains(r.VolumeDisks, serial) {
			r.VolumeDisks = append(slices.Clone(r.VolumeDisks), serial)
		}
		return nil
	})
	if err != nil {
		return err
	}
	sb.mu.Lock()
	sb.useDisk(serial, containerID) // the undoing of a failed container takes it back
	sb.mu.Unlock()
	if err := vm.AddDisk(ctx, vmruntime.Disk{Serial: serial, Device: number, ReadOnly: strings.HasPrefix(serial, "blkro-")}); err != nil {
		return vmFailure(vm, fmt.Errorf("plugging the device: %w", err))
	}
	return nil
}

// syncDevices has the guest of a pod that is being stopped write back what containers wrote to block devices: it is
// lost with the VM, which it would not be on a node without VMs.
func (s *Server) syncDevices(ctx context.Context, sandboxID string) {
	has := slices.ContainsFunc(s.store.Containers(sandboxID), func(c store.Container) bool {
		return slices.ContainsFunc(c.VolumeDisks, func(serial string) bool { _, ok := deviceNumber(serial); return ok })
	})
	sb := s.sandbox(sandboxID)
	if _, err := sb.machine(); err != nil || !has {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, syncLimit)
	defer cancel()
	agent, err := sb.client(ctx)
	if err == nil {
		_, err = agent.SyncDevices(ctx, &agentproto.SyncDevicesRequest{})
	}
	if err != nil {
		s.log.Error("writing back what a pod wrote to its block devices", "sandbox", sandboxID, "error", err)
	}
}
