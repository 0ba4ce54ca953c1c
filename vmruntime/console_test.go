package vmruntime

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

func TestBoundFile(t *testing.T) {
	for name, flags := range map[string]int{"appending writer": os.O_APPEND, "writer with an offset": 0} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "console.log")
			f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|flags, 0o600)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			chunk := bytes.Repeat([]byte("0123456789abcde\n"), 4096) // 64 KiB
			for range 64 {
				if _, err := f.Write(chunk); err != nil {
					t.Fatal(err)
				}
				if err := BoundFile(path, ConsoleBytes); err != nil {
					t.Fatal(err)
				}
			}
			if _, err := f.WriteString("the end\n"); err != nil {
				t.Fatal(err)
			}
			fi, err := os.Stat(path)
			if err != nil {
				t.Fatal(err)
			}
			if used := fi.Sys().(*syscall.Stat_t).Blocks * 512; used > 3*ConsoleBytes {
				t.Errorf("%d bytes used on disk", used)
			}
			tail := TailFile(path)
			if !strings.HasSuffix(tail, "\nthe end") || len(tail) > consoleTail || len(tail) < consoleTail/2 {
				t.Errorf("tail of %d bytes ends with %q", len(tail), tail[max(0, len(tail)-40):])
			}
		})
	}
	if err := BoundFile(filepath.Join(t.TempDir(), "missing"), 1); err != nil {
		t.Errorf("missing file: %v", err)
	}
}

func TestTailFile(t *testing.T) {
	dir := t.TempDir()
	for name, c := range map[string]struct{ in, want string }{
		"empty":           {"", ""},
		"text":            {"a\r\nb\tc\r\n", "a\nb\tc"},
		"control":         {"x\x1b[2Jy\x00z\x7f", `x\x1b[2Jy\x00z\x7f`},
		"not UTF-8":       {"a\xff\xfeb", `a\xff\xfeb`},
		"UTF-8":           {"grüß €", "grüß €"},
		"bidi override":   {"a\u202eb", `a\xe2\x80\xaeb`},
		"C1 control":      {"a\u009bb", `a\xc2\x9bb`},
		"zeros of a hole": {"\x00\x00\x00last words", "last words"},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(dir, "f")
			if err := os.WriteFile(path, []byte(c.in), 0o600); err != nil {
				t.Fatal(err)
			}
			if got := TailFile(path); got != c.want {
				t.Errorf("got %q, want %q", got, c.want)
			}
		})
	}
	hostile := filepath.Join(dir, "hostile")
	if err := os.WriteFile(hostile, bytes.Repeat([]byte{0x1b}, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := TailFile(hostile); len(got) > consoleTail || len(got) < consoleTail/2 {
		t.Errorf("%d bytes", len(got))
	}
	if TailFile(filepath.Join(dir, "missing")) != "" {
		t.Error("a missing file has a tail")
	}
	link := filepath.Join(dir, "link")
	if err := os.Symlink("/etc/passwd", link); err != nil {
		t.Fatal(err)
	}
	if TailFile(link) != "" {
		t.Error("followed a symbolic link")
	}
	fifo := filepath.Join(dir, "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	if TailFile(fifo) != "" {
		t.Error("read a fifo")
	}
}
