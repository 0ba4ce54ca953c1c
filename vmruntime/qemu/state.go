package qemu

import (
	"fmt"
	"net"
	"path/filepath"
	"reflect"
	"regexp"

	"github.com/containerd/errdefs"

	"github.com/crivm/crivm/vmruntime"
)

// rootPorts is how many PCIe root ports a VM has: the devices it can hold, hot-plugged or not. Idle ports
// cost nothing measurable.
const rootPorts = 32

// stateName is the file in a VM's directory from which a later daemon learns what is plugged where.
const stateName = "qemu.json"

// phase says how far a device is. It is written before the step that it names, so that a daemon that died
// in between is known to have been there: "adding" and "removing" devices may or may not exist in QEMU.
type phase string

const (
	adding   phase = "adding"
	plugged  phase = "plugged"
	removing phase = "removing"
)

// device is what sits on a root port: exactly one of Disk, NIC, Share.
type device struct {
	Port  int
	Phase phase
	Disk  *vmruntime.Disk  `json:",omitempty"`
	NIC   *vmruntime.NIC   `json:",omitempty"`
	Share *vmruntime.Share `json:",omitempty"`
}

// state of a VM. Devices are known by their QEMU id.
type state struct {
	Spec    vmruntime.Spec
	Devices map[string]device
}

func (s *state) save() error {
	return vmruntime.SaveState(filepath.Join(s.Spec.Dir, stateName), s)
}

// ids are names that go into QEMU ids, node names and host file names.
var ids = regexp.MustCompile(`^[a-zA-Z0-9_.-]{1,36}$`)

// serials are at most as long as virtio-blk has room for.
var serials = regexp.MustCompile(`^[a-zA-Z0-9_-]{1,20}$`)

// id is the device's name in QEMU, for its front end and its back end alike.
func (d device) id() string {
	switch {
	case d.Disk != nil:
		return "disk-" + d.Disk.Serial
	case d.NIC != nil:
		return "nic-" + d.NIC.ID
	default:
		return "share-" + d.Share.Tag
	}
}

func (d device) validate() error {
	switch {
	case d.Disk != nil && !serials.MatchString(d.Disk.Serial):
		return fmt.Errorf("disk serial %q: %w", d.Disk.Serial, errdefs.ErrInvalidArgument)
	case d.Disk != nil && !filepath.IsAbs(d.Disk.Path) && d.Disk.Device == 0:
		return fmt.Errorf("disk path %q: %w", d.Disk.Path, errdefs.ErrInvalidArgument)
	case d.NIC != nil && !ids.MatchString(d.NIC.ID):
		return fmt.Errorf("NIC id %q: %w", d.NIC.ID, errdefs.ErrInvalidArgument)
	case d.NIC != nil && !validMAC(d.NIC.MAC):
		return fmt.Errorf("NIC %s: MAC %q: %w", d.NIC.ID, d.NIC.MAC, errdefs.ErrInvalidArgument)
	case d.Share != nil && !ids.MatchString(d.Share.Tag):
		return fmt.Errorf("share tag %q: %w", d.Share.Tag, errdefs.ErrInvalidArgument)
	case d.Share != nil && !filepath.IsAbs(d.Share.Socket):
		return fmt.Errorf("share socket %q: %w", d.Share.Socket, errdefs.ErrInvalidArgument)
	}
	return nil
}

func validMAC(s string) bool {
	mac, err := net.ParseMAC(s)
	return err == nil && len(mac) == 6
}

// same reports whether two devices are the same but for where they are plugged.
func (d device) same(o device) bool {
	return reflect.DeepEqual(d.Disk, o.Disk) && reflect.DeepEqual(d.NIC, o.NIC) && reflect.DeepEqual(d.Share, o.Share)
}

// put gives a new device the lowest free port. AlreadyExists when its id is taken.
func (s *state) put(d device) (device, error) {
	if err := d.validate(); err != nil {
		return d, err
	}
	if _, taken := s.Devices[d.id()]; taken {
		return d, fmt.Errorf("device %s: %w", d.id(), errdefs.ErrAlreadyExists)
	}
	var used [rootPorts]bool
	for _, o := range s.Devices {
		if o.Port >= 0 && o.Port < rootPorts {
			used[o.Port] = true
		}
	}
	for port, taken := range used {
		if !taken {
			d.Port = port
			s.Devices[d.id()] = d
			return d, nil
		}
	}
	return d, fmt.Errorf("device %s: all %d slots are in use: %w", d.id(), rootPorts, errdefs.ErrResourceExhausted)
}

// newState is the state of a VM that is about to boot, its devices plugged.
func newState(spec vmruntime.Spec) (*state, error) {
	s := &state{Spec: spec, Devices: map[string]device{}}
	for i := range spec.Disks {
		if _, err := s.put(device{Phase: plugged, Disk: &spec.Disks[i]}); err != nil {
			return nil, err
		}
	}
	for i := range spec.NICs {
		if _, err := s.put(device{Phase: plugged, NIC: &spec.NICs[i]}); err != nil {
			return nil, err
		}
	}
	return s, nil
}

// validateSpec refuses what QEMU would misunderstand or refuse with a worse message.
func validateSpec(s vmruntime.Spec) error {
	const block = 2 << 20
	switch {
	case !filepath.IsAbs(s.Dir) || len(s.Dir) > 60 || !safePath.MatchString(s.Dir):
		return fmt.Errorf("VM directory %q: %w", s.Dir, errdefs.ErrInvalidArgument)
	case s.Kernel == "":
		return fmt.Errorf("no kernel: %w", errdefs.ErrInvalidArgument)
	case s.VCPUs < 1 || s.MaxVCPUs < s.VCPUs || s.MaxVCPUs > 255:
		return fmt.Errorf("%d vCPUs, at most %d: %w", s.VCPUs, s.MaxVCPUs, errdefs.ErrInvalidArgument)
	case s.MemoryBytes < block || s.MemoryBytes%block != 0 || s.MaxMemoryBytes < s.MemoryBytes:
		return fmt.Errorf("%d bytes of memory, at most %d: %w", s.MemoryBytes, s.MaxMemoryBytes, errdefs.ErrInvalidArgument)
	}
	return nil
}

// safePath is a path that needs no quoting in QEMU's option syntax.
var safePath = regexp.MustCompile(`^/[a-zA-Z0-9_./+@:-]*$`)
