package rootdisk

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	whiteoutPrefix = ".wh."
	whiteoutOpaque = ".wh..wh..opq"
	whiteoutMeta   = ".wh..wh." // aufs' own files, of no meaning here
)

// merger collects the layers of an image, uppermost first.
type merger struct {
	ctx    context.Context
	out    *dataWriter
	root   *node // all layers so far
	memory account
}

// addLayer puts a layer below those added before.
func (m *merger) addLayer(layer Layer) error {
	lower := newDir()
	err := m.eachEntry(layer, func(i int, h *tar.Header, r io.Reader) error {
		return m.addEntry(lower, i, h, r)
	})
	if err != nil {
		return err
	}
	// A file that is hidden under its own name can be visible under another. Its data was skipped.
	needed := map[int]*inode{}
	fold(m.root, lower, func(n *node) { collectSkipped(n, needed) })
	if len(needed) == 0 {
		return nil
	}
	return m.eachEntry(layer, func(i int, _ *tar.Header, r io.Reader) error {
		if in := needed[i]; in != nil {
			return m.out.file(in, r)
		}
		return nil
	})
}

func collectSkipped(n *node, into map[int]*inode) {
	if n.inode != nil && n.inode.skipped {
		n.inode.skipped = false
		into[n.inode.entry] = n.inode
	}
	for _, child := range n.children {
		collectSkipped(child, into)
	}
}

// eachEntry calls f with every entry of a layer and errors name the entry.
func (m *merger) eachEntry(layer Layer, f func(int, *tar.Header, io.Reader) error) (err error) {
	stream, err := layer()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, stream.Close()) }()
	r := tar.NewReader(&ctxReader{m.ctx, stream})
	for i := 0; ; i++ {
		h, err := r.Next()
		if err == io.EOF {
			// Bytes after the end belong to the layer; reading them lets the store check its sums.
			_, err = io.Copy(io.Discard, &ctxReader{m.ctx, stream})
			return err
		}
		if err != nil {
			return fmt.Errorf("tar: %w", err)
		}
		if err := f(i, h, r); err != nil {
			return fmt.Errorf("entry %q: %w", h.Name, err)
		}
	}
}

// addEntry adds a tar entry to the tree of its layer.
func (m *merger) addEntry(lower *node, i int, h *tar.Header, r io.Reader) error {
	if h.Typeflag == tar.TypeXGlobalHeader {
		return nil
	}
	parts, err := split(h.Name)
	if err != nil {
		return err
	}
	if len(parts) == 0 {
		if h.Typeflag != tar.TypeDir {
			return errors.New("the root is not a directory")
		}
		lower.inode, err = newInode(h)
		return err
	}
	name := parts[len(parts)-1]
	if name != whiteoutOpaque && strings.HasPrefix(name, whiteoutMeta) {
		return nil
	}
	dir, dirParts, err := walk(lower, parts[:len(parts)-1], &m.memory)
	if err != nil {
		return err
	}
	if err := m.memory.take(nodeBytes + int64(len(name))); err != nil {
		return err
	}
	if name == whiteoutOpaque {
		dir.opaque = true
		return nil
	}
	if hidden, ok := strings.CutPrefix(name, whiteoutPrefix); ok {
		if hidden == "" || hidden == "." || hidden == ".." {
			return errors.New("bad whiteout")
		}
		dir.put(hidden, &node{})
		return nil
	}
	if len(name) > maxNameLen {
		return errors.New("name is too long")
	}
	if h.Typeflag == tar.TypeLink {
		return link(lower, dir, name, h.Linkname)
	}

	in, err := newInode(h)
	if err != nil {
		return err
	}
	if h.Typeflag == tar.TypeChar && in.rdev == 0 {
		dir.put(name, &node{})
		return nil
	}
	if err := m.memory.take(int64(len(in.target) + len(in.xattrs))); err != nil {
		return err
	}
	n := &node{inode: in}
	if in.isDir() {
		n.children = map[string]*node{}
	}
	dir.put(name, n)
	if !in.isRegular() || in.size == 0 {
		return nil
	}
	if hides(m.root, append(dirParts, name)) {
		in.skipped, in.entry = true, i
		return nil
	}
	return m.out.file(in, r)
}

// link makes name in dir a hard link to target.
func link(root, dir *node, name, target string) error {
	parts, err := split(target)
	if err != nil {
		return err
	}
	if len(parts) == 0 {
		return errors.New("hard link to the root")
	}
	last := parts[len(parts)-1]
	from, _, err := walk(root, parts[:len(parts)-1], nil)
	if err != nil {
		return err
	}
	if from == nil || from.children[last] == nil || from.children[last].isWhiteout() {
		return fmt.Errorf("hard link to %q, which is not in this layer", target)
	}
	file := from.children[last]
	if file.isDir() {
		return fmt.Errorf("hard link to the directory %q", target)
	}
	dir.put(name, &node{inode: file.inode})
	return nil
}

// newInode takes the attributes of a tar entry.
func newInode(h *tar.Header) (*inode, error) {
	in := &inode{
		mode:    uint32(h.Mode) & 0o7777,
		mtime:   h.ModTime.Unix(),
		mtimeNS: uint32(h.ModTime.Nanosecond()),
	}
	switch h.Typeflag {
	case tar.TypeReg, tar.TypeGNUSparse, tar.TypeCont:
		in.mode |= unix.S_IFREG
		in.size = h.Size
	case tar.TypeDir:
		in.mode |= unix.S_IFDIR
	case tar.TypeSymlink:
		in.mode = unix.S_IFLNK | 0o777
		in.target = h.Linkname
		in.size = int64(len(h.Linkname))
		if in.size == 0 || in.size > maxPathLen || strings.IndexByte(h.Linkname, 0) >= 0 {
			return nil, errors.New("bad symbolic link target")
		}
	case tar.TypeFifo:
		in.mode |= unix.S_IFIFO
	case tar.TypeChar, tar.TypeBlock:
		in.mode |= unix.S_IFCHR
		if h.Typeflag == tar.TypeBlock {
			in.mode ^= unix.S_IFCHR ^ unix.S_IFBLK
		}
		if h.Devmajor < 0 || h.Devmajor > 0xfff || h.Devminor < 0 || h.Devminor > 0xfffff {
			return nil, fmt.Errorf("device number %d:%d out of range", h.Devmajor, h.Devminor)
		}
		major, minor := uint32(h.Devmajor), uint32(h.Devminor)
		in.rdev = minor&0xff | major<<8 | minor&^0xff<<12
	default:
		return nil, fmt.Errorf("tar entry of unknown type %q", h.Typeflag)
	}
	// The all-ones IDs mean "no change" to chown and belong to nobody.
	if h.Uid < 0 || h.Gid < 0 || h.Uid >= math.MaxUint32 || h.Gid >= math.MaxUint32 {
		return nil, fmt.Errorf("owner %d:%d out of range", h.Uid, h.Gid)
	}
	in.uid, in.gid = uint32(h.Uid), uint32(h.Gid)
	var err error
	in.xattrs, err = encodeXattrs(h.PAXRecords)
	return in, err
}

// ctxReader fails when its context has ended.
type ctxReader struct {
	ctx context.Context
	r   io.Reader
}

func (c *ctxReader) Read(p []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	return c.r.Read(p)
}
