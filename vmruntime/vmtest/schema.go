package vmtest

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"
)

// The API's objects by field. A field's type is written as
//
//	"s" string, "b" bool, "i" integer, "u8" "u16" "u32" bounded ones, "e:A|B" one of these strings,
//	"o:Name" object, "a:..." array of it; "!" in front: required.
//
// They are those of v53.0 and were compared with its API description.
var schema = map[string]map[string]string{
	"VmConfig": {
		"cpus": "o:CpusConfig", "memory": "o:MemoryConfig", "payload": "!o:PayloadConfig",
		"disks": "a:o:DiskConfig", "net": "a:o:NetConfig", "rng": "o:RngConfig", "balloon": "o:BalloonConfig",
		"fs": "a:o:FsConfig", "pmem": "a:o:PmemConfig", "serial": "o:SerialConfig", "console": "o:ConsoleConfig",
		"devices": "a:o:DeviceConfig", "vsock": "o:VsockConfig", "watchdog": "b", "pvpanic": "b", "iommu": "b",
		"platform": "o:PlatformConfig", "landlock_enable": "b", "landlock_rules": "a:o:LandlockConfig",
	},
	"PayloadConfig": {"kernel": "s", "initramfs": "s", "cmdline": "s", "firmware": "s"},
	"CpusConfig": {
		"boot_vcpus": "!u32", "max_vcpus": "!u32", "kvm_hyperv": "b", "max_phys_bits": "u8", "nested": "b",
		"core_scheduling": "e:Vm|Vcpu|Off",
	},
	"MemoryConfig": {
		"size": "!i", "hotplug_size": "i", "hotplugged_size": "i", "mergeable": "b", "hotplug_method": "e:Acpi|VirtioMem",
		"shared": "b", "hugepages": "b", "hugepage_size": "i", "prefault": "b", "reserve": "b", "thp": "b",
		"zones": "a:o:MemoryZoneConfig",
	},
	"MemoryZoneConfig": {
		"id": "!s", "size": "!i", "file": "s", "mergeable": "b", "shared": "b", "hugepages": "b", "hugepage_size": "i",
		"host_numa_node": "u32", "hotplug_size": "i", "hotplugged_size": "i", "prefault": "b", "reserve": "b",
	},
	"DiskConfig": {
		"path": "s", "readonly": "b", "direct": "b", "iommu": "b", "num_queues": "u16", "queue_size": "u16",
		"vhost_user": "b", "vhost_socket": "s", "pci_segment": "u16", "pci_device_id": "u8", "id": "s", "serial": "s",
		"backing_files": "b", "sparse": "b", "image_type": "!e:FixedVhd|Qcow2|Raw|Vhdx|Unknown",
		"lock_granularity": "e:ByteRange|Full",
	},
	"NetConfig": {
		"tap": "s", "ip": "s", "mask": "s", "mac": "s", "host_mac": "s", "mtu": "u16", "iommu": "b", "num_queues": "u16",
		"queue_size": "u16", "vhost_user": "b", "vhost_socket": "s", "vhost_mode": "e:Client|Server", "id": "s",
		"pci_segment": "u16", "pci_device_id": "u8", "offload_tso": "b", "offload_ufo": "b", "offload_csum": "b",
	},
	"RngConfig": {"src": "!s", "iommu": "b", "id": "s", "pci_segment": "u16", "pci_device_id": "u8"},
	"BalloonConfig": {
		"size": "!i", "deflate_on_oom": "b", "free_page_reporting": "b", "id": "s", "pci_segment": "u16",
		"pci_device_id": "u8", "iommu": "b",
	},
	"FsConfig": {
		"tag": "!s", "socket": "!s", "num_queues": "!u16", "queue_size": "!u16", "pci_segment": "u16",
		"pci_device_id": "u8", "id": "s",
	},
	"PmemConfig": {
		"file": "!s", "size": "i", "iommu": "b", "discard_writes": "b", "pci_segment": "u16", "pci_device_id": "u8", "id": "s",
	},
	"SerialConfig": {"mode": "!e:Off|Pty|Tty|File|Socket|Null", "file": "s", "socket": "s"},
	"ConsoleConfig": {
		"mode": "!e:Off|Pty|Tty|File|Socket|Null", "file": "s", "socket": "s", "iommu": "b", "id": "s",
		"pci_segment": "u16", "pci_device_id": "u8",
	},
	"DeviceConfig": {
		"path": "s", "iommu": "b", "pci_segment": "u16", "pci_device_id": "u8", "id": "s",
		"x_nv_gpudirect_clique": "u8", "x_exclude_mmap_bars": "a:i",
	},
	"VsockConfig": {
		"cid": "!u32", "socket": "!s", "iommu": "b", "pci_segment": "u16", "pci_device_id": "u8", "id": "s",
	},
	"PlatformConfig": {
		"num_pci_segments": "u16", "iommu_segments": "a:u16", "iommu_address_width_bits": "u8",
		"system_serial_number": "s", "serial_number": "s", "system_uuid": "s", "uuid": "s", "oem_strings": "a:s",
		"iommufd": "b", "vfio_p2p_dma": "b",
	},
	"LandlockConfig": {"path": "!s", "access": "!s"},
	"VmResize":       {"desired_vcpus": "u32", "desired_ram": "i", "desired_balloon": "i"},
	"VmResizeZone":   {"id": "!s", "desired_ram": "!i"},
	"VmResizeDisk":   {"id": "!s", "desired_size": "!i"},
	"VmRemoveDevice": {"id": "!s"},
	"VmSnapshot":     {"destination_url": "!s"},
	"RestoreConfig": {
		"source_url": "!s", "prefault": "b", "memory_restore_mode": "e:Copy|OnDemand", "resume": "b",
		"net_fds": "a:o:RestoredNetConfig",
	},
	"RestoredNetConfig": {"id": "!s", "num_fds": "!u32"},
}

// check parses a body and holds it against the object of that name. The real one ignores unknown fields; here
// they are mistakes.
func check(name string, body []byte) (map[string]any, error) {
	d := json.NewDecoder(bytes.NewReader(body))
	d.UseNumber()
	v, err := value(d, "o:"+name, name)
	if err != nil {
		return nil, err
	}
	if _, err := d.Token(); err != io.EOF {
		return nil, fmt.Errorf("trailing characters")
	}
	return v.(map[string]any), nil
}

// value reads one value of a type.
func value(d *json.Decoder, typ, where string) (any, error) {
	token, err := d.Token()
	if err != nil {
		return nil, err
	}
	mismatch := fmt.Errorf("%s: invalid type: %v, expected %s", where, token, typ)
	kind, rest, _ := strings.Cut(typ, ":")
	switch kind {
	case "o":
		if token != json.Delim('{') {
			return nil, mismatch
		}
		return object(d, rest, where)
	case "a":
		if token != json.Delim('[') {
			return nil, mismatch
		}
		list := []any{}
		for d.More() {
			v, err := value(d, rest, fmt.Sprintf("%s[%d]", where, len(list)))
			if err != nil {
				return nil, err
			}
			list = append(list, v)
		}
		_, err := d.Token()
		return list, err
	case "s", "e":
		s, ok := token.(string)
		if !ok {
			return nil, mismatch
		}
		if kind == "e" && !slices.Contains(strings.Split(rest, "|"), s) {
			return nil, fmt.Errorf("%s: unknown variant `%s`", where, s)
		}
		return s, nil
	case "b":
		if b, ok := token.(bool); ok {
			return b, nil
		}
		return nil, mismatch
	default:
		n, ok := token.(json.Number)
		if !ok {
			return nil, mismatch
		}
		i, err := n.Int64()
		limit := map[string]int64{"u8": 1<<8 - 1, "u16": 1<<16 - 1, "u32": 1<<32 - 1}[kind]
		if err != nil || i < 0 || limit > 0 && i > limit {
			return nil, fmt.Errorf("%s: invalid value: integer `%s`, expected %s", where, n, kind)
		}
		return i, nil
	}
}

func object(d *json.Decoder, name, where string) (any, error) {
	fields := schema[name]
	m := map[string]any{}
	for d.More() {
		token, err := d.Token()
		if err != nil {
			return nil, err
		}
		key := token.(string) // by the decoder
		typ, ok := fields[key]
		if !ok {
			return nil, fmt.Errorf("%s: unknown field `%s` (the real one would ignore it)", where, key)
		}
		if _, twice := m[key]; twice {
			return nil, fmt.Errorf("%s: duplicate field `%s`", where, key)
		}
		if m[key], err = value(d, strings.TrimPrefix(typ, "!"), where+"."+key); err != nil {
			return nil, err
		}
	}
	if _, err := d.Token(); err != nil {
		return nil, err
	}
	for key, typ := range fields {
		if _, ok := m[key]; !ok && strings.HasPrefix(typ, "!") {
			return nil, fmt.Errorf("%s: missing field `%s`", where, key)
		}
	}
	return m, nil
}

// Typed access to what check has let pass; zero for absent fields.

func text(m map[string]any, key string) string  { s, _ := m[key].(string); return s }
func number(m map[string]any, key string) int64 { n, _ := m[key].(int64); return n }
func flag(m map[string]any, key string) bool    { b, _ := m[key].(bool); return b }
func sub(m map[string]any, key string) map[string]any {
	o, _ := m[key].(map[string]any)
	return o
}
func list(m map[string]any, key string) []map[string]any {
	var out []map[string]any
	items, _ := m[key].([]any)
	for _, item := range items {
		if o, ok := item.(map[string]any); ok {
			out = append(out, o)
		}
	}
	return out
}
