package imageservice

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// torn are what a power cut may leave of a file.
var torn = map[string]func([]byte) []byte{
	"empty":    func([]byte) []byte { return nil },
	"half":     func(b []byte) []byte { return b[:len(b)/2] },
	"zeroed":   func(b []byte) []byte { return make([]byte, len(b)) },
	"tail":     func(b []byte) []byte { clear(b[len(b)/2:]); return b },
	"missing":  nil,
	"not JSON": func(b []byte) []byte { return append([]byte("{"), b...) },
}

// TestPowerCutMetadata tears each file of the store's metadata. The next daemon starts, tells no lies about images, and
// can pull and use every image; nothing stays that belongs to none.
func TestPowerCutMetadata(t *testing.T) {
	sequential(t)
	if os.Geteuid() != 0 {
		t.Skip("unpacking layers with their owners needs root")
	}
	reg := newRegistry(t, false)
	c := testConfig(t, func(c *Config) { write(t, c.RegistriesConf, insecure(reg)) })
	s := openService(t, c)
	ref := reg.push(t, "app:1", simpleImage(t, "of the image"))
	id := pull(t, s, ref)
	want, err := os.ReadFile(s.diskPath(strings.TrimPrefix(id, "sha256:")))
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	var files []string
	err = filepath.WalkDir(c.Root, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() && !strings.Contains(path, "/diff/") && !strings.HasSuffix(path, ".lock") && !strings.Contains(path, "/vfs/dir/") {
			files = append(files, strings.TrimPrefix(path, c.Root+"/"))
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("files: %q", files)
	for _, file := range files {
		for how, tear := range torn {
			t.Run(strings.ReplaceAll(file, "/", "|")+" "+how, func(t *testing.T) {
				path := filepath.Join(c.Root, file)
				content, err := os.ReadFile(path)
				if os.IsNotExist(err) {
					t.Skip("not there after the last repair")
				}
				if err != nil {
					t.Fatal(err)
				}
				if tear == nil {
					err = os.Remove(path)
				} else {
					err = os.WriteFile(path, tear(bytes.Clone(content)), 0o600)
				}
				if err != nil {
					t.Fatal(err)
				}
				s, err := New(context.Background(), c)
				if err != nil {
					t.Fatalf("the daemon does not start: %v", err)
				}
				if got := pull(t, s, ref); got != id {
					t.Errorf("pulled again the image is %s, want %s", got, id)
				}
				disk, err := s.Disk(context.Background(), id)
				if err != nil {
					t.Fatal(err)
				}
				if got, err := os.ReadFile(disk); err != nil || !bytes.Equal(got, want) {
					t.Errorf("the disk differs (%v)", err)
				}
				s.sums.Wait() // disks that are read count as being built
				left, err := s.Leftovers(context.Background(), false)
				if err != nil || len(left) > 0 {
					t.Errorf("leftovers: %v (%v)", left, err)
				}
				if n := countBlobs(t, c); n != 1 {
					t.Errorf("%d layers", n)
				}
				if err := s.Close(); err != nil {
					t.Error(err)
				}
			})
		}
	}
}

// TestPowerCutDisk tears an image's disk in every way and boots the host: whoever asks for the disk gets what the image
// says, from the disk where it is whole, else from one that is built anew.
func TestPowerCutDisk(t *testing.T) {
	sequential(t)
	if os.Geteuid() != 0 {
		t.Skip("unpacking layers with their owners needs root")
	}
	reg := newRegistry(t, false)
	c := testConfig(t, func(c *Config) { write(t, c.RegistriesConf, insecure(reg)) })
	s := openService(t, c)
	id := pull(t, s, reg.push(t, "app:1", newImage(t, nil, tarLayer(t, map[string]string{"file": strings.Repeat("content ", 4000)}))))
	hex := strings.TrimPrefix(id, "sha256:")
	s.sums.Wait()
	path, sum := s.diskPath(hex), s.sumPath(hex)
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	good, err := os.ReadFile(sum)
	if err != nil {
		t.Fatal(err)
	}
	written := func() unix.Timespec {
		var st unix.Stat_t
		if err := unix.Stat(path, &st); err != nil {
			t.Fatal(err)
		}
		return st.Mtim
	}
	for _, test := range []struct {
		name   string
		tear   func() error
		reboot bool
		kept   bool
	}{
		{"nothing", func() error { return nil }, true, true},
		{"cut off", func() error { return os.Truncate(path, int64(len(want))-4096) }, false, false},
		{"empty", func() error { return os.Truncate(path, 0) }, false, false},
		{"superblock zeroed", func() error { return overwrite(path, 1024, make([]byte, 128)) }, false, false},
		{"bit flipped in a file", func() error { return flip(path, bytes.Index(want, []byte("content"))) }, true, false},
		{"bit flipped at the end", func() error { return flip(path, len(want)-1) }, true, false},
		{"block zeroed", func() error { return overwrite(path, bytes.Index(want, []byte("content"))&^4095, make([]byte, 4096)) }, true, false},
		{"sum missing", func() error { return os.Remove(sum) }, true, false},
		{"sum torn", func() error { return os.WriteFile(sum, good[:len(good)/2], 0o600) }, true, false},
		{"disk missing", func() error { return os.Remove(path) }, true, false},
	} {
		s.sums.Wait()
		if got, err := os.ReadFile(sum); err != nil || !bytes.Equal(got, good) {
			t.Fatalf("before %s: the sum is %q (%v), want %q", test.name, got, err, good)
		}
		before := written()
		if err := test.tear(); err != nil {
			t.Fatal(err)
		}
		if test.reboot {
			if err := os.RemoveAll(c.RunRoot + "/crivm-disks"); err != nil {
				t.Fatal(err)
			}
		}
		for range 2 {
			if got, err := s.Disk(context.Background(), id); err != nil || got != path {
				t.Fatalf("%s: %s (%v)", test.name, got, err)
			}
		}
		if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, want) {
			t.Errorf("%s: the disk differs (%v)", test.name, err)
		}
		if kept := written() == before; kept != test.kept {
			t.Errorf("%s: the disk was kept: %t", test.name, kept)
		}
	}
	remove(t, s, id)
	for _, path := range []string{path, sum, s.notePath(hex)} {
		if _, err := os.Stat(path); !os.IsNotExist(err) {
			t.Errorf("%s is left (%v)", path, err)
		}
	}
}

func flip(path string, at int) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	return overwrite(path, at, []byte{b[at] ^ 1})
}

func overwrite(path string, at int, b []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(b, int64(at))
	return errors.Join(err, f.Close())
}
