package image

import (
	"bufio"
	"fmt"
	"io"
	"maps"
	"path"
	"slices"
	"strings"
)

// File type bits of a cpio mode, as in stat(2).
const (
	typeDir     = 0o040000
	typeRegular = 0o100000
	typeSymlink = 0o120000
	typeChar    = 0o020000
)

// archive collects the entries of an initramfs by absolute path; a later entry replaces an earlier one.
type archive struct {
	entries map[string]entry
}

type entry struct {
	mode         uint32
	content      []byte // of a regular file, or a symbolic link's target
	major, minor uint32 // of a character device
}

// add stores an entry and the directories above it.
func (a *archive) add(name string, e entry) {
	if a.entries == nil {
		a.entries = map[string]entry{}
	}
	name = path.Clean("/" + name)
	if dir := path.Dir(name); dir != "/" {
		if _, ok := a.entries[dir]; !ok {
			a.addDir(dir)
		}
	}
	a.entries[name] = e
}

func (a *archive) addDir(name string) {
	a.add(name, entry{mode: typeDir | 0o755})
}

func (a *archive) addFile(name string, perm uint32, content []byte) {
	a.add(name, entry{mode: typeRegular | perm, content: content})
}

func (a *archive) addSymlink(name, target string) {
	a.add(name, entry{mode: typeSymlink | 0o777, content: []byte(target)})
}

func (a *archive) addCharDevice(name string, perm, major, minor uint32) {
	a.add(name, entry{mode: typeChar | perm, major: major, minor: minor})
}

// writeTo writes the archive in the kernel's "newc" cpio format
// (Documentation/driver-api/early-userspace/buffer-format.rst): sorted, so that directories come
// before what is in them, with counted inode numbers, and with owners and times zero.
func (a *archive) writeTo(w io.Writer) error {
	out := &paddedWriter{w: bufio.NewWriter(w)}
	for i, name := range slices.Sorted(maps.Keys(a.entries)) {
		out.entry(uint32(i+1), strings.TrimPrefix(name, "/"), a.entries[name])
	}
	out.entry(0, "TRAILER!!!", entry{})
	out.pad(512)
	if out.err != nil {
		return out.err
	}
	return out.w.Flush()
}

// paddedWriter counts what it writes and keeps the first error.
type paddedWriter struct {
	w   *bufio.Writer
	n   int
	err error
}

func (p *paddedWriter) entry(inode uint32, name string, e entry) {
	links := uint32(1)
	if e.mode&typeDir != 0 && e.mode&typeRegular == 0 {
		links = 2
	}
	if uint64(len(e.content)) > 1<<32-1 {
		p.err = fmt.Errorf("%s: %d bytes are too many for cpio", name, len(e.content))
		return
	}
	p.bytes(fmt.Appendf(nil, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x",
		inode, e.mode, 0, 0, links, 0, len(e.content), 0, 0, e.major, e.minor, len(name)+1, 0))
	p.bytes([]byte(name + "\x00"))
	p.pad(4)
	p.bytes(e.content)
	p.pad(4)
}

func (p *paddedWriter) bytes(b []byte) {
	if p.err == nil {
		_, p.err = p.w.Write(b)
		p.n += len(b)
	}
}

func (p *paddedWriter) pad(to int) {
	p.bytes(make([]byte, (to-p.n%to)%to))
}
