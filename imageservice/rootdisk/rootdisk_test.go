package rootdisk

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"
)

func sum(b []byte) string {
	s := sha256.Sum256(b)
	return hex.EncodeToString(s[:8])
}

var testUUID = [16]byte{1, 2, 3}

// layersOf makes Layers of encoded tars.
func layersOf(t fataler, layers [][]entry) []Layer {
	t.Helper()
	var out []Layer
	for _, l := range layers {
		b := encodeLayer(t, l)
		out = append(out, func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(b)), nil })
	}
	return out
}

func buildTo(t fataler, path string, layers []Layer) error {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatalf("%v", err)
	}
	defer f.Close()
	return Build(context.Background(), f, testUUID, layers)
}

// mountDisk mounts a disk through a loop device. Only this test does so; the product never mounts.
func mountDisk(t fataler, disk, dir string) (unmount func()) {
	t.Helper()
	if out, err := exec.Command("mount", "-t", "erofs", "-o", "ro,loop", disk, dir).CombinedOutput(); err != nil {
		t.Fatalf("mount: %v: %s", err, out)
	}
	return func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Fatalf("unmount: %v", err)
		}
	}
}

func needMount(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mounting a disk to read it back needs root")
	}
	fss, err := os.ReadFile("/proc/filesystems")
	if err != nil || !strings.Contains(string(fss), "\terofs\n") {
		t.Skip("this kernel has no EROFS (modprobe erofs), so disks cannot be mounted to read them back")
	}
	if _, err := os.Stat("/dev/loop-control"); err != nil {
		t.Skip("no loop devices here to mount a disk with")
	}
}

// readTree describes a mounted tree as tree.describe does.
func readTree(t fataler, root string) []string {
	t.Helper()
	var out []string
	first := map[uint64]string{}
	var walk func(string)
	walk = func(p string) {
		full := filepath.Join(root, p)
		var st unix.Stat_t
		if err := unix.Lstat(full, &st); err != nil {
			t.Fatalf("%v", err)
		}
		if first[st.Ino] == "" {
			first[st.Ino] = p
		}
		extra, size := "", int(st.Size)
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			b, err := os.ReadFile(full)
			if err != nil {
				t.Fatalf("%v", err)
			}
			extra = sum(b)
		case unix.S_IFLNK:
			var err error
			if extra, err = os.Readlink(full); err != nil {
				t.Fatalf("%v", err)
			}
		case unix.S_IFDIR:
			size = 0
		}
		major, minor := int64(unix.Major(st.Rdev)), int64(unix.Minor(st.Rdev))
		out = append(out, line(p, st.Mode, st.Uid, st.Gid, time.Unix(st.Mtim.Unix()), size, int(st.Nlink), first[st.Ino], major, minor, extra, readXattrs(t, full)))
		if st.Mode&unix.S_IFMT == unix.S_IFDIR {
			names, err := os.ReadDir(full)
			if err != nil {
				t.Fatalf("%v", err)
			}
			for _, e := range names {
				walk(filepath.Join(p, e.Name()))
			}
		}
	}
	walk("")
	slices.Sort(out)
	return out
}

func readXattrs(t fataler, path string) map[string]string {
	t.Helper()
	b := make([]byte, 64<<10)
	n, err := unix.Llistxattr(path, b)
	if err != nil {
		t.Fatalf("llistxattr %s: %v", path, err)
	}
	out := map[string]string{}
	for _, name := range strings.Split(strings.TrimRight(string(b[:n]), "\x00"), "\x00") {
		if name == "" {
			continue
		}
		v := make([]byte, 64<<10)
		m, err := unix.Lgetxattr(path, name, v)
		if err != nil {
			t.Fatalf("lgetxattr %s %s: %v", path, name, err)
		}
		out[name] = string(v[:m])
	}
	return out
}

// TestBuildMatchesModel compares disks of random layers, mounted, with a plain model of the merged tree.
func TestBuildMatchesModel(t *testing.T) {
	needMount(t)
	dir := t.TempDir()
	mnt := filepath.Join(dir, "mnt")
	if err := os.Mkdir(mnt, 0o700); err != nil {
		t.Fatal(err)
	}
	checks := 0
	rapid.Check(t, func(t *rapid.T) {
		layers := genLayers(t)
		// A file of its own: mount would use a loop device that is not quite gone again for the same file.
		checks++
		disk := filepath.Join(dir, fmt.Sprint("disk", checks))
		defer os.Remove(disk)
		want := newTree()
		for _, l := range layers {
			want = want.apply(l)
		}
		if err := buildTo(t, disk, layersOf(t, layers)); err != nil {
			t.Fatalf("Build: %v", err)
		}
		unmount := mountDisk(t, disk, mnt)
		defer unmount()
		compare(t, readTree(t, mnt), want.describe())
	})
}

func compare(t fataler, got, want []string) {
	t.Helper()
	slices.Sort(want)
	if slices.Equal(got, want) {
		return
	}
	var diff []string
	for _, l := range want {
		if !slices.Contains(got, l) {
			diff = append(diff, "- "+l)
		}
	}
	for _, l := range got {
		if !slices.Contains(want, l) {
			diff = append(diff, "+ "+l)
		}
	}
	t.Fatalf("%d lines differ (- wanted, + on the disk):\n%.3000s", len(diff), strings.Join(diff, "\n"))
}

func reg(name string, data string) entry {
	return entry{hdr: tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644}, data: []byte(data)}
}

func TestBuildRefuses(t *testing.T) {
	long := strings.Repeat("x", 256)
	tests := []struct {
		name  string
		layer []entry
		want  string
	}{
		{"link to nothing", []entry{{hdr: tar.Header{Typeflag: tar.TypeLink, Name: "a", Linkname: "b"}}}, "not in this layer"},
		{"link to directory", []entry{{hdr: tar.Header{Typeflag: tar.TypeDir, Name: "d/"}}, {hdr: tar.Header{Typeflag: tar.TypeLink, Name: "a", Linkname: "d"}}}, "directory"},
		{"link to root", []entry{{hdr: tar.Header{Typeflag: tar.TypeLink, Name: "a", Linkname: "/"}}}, "root"},
		{"long name", []entry{reg(long, "")}, "too long"},
		{"long path", []entry{reg(strings.Repeat("d/", 2100)+"f", "")}, "too long"},
		{"file as parent", []entry{reg("f", ""), reg("f/g", "")}, "not a directory"},
		{"link loop", []entry{{hdr: tar.Header{Typeflag: tar.TypeSymlink, Name: "l", Linkname: "l"}}, reg("l/g", "")}, "too many symbolic links"},
		{"dangling parent", []entry{{hdr: tar.Header{Typeflag: tar.TypeSymlink, Name: "l", Linkname: "no"}}, reg("l/g", "")}, "not a directory"},
		{"root is a file", []entry{reg(".", "x")}, "root"},
		{"owner", []entry{{hdr: tar.Header{Typeflag: tar.TypeReg, Name: "f", Uid: 1<<32 - 1}}}, "owner"},
		{"device", []entry{{hdr: tar.Header{Typeflag: tar.TypeChar, Name: "f", Devmajor: 4096}}}, "device number"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			err := buildTo(t, filepath.Join(t.TempDir(), "disk"), layersOf(t, [][]entry{tt.layer}))
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %v, want one with %q", err, tt.want)
			}
		})
	}
}

// TestMemoryIsBounded: whatever an image spends memory on is counted.
func TestMemoryIsBounded(t *testing.T) {
	many := func(f func(i int) entry) []entry {
		var out []entry
		for i := range 300 {
			out = append(out, f(i))
		}
		return out
	}
	for name, layer := range map[string][]entry{
		"files":       many(func(i int) entry { return reg(fmt.Sprint(i), "") }),
		"whiteouts":   many(func(i int) entry { return reg(fmt.Sprint(".wh.", i), "") }),
		"directories": {reg(strings.Repeat("d/", 300)+"f", "")},
		"targets": many(func(i int) entry {
			return entry{hdr: tar.Header{Typeflag: tar.TypeSymlink, Name: fmt.Sprint(i % 5), Linkname: strings.Repeat("x", 4000)}}
		}),
		"attributes": many(func(i int) entry {
			e := reg(fmt.Sprint(i%5), "")
			e.hdr.PAXRecords = map[string]string{xattrRecord + "user.x": strings.Repeat("x", 4000)}
			return e
		}),
	} {
		m := &merger{ctx: context.Background(), root: newDir(), memory: account{100000}}
		if err := m.addLayer(layersOf(t, [][]entry{layer})[0]); err == nil || !strings.Contains(err.Error(), "too many") {
			t.Errorf("%s: error %v, want one about too many files", name, err)
		}
	}
}

func TestBuildTruncatedLayer(t *testing.T) {
	whole := encodeLayer(t, []entry{reg("f", strings.Repeat("data", 5000))})
	cut := func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(whole[:9000])), nil }
	err := buildTo(t, filepath.Join(t.TempDir(), "disk"), []Layer{cut})
	if !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("error %v, want unexpected EOF", err)
	}
}

// closeFails is a stream whose producer finds damage at the end.
type closeFails struct{ io.Reader }

func (closeFails) Close() error { return errors.New("checksum does not match") }

func TestBuildReportsStreamErrors(t *testing.T) {
	whole := encodeLayer(t, []entry{reg("f", "data")})
	l := func() (io.ReadCloser, error) { return closeFails{bytes.NewReader(whole)}, nil }
	err := buildTo(t, filepath.Join(t.TempDir(), "disk"), []Layer{l})
	if err == nil || !strings.Contains(err.Error(), "checksum") {
		t.Errorf("error %v, want the stream's", err)
	}
}

func TestBuildStopsWithContext(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	f, err := os.Create(filepath.Join(t.TempDir(), "disk"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := Build(ctx, f, testUUID, layersOf(t, [][]entry{{reg("f", "x")}})); !errors.Is(err, context.Canceled) {
		t.Errorf("error %v, want context.Canceled", err)
	}
}

func TestBuildIsReproducible(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		layers := layersOf(rt, genLayers(rt))
		dir := t.TempDir()
		var sums []string
		for _, name := range []string{"a", "b"} {
			p := filepath.Join(dir, name)
			if err := buildTo(rt, p, layers); err != nil {
				rt.Fatalf("Build: %v", err)
			}
			b, err := os.ReadFile(p)
			if err != nil {
				rt.Fatalf("%v", err)
			}
			sums = append(sums, sum(b))
		}
		if sums[0] != sums[1] {
			rt.Fatalf("the same layers gave different disks")
		}
	})
}

func TestVerify(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk")
	if err := buildTo(t, path, layersOf(t, [][]entry{{reg("f", strings.Repeat("x", 10000)), reg("g", "")}})); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	info, err := Verify(f, testUUID)
	if err != nil {
		t.Fatalf("Verify of a good disk: %v", err)
	}
	if info.Inodes != 3 {
		t.Errorf("%d inodes, want 3", info.Inodes)
	}
	if _, err := Verify(f, [16]byte{9}); err == nil {
		t.Error("Verify took a disk with another UUID")
	}
	if err := f.Truncate(info.Bytes - BlockSize); err != nil {
		t.Fatal(err)
	}
	if _, err := Verify(f, testUUID); err == nil {
		t.Error("Verify took a truncated disk")
	}
	if err := f.Truncate(info.Bytes); err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt([]byte{0xff}, superOffset+40); err != nil {
		t.Fatal(err)
	}
	if _, err := Verify(f, testUUID); err == nil {
		t.Error("Verify took a damaged superblock")
	}
}

// TestSparse checks that zeros take no room on the host.
func TestSparse(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk")
	if err := buildTo(t, path, layersOf(t, [][]entry{{reg("f", string(make([]byte, 64<<20)))}})); err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	if st.Size < 64<<20 || st.Blocks*512 > 1<<20 {
		t.Errorf("size %d, %d bytes allocated", st.Size, st.Blocks*512)
	}
}

// TestManyFiles has a directory of many blocks and more file ends than are kept in memory.
func TestManyFiles(t *testing.T) {
	needMount(t)
	var layer []entry
	for i := range 20000 {
		name := "many/" + strings.Repeat("n", i%60) + "-" + hex.EncodeToString([]byte{byte(i >> 16), byte(i >> 8), byte(i)})
		layer = append(layer, reg(name, strings.Repeat(string(rune('a'+i%26)), 3900)))
	}
	disk := filepath.Join(t.TempDir(), "disk")
	if err := buildTo(t, disk, layersOf(t, [][]entry{layer})); err != nil {
		t.Fatal(err)
	}
	mnt := t.TempDir()
	defer mountDisk(t, disk, mnt)()
	for i, e := range layer {
		b, err := os.ReadFile(filepath.Join(mnt, e.hdr.Name))
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(b, e.data) {
			t.Fatalf("file %d (%s) differs", i, e.hdr.Name)
		}
	}
	names, err := os.ReadDir(filepath.Join(mnt, "many"))
	if err != nil || len(names) != 20000 {
		t.Errorf("%d names in the directory (%v), want 20000", len(names), err)
	}
	fsck(t, disk)
}

func TestDeepTree(t *testing.T) {
	needMount(t)
	name := strings.Repeat("d/", 1900) + "f"
	disk := filepath.Join(t.TempDir(), "disk")
	if err := buildTo(t, disk, layersOf(t, [][]entry{{reg(name, "deep")}})); err != nil {
		t.Fatal(err)
	}
	mnt := t.TempDir()
	defer mountDisk(t, disk, mnt)()
	if b, err := os.ReadFile(filepath.Join(mnt, name)); string(b) != "deep" {
		t.Errorf("read %q, %v", b, err)
	}
}

// fsck lets erofs-utils check a disk, where they are installed.
func fsck(t *testing.T, disk string) {
	t.Helper()
	tool, err := exec.LookPath("fsck.erofs")
	if err != nil {
		t.Log("fsck.erofs is not installed (erofs-utils): its check is left out")
		return
	}
	if out, err := exec.Command(tool, disk).CombinedOutput(); err != nil {
		t.Errorf("fsck.erofs: %v: %s", err, out)
	}
}
