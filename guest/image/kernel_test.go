package image

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

func TestExtractKernelEveryCompression(t *testing.T) {
	kernel := testKernel(t)
	for _, how := range []string{"gzip", "xz", "lzma", "zstd", "lz4"} {
		t.Run(how, func(t *testing.T) {
			got, release, err := extractKernel(bzImage(pack(t, how, kernel)), maxKernel)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, kernel) || release != testRelease {
				t.Errorf("got %d bytes of release %q, want %d of %q", len(got), release, len(kernel), testRelease)
			}
		})
	}
}

func TestExtractKernelTakesELF(t *testing.T) {
	kernel := testKernel(t)
	got, release, err := extractKernel(kernel, maxKernel)
	if err != nil || !bytes.Equal(got, kernel) || release != testRelease {
		t.Fatalf("got %d bytes of release %q, error %v", len(got), release, err)
	}
}

func TestExtractKernelBroken(t *testing.T) {
	kernel := testKernel(t)
	good := bzImage(pack(t, "lz4", kernel))
	changed := func(change func(b []byte)) []byte {
		b := bytes.Clone(good)
		change(b)
		return b
	}
	wrongMachine := bytes.Clone(kernel)
	binary.LittleEndian.PutUint16(wrongMachine[18:], uint16(elf.EM_AARCH64))
	for name, test := range map[string]struct {
		data []byte
		want string
	}{
		"empty":                 {nil, "neither an ELF file nor a bzImage"},
		"text":                  {[]byte(strings.Repeat("hello", 1000)), "neither an ELF file nor a bzImage"},
		"cut off":               {good[:len(good)-40], "cut off: its payload ends at"},
		"cut in header":         {good[:0x220], "neither an ELF file nor a bzImage"},
		"old protocol":          {changed(func(b []byte) { binary.LittleEndian.PutUint16(b[setupVersionAt:], 0x0207) }), "boot protocol 2.07 is too old"},
		"unknown compression":   {bzImage([]byte("\xde\xad\xbe\xef and so on")), "magic number deadbeef is not known"},
		"tiny payload":          {bzImage([]byte("abc")), "payload of 3 bytes"},
		"damaged lz4":           {changed(func(b []byte) { copy(b[3*512+32+4:], "\xff\xff\xff\xff") }), "a block of 4294967295 bytes"},
		"size differs":          {bzImage(append(pack(t, "zstd", kernel)[:len(pack(t, "zstd", kernel))-4], 1, 0, 0, 0)), "its trailer says 1"},
		"payload is no ELF":     {bzImage(pack(t, "gzip", []byte(strings.Repeat("not a kernel", 10)))), "bad magic number"},
		"no PVH note":           {buildELF(t, []elfSegment{{elf.PT_NOTE, note("GNU", 18, make([]byte, 8))}}, nil), "no PVH entry point"},
		"other machine":         {wrongMachine, "EM_AARCH64"},
		"note longer than file": {buildELF(t, []elfSegment{{elf.PT_NOTE, []byte("\xff\xff\xff\xff\x08\x00\x00\x00\x12\x00\x00\x00Xen\x00")}}, nil), "no PVH entry point"},
	} {
		t.Run(name, func(t *testing.T) {
			_, _, err := extractKernel(test.data, maxKernel)
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Fatalf("error %v, want one with %q", err, test.want)
			}
			if !errdefs.IsInvalidArgument(err) {
				t.Errorf("error %v is not InvalidArgument", err)
			}
		})
	}
}

func TestExtractKernelIsBounded(t *testing.T) {
	kernel := append(testKernel(t), make([]byte, 1<<20)...)
	for _, how := range []string{"gzip", "xz", "lzma", "zstd", "lz4"} {
		if _, _, err := extractKernel(bzImage(pack(t, how, kernel)), 1<<20); err == nil {
			t.Errorf("%s: a kernel larger than the limit was taken", how)
		}
	}
}

func TestVersionLess(t *testing.T) {
	ordered := []string{"vmlinuz-5.10.0-9", "vmlinuz-6.1.0-9-cloud-amd64", "vmlinuz-6.1.0-56-cloud-amd64", "vmlinuz-6.1.192", "vmlinuz-6.12.1", "vmlinuz-6.12.1-rc"}
	for i := range ordered {
		for j := range ordered {
			if got := versionLess(ordered[i], ordered[j]); got != (i < j) {
				t.Errorf("versionLess(%q, %q) = %v", ordered[i], ordered[j], got)
			}
		}
	}
}

func TestNewestKernel(t *testing.T) {
	dir := t.TempDir()
	if _, err := newestKernel(dir); !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), "install a kernel package") {
		t.Errorf("without a kernel: %v", err)
	}
	for _, name := range []string{"vmlinuz-6.1.0-9-cloud-amd64", "vmlinuz-6.1.0-56-cloud-amd64", "config-7.0"} {
		writeFile(t, nil, dir, name)
	}
	if got, err := newestKernel(dir); err != nil || !strings.HasSuffix(got, "vmlinuz-6.1.0-56-cloud-amd64") {
		t.Errorf("got %s, %v", got, err)
	}
}

// FuzzExtractKernel covers our own parsers: setup header, LZ4 framing, ELF notes, banner. The other
// decompressors are libraries and slow under instrumentation.
func FuzzExtractKernel(f *testing.F) {
	kernel := buildELF(f, []elfSegment{{elf.PT_NOTE, note("Xen", 18, make([]byte, 8))}}, nil)
	f.Add(kernel)
	f.Add(bzImage(pack(f, "lz4", kernel)))
	f.Add(bzImage(pack(f, "gzip", kernel)))
	f.Fuzz(func(t *testing.T, data []byte) {
		const limit = 1 << 20
		if payload, _, err := parseBzImage(data); err == nil && !bytes.HasPrefix(payload, []byte("\x02\x21\x4c\x18")) {
			return // not LZ4: a library's
		}
		vmlinux, _, err := extractKernel(data, limit)
		if err == nil && !bytes.HasPrefix(vmlinux, []byte(elf.ELFMAG)) {
			t.Errorf("%d bytes that are no ELF file were taken", len(vmlinux))
		}
	})
}
