package vmruntime

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"syscall"
	"time"
	"unicode"
	"unicode/utf8"

	"golang.org/x/sys/unix"
)

const (
	// ConsoleBytes is how much of a console or VMM log is kept on disk, at least; twice as much at most
	// while the daemon watches.
	ConsoleBytes = 64 << 10
	// consoleTail is how much of it Console tells.
	consoleTail = 4 << 10
)

// BoundFile frees the disk space of all but the last keep bytes of a file that another process goes on
// writing to, once it has grown to twice that. It makes a hole, so the writer's offset stays right whether
// it appends or not; a file system that cannot make holes loses the whole content instead.
func BoundFile(path string, keep int64) error {
	f, err := os.OpenFile(path, os.O_RDWR|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("bound file: %w", err)
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return fmt.Errorf("bound file: %w", err)
	}
	const block = 512 // st_blocks counts these
	st, ok := fi.Sys().(*syscall.Stat_t)
	used := fi.Size()
	if ok {
		used = st.Blocks * block
	}
	if !fi.Mode().IsRegular() || used < 2*keep || fi.Size() < 2*keep {
		return nil
	}
	const mode = unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE
	err = unix.Fallocate(int(f.Fd()), mode, 0, fi.Size()-keep)
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOSYS) {
		err = f.Truncate(0)
	}
	if err != nil {
		return fmt.Errorf("bound file %s: %w", path, err)
	}
	return nil
}

// WatchFiles keeps files that a VMM writes within about ConsoleBytes until done is closed. It looks each
// second; a guest's serial port manages well below 10 MB/s.
func WatchFiles(done <-chan struct{}, paths ...string) {
	t := time.NewTicker(time.Second)
	defer t.Stop()
	for {
		for _, p := range paths {
			_ = BoundFile(p, ConsoleBytes) // tried again in a second
		}
		select {
		case <-done:
			return
		case <-t.C:
		}
	}
}

// TailFile is the end of a console file for error messages: at most 4 KiB, printable, with "\n" between
// lines. A guest wrote it, so control characters are shown as \xNN and never reach a terminal or a log.
// "" when there is none.
func TailFile(path string) string {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return ""
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil || !fi.Mode().IsRegular() {
		return ""
	}
	off := max(fi.Size()-consoleTail, 0)
	b, err := io.ReadAll(io.NewSectionReader(f, off, consoleTail))
	if err != nil {
		return ""
	}
	return printable(strings.TrimLeft(string(b), "\x00"))
}

// printable escapes what is not text and keeps the last 4 KiB of the result, from a line's beginning
// where one is near.
func printable(s string) string {
	var out strings.Builder
	for i := 0; i < len(s); {
		r, n := utf8.DecodeRuneInString(s[i:])
		switch {
		case s[i:i+n] == "\n" || s[i:i+n] == "\t":
			out.WriteByte(s[i])
		case s[i:i+n] == "\r": // serial consoles end lines with \r\n
		case !unicode.IsPrint(r) || r == utf8.RuneError: // control, bidirectional and other invisible characters
			for _, c := range []byte(s[i : i+n]) {
				fmt.Fprintf(&out, `\x%02x`, c)
			}
		default:
			out.WriteString(s[i : i+n])
		}
		i += n
	}
	t := strings.TrimSpace(out.String())
	if len(t) <= consoleTail {
		return t
	}
	t = t[len(t)-consoleTail:]
	if i := strings.IndexByte(t, '\n'); i >= 0 && i < 512 {
		t = t[i+1:]
	}
	return strings.ToValidUTF8(t, "")
}
