package qemu

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/crivm/crivm/vmruntime"
)

// The serial console must neither block the VMM, nor fill the disk, nor be lost with the daemon, whatever
// the guest prints. So QEMU writes to a fifo that it itself holds open in both directions, non-blocking:
// without a reader it goes on, with the first 64 KiB kept by the kernel and the rest dropped. The daemon
// drains the fifo into console.log, of which it keeps the end; a later daemon goes on where the former
// stopped.
//
// QEMU's pipe device is a pair of fifos; nothing is ever written to the one for input.
const (
	consoleLog = "console.log"
	fifoOut    = consoleName + ".out"
	fifoIn     = consoleName + ".in"
)

// panicLine is how Linux says why it gives up. A guest may print anything; this is for people only.
var panicLine = regexp.MustCompile(`Kernel panic - not syncing: ([^\n]{0,200})`)

// makeFifos makes the console's fifos for the user that QEMU runs as.
func makeFifos(dir string, uid, gid int) error {
	for _, name := range []string{fifoOut, fifoIn} {
		path := filepath.Join(dir, name)
		if err := os.Remove(path); err != nil && !os.IsNotExist(err) {
			return fmt.Errorf("console: %w", err)
		}
		if err := unix.Mkfifo(path, 0o600); err != nil {
			return fmt.Errorf("console fifo %s: %w", path, err)
		}
		if err := os.Lchown(path, uid, gid); err != nil {
			return fmt.Errorf("console: %w", err)
		}
	}
	return nil
}

// console copies from the fifo to console.log.
type console struct {
	path string
	in   *os.File
	done chan struct{} // closed when QEMU is gone and all is copied
}

// openConsole starts copying. QEMU must have the fifo open; the end of its process ends the copying.
func openConsole(dir string) (*console, error) {
	in, err := os.OpenFile(filepath.Join(dir, fifoOut), os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, fmt.Errorf("console: %w", err)
	}
	if fi, err := in.Stat(); err != nil || fi.Mode()&os.ModeNamedPipe == 0 {
		in.Close()
		return nil, fmt.Errorf("console %s is not a fifo", in.Name())
	}
	path := filepath.Join(dir, consoleLog)
	out, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0o600)
	if err != nil {
		in.Close()
		return nil, fmt.Errorf("console: %w", err)
	}
	c := &console{path: path, in: in, done: make(chan struct{})}
	go func() {
		defer close(c.done)
		defer in.Close()
		defer out.Close()
		copyBounded(out, in)
	}()
	return c, nil
}

// close ends the copying even though QEMU may still write.
func (c *console) close() {
	c.in.Close()
	<-c.done
}

// copyBounded appends what it reads to the file until the end of input, and keeps the file within twice
// vmruntime.ConsoleBytes. A full disk costs console output and nothing else.
func copyBounded(out *os.File, in io.Reader) {
	size, err := out.Seek(0, io.SeekEnd)
	if err != nil {
		size = 0
	}
	buf := make([]byte, 4096) // one page a VM; a console is quiet
	for {
		n, err := in.Read(buf)
		if n > 0 {
			if size+int64(n) > 2*vmruntime.ConsoleBytes {
				size = keepEnd(out, size)
			}
			w, _ := out.WriteAt(buf[:n], size)
			size += int64(w)
		}
		if err != nil {
			return
		}
	}
}

// keepEnd shortens the file to its last vmruntime.ConsoleBytes and returns its new size.
func keepEnd(f *os.File, size int64) int64 {
	buf := make([]byte, vmruntime.ConsoleBytes)
	n, err := f.ReadAt(buf, max(size-vmruntime.ConsoleBytes, 0))
	if err != nil && err != io.EOF {
		n = 0
	}
	if err := f.Truncate(0); err != nil {
		return 0 // overwrites from the start; still bounded
	}
	w, _ := f.WriteAt(buf[:n], 0)
	return int64(w)
}

// tail is the console's end for error messages.
func tail(dir string) string {
	return vmruntime.TailFile(filepath.Join(dir, consoleLog))
}

// panicMessage is what the guest's kernel said when it gave up, "" if it does not seem so.
func panicMessage(dir string) string {
	f, err := os.OpenFile(filepath.Join(dir, consoleLog), os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return ""
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil || !fi.Mode().IsRegular() {
		return ""
	}
	const end = 16 << 10 // a stack trace follows the line
	b, err := io.ReadAll(io.NewSectionReader(f, max(fi.Size()-end, 0), end))
	if err != nil {
		return ""
	}
	m := panicLine.FindAllSubmatch(b, -1)
	if len(m) == 0 {
		return ""
	}
	return strings.Map(func(r rune) rune {
		if r < ' ' || r > '~' {
			return -1
		}
		return r
	}, string(m[len(m)-1][1]))
}
