package vmtest

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const slotsPerSegment = 32 // slot 0 is the host bridge

// pciDevice is what vm.add-* answers.
type pciDevice struct {
	ID  string `json:"id"`
	BDF string `json:"bdf"`
}

// device is one of the booted VM.
type device struct {
	kind, bdf, path string
	fds             []int
	conn            net.Conn // to a vhost-user process
	leaving         bool
}

// validate checks what can be told from the configuration alone.
func (m *machine) validate() error {
	c := m.config
	cpus, memory, payload := sub(c, "cpus"), sub(c, "memory"), sub(c, "payload")
	kernel, err := os.ReadFile(text(payload, "kernel"))
	if err != nil {
		return worded("Cannot open kernel file: %v", err)
	}
	if len(kernel) == 0 {
		return worded("Kernel lacks PVH header")
	}
	if initrd := text(payload, "initramfs"); initrd != "" {
		if _, err := os.Stat(initrd); err != nil {
			return worded("Cannot open initramfs file: %v", err)
		}
	}
	segments := max(1, number(sub(c, "platform"), "num_pci_segments"))
	switch {
	case number(cpus, "boot_vcpus") < 1 || number(cpus, "max_vcpus") < number(cpus, "boot_vcpus"):
		return worded("Max vCPUs lower than boot vCPUs")
	case number(memory, "size") == 0 || number(memory, "size")%(2<<20) != 0:
		return fmt.Errorf("memory size %d", number(memory, "size"))
	case number(memory, "hotplug_size")%(128<<20) != 0:
		return fmt.Errorf("hotplug size %d is no multiple of 128 MiB", number(memory, "hotplug_size"))
	case segments > 96:
		return worded("Number of PCI segments (%d) not in range of 1 to 96", segments)
	}
	ids := map[string]bool{}
	for _, kind := range []string{"disks", "net", "fs", "pmem", "devices", "vsock"} {
		items := list(c, kind)
		if kind == "vsock" && c["vsock"] != nil {
			items = []map[string]any{sub(c, "vsock")}
		}
		for _, d := range items {
			id := text(d, "id")
			if id == "" {
				continue
			}
			if ids[id] {
				return worded("Identifier %s is not unique", id)
			}
			ids[id] = true
			if strings.HasPrefix(id, "__") {
				return worded("Identifier %s is reserved", id)
			}
			if number(d, "pci_segment") >= segments {
				return worded("Invalid PCI segment id: %d", number(d, "pci_segment"))
			}
			if err := m.validateDevice(kind, d); err != nil {
				return err
			}
		}
	}
	return nil
}

func (m *machine) validateDevice(kind string, d map[string]any) error {
	queues := number(d, "num_queues")
	vcpus := number(sub(m.config, "cpus"), "boot_vcpus")
	switch kind {
	case "disks":
		if n := len(text(d, "serial")); n > 20 {
			return worded("Block device serial length (%d) exceeds maximum allowed length (20)", n)
		}
		if queues > vcpus {
			return worded("Number of queues to virtio_block exceeds number of vCPUs")
		}
	case "net":
		if mtu := number(d, "mtu"); mtu != 0 && mtu < 1280 {
			return worded("MTU %d is lower than 1280", mtu)
		}
		if queues/2 > vcpus {
			return worded("Number of queues to virtio_net exceeds number of vCPUs")
		}
		if _, err := net.ParseMAC(text(d, "mac")); text(d, "mac") != "" && err != nil {
			return err
		}
		if files, ok := m.taps[text(d, "id")]; ok && int64(2*len(files)) != queues {
			return worded("Number of queues to virtio_net does not match the number of input FDs")
		}
	case "fs":
		if !flag(sub(m.config, "memory"), "shared") {
			return worded("Using vhost-user requires using shared memory or huge pages")
		}
		if n := len(text(d, "tag")); n == 0 || n > 36 {
			return fmt.Errorf("tag of %d bytes", n)
		}
	case "vsock":
		if cid := number(d, "cid"); cid < 3 || cid == 1<<32-1 {
			return worded("Invalid CID %d", cid)
		}
	}
	return nil
}

// adder answers vm.add-*: what is in the configuration is validated, and plugged when the VM runs.
func (m *machine) adder(kind, what string) func(map[string]any, []int) response {
	return func(d map[string]any, files []int) response {
		if m.config == nil {
			return refuse(404, "Error from API", what, notCreated)
		}
		if kind == "devices" && len(files) > 1 {
			return badBody
		}
		if len(files) > 0 {
			if kind != "net" {
				return apiError(what, "files with "+kind)
			}
			own, err := duplicate(files)
			if err != nil {
				return apiError(what, err.Error())
			}
			m.taps[text(d, "id")] = own // kept open for reboots
		}
		items, _ := m.config[kind].([]any)
		m.config[kind] = append(slices.Clone(items), d)
		info, err := pciDevice{}, m.validate()
		if err != nil {
			err = worded("Failed to validate config: %v", err)
		} else if m.guest != nil {
			info, err = m.plug(kind, d)
		}
		if err != nil {
			if m.config[kind] = items; items == nil {
				delete(m.config, kind)
			}
			m.dropTaps(text(d, "id"))
			return apiError(what, err.Error())
		}
		if m.guest == nil {
			return noContent
		}
		return ok(info)
	}
}

func duplicate(files []int) ([]int, error) {
	var own []int
	for _, fd := range files {
		n, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 3)
		if err != nil {
			return nil, err
		}
		own = append(own, n)
	}
	return own, nil
}

func (m *machine) addVsock(d map[string]any, _ []int) response {
	if m.config == nil || m.guest != nil || m.config["vsock"] != nil {
		return apiError("The vsock device could not be added to the VM", "Too many virtio-vsock devices")
	}
	m.config["vsock"] = d
	return noContent
}

// plug makes a device of the VM: ID, slot, and what it is backed by.
func (m *machine) plug(kind string, c map[string]any) (pciDevice, error) {
	id := text(c, "id")
	if id == "" {
		id = fmt.Sprintf("_%s%d", map[string]string{"disks": "disk", "devices": "vfio"}[kind], m.autoID)
		c["id"] = id
		m.autoID++
	}
	if _, ok := m.devices[id]; ok {
		return pciDevice{}, worded("Invalid identifier as it is not unique: %s", id)
	}
	d := &device{kind: kind}
	segment := number(c, "pci_segment")
	for slot := 1; slot < slotsPerSegment && d.bdf == ""; slot++ {
		bdf := fmt.Sprintf("%04x:00:%02x.0", segment, slot)
		taken := false
		for _, other := range m.devices {
			taken = taken || other.bdf == bdf
		}
		if !taken {
			d.bdf = bdf
		}
	}
	if d.bdf == "" {
		return pciDevice{}, worded("Failed to find an available PCI device ID: Could not find an available device slot on the PCI bus")
	}
	var err error
	switch kind {
	case "disks":
		err = m.openDisk(d, c)
	case "fs":
		d.conn, err = net.DialTimeout("unix", text(c, "socket"), time.Second)
	case "net":
		if len(m.taps[id]) == 0 {
			err = fmt.Errorf("a NIC without file descriptors (the real one would open or make a tap)")
		} else {
			d.fds, err = duplicate(m.taps[id])
		}
	}
	if err != nil {
		return pciDevice{}, worded("Error from device manager: %v", err)
	}
	m.devices[id] = d
	return pciDevice{id, d.bdf}, nil
}

func (m *machine) openDisk(d *device, c map[string]any) error {
	path := text(c, "path")
	if m.guest != nil && !m.allowed(path, flag(c, "readonly")) {
		return worded("I/O error (path=%s op=open): Permission denied (os error 13)", path)
	}
	flags, lock := unix.O_RDWR, int16(unix.F_WRLCK)
	if flag(c, "readonly") {
		flags, lock = unix.O_RDONLY, unix.F_RDLCK
	}
	fd, err := unix.Open(path, flags|unix.O_CLOEXEC, 0)
	if err != nil {
		return worded("I/O error (path=%s op=open): %v", path, err)
	}
	if err := unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLK, &unix.Flock_t{Type: lock}); err != nil {
		unix.Close(fd)
		return worded("Cannot lock images of all block devices: %s: The file is already locked", path)
	}
	d.path, d.fds = path, []int{fd}
	return nil
}

// allowed is Landlock for what is opened after vm.create.
func (m *machine) allowed(path string, readonly bool) bool {
	if !flag(m.config, "landlock_enable") {
		return true
	}
	for _, r := range list(m.config, "landlock_rules") {
		if !readonly && !strings.Contains(text(r, "access"), "w") {
			continue
		}
		if rel, err := filepath.Rel(text(r, "path"), path); err == nil && filepath.IsLocal(rel) {
			return true
		}
	}
	return false
}

// dropTaps closes what came with a NIC that is no more.
func (m *machine) dropTaps(id string) {
	for _, fd := range m.taps[id] {
		unix.Close(fd)
	}
	delete(m.taps, id)
}

func (m *machine) unplug(id string) {
	d := m.devices[id]
	for _, fd := range d.fds {
		unix.Close(fd)
	}
	if d.conn != nil {
		d.conn.Close()
	}
	delete(m.devices, id)
}

// remove answers at once; the guest lets go later.
func (m *machine) remove(r map[string]any, _ []int) response {
	const what = "The device could not be removed from the VM"
	id := text(r, "id")
	if m.config == nil {
		return refuse(404, "Error from API", what, notCreated)
	}
	found := ""
	for _, kind := range []string{"disks", "net", "fs", "pmem", "devices"} {
		for _, d := range list(m.config, kind) {
			if text(d, "id") == id {
				found = kind
			}
		}
	}
	if m.guest == nil {
		if found == "" {
			return apiError(what, fmt.Sprintf("No device with id %q to remove", id))
		}
		m.forget(found, id)
		return noContent
	}
	d, ok := m.devices[id]
	if !ok || d.leaving || found == "" {
		return apiError(what, "Error from device manager", "Failed to find device corresponding to the given identifier: "+id)
	}
	d.leaving = true
	m.forget(found, id)
	f := loadFaults()
	if f.RemovalDelay < 0 {
		return noContent
	}
	delay := 10 * time.Millisecond
	if f.RemovalDelay > 0 {
		delay = time.Duration(f.RemovalDelay) * time.Millisecond
	}
	time.AfterFunc(delay, func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		if m.devices[id] != d {
			return // stopped meanwhile
		}
		m.unplug(id)
		m.dropTaps(id)
		if !f.LoseRemovalEvent {
			m.events.send("vm", "device-removed", map[string]string{"id": id, "bdf": d.bdf})
		}
	})
	return noContent
}

func (m *machine) forget(kind, id string) {
	items, _ := m.config[kind].([]any)
	m.config[kind] = slices.DeleteFunc(slices.Clone(items), func(item any) bool {
		return text(item.(map[string]any), "id") == id
	})
}
