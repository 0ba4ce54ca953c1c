package rootdisk

import (
	"archive/tar"
	"bytes"
	"fmt"
	"maps"
	"path"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"
)

// entry is one tar entry of a generated layer.
type entry struct {
	hdr  tar.Header
	data []byte
}

func encodeLayer(t fataler, entries []entry) []byte {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range entries {
		h := e.hdr
		h.Format = tar.FormatPAX
		h.Size = int64(len(e.data))
		if err := w.WriteHeader(&h); err != nil {
			t.Fatalf("write header %q: %v", h.Name, err)
		}
		if _, err := w.Write(e.data); err != nil {
			t.Fatalf("write %q: %v", h.Name, err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatalf("close tar: %v", err)
	}
	return b.Bytes()
}

type fataler interface {
	Helper()
	Fatalf(string, ...any)
}

var _ fataler = (*testing.T)(nil)

// A file is what a path of a merged tree must look like. Hard links are equal pointers.
type file struct {
	kind       byte // tar type
	mode       uint32
	uid, gid   int
	mtime      time.Time
	data       []byte
	target     string
	major, min int64
	xattrs     map[string]string
}

func fileOf(e entry) *file {
	f := &file{
		kind: e.hdr.Typeflag, mode: uint32(e.hdr.Mode), uid: e.hdr.Uid, gid: e.hdr.Gid, mtime: e.hdr.ModTime,
		data: e.data, target: e.hdr.Linkname, major: e.hdr.Devmajor, min: e.hdr.Devminor, xattrs: map[string]string{},
	}
	if f.kind == tar.TypeSymlink {
		f.mode = 0o777
	}
	for k, v := range e.hdr.PAXRecords {
		if name, ok := strings.CutPrefix(k, xattrRecord); ok && !strings.HasPrefix(name, "trusted.overlay.") {
			f.xattrs[name] = v
		}
	}
	return f
}

// tree maps paths ("" is the root) to files. It is the plain model: layers are applied lowest first, each
// as the image specification words it, on whole trees.
type tree map[string]*file

func newTree() tree {
	return tree{"": {kind: tar.TypeDir, mode: 0o755, mtime: time.Unix(0, 0), xattrs: map[string]string{}}}
}

func (t tree) removeBelow(p string) {
	maps.DeleteFunc(t, func(q string, _ *file) bool { return strings.HasPrefix(q, p+"/") || p == "" && q != "" })
}

func (t tree) remove(p string) {
	t.removeBelow(p)
	delete(t, p)
}

func (t tree) isDir(p string) bool { return t[p] != nil && t[p].kind == tar.TypeDir }

// clean makes a key of a tree from a path.
func clean(p string) string { return strings.TrimPrefix(path.Clean("/"+p), "/") }

// apply returns the tree after one layer.
func (t tree) apply(layer []entry) tree {
	out := maps.Clone(t)
	var whiteouts, opaques []string
	own := tree{} // what the layer itself brings
	implied := map[string]bool{}
	for _, e := range layer {
		p := clean(e.hdr.Name)
		dir, base := clean(path.Dir(p)), path.Base(p)
		for d := dir; d != ""; d = clean(path.Dir(d)) {
			if own[d] == nil {
				own[d] = newTree()[""]
				implied[d] = true
			}
		}
		switch {
		case base == whiteoutOpaque:
			opaques = append(opaques, dir)
		case strings.HasPrefix(base, whiteoutPrefix):
			whiteouts = append(whiteouts, path.Join(dir, strings.TrimPrefix(base, whiteoutPrefix)))
		case e.hdr.Typeflag == tar.TypeLink:
			target := own[clean(e.hdr.Linkname)]
			own.removeBelow(p)
			own[p] = target
			delete(implied, p)
		default:
			f := fileOf(e)
			if !own.isDir(p) || f.kind != tar.TypeDir {
				own.removeBelow(p)
			}
			own[p] = f
			delete(implied, p)
		}
	}
	for _, p := range whiteouts {
		out.remove(p)
	}
	for _, p := range opaques {
		out.removeBelow(p)
	}
	for _, p := range slices.Sorted(maps.Keys(own)) {
		f := own[p]
		if out.isDir(p) && f.kind == tar.TypeDir {
			if !implied[p] {
				out[p] = f
			}
			continue
		}
		out.remove(p)
		out[p] = f
	}
	return out
}

// genLayers draws layers that have much in common: few names, so that they collide.
func genLayers(t *rapid.T) [][]entry {
	layers := make([][]entry, rapid.IntRange(1, 4).Draw(t, "layers"))
	for i := range layers {
		layers[i] = genLayer(t)
	}
	return layers
}

var genName = rapid.OneOf(
	rapid.SampledFrom([]string{"a", "b", "c", "!", "-x", "..d", "ü", strings.Repeat("n", 255)}),
	rapid.StringMatching(`[a-z]{1,8}`),
)

func genLayer(t *rapid.T) []entry {
	var out []entry
	own := tree{"": {kind: tar.TypeDir}}
	for range rapid.IntRange(0, 12).Draw(t, "entries") {
		depth := rapid.IntRange(1, 4).Draw(t, "depth")
		parts := make([]string, depth)
		for i := range parts {
			parts[i] = genName.Draw(t, "name")
		}
		// A parent that is a file of this layer cannot be extracted through.
		ok := true
		for i := range parts[:depth-1] {
			if f := own[path.Join(parts[:i+1]...)]; f != nil && f.kind != tar.TypeDir {
				ok = false
			}
		}
		if !ok {
			continue
		}
		p := path.Join(parts...)
		e := entry{hdr: tar.Header{
			Name:    rapid.SampledFrom([]string{"", "/", "./"}).Draw(t, "lead") + p,
			Mode:    int64(rapid.SampledFrom([]int{0, 0o644, 0o755, 0o4755, 0o2711, 0o1777, 0o7777}).Draw(t, "mode")),
			Uid:     rapid.SampledFrom([]int{0, 1, 65534, 65536, 1<<32 - 2}).Draw(t, "uid"),
			Gid:     rapid.SampledFrom([]int{0, 7, 70000}).Draw(t, "gid"),
			ModTime: time.Unix(rapid.Int64Range(-1<<33, 1<<33).Draw(t, "sec"), rapid.Int64Range(0, 999999999).Draw(t, "ns")),
		}}
		kind := rapid.SampledFrom([]string{"file", "file", "file", "dir", "dir", "symlink", "link", "char", "block", "fifo", "whiteout", "opaque", "implied"}).Draw(t, "kind")
		switch kind {
		case "file":
			e.hdr.Typeflag = tar.TypeReg
			e.data = genData(t)
		case "dir":
			e.hdr.Typeflag = tar.TypeDir
			e.hdr.Name += "/"
		case "implied":
			e.hdr.Typeflag = tar.TypeReg
			e.hdr.Name += "/only"
			if f := own[p]; f != nil && f.kind != tar.TypeDir {
				continue
			}
			p += "/only"
		case "symlink":
			e.hdr.Typeflag = tar.TypeSymlink
			e.hdr.Linkname = rapid.SampledFrom([]string{"a", "../b", "/abs/olute", strings.Repeat("x/", 2000) + "end"}).Draw(t, "target")
			e.hdr.Mode = 0o777
		case "link":
			var targets []string
			for q, f := range own {
				if f.kind != tar.TypeDir && q != p && !strings.HasPrefix(q, p+"/") {
					targets = append(targets, q)
				}
			}
			if len(targets) == 0 {
				continue
			}
			slices.Sort(targets)
			e.hdr = tar.Header{Typeflag: tar.TypeLink, Name: e.hdr.Name, Linkname: rapid.SampledFrom(targets).Draw(t, "link")}
		case "char", "block":
			e.hdr.Typeflag = tar.TypeChar
			if kind == "block" {
				e.hdr.Typeflag = tar.TypeBlock
			}
			e.hdr.Devmajor = rapid.Int64Range(1, 4095).Draw(t, "major")
			e.hdr.Devminor = rapid.Int64Range(0, 1<<20-1).Draw(t, "minor")
		case "fifo":
			e.hdr.Typeflag = tar.TypeFifo
		case "whiteout":
			dir, base := path.Split(p)
			e.hdr = tar.Header{Typeflag: tar.TypeReg, Name: dir + whiteoutPrefix + base}
			out = append(out, e)
			continue
		case "opaque":
			if f := own[p]; f != nil && f.kind != tar.TypeDir {
				continue
			}
			e.hdr = tar.Header{Typeflag: tar.TypeReg, Name: p + "/" + whiteoutOpaque}
			own[p] = &file{kind: tar.TypeDir}
			out = append(out, e)
			continue
		}
		if e.hdr.Typeflag != tar.TypeLink {
			genXattrs(t, &e.hdr)
		}
		for d := path.Dir(p); d != "."; d = path.Dir(d) {
			if own[d] == nil {
				own[d] = &file{kind: tar.TypeDir}
			}
		}
		if e.hdr.Typeflag == tar.TypeLink {
			own.remove(p)
			own[p] = &file{kind: tar.TypeReg}
		} else {
			if e.hdr.Typeflag != tar.TypeDir {
				own.remove(p)
			}
			own[p] = &file{kind: e.hdr.Typeflag}
		}
		out = append(out, e)
	}
	return out
}

// genData draws file contents around the sizes where the layout changes.
func genData(t *rapid.T) []byte {
	n := rapid.SampledFrom([]int{0, 1, 100, 4031, 4032, 4033, 4095, 4096, 4097, 8191, 8192, 3 * 4096, 1<<20 - 1, 1 << 20, 1<<20 + 5000}).Draw(t, "size")
	data := make([]byte, n)
	switch rapid.SampledFrom([]string{"pattern", "zeros", "holes"}).Draw(t, "content") {
	case "pattern":
		seed := rapid.Byte().Draw(t, "seed")
		for i := range data {
			data[i] = byte(i>>8) ^ byte(i) ^ seed
		}
	case "holes":
		for i := 0; i < n; i += 3 * 4096 {
			data[i] = 1
		}
	}
	return data
}

func genXattrs(t *rapid.T, h *tar.Header) {
	for range rapid.SampledFrom([]int{0, 0, 0, 1, 3}).Draw(t, "xattrs") {
		name := rapid.SampledFrom([]string{"security.capability", "user.a", "user.long." + strings.Repeat("k", 200), "trusted.t", "trusted.overlay.opaque"}).Draw(t, "xattr")
		// user.* is for regular files and directories only.
		if strings.HasPrefix(name, "user.") && h.Typeflag != tar.TypeReg && h.Typeflag != tar.TypeDir {
			continue
		}
		if name == "security.capability" && h.Typeflag != tar.TypeReg {
			continue
		}
		value := strings.Repeat("v", rapid.SampledFrom([]int{0, 1, 20, 3000, 9000}).Draw(t, "vlen"))
		if name == "security.capability" {
			value = "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"
		}
		if h.PAXRecords == nil {
			h.PAXRecords = map[string]string{}
		}
		h.PAXRecords[xattrRecord+name] = value
	}
}

// describe says everything about a tree in lines, for comparison. Hard links are numbered by first path.
func (t tree) describe() []string {
	first := map[*file]string{}
	links := map[*file]int{}
	for _, f := range t {
		links[f]++
	}
	var out []string
	for _, p := range slices.Sorted(maps.Keys(t)) {
		f := t[p]
		if first[f] == "" {
			first[f] = p
		}
		var kind uint32
		size := len(f.data)
		extra := ""
		switch f.kind {
		case tar.TypeReg:
			kind = unix.S_IFREG
			extra = sum(f.data)
		case tar.TypeDir:
			kind = unix.S_IFDIR
			size = 0
		case tar.TypeSymlink:
			kind = unix.S_IFLNK
			size = len(f.target)
			extra = f.target
		case tar.TypeChar:
			kind = unix.S_IFCHR
		case tar.TypeBlock:
			kind = unix.S_IFBLK
		case tar.TypeFifo:
			kind = unix.S_IFIFO
		}
		n := links[f]
		if f.kind == tar.TypeDir {
			n = 2
			for q := range t {
				if q != "" && path.Dir("/"+q) == path.Clean("/"+p) && t.isDir(q) {
					n++
				}
			}
		}
		out = append(out, line(p, kind|f.mode&0o7777, uint32(f.uid), uint32(f.gid), f.mtime, size, n, first[f], f.major, f.min, extra, f.xattrs))
	}
	return out
}

func line(p string, mode, uid, gid uint32, mtime time.Time, size, links int, first string, major, minor int64, extra string, xattrs map[string]string) string {
	var x []string
	for _, k := range slices.Sorted(maps.Keys(xattrs)) {
		x = append(x, k+"="+sum([]byte(xattrs[k])))
	}
	return fmt.Sprintf("%q mode=%o uid=%d gid=%d mtime=%d.%09d size=%d links=%d first=%q dev=%d:%d %s xattrs=%v",
		p, mode, uid, gid, mtime.Unix(), mtime.Nanosecond(), size, links, first, major, minor, extra, x)
}
