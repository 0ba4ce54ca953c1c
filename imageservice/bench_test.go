package imageservice

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"
)

// benchTar is a layer like that of a program with its libraries: 7,000 files, 100 MiB.
func benchTar(b *testing.B) ([]byte, string) {
	b.Helper()
	rng := rand.New(rand.NewPCG(1, 2))
	dir := b.TempDir()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	block := make([]byte, 4<<20)
	for i := range block {
		block[i] = byte(rng.Uint32()) & 0x1f
	}
	for i := range 7000 {
		size := int(rng.ExpFloat64() * 10000)
		if i%400 == 0 {
			size = 2 << 20
		}
		name := fmt.Sprintf("dir%d/file%d", i/100, i)
		data := block[i%1000 : i%1000+min(size, 3<<20)]
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: int64(len(data)), ModTime: time.Unix(1000, 0)}); err != nil {
			b.Fatal(err)
		}
		if _, err := w.Write(data); err != nil {
			b.Fatal(err)
		}
		p := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			b.Fatal(err)
		}
		if err := os.WriteFile(p, data, 0o644); err != nil {
			b.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		b.Fatal(err)
	}
	return buf.Bytes(), dir
}

// BenchmarkDisk measures a disk build from the store, beside mkfs.erofs of the unpacked tree, which would need a
// mounted image and does not sync.
func BenchmarkDisk(b *testing.B) {
	if os.Geteuid() != 0 {
		b.Skip("unpacking layers with their owners needs root")
	}
	raw, dir := benchTar(b)
	b.Run("crivm", func(b *testing.B) {
		reg := newRegistry(b, false)
		s := newService(b, func(c *Config) { write(b, c.RegistriesConf, insecure(reg)) })
		id := pull(b, s, reg.push(b, "bench:1", newImage(b, nil, rawLayer(b, raw))))
		b.SetBytes(int64(len(raw)))
		for b.Loop() {
			b.StopTimer()
			if err := os.Remove(s.diskPath(id[len("sha256:"):])); err != nil {
				b.Fatal(err)
			}
			b.StartTimer()
			if _, err := s.Disk(context.Background(), id); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("mkfs.erofs", func(b *testing.B) {
		tool, err := exec.LookPath("mkfs.erofs")
		if err != nil {
			b.Skip("mkfs.erofs is not installed (erofs-utils)")
		}
		b.SetBytes(int64(len(raw)))
		for b.Loop() {
			if out, err := exec.Command(tool, "--quiet", filepath.Join(b.TempDir(), "disk"), dir).CombinedOutput(); err != nil {
				b.Fatalf("%v: %s", err, out)
			}
		}
	})
}

// BenchmarkPull measures PullImage to "root disk ready".
func BenchmarkPull(b *testing.B) {
	if os.Geteuid() != 0 {
		b.Skip("unpacking layers with their owners needs root")
	}
	raw, _ := benchTar(b)
	reg := newRegistry(b, false)
	s := newService(b, func(c *Config) { write(b, c.RegistriesConf, insecure(reg)) })
	ref := reg.push(b, "bench:1", newImage(b, nil, rawLayer(b, raw)))
	b.SetBytes(int64(len(raw)))
	for b.Loop() {
		pull(b, s, ref)
		b.StopTimer()
		remove(b, s, ref)
		b.StartTimer()
	}
}
