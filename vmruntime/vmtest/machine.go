package vmtest

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"
)

// machine is the VMM: at most one VM, in the states that vm.info shows.
type machine struct {
	events  *monitor
	version string
	apiPath string

	mu         sync.Mutex
	config     map[string]any // nil before vm.create
	paused     bool
	devices    map[string]*device // of the booted VM, by ID
	taps       map[string][]int   // of NICs that came with file descriptors, by ID
	guest      *guestProcess      // nil when not booted
	vsock      *vsock
	serial     *serialPort
	autoID     int
	plugged    int64     // by virtio-mem
	pendingCPU time.Time // until then a removal of vCPUs is pending
}

// worded makes an error in the words of the real one.
func worded(format string, args ...any) error { return wording(fmt.Sprintf(format, args...)) }

type wording string

func (w wording) Error() string { return string(w) }

// apiError is a refusal as the real one words it.
func apiError(what string, causes ...string) response {
	return refuse(500, append([]string{"Error from API", what}, causes...)...)
}

var (
	noContent = response{status: 204}
	badBody   = refuse(400, "Bad Request")
)

const (
	notCreated = "VM is not created"
	notRunning = "VM is not running"
)

// handle is called for one request at a time.
func (m *machine) handle(q request) response {
	action, ok := strings.CutPrefix(q.path, "/api/v1/")
	if !ok {
		return refuse(404, "Not Found")
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if get, ok := map[string]func() response{
		"vmm.ping": m.ping, "vm.info": m.info, "vm.counters": m.counters,
	}[action]; ok {
		if q.method != "GET" {
			return badBody
		}
		return get()
	}
	if put, ok := map[string]func() response{
		"vm.boot": m.boot, "vm.delete": m.delete, "vm.shutdown": m.shutdown, "vm.reboot": m.rebootByAPI,
		"vm.pause": m.pause, "vm.resume": m.resume, "vm.power-button": m.powerButton, "vm.nmi": m.nmi, "vmm.shutdown": m.shutdownVMM,
	}[action]; ok {
		if q.method != "PUT" || q.hasBody && action != "vmm.shutdown" {
			return badBody
		}
		return put()
	}
	withBody, ok := map[string]struct {
		object string
		do     func(body map[string]any, files []int) response
	}{
		"vm.create":        {"VmConfig", m.create},
		"vm.resize":        {"VmResize", m.resize},
		"vm.resize-zone":   {"VmResizeZone", m.resizeZone},
		"vm.resize-disk":   {"VmResizeDisk", m.resizeDisk},
		"vm.add-disk":      {"DiskConfig", m.adder("disks", "The disk could not be added to the VM")},
		"vm.add-net":       {"NetConfig", m.adder("net", "The network device could not be added to the VM")},
		"vm.add-fs":        {"FsConfig", m.adder("fs", "The fs could not be added to the VM")},
		"vm.add-pmem":      {"PmemConfig", m.adder("pmem", "The pmem device could not be added to the VM")},
		"vm.add-vsock":     {"VsockConfig", m.addVsock},
		"vm.add-device":    {"DeviceConfig", m.adder("devices", "The device could not be added to the VM")},
		"vm.remove-device": {"VmRemoveDevice", m.remove},
		"vm.snapshot":      {"VmSnapshot", m.snapshot},
		"vm.restore":       {"RestoreConfig", m.restore},
	}[action]
	if !ok {
		return refuse(404, "Not Found")
	}
	if q.method != "PUT" || !q.hasBody {
		return badBody
	}
	body, err := check(withBody.object, q.body)
	if err != nil {
		return refuse(400, "Failed to deserialize JSON", err.Error())
	}
	return withBody.do(body, q.files)
}

func ok(v any) response {
	b, err := json.Marshal(v)
	if err != nil {
		return refuse(500, err.Error())
	}
	return response{status: 200, body: b}
}

func (m *machine) ping() response {
	return ok(map[string]any{
		"build_version": m.version, "version": strings.TrimPrefix(m.version, "v") + ".0",
		"pid": os.Getpid(), "features": []string{"io_uring", "kvm"},
	})
}

func (m *machine) state() string {
	switch {
	case m.guest == nil:
		return "Created"
	case m.paused:
		return "Paused"
	default:
		return "Running"
	}
}

func (m *machine) info() response {
	if m.config == nil {
		return refuse(404, "Error from API", "The VM info is not available", notCreated)
	}
	memory := sub(m.config, "memory")
	info := map[string]any{
		"config": m.config, "state": m.state(), "memory_actual_size": number(memory, "size") + m.plugged,
	}
	if m.guest != nil {
		tree := map[string]any{"__serial": map[string]any{"id": "__serial", "resources": []any{}, "children": []string{}}}
		for id, d := range m.devices {
			parent := "_virtio-pci-" + id
			tree[id] = map[string]any{"id": id, "resources": []any{}, "parent": parent, "children": []string{}}
			tree[parent] = map[string]any{"id": parent, "resources": []any{}, "children": []string{id}, "pci_bdf": d.bdf}
		}
		info["device_tree"] = tree
	}
	return ok(info)
}

func (m *machine) counters() response {
	if m.guest == nil {
		return apiError("The VM info is not available", notRunning)
	}
	c := map[string]map[string]uint64{}
	for id, d := range m.devices {
		if d.kind == "disks" {
			c[id] = map[string]uint64{"read_bytes": 0, "read_latency_min": 1<<64 - 1}
		}
	}
	return ok(c)
}

func (m *machine) create(c map[string]any, _ []int) response {
	const what = "The VM could not be created"
	if m.config != nil {
		return apiError(what, "VM is already created")
	}
	// As in the real one the configuration stays when the rest fails.
	m.config = c
	if _, ok := c["cpus"]; !ok {
		c["cpus"] = map[string]any{"boot_vcpus": int64(1), "max_vcpus": int64(1)}
	}
	if _, ok := c["memory"]; !ok {
		c["memory"] = map[string]any{"size": int64(512 << 20)}
	}
	for _, key := range []string{"serial", "console"} {
		con := sub(c, key)
		mode := text(con, "mode")
		if mode == "File" && text(con, "file") == "" || mode == "Socket" && text(con, "socket") == "" {
			fatal(key + ": the real one panics for want of a file or socket")
		}
		if key == "console" && (con == nil || mode == "Tty" || mode == "Socket") {
			return apiError(what, "console mode "+mode+" (the real one would use the daemon's terminal)")
		}
	}
	if path := text(sub(c, "serial"), "socket"); path != "" {
		port, err := listenSerial(path)
		if err != nil {
			return apiError(what, "Error creating console devices", err.Error())
		}
		m.serial = port
	}
	for _, r := range list(c, "landlock_rules") {
		if a := text(r, "access"); strings.Trim(a, "rw") != "" || a == "" {
			return apiError(what, "Failed to apply landlock config during vm_create", "Invalid access: "+a)
		}
	}
	return noContent
}

func (m *machine) boot() response {
	const what = "The VM could not boot"
	if m.guest != nil {
		return apiError(what, "VM is already created")
	}
	m.events.send("vm", "booting", nil)
	if m.config == nil {
		return refuse(404, "Error from API", what, "VM config is missing")
	}
	if err := m.bootLocked(); err != nil {
		return apiError(what, err.Error())
	}
	m.events.send("vm", "booted", nil)
	f := loadFaults()
	if f.EventGarbage != "" && m.events.fd >= 0 {
		m.events.raw(f.EventGarbage)
	}
	return noContent
}

// bootLocked makes the VM of the configuration and starts its guest.
func (m *machine) bootLocked() error {
	if err := m.validate(); err != nil {
		return err
	}
	if m.serial == nil {
		if path := text(sub(m.config, "serial"), "socket"); path != "" {
			port, err := listenSerial(path)
			if err != nil {
				return err
			}
			m.serial = port
		}
	}
	m.devices, m.plugged, m.paused = map[string]*device{}, 0, false
	for _, id := range []string{"__rng", "__balloon", "__pvpanic"} {
		present := id == "__rng" || id == "__balloon" && m.config["balloon"] != nil || id == "__pvpanic" && flag(m.config, "pvpanic")
		if present {
			if _, err := m.plug("builtin", map[string]any{"id": id}); err != nil {
				return err
			}
		}
	}
	if number(sub(m.config, "memory"), "hotplug_size") > 0 && text(sub(m.config, "memory"), "hotplug_method") == "VirtioMem" {
		if _, err := m.plug("builtin", map[string]any{"id": "mem0"}); err != nil {
			return err
		}
	}
	for _, kind := range []string{"disks", "net", "fs", "pmem", "devices"} {
		for _, d := range list(m.config, kind) {
			if _, err := m.plug(kind, d); err != nil {
				return err
			}
		}
	}
	socket := ""
	if v := sub(m.config, "vsock"); v != nil {
		if _, err := m.plug("vsock", v); err != nil {
			return err
		}
		socket = text(v, "socket")
		var err error
		if m.vsock, err = listenVsock(socket); err != nil {
			return err
		}
	}
	g, err := startGuest(m, filepath.Dir(socket))
	if err != nil {
		return err
	}
	m.guest = g
	if m.vsock != nil {
		m.vsock.attach(g)
	}
	return nil
}

// stopLocked ends the guest without asking it.
func (m *machine) stopLocked() {
	if m.guest == nil {
		return
	}
	m.guest.kill()
	m.guest = nil
	if m.vsock != nil {
		m.vsock.close()
		m.vsock = nil
	}
	if m.serial != nil {
		m.serial.close()
		m.serial = nil
	}
	for id := range m.devices {
		m.unplug(id)
	}
}

func (m *machine) shutdown() response {
	if m.guest == nil {
		return apiError("The VM could not shutdown", notRunning)
	}
	m.stopLocked()
	m.events.send("vm", "shutdown", nil)
	return noContent
}

func (m *machine) delete() response {
	if m.config == nil {
		return noContent
	}
	if m.guest != nil {
		m.stopLocked()
		m.events.send("vm", "shutdown", nil)
	}
	if m.serial != nil {
		m.serial.close()
		m.serial = nil
	}
	m.config = nil
	m.events.send("vm", "deleted", nil)
	return noContent
}

func (m *machine) shutdownVMM() response {
	return response{status: 200, after: m.exit}
}

// exit is every orderly end of the VMM, and of a VMM of which a thread failed.
func (m *machine) exit() {
	m.mu.Lock()
	m.delete()
	m.events.send("vmm", "shutdown", nil)
	if m.apiPath != "" {
		os.Remove(m.apiPath)
	}
	exitNow(0)
}

func (m *machine) rebootByAPI() response {
	if m.guest == nil {
		return apiError("The VM could not reboot", notRunning)
	}
	if err := m.rebootLocked(); err != nil {
		return apiError("The VM could not reboot", err.Error())
	}
	return noContent
}

// reboot is what the guest does by itself.
func (m *machine) reboot() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.guest == nil {
		return
	}
	if err := m.rebootLocked(); err != nil {
		fatal("reboot: " + err.Error())
	}
}

func (m *machine) rebootLocked() error {
	m.events.send("vm", "rebooting", nil)
	m.stopLocked()
	if err := m.bootLocked(); err != nil {
		return err
	}
	m.events.send("vm", "rebooted", nil)
	return nil
}

// powerOff is a guest that has switched itself off; g is that guest.
func (m *machine) powerOff(g *guestProcess) {
	m.mu.Lock()
	current := m.guest == g
	m.mu.Unlock()
	if !current {
		return
	}
	if loadFaults().IgnorePowerOff {
		m.events.send("vm", "shutdown", nil)
		return
	}
	m.exit()
}

func (m *machine) pause() response {
	const what = "The VM could not be paused"
	switch {
	case m.guest == nil:
		return apiError(what, notRunning)
	case m.paused:
		m.events.send("vm", "pausing", nil)
		return apiError(what, "Cannot pause VM", "Failed to pause migratable component", "Invalid transition: InvalidStateTransition(Paused, Paused)")
	}
	m.events.send("vm", "pausing", nil)
	m.guest.freeze(true)
	m.paused = true
	m.events.send("vm", "paused", nil)
	return noContent
}

func (m *machine) resume() response {
	const what = "The VM could not resume"
	switch {
	case m.guest == nil:
		return apiError(what, notRunning)
	case !m.paused:
		m.events.send("vm", "resuming", nil)
		return apiError(what, "Cannot resume VM", "Failed to resume migratable component", "Invalid transition: InvalidStateTransition(Running, Running)")
	}
	m.events.send("vm", "resuming", nil)
	m.guest.freeze(false)
	m.paused = false
	m.events.send("vm", "resumed", nil)
	return noContent
}

func (m *machine) powerButton() response {
	if m.guest == nil {
		return apiError("Error triggering power button", notRunning)
	}
	return noContent // the agent does not listen to it
}

func (m *machine) nmi() response {
	if m.guest == nil {
		return apiError("Error triggering NMI", notRunning)
	}
	return noContent
}

func (m *machine) resize(r map[string]any, _ []int) response {
	const what = "The VM could not be resized"
	if m.config == nil {
		return refuse(404, "Error from API", what, notCreated)
	}
	cpus, memory := sub(m.config, "cpus"), sub(m.config, "memory")
	if m.guest == nil { // the stored configuration changes, unchecked
		for key, target := range map[string]map[string]any{"desired_vcpus": cpus, "desired_ram": memory} {
			if n, ok := r[key].(int64); ok {
				target[map[string]string{"desired_vcpus": "boot_vcpus", "desired_ram": "size"}[key]] = n
			}
		}
		return noContent
	}
	m.events.send("vm", "resizing", nil)
	if n, ok := r["desired_vcpus"].(int64); ok {
		switch {
		case n == 0:
			return apiError(what, "Error from CPU manager", "Requested zero vCPUs")
		case n > number(cpus, "max_vcpus"):
			return apiError(what, "Error from CPU manager", "Requested vCPUs exceed maximum")
		case time.Now().Before(m.pendingCPU):
			return refuse(429, "Too Many Requests")
		}
		if n < number(cpus, "boot_vcpus") {
			m.pendingCPU = time.Now().Add(30 * time.Millisecond)
		}
		cpus["boot_vcpus"] = n
	}
	if n, ok := r["desired_ram"].(int64); ok {
		if err := m.resizeMemory(memory, n); err != nil {
			return apiError(what, "Memory manager error", err.Error())
		}
	}
	if _, ok := r["desired_balloon"]; ok && m.config["balloon"] == nil {
		return apiError(what, "Error from device manager", "Missing virtio-balloon")
	}
	m.events.send("vm", "resized", nil)
	return noContent
}

func (m *machine) resizeMemory(memory map[string]any, n int64) error {
	size, room := number(memory, "size"), number(memory, "hotplug_size")
	if text(memory, "hotplug_method") != "VirtioMem" || room == 0 {
		return fmt.Errorf("no virtio-mem (the real one would change nothing and say it did)")
	}
	more := n - size
	switch {
	case more < 0:
		return worded("Invalid resize request: desired_size = %d below boot size = %d", n, size)
	case more%(2<<20) != 0:
		return fmt.Errorf("new size %#x is not aligned on block_size 0x200000", more)
	case more > room:
		return fmt.Errorf("new size %#x is bigger than region_size %#x", more, room)
	case more == number(memory, "hotplugged_size"):
		return fmt.Errorf("new size %#x and requested_size are identical", more)
	}
	memory["hotplugged_size"] = more
	if !loadFaults().MemoryStuck {
		time.AfterFunc(10*time.Millisecond, func() {
			m.mu.Lock()
			defer m.mu.Unlock()
			m.plugged = more
		})
	}
	return nil
}

func (m *machine) resizeZone(map[string]any, []int) response {
	return apiError("The memory zone could not be resized", "Failed resizing a memory zone")
}

func (m *machine) resizeDisk(r map[string]any, _ []int) response {
	const what = "The disk could not be resized"
	d, ok := m.devices[text(r, "id")]
	if !ok || d.kind != "disks" || number(r, "desired_size")%512 != 0 {
		return apiError(what, "Failed resizing a disk image")
	}
	if fi, err := os.Stat(d.path); err == nil && fi.Mode().Type() == os.ModeDevice {
		// The real one changes no block device; it must have the size already.
		if end, err := syscall.Seek(d.fds[0], 0, io.SeekEnd); err != nil || end != number(r, "desired_size") {
			return apiError(what, fmt.Sprintf("Block device size %d does not match requested size %d", end, number(r, "desired_size")))
		}
		return noContent
	}
	if err := os.Truncate(d.path, number(r, "desired_size")); err != nil {
		return apiError(what, err.Error())
	}
	return noContent
}
