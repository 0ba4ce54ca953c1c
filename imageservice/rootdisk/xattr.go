package rootdisk

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
)

// xattrRecord starts the PAX records that hold extended attributes.
const xattrRecord = "SCHILY.xattr."

// xattrPrefixes are the attribute namespaces EROFS knows, by their number on disk. The access control
// lists are whole names. Others (such as macOS' com.apple.*) cannot be set on Linux and are dropped.
var xattrPrefixes = []struct {
	index  byte
	prefix string
	whole  bool
}{
	{1, "user.", false},
	{2, "system.posix_acl_access", true},
	{3, "system.posix_acl_default", true},
	{4, "trusted.", false},
	{6, "security.", false},
}

const (
	xattrHeaderLen = 12
	maxXattrValue  = 64 << 10                  // XATTR_SIZE_MAX
	maxXattrBytes  = xattrHeaderLen + 65534<<2 // of one file: its count is 16 bits
)

// encodeXattrs makes the extended attribute area of an inode, as it follows the inode on disk
// (erofs_xattr_ibody_header and entries, in byte order of names).
func encodeXattrs(records map[string]string) ([]byte, error) {
	var b []byte
	for _, key := range slices.Sorted(maps.Keys(records)) {
		name, ok := strings.CutPrefix(key, xattrRecord)
		if !ok || strings.HasPrefix(name, "trusted.overlay.") || strings.HasPrefix(name, "user.overlay.") {
			continue
		}
		value := records[key]
		for _, p := range xattrPrefixes {
			rest, ok := strings.CutPrefix(name, p.prefix)
			if !ok || p.whole != (rest == "") {
				continue
			}
			if len(name) > maxNameLen || len(value) > maxXattrValue-1 {
				return nil, fmt.Errorf("extended attribute %.40q is too long", name)
			}
			if b == nil {
				b = make([]byte, xattrHeaderLen)
			}
			b = append(b, byte(len(rest)), p.index)
			b = binary.LittleEndian.AppendUint16(b, uint16(len(value)))
			b = append(b, rest...)
			b = append(b, value...)
			for len(b)%4 != 0 {
				b = append(b, 0)
			}
			break
		}
	}
	if len(b) > maxXattrBytes {
		return nil, errors.New("too many extended attributes")
	}
	return b, nil
}
