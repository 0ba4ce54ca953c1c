package rootdisk

import (
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// An inode is a file of any type. Hard links are several nodes with one inode.
type inode struct {
	mode    uint32 // type and permissions, as in st_mode
	uid     uint32
	gid     uint32
	rdev    uint32 // encoded as the kernel's new_encode_dev
	mtime   int64  // seconds
	mtimeNS uint32
	size    int64
	target  string // of a symbolic link
	xattrs  []byte // encoded, a multiple of 4 bytes; nil without any

	block uint32 // first data block
	tail  []byte // what follows the last whole block, when it is kept beside the inode

	// Only while layers are read.
	implied bool // directory without an entry of its own
	skipped bool // regular file of which the data was not written, for no visible name was known
	entry   int  // position of the file's entry in its layer

	// Only while the tree is written.
	placed    bool
	links     uint32
	number    uint32 // i_ino, only for 32-bit stat
	pos       int64  // byte position in the metadata area
	dirBlocks uint32
}

func (i *inode) isDir() bool     { return i.mode&unix.S_IFMT == unix.S_IFDIR }
func (i *inode) isRegular() bool { return i.mode&unix.S_IFMT == unix.S_IFREG }
func (i *inode) isSymlink() bool { return i.mode&unix.S_IFMT == unix.S_IFLNK }

// A node is a name in a directory: a file, or a whiteout (no inode).
type node struct {
	inode    *inode
	children map[string]*node // of a directory
	opaque   bool             // directory that hides what the layers below have in it
}

func newDir() *node {
	return &node{
		inode:    &inode{mode: unix.S_IFDIR | 0o755, implied: true},
		children: map[string]*node{},
	}
}

func (n *node) isWhiteout() bool { return n.inode == nil }
func (n *node) isDir() bool      { return n.inode != nil && n.inode.isDir() }

// sortedNames are the names in a directory in byte order.
func (n *node) sortedNames() []string {
	names := make([]string, 0, len(n.children))
	for name := range n.children {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// put makes child the entry name of directory n, as extracting it over what is there would.
func (n *node) put(name string, child *node) {
	old := n.children[name]
	switch {
	case old == nil:
	case old.isDir() && child.isDir():
		old.inode = child.inode // keeps its children
		return
	case old.isWhiteout() && child.isDir():
		child.opaque, child.inode.implied = true, false
	case child.isWhiteout():
		// Whiteouts are for the layers below only.
		if old.isDir() {
			old.opaque = true
		}
		return
	}
	n.children[name] = child
}

// split cleans a path of a tar entry; ".." cannot lead above the root. The root itself has no components.
func split(name string) ([]string, error) {
	if len(name) > maxPathLen {
		return nil, fmt.Errorf("path of %d bytes is too long", len(name))
	}
	name = path.Clean("/" + name)
	if name == "/" {
		return nil, nil
	}
	parts := strings.Split(name[1:], "/")
	for _, p := range parts {
		// The name of a whiteout is longer than the name it hides.
		if len(strings.TrimPrefix(p, whiteoutPrefix)) > maxNameLen {
			return nil, fmt.Errorf("name of %d bytes is too long", len(p))
		}
		if strings.IndexByte(p, 0) >= 0 {
			return nil, errors.New("name holds a NUL byte")
		}
	}
	return parts, nil
}

var errNotDirectory = errors.New("a parent is not a directory")

// An account bounds the memory of a tree, since an image may be made to use much of it.
type account struct{ left int64 }

// nodeBytes is about what a node with its inode takes beside its texts.
const nodeBytes = 400

func (a *account) take(n int64) error {
	if a.left -= n; a.left < 0 {
		return errors.New("image has too many files, or too long names and attributes")
	}
	return nil
}

// walk finds the directory with the given path below root, following symbolic links as an extraction
// confined to root would. Missing directories are made at the expense of create; without it nil is returned for
// them.
// The path without links is returned too.
func walk(root *node, parts []string, create *account) (*node, []string, error) {
	type step struct {
		dir  *node
		name string
	}
	var trail []step
	dir, links := root, 0
	for len(parts) > 0 {
		name := parts[0]
		parts = parts[1:]
		switch name {
		case "", ".":
			continue
		case "..":
			if len(trail) > 0 {
				dir = trail[len(trail)-1].dir
				trail = trail[:len(trail)-1]
			}
			continue
		}
		child := dir.children[name]
		switch {
		case child == nil || child.isWhiteout():
			if create == nil {
				return nil, nil, nil
			}
			if links > 0 {
				return nil, nil, errNotDirectory // a dangling link
			}
			if err := create.take(nodeBytes + int64(len(name))); err != nil {
				return nil, nil, err
			}
			dir.put(name, newDir())
			child = dir.children[name]
		case child.isDir():
		case child.inode.isSymlink():
			if links++; links > 40 {
				return nil, nil, errors.New("too many symbolic links")
			}
			target := strings.Split(child.inode.target, "/")
			if strings.HasPrefix(child.inode.target, "/") {
				dir, trail = root, nil
			}
			parts = append(slices.Clone(target), parts...)
			continue
		default:
			return nil, nil, errNotDirectory
		}
		trail = append(trail, step{dir, name})
		dir = child
	}
	names := make([]string, len(trail))
	for i, s := range trail {
		names[i] = s.name
	}
	return dir, names, nil
}

// hides tells whether root, the tree of the layers above, hides a file with this path.
func hides(root *node, parts []string) bool {
	n := root
	for _, name := range parts {
		child := n.children[name]
		if child == nil {
			return n.opaque
		}
		if !child.isDir() {
			return true
		}
		n = child
	}
	return true // a directory
}

// fold adds lower to upper, below what upper has already. Subtrees that become part of upper are given to
// added.
func fold(upper, lower *node, added func(*node)) {
	if upper.inode.implied {
		upper.inode = lower.inode
	}
	if upper.opaque {
		return
	}
	for name, l := range lower.children {
		u := upper.children[name]
		switch {
		case u == nil:
			upper.children[name] = l
			added(l)
		case !u.isDir():
		case l.isDir():
			fold(u, l, added)
		default: // another file or nothing: what is further below was never in this directory
			u.opaque, u.inode.implied = true, false
		}
	}
	upper.opaque = upper.opaque || lower.opaque
}
