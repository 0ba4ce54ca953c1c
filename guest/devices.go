package guest

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/crivm/crivm/agentproto"
)

// blockDevices are the disks that containers see as devices.
type blockDevices struct {
	mu    sync.Mutex
	users map[string]map[string]bool // IDs of containers, by the disk's serial
}

// addDevices gives a container the disks that it asks for: a node for each, and the right to use it.
func (a *Agent) addDevices(ctx context.Context, c *container, s *specs.Spec, devices []*agentproto.BlockDevice) error {
	if a.machine == nil { // without devices of its own: containers see those that there are
		return nil
	}
	for _, d := range devices {
		if err := a.addDevice(ctx, c, s, d); err != nil {
			return fmt.Errorf("device %s: %w", d.GetPath(), err)
		}
	}
	return nil
}

func (a *Agent) addDevice(ctx context.Context, c *container, s *specs.Spec, d *agentproto.BlockDevice) error {
	if err := checkID("disk serial", d.GetSerial()); err != nil {
		return err
	}
	if !path.IsAbs(d.GetPath()) || d.GetAccess() == "" || strings.Trim(d.GetAccess(), "rwm") != "" {
		return fmt.Errorf("access %q: %w", d.GetAccess(), errdefs.ErrInvalidArgument)
	}
	a.machine.modules.Load("virtio_blk")
	node, err := findDisk(ctx, d.GetSerial())
	if err != nil {
		return err
	}
	var st unix.Stat_t
	if err := unix.Stat(node, &st); err != nil {
		return fmt.Errorf("%s: %w", node, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFBLK {
		return fmt.Errorf("%s is no block device: %w", node, errdefs.ErrInternal)
	}
	a.machine.blocks.use(d.GetSerial(), c.id)
	c.undo = append(c.undo, func(context.Context) error { a.machine.blocks.leave(d.GetSerial(), c.id); return nil })
	major, minor := int64(unix.Major(st.Rdev)), int64(unix.Minor(st.Rdev))
	mode, uid, gid := os.FileMode(d.GetMode()&0o777), d.GetUid(), d.GetGid()
	s.Linux.Devices = append(s.Linux.Devices, specs.LinuxDevice{
		Path: path.Clean(d.GetPath()), Type: "b", Major: major, Minor: minor, FileMode: &mode, UID: &uid, GID: &gid,
	})
	if s.Linux.Resources == nil {
		s.Linux.Resources = &specs.LinuxResources{}
	}
	s.Linux.Resources.Devices = append(s.Linux.Resources.Devices, specs.LinuxDeviceCgroup{Allow: true, Type: "b", Major: &major, Minor: &minor, Access: d.GetAccess()})
	return nil
}

func (b *blockDevices) use(serial, id string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.users[serial] == nil {
		b.users[serial] = map[string]bool{}
	}
	b.users[serial][id] = true
}

func (b *blockDevices) leave(serial, id string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.users[serial], id)
	if len(b.users[serial]) == 0 {
		delete(b.users, serial)
	}
}

// used tells whether a container uses a disk.
func (b *blockDevices) used(serial string) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return len(b.users[serial]) > 0
}

func (b *blockDevices) serials() []string {
	b.mu.Lock()
	defer b.mu.Unlock()
	all := []string{}
	for serial := range b.users {
		all = append(all, serial)
	}
	return all
}

// SyncDevices implements agentproto.AgentService. What a container has written to a device may be in the guest's page
// cache only, even after its end; on a node without VMs it would outlive the pod.
func (a *Agent) SyncDevices(ctx context.Context, _ *agentproto.SyncDevicesRequest) (*agentproto.SyncDevicesResponse, error) {
	var failed []error
	if a.machine != nil {
		for _, serial := range a.machine.blocks.serials() {
			failed = append(failed, syncDisk(ctx, serial))
		}
	}
	return &agentproto.SyncDevicesResponse{}, errors.Join(failed...)
}

// syncDisk writes back what the kernel has cached of a disk.
func syncDisk(ctx context.Context, serial string) error {
	node, err := findDisk(ctx, serial)
	if err != nil {
		return err
	}
	f, err := os.Open(node)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("disk %s: %w", serial, err)
	}
	defer f.Close()
	if err := f.Sync(); err != nil {
		return fmt.Errorf("disk %s: %w", serial, err)
	}
	return nil
}
