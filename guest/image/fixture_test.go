package image

import (
	"bytes"
	"compress/gzip"
	"debug/elf"
	"encoding/binary"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"
	"github.com/ulikunitz/xz/lzma"
)

const testRelease = "6.1.0-7-test-amd64"

// elfSection is a section of an ELF file made for a test.
type elfSection struct {
	name    string
	kind    elf.SectionType
	link    uint32
	content []byte
}

// elfSegment is a program header of one.
type elfSegment struct {
	kind    elf.ProgType
	content []byte
}

// buildELF makes a little-endian 64-bit x86 ELF file that debug/elf reads.
func buildELF(t testing.TB, segments []elfSegment, sections []elfSection) []byte {
	t.Helper()
	const headerSize, progSize, sectionSize = 64, 56, 64
	names := []byte{0}
	sections = append([]elfSection{{}}, sections...)
	sections = append(sections, elfSection{name: ".shstrtab", kind: elf.SHT_STRTAB})
	nameAt := make([]uint32, len(sections))
	for i, s := range sections {
		if s.name != "" {
			nameAt[i] = uint32(len(names))
			names = append(names, s.name+"\x00"...)
		}
	}
	sections[len(sections)-1].content = names

	offset := uint64(headerSize + progSize*len(segments))
	var progs, heads, data bytes.Buffer
	write := func(w *bytes.Buffer, v any) {
		if err := binary.Write(w, binary.LittleEndian, v); err != nil {
			t.Fatal(err)
		}
	}
	for _, p := range segments {
		write(&progs, elf.Prog64{Type: uint32(p.kind), Off: offset + uint64(data.Len()), Filesz: uint64(len(p.content)), Memsz: uint64(len(p.content)), Align: 4})
		data.Write(p.content)
	}
	for i, s := range sections {
		head := elf.Section64{Name: nameAt[i], Type: uint32(s.kind), Link: s.link, Off: offset + uint64(data.Len()), Size: uint64(len(s.content))}
		if s.kind == elf.SHT_DYNAMIC {
			head.Entsize = 16
		}
		write(&heads, head)
		data.Write(s.content)
	}
	var out bytes.Buffer
	head := elf.Header64{
		Type: uint16(elf.ET_EXEC), Machine: uint16(elf.EM_X86_64), Version: 1,
		Phoff: headerSize, Shoff: offset + uint64(data.Len()), Ehsize: headerSize,
		Phentsize: progSize, Phnum: uint16(len(segments)),
		Shentsize: sectionSize, Shnum: uint16(len(sections)), Shstrndx: uint16(len(sections) - 1),
	}
	copy(head.Ident[:], elf.ELFMAG)
	head.Ident[elf.EI_CLASS], head.Ident[elf.EI_DATA], head.Ident[elf.EI_VERSION] = byte(elf.ELFCLASS64), byte(elf.ELFDATA2LSB), 1
	write(&out, head)
	out.Write(progs.Bytes())
	out.Write(data.Bytes())
	out.Write(heads.Bytes())
	return out.Bytes()
}

// note is one ELF note.
func note(name string, kind uint32, content []byte) []byte {
	name += "\x00"
	out := binary.LittleEndian.AppendUint32(nil, uint32(len(name)))
	out = binary.LittleEndian.AppendUint32(out, uint32(len(content)))
	out = binary.LittleEndian.AppendUint32(out, kind)
	pad := func(b []byte) []byte { return append(b, make([]byte, (4-len(b)%4)%4)...) }
	return append(append(out, pad([]byte(name))...), pad(content)...)
}

// testKernel is an ELF kernel with a PVH note behind another one.
func testKernel(t testing.TB) []byte {
	notes := append(note("GNU", 3, []byte("build-id")), note("Xen", 18, []byte{0, 0, 0, 1, 0, 0, 0, 0})...)
	banner := strings.Repeat("filler ", 5000) + "Linux version %s fmt\x00Linux version " + testRelease + " (builder) #1"
	return buildELF(t, []elfSegment{{elf.PT_NOTE, notes}, {elf.PT_LOAD, []byte(banner)}}, nil)
}

// pack compresses as the kernel's build does: all formats but gzip with the plain size behind.
func pack(t testing.TB, how string, plain []byte) []byte {
	t.Helper()
	var out bytes.Buffer
	check := func(err error) {
		if err != nil {
			t.Fatal(err)
		}
	}
	switch how {
	case "gzip":
		w := gzip.NewWriter(&out)
		_, err := w.Write(plain)
		check(err)
		check(w.Close())
		return out.Bytes()
	case "xz":
		w, err := xz.NewWriter(&out)
		check(err)
		_, err = w.Write(plain)
		check(err)
		check(w.Close())
	case "lzma":
		w, err := lzma.NewWriter(&out)
		check(err)
		_, err = w.Write(plain)
		check(err)
		check(w.Close())
	case "zstd":
		w, err := zstd.NewWriter(&out)
		check(err)
		_, err = w.Write(plain)
		check(err)
		check(w.Close())
	case "lz4":
		packed, err := compress("lz4", plain)
		check(err)
		out.Write(packed)
	case "none":
		out.Write(plain)
	default:
		t.Fatalf("pack %q", how)
	}
	return binary.LittleEndian.AppendUint32(out.Bytes(), uint32(len(plain)))
}

// bzImage wraps a payload in a setup header of boot protocol 2.15.
func bzImage(payload []byte) []byte {
	const setupSects = 2
	image := make([]byte, (setupSects+1)*512)
	le := binary.LittleEndian
	image[setupSectsAt] = setupSects
	copy(image[setupMagicAt:], "HdrS")
	le.PutUint16(image[setupVersionAt:], 0x020f)
	le.PutUint16(image[kernelVersionAt:], 0x400-0x200)
	copy(image[0x400:], testRelease+" (builder@host) #1\x00")
	le.PutUint32(image[payloadOffsetAt:], 32)
	le.PutUint32(image[payloadLengthAt:], uint32(len(payload)))
	image = append(image, make([]byte, 32)...)
	image = append(image, payload...)
	return append(image, "behind the payload"...)
}

// testModule is a kernel module with a .modinfo section.
func testModule(t testing.TB, release string, fields ...string) []byte {
	info := strings.Join(append(fields, "vermagic="+release+" SMP"), "\x00") + "\x00"
	return buildELF(t, nil, []elfSection{{name: ".modinfo", kind: elf.SHT_PROGBITS, content: []byte(info)}})
}

// testProgram is a program or library with an interpreter ("": none) and needed libraries.
func testProgram(t testing.TB, loader string, runpath string, needed ...string) []byte {
	strtab := []byte{0}
	var dynamic []byte
	entry := func(tag elf.DynTag, value string) {
		dynamic = binary.LittleEndian.AppendUint64(dynamic, uint64(tag))
		dynamic = binary.LittleEndian.AppendUint64(dynamic, uint64(len(strtab)))
		strtab = append(strtab, value+"\x00"...)
	}
	for _, n := range needed {
		entry(elf.DT_NEEDED, n)
	}
	if runpath != "" {
		entry(elf.DT_RUNPATH, runpath)
	}
	var segments []elfSegment
	if loader != "" {
		segments = append(segments, elfSegment{elf.PT_INTERP, []byte(loader + "\x00")})
	}
	if dynamic == nil {
		return buildELF(t, segments, nil)
	}
	return buildELF(t, segments, []elfSection{
		{name: ".dynstr", kind: elf.SHT_STRTAB, content: strtab},
		{name: ".dynamic", kind: elf.SHT_DYNAMIC, link: 1, content: dynamic},
	})
}

// writeFile makes a file with the directories above it and returns its path.
func writeFile(t testing.TB, content []byte, parts ...string) string {
	t.Helper()
	name := filepath.Join(parts...)
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, content, 0o644); err != nil {
		t.Fatal(err)
	}
	return name
}
