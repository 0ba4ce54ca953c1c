package image

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
)

const (
	maxKernelFile = 1 << 30   // an ELF with debug information is the largest that people have
	maxKernel     = 512 << 20 // decompressed out of a bzImage
)

// The bzImage's setup header: Linux Documentation/arch/x86/boot.rst.
const (
	setupSectsAt     = 0x1f1
	setupMagicAt     = 0x202 // "HdrS"
	setupVersionAt   = 0x206
	kernelVersionAt  = 0x20e // offset - 0x200 of the version string
	payloadOffsetAt  = 0x248
	payloadLengthAt  = 0x24c
	setupHeaderEnd   = 0x250
	payloadSince     = 0x0208 // protocol version that has payload_offset
	maxVersionString = 256
)

// loadKernel reads a kernel and returns an ELF image with a PVH entry, and its release (uname -r; ""
// when an ELF does not tell).
func loadKernel(name string) (vmlinux []byte, release string, err error) {
	info, err := os.Stat(name)
	if err != nil {
		return nil, "", missing(err)
	}
	if info.Size() > maxKernelFile {
		return nil, "", fmt.Errorf("%d bytes are too many for a kernel: %w", info.Size(), errdefs.ErrInvalidArgument)
	}
	data, err := os.ReadFile(name)
	if err != nil {
		return nil, "", err
	}
	return extractKernel(data, maxKernel)
}

// extractKernel is loadKernel on bytes; at most limit bytes are decompressed.
func extractKernel(data []byte, limit int) (vmlinux []byte, release string, err error) {
	if bytes.HasPrefix(data, []byte(elf.ELFMAG)) {
		return data, bannerRelease(data), checkPVH(data)
	}
	payload, release, err := parseBzImage(data)
	if err != nil {
		return nil, "", err
	}
	if vmlinux, err = unpackPayload(payload, limit); err != nil {
		return nil, "", err
	}
	return vmlinux, release, checkPVH(vmlinux)
}

// parseBzImage finds the compressed kernel in a bzImage.
func parseBzImage(data []byte) (payload []byte, release string, err error) {
	if len(data) < setupHeaderEnd || string(data[setupMagicAt:setupMagicAt+4]) != "HdrS" {
		return nil, "", fmt.Errorf("neither an ELF file nor a bzImage: %w", errdefs.ErrInvalidArgument)
	}
	le := binary.LittleEndian
	if v := le.Uint16(data[setupVersionAt:]); v < payloadSince {
		return nil, "", fmt.Errorf("boot protocol %d.%02d is too old (2.08 has what is needed): %w", v>>8, v&0xff, errdefs.ErrInvalidArgument)
	}
	sectors := uint64(data[setupSectsAt])
	if sectors == 0 {
		sectors = 4
	}
	start := (sectors+1)*512 + uint64(le.Uint32(data[payloadOffsetAt:]))
	length := uint64(le.Uint32(data[payloadLengthAt:]))
	if start+length > uint64(len(data)) {
		return nil, "", fmt.Errorf("cut off: its payload ends at byte %d, the file at %d: %w", start+length, len(data), errdefs.ErrInvalidArgument)
	}
	if at := uint64(le.Uint16(data[kernelVersionAt:])); at != 0 {
		at += 0x200
		if at < uint64(len(data)) {
			version, _, _ := bytes.Cut(data[at:min(at+maxVersionString, uint64(len(data)))], []byte{0})
			release, _, _ = strings.Cut(string(version), " ")
		}
	}
	return data[start : start+length], release, nil
}

// unpackPayload decompresses the kernel. All formats but gzip, which has its own, are followed by the
// plain size as 32 bits.
func unpackPayload(payload []byte, limit int) ([]byte, error) {
	if bytes.HasPrefix(payload, []byte("\x1f\x8b")) {
		return decompress(payload, limit)
	}
	if len(payload) < 8 {
		return nil, fmt.Errorf("payload of %d bytes: %w", len(payload), errdefs.ErrInvalidArgument)
	}
	end := len(payload) - 4
	want := binary.LittleEndian.Uint32(payload[end:])
	plain, err := decompress(payload[:end], limit)
	if err != nil {
		return nil, err
	}
	if uint32(len(plain)) != want {
		return nil, fmt.Errorf("payload decompresses to %d bytes, its trailer says %d: %w", len(plain), want, errdefs.ErrInvalidArgument)
	}
	return plain, nil
}

// checkPVH refuses an ELF file that a VMM cannot enter: the 32-bit entry point is told by a Xen note
// (XEN_ELFNOTE_PHYS32_ENTRY; CONFIG_PVH).
func checkPVH(vmlinux []byte) error {
	f, err := elf.NewFile(bytes.NewReader(vmlinux))
	if err != nil {
		return fmt.Errorf("kernel image: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	if f.Class != elf.ELFCLASS64 || f.Machine != elf.EM_X86_64 {
		return fmt.Errorf("kernel is %v %v, not 64-bit x86: %w", f.Class, f.Machine, errdefs.ErrInvalidArgument)
	}
	for _, p := range f.Progs {
		if p.Type != elf.PT_NOTE {
			continue
		}
		if p.Off > uint64(len(vmlinux)) || p.Filesz > uint64(len(vmlinux))-p.Off {
			return fmt.Errorf("kernel image is cut off in its notes: %w", errdefs.ErrInvalidArgument)
		}
		if hasPVHNote(vmlinux[p.Off:p.Off+p.Filesz], max(p.Align, 4)) {
			return nil
		}
	}
	return fmt.Errorf("kernel has no PVH entry point (CONFIG_PVH is off): %w", errdefs.ErrInvalidArgument)
}

// hasPVHNote walks ELF notes: three 32-bit words (sizes of name and content, type), then both, each
// padded to align.
func hasPVHNote(notes []byte, align uint64) bool {
	const physicalEntry = 18
	if align > 8 {
		return false
	}
	pad := func(n uint64) uint64 { return (n + align - 1) / align * align }
	le := binary.LittleEndian
	for len(notes) >= 12 {
		nameSize, size, kind := uint64(le.Uint32(notes)), uint64(le.Uint32(notes[4:])), le.Uint32(notes[8:])
		end := 12 + pad(nameSize) + pad(size)
		if 12+nameSize > uint64(len(notes)) {
			return false
		}
		if kind == physicalEntry && string(notes[12:12+nameSize]) == "Xen\x00" && size >= 4 {
			return true
		}
		if end > uint64(len(notes)) {
			return false
		}
		notes = notes[end:]
	}
	return false
}

// bannerRelease finds the release in the kernel's banner, "Linux version RELEASE (builder) ...".
func bannerRelease(vmlinux []byte) string {
	banner := []byte("Linux version ")
	for {
		at := bytes.Index(vmlinux, banner)
		if at < 0 {
			return ""
		}
		vmlinux = vmlinux[at+len(banner):]
		release, _, found := bytes.Cut(vmlinux[:min(len(vmlinux), maxVersionString)], []byte(" "))
		if found && len(release) > 0 && release[0] >= '0' && release[0] <= '9' {
			return string(release)
		}
	}
}

// newestKernel picks the highest version among dir/vmlinuz-*.
func newestKernel(dir string) (string, error) {
	names, err := filepath.Glob(filepath.Join(dir, "vmlinuz-*"))
	if err != nil {
		return "", err
	}
	best := ""
	for _, name := range names {
		if best == "" || versionLess(best, name) {
			best = name
		}
	}
	if best == "" {
		return "", fmt.Errorf("no kernel in %s: install a kernel package (such as linux-image-cloud-amd64) or name a kernel: %w", dir, errdefs.ErrNotFound)
	}
	return best, nil
}

// versionLess compares two names with runs of digits as numbers, so that 6.1.0-9 is before 6.1.0-56.
func versionLess(a, b string) bool {
	digits := func(s string) int { return len(s) - len(strings.TrimLeft(s, "0123456789")) }
	for len(a) > 0 && len(b) > 0 {
		na, nb := digits(a), digits(b)
		if na > 0 && nb > 0 {
			x, y := strings.TrimLeft(a[:na], "0"), strings.TrimLeft(b[:nb], "0")
			if len(x) != len(y) {
				return len(x) < len(y)
			}
			if x != y {
				return x < y
			}
			a, b = a[na:], b[nb:]
			continue
		}
		if a[0] != b[0] {
			return a[0] < b[0]
		}
		a, b = a[1:], b[1:]
	}
	return len(a) < len(b)
}
