package qemu

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/crivm/crivm/vmruntime"
)

// The whole way of a console: a writer that never blocks, a daemon that comes and goes, a bounded file.
func TestConsole(t *testing.T) {
	dir := t.TempDir()
	if err := makeFifos(dir, os.Getuid(), os.Getgid()); err != nil {
		t.Fatal(err)
	}
	// As QEMU opens it.
	w, err := os.OpenFile(filepath.Join(dir, fifoOut), os.O_RDWR|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := w.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	write := func(s string) (n int) {
		if err := raw.Write(func(fd uintptr) bool { n, _ = unix.Write(int(fd), []byte(s)); return true }); err != nil {
			t.Fatal(err)
		}
		return n
	}
	// No daemon: the first 64 KiB are kept, the rest is dropped, nothing blocks.
	line := strings.Repeat("x", 1023) + "\n"
	kept := 0
	for range 100 {
		if n := write(line); n > 0 {
			kept += n
		}
	}
	if kept != 64<<10 {
		t.Errorf("%d bytes kept without a reader", kept)
	}
	c, err := openConsole(dir)
	if err != nil {
		t.Fatal(err)
	}
	c.close() // this daemon dies, possibly with part of it read
	if c, err = openConsole(dir); err != nil {
		t.Fatal(err)
	}
	for i := range 1000 {
		s := fmt.Sprintf("line %06d %s", i, line)
		for sent := 0; sent < len(s); { // a guest that waits for its serial port
			if n := write(s[sent:]); n > 0 {
				sent += n
			}
		}
	}
	write("last words")
	w.Close() // QEMU has ended
	<-c.done
	fi, err := os.Stat(filepath.Join(dir, consoleLog))
	if err != nil {
		t.Fatal(err)
	}
	if fi.Size() > 2*vmruntime.ConsoleBytes || fi.Size() < vmruntime.ConsoleBytes {
		t.Errorf("%d bytes kept", fi.Size())
	}
	if got := tail(dir); !strings.HasSuffix(got, "last words") || !strings.Contains(got, "line 000999 ") {
		t.Errorf("tail %q", got)
	}
	b, err := os.ReadFile(filepath.Join(dir, consoleLog))
	if err != nil {
		t.Fatal(err)
	}
	// What is kept has no gap.
	for i := 999; i > 960; i-- {
		if !bytes.Contains(b, []byte(fmt.Sprintf("line %06d ", i))) {
			t.Errorf("line %d is missing", i)
		}
	}
}

func TestOpenConsoleRefusesOtherFiles(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, fifoOut), []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if c, err := openConsole(dir); err == nil {
		c.close()
		t.Error("a regular file was taken for the fifo")
	}
}

func TestPanicMessage(t *testing.T) {
	dir := t.TempDir()
	for _, c := range []struct{ console, want string }{
		{"", ""},
		{"all is well\n", ""},
		{"[1.0] Kernel panic - not syncing: No working init found.\r\n[1.1] CPU: 0\n", "No working init found."},
		{"Kernel panic - not syncing: a\nKernel panic - not syncing: b\n", "b"},
		{"Kernel panic - not syncing: \x1b[2Jx\x00y\n", "[2Jxy"},
		{"Kernel panic - not syncing: " + strings.Repeat("x", 1000), strings.Repeat("x", 200)},
		{"Kernel panic - not syncing: early\n" + strings.Repeat("trace\n", 1000), "early"},
	} {
		if err := os.WriteFile(filepath.Join(dir, consoleLog), []byte(c.console), 0o600); err != nil {
			t.Fatal(err)
		}
		if got := panicMessage(dir); got != c.want {
			t.Errorf("%.60q: got %q, want %q", c.console, got, c.want)
		}
	}
}
