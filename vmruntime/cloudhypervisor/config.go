package cloudhypervisor

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"syscall"

	"github.com/containerd/errdefs"

	"github.com/crivm/crivm/agentproto"
	"github.com/crivm/crivm/vmruntime"
	"github.com/crivm/crivm/vmruntime/chclient"
)

const (
	// slots of a PCI segment that devices can take; slot 0 is the host bridge.
	slots = 31
	// maxSegments is what one VM can have.
	maxSegments = 96
	// builtin is how many slots of segment 0 the VMM's own devices take at most: rng, balloon, vsock, pvpanic,
	// virtio-mem; one spare.
	builtin = 6

	// guestCID is the guest's vsock address. It means nothing outside of this VM.
	guestCID = 3

	// memoryBlock is what virtio-mem plugs at a time; memoryRegion is what its region must be a multiple of.
	memoryBlock  = 2 << 20
	memoryRegion = 128 << 20

	maxDir    = 60
	maxSerial = 20
	maxTag    = 36
)

var (
	serialText = regexp.MustCompile(`^[a-zA-Z0-9_-]{1,20}$`)
	idText     = regexp.MustCompile(`^[a-zA-Z0-9_.-]{1,64}$`)
)

// IDs of devices in the VMM: chosen by us, so that they mean the same to a later daemon.
func diskID(serial string) string { return "disk-" + serial }
func netID(id string) string      { return "net-" + id }
func shareID(tag string) string   { return "fs-" + tag }

func checkSpec(s vmruntime.Spec) error {
	fail := func(format string, args ...any) error {
		return fmt.Errorf(format+": %w", append(args, errdefs.ErrInvalidArgument)...)
	}
	switch {
	case !filepath.IsAbs(s.Dir) || len(s.Dir) > maxDir:
		return fail("directory %q, want an absolute path of at most %d bytes", s.Dir, maxDir)
	case !filepath.IsAbs(s.Kernel) || s.Initrd != "" && !filepath.IsAbs(s.Initrd):
		return fail("kernel %q and initrd %q, want absolute paths", s.Kernel, s.Initrd)
	case s.VCPUs < 1 || s.MaxVCPUs < s.VCPUs:
		return fail("%d of %d vCPUs", s.VCPUs, s.MaxVCPUs)
	case s.MemoryBytes < memoryBlock || s.MemoryBytes%memoryBlock != 0 || s.MaxMemoryBytes < s.MemoryBytes:
		return fail("%d of %d bytes of memory, want multiples of 2 MiB", s.MemoryBytes, s.MaxMemoryBytes)
	}
	seen := map[string]bool{}
	for _, d := range s.Disks {
		if err := checkDisk(d); err != nil {
			return err
		}
		if seen[diskID(d.Serial)] {
			return fail("two disks with serial %s", d.Serial)
		}
		seen[diskID(d.Serial)] = true
	}
	for _, n := range s.NICs {
		if err := checkNIC(n); err != nil {
			return err
		}
		if seen[netID(n.ID)] {
			return fail("two NICs with ID %s", n.ID)
		}
		seen[netID(n.ID)] = true
	}
	return nil
}

func checkDisk(d vmruntime.Disk) error {
	if !serialText.MatchString(d.Serial) {
		return fmt.Errorf("disk serial %q, want 1 to %d of [a-zA-Z0-9_-]: %w", d.Serial, maxSerial, errdefs.ErrInvalidArgument)
	}
	if d.Device == 0 && !filepath.IsAbs(d.Path) {
		return fmt.Errorf("disk %s: path %q is not absolute: %w", d.Serial, d.Path, errdefs.ErrInvalidArgument)
	}
	return nil
}

func checkNIC(n vmruntime.NIC) error {
	if !idText.MatchString(n.ID) || n.Tap == "" || n.MAC == "" {
		return fmt.Errorf("NIC %q: needs an ID, a tap and a MAC: %w", n.ID, errdefs.ErrInvalidArgument)
	}
	return nil
}

// vmConfig is the VM without its NICs: they come with a file descriptor each and are added one by one.
func (d *Driver) vmConfig(s vmruntime.Spec) chclient.VMConfig {
	c := chclient.VMConfig{
		Payload: &chclient.PayloadConfig{Kernel: s.Kernel, Initramfs: s.Initrd, Cmdline: cmdline(s.Cmdline)},
		CPUs:    &chclient.CPUsConfig{Boot: s.VCPUs, Max: s.MaxVCPUs},
		Memory:  &chclient.MemoryConfig{Size: s.MemoryBytes, Shared: s.SharedMemory},
		// Free page reporting gives the host back what the guest has freed, without being asked.
		Balloon: &chclient.BalloonConfig{DeflateOnOOM: true, FreePageReporting: true},
		RNG:     &chclient.RNGConfig{Src: "/dev/urandom"},
		Serial:  &chclient.SerialConfig{Mode: chclient.ConsoleSocket, Socket: serialPath(s.Dir)},
		Console: &chclient.ConsoleConfig{Mode: chclient.ConsoleOff},
		Vsock:   &chclient.VsockConfig{ID: "vsock", CID: guestCID, Socket: vsockPath(s.Dir)},
		PVPanic: true,
		Platform: &chclient.PlatformConfig{
			NumPCISegments: max(d.config.PCISegments, segmentAtBoot(len(s.Disks)+len(s.NICs))+1),
		},
	}
	if s.MaxMemoryBytes > s.MemoryBytes {
		c.Memory.HotplugMethod = chclient.HotplugVirtioMem
		c.Memory.HotplugSize = (s.MaxMemoryBytes - s.MemoryBytes + memoryRegion - 1) / memoryRegion * memoryRegion
	}
	for i, disk := range s.Disks {
		c.Disks = append(c.Disks, diskConfig(disk, segmentAtBoot(i)))
	}
	if d.landlock {
		// The VMM adds what the configuration names; a rule for a file that is not there yet counts for nothing,
		// hence the directory of the sockets and those of later disks.
		c.Landlock = true
		c.LandlockRules = []chclient.LandlockRule{{Path: runPath(s.Dir), Access: "rw"}, {Path: vmruntime.DeviceDir(s.Dir), Access: "rw"}}
		for _, dir := range slices.Concat(d.config.HotplugDirs, s.HotplugDirs) {
			c.LandlockRules = append(c.LandlockRules, chclient.LandlockRule{Path: dir, Access: "rw"})
		}
		for _, dir := range d.config.ReadDirs {
			c.LandlockRules = append(c.LandlockRules, chclient.LandlockRule{Path: dir, Access: "r"})
		}
	}
	return c
}

// segmentAtBoot is where the i-th device of a Spec goes: after the VMM's own in segment 0, and so on.
func segmentAtBoot(i int) int { return (i + builtin) / slots }

// cmdline is what the driver needs, then what the caller wants, which wins where both say something.
func cmdline(extra string) string {
	// A panic reboots at once; the reboot is seen as an event and ends the VM.
	s := "console=ttyS0 quiet panic=1 " + agentproto.TransportParameter + "=" + agentproto.TransportVsock
	if extra != "" {
		s += " " + extra
	}
	return s
}

func diskConfig(d vmruntime.Disk, segment int) chclient.DiskConfig {
	c := chclient.DiskConfig{
		ID: diskID(d.Serial), Path: d.Path, ReadOnly: d.ReadOnly, Serial: d.Serial,
		ImageType: chclient.ImageRaw, PCISegment: segment,
	}
	if d.ReadOnly {
		c.Sparse = new(bool) // nothing to discard; the VMM would warn of each
	}
	return c
}

func netConfig(n vmruntime.NIC, segment int) chclient.NetConfig {
	return chclient.NetConfig{ID: netID(n.ID), MAC: n.MAC, NumQueues: 2, PCISegment: segment}
}

// deviceGroups are the groups that own the device files which the VMM opens, as far as they give access by it.
// Root's group is left out: it opens much else.
func deviceGroups() []int {
	var groups []int
	for _, path := range []string{"/dev/kvm"} {
		fi, err := os.Stat(path)
		if err != nil {
			continue
		}
		st, ok := fi.Sys().(*syscall.Stat_t)
		if ok && st.Gid != 0 && fi.Mode().Perm()&0o060 == 0o060 && !slices.Contains(groups, int(st.Gid)) {
			groups = append(groups, int(st.Gid))
		}
	}
	return groups
}
