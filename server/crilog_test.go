package server

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestLineSplitter(t *testing.T) {
	now := time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC)
	const stamp = "2026-01-02T03:04:05.000000006Z stdout "
	for _, test := range []struct {
		name    string
		max     int
		chunks  []string
		want    string // without the stamp
		pending int    // after the last chunk
		end     string // what finish adds
	}{
		{"one line", 0, []string{"a\n"}, "F a\n", 0, ""},
		{"lines over chunks", 0, []string{"a", "b\nc", "\n"}, "F ab\nF c\n", 0, ""},
		{"empty lines", 0, []string{"\n\n"}, "F \nF \n", 0, ""},
		{"no newline at the end", 0, []string{"a\nb"}, "F a\n", 1, "P b\n"},
		{"exactly as long as allowed", 4, []string{"abcd\n"}, "F abcd\n", 0, ""},
		{"too long by one", 4, []string{"abcde\n"}, "P abcd\nF e\n", 0, ""},
		{"much too long", 4, []string{"abcdefghi", "j\nk\n"}, "P abcd\nP efgh\nF ij\nF k\n", 0, ""},
		{"nothing", 4, nil, "", 0, ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := &lineSplitter{stream: "stdout", maxLine: test.max}
			var out bytes.Buffer
			pending := 0
			for _, c := range test.chunks {
				pending = s.split(&out, []byte(c), now)
			}
			if got := strings.ReplaceAll(out.String(), stamp, ""); got != test.want || pending != test.pending {
				t.Errorf("entries %q with %d bytes pending, want %q with %d", got, pending, test.want, test.pending)
			}
			out.Reset()
			s.finish(&out, now)
			if got := strings.ReplaceAll(out.String(), stamp, ""); got != test.end {
				t.Errorf("finish adds %q, want %q", got, test.end)
			}
		})
	}
}

// TestLogAfterCrash: what was written but not recorded when a daemon died is taken back, so that the agent's
// second sending of it does not double it.
func TestLogAfterCrash(t *testing.T) {
	dir := t.TempDir()
	path, position := filepath.Join(dir, "c.log"), filepath.Join(dir, "positions", "c")
	open := func() *logFile {
		t.Helper()
		l, err := openLog(path, position)
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	check := func(l *logFile, want string, offset uint64) {
		t.Helper()
		text, err := os.ReadFile(path)
		if err != nil || string(text) != want || l.offset(streamStdout) != offset {
			t.Fatalf("log is %q (%v) at offset %d, want %q at %d", text, err, l.offset(streamStdout), want, offset)
		}
	}
	var err error
	l := open()
	if err := l.write([]byte("one\n"), streamStdout, 3); err != nil {
		t.Fatal(err)
	}
	if _, err := l.file.Write([]byte("two, not recor")); err != nil {
		t.Fatal(err)
	}
	l.close()
	l = open()
	check(l, "one\n", 3)
	if err := l.write([]byte("two\n"), streamStdout, 7); err != nil {
		t.Fatal(err)
	}
	check(l, "one\ntwo\n", 7)

	// Killed between a rename by kubelet and the reopening, with an entry written and not recorded.
	if err := os.Rename(path, path+".0"); err != nil {
		t.Fatal(err)
	}
	if _, err := l.file.Write([]byte("not recorded\n")); err != nil {
		t.Fatal(err)
	}
	l.close()
	l = open()
	check(l, "", 7)
	if old, err := os.ReadFile(path + ".0"); err != nil || string(old) != "one\ntwo\n" {
		t.Errorf("log that was renamed while nobody held it is %q (%v)", old, err)
	}
	if err := os.Rename(path+".0", path); err != nil {
		t.Fatal(err)
	}
	if err := l.reopen(); err != nil {
		t.Fatal(err)
	}

	// A position that cannot be recorded takes the entries back.
	writable := l.position
	if l.position, err = os.Open(writable.Name()); err != nil { // not for writing
		t.Fatal(err)
	}
	if err := l.write([]byte("twice\n"), streamStdout, 13); err == nil {
		t.Error("a write whose position is not recorded succeeds")
	}
	check(l, "one\ntwo\n", 7)
	l.position.Close()
	l.position = writable

	// After a rotation the old file is not ours to cut.
	if err := os.Rename(path, path+".1"); err != nil {
		t.Fatal(err)
	}
	if err := l.reopen(); err != nil {
		t.Fatal(err)
	}
	if err := l.write([]byte("three\n"), streamStdout, 12); err != nil {
		t.Fatal(err)
	}
	check(l, "three\n", 12)
	l.close()
	if err := l.write([]byte("x"), streamStdout, 13); err == nil {
		t.Error("a closed log can be written")
	}
	if old, err := os.ReadFile(path + ".1"); err != nil || string(old) != "one\ntwo\n" {
		t.Errorf("rotated log is %q (%v)", old, err)
	}
}
