package rootdisk

import (
	"context"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"math"
	"slices"

	"golang.org/x/sys/unix"
)

// On-disk format: fs/erofs/erofs_fs.h of Linux. Only what Linux 5.5 and later can read is used:
// uncompressed files, whole blocks first and the rest beside the inode where it fits.
const (
	superOffset    = 1024
	superLen       = 128
	superMagic     = 0xE0F5E1E2
	compatChecksum = 1 << 0
	compatMtime    = 1 << 1

	slotLen   = 32 // inodes are addressed in units of this, from the start of the metadata area
	inodeLen  = 64 // of the "extended" form, the only one with a time of its own
	direntLen = 12

	layoutPlain  = 0
	layoutInline = 2
	extended     = 1

	// The metadata area starts with an unused slot pair, since libc takes inode number 0 for a deleted file.
	firstInode = 2 * slotLen
)

// File types in directory entries.
var direntTypes = map[uint32]byte{
	unix.S_IFREG: 1, unix.S_IFDIR: 2, unix.S_IFCHR: 3, unix.S_IFBLK: 4, unix.S_IFIFO: 5, unix.S_IFLNK: 7,
}

// treeWriter writes the directory tree behind the file data: blocks of directories, then the metadata
// area with the inodes.
type treeWriter struct {
	out    *dataWriter
	inodes []*inode // in order of discovery
	dirs   []dir    // the same, parents first
	open   []gap    // metadata blocks with room left
	end    int64    // of the metadata area
}

type dir struct {
	node   *node
	parent *inode
	names  []string
}

// gap is unused room at the end of a metadata block.
type gap struct{ pos, left int64 }

func writeTree(ctx context.Context, out *dataWriter, root *node, uuid [16]byte) error {
	w := &treeWriter{out: out, end: firstInode}
	w.plan(root)
	block := out.pos() / BlockSize
	for _, d := range w.dirs {
		d.node.inode.block = uint32(block)
		block += int64(d.node.inode.dirBlocks)
	}
	if block+(w.end+BlockSize-1)/BlockSize > math.MaxUint32 {
		return errTooBig
	}
	for _, d := range w.dirs {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := w.writeDir(d); err != nil {
			return err
		}
	}
	return w.finish(ctx, uuid)
}

// plan gives every visible inode its place in the metadata area, breadth first, so that the inodes of a
// directory lie together.
func (w *treeWriter) plan(root *node) {
	root.inode.links = 2
	w.addDir(root, root.inode)
	w.place(root.inode)
	for i := 0; i < len(w.dirs); i++ {
		d := w.dirs[i]
		for _, name := range d.names {
			child := d.node.children[name]
			child.inode.links++
			if child.isDir() {
				child.inode.links++
				d.node.inode.links++
				w.addDir(child, d.node.inode)
			}
			if !child.inode.placed {
				w.place(child.inode)
			}
		}
	}
}

// addDir works out the size of a directory. Its whole blocks go to the disk and the last part beside the
// inode if it fits there.
func (w *treeWriter) addDir(n *node, parent *inode) {
	for name, child := range n.children {
		if child.isWhiteout() {
			delete(n.children, name)
		}
	}
	d := dir{node: n, parent: parent, names: n.sortedNames()}
	w.dirs = append(w.dirs, d)
	in := n.inode
	full, last := int64(0), int64(0)
	d.eachName(func(name string) {
		need := int64(direntLen + len(name))
		if last+need > BlockSize {
			full++
			last = 0
		}
		last += need
	})
	in.size = full*BlockSize + last
	in.dirBlocks = uint32(full)
	if inodeLen+int64(len(in.xattrs))+last > BlockSize {
		in.dirBlocks++
	} else {
		in.tail = make([]byte, last)
	}
}

// eachName calls f with the names of a directory as they are stored: in byte order, "." and ".." included.
func (d dir) eachName(f func(string)) {
	names := append([]string{".", ".."}, d.names...)
	slices.Sort(names)
	for _, name := range names {
		f(name)
	}
}

// place finds room for an inode with its extended attributes and what is stored beside it: all in one
// block where that is possible. Room left in the last few blocks is used first.
func (w *treeWriter) place(in *inode) {
	const openBlocks = 16
	in.placed = true
	in.number = uint32(len(w.inodes)) + 1
	w.inodes = append(w.inodes, in)
	if in.isSymlink() && inodeLen+int64(len(in.xattrs))+in.size <= BlockSize {
		in.tail = []byte(in.target)
	}
	size := inodeLen + int64(len(in.xattrs)+len(in.tail))
	size = (size + slotLen - 1) / slotLen * slotLen
	for i := range w.open {
		if g := &w.open[i]; g.left >= size {
			in.pos = g.pos
			g.pos += size
			g.left -= size
			return
		}
	}
	if rest := BlockSize - w.end%BlockSize; rest < size && rest < BlockSize {
		if rest >= inodeLen {
			w.open = append(w.open, gap{w.end, rest})
			if len(w.open) > openBlocks {
				w.open = w.open[1:]
			}
		}
		w.end += rest
	}
	in.pos = w.end
	w.end += size
}

// writeDir writes the whole blocks of a directory and fills its tail.
func (w *treeWriter) writeDir(d dir) error {
	var block []string
	used := 0
	emit := func() error {
		b := w.encodeDirents(d, block)
		block, used = block[:0], 0
		if _, err := w.out.Write(b); err != nil {
			return err
		}
		return w.out.align()
	}
	var err error
	d.eachName(func(name string) {
		if used+direntLen+len(name) > BlockSize && err == nil {
			err = emit()
		}
		block = append(block, name)
		used += direntLen + len(name)
	})
	if err != nil {
		return err
	}
	if d.node.inode.tail == nil {
		return emit()
	}
	copy(d.node.inode.tail, w.encodeDirents(d, block))
	return nil
}

// encodeDirents makes one directory block: entries, then their names.
func (w *treeWriter) encodeDirents(d dir, names []string) []byte {
	b := make([]byte, 0, BlockSize)
	at := len(names) * direntLen
	for _, name := range names {
		in := d.parent
		switch name {
		case ".":
			in = d.node.inode
		case "..":
		default:
			in = d.node.children[name].inode
		}
		b = binary.LittleEndian.AppendUint64(b, uint64(in.pos/slotLen))
		b = binary.LittleEndian.AppendUint16(b, uint16(at))
		b = append(b, direntTypes[in.mode&unix.S_IFMT], 0)
		at += len(name)
	}
	for _, name := range names {
		b = append(b, name...)
	}
	return b
}

// finish writes the metadata area and the superblock.
func (w *treeWriter) finish(ctx context.Context, uuid [16]byte) error {
	root := w.inodes[0]
	metaStart := w.out.pos()
	slices.SortFunc(w.inodes, func(a, b *inode) int { return int(a.pos - b.pos) })
	var large []*inode // symbolic links that do not fit beside their inode
	for _, in := range w.inodes {
		if in.isSymlink() && in.tail == nil {
			large = append(large, in)
		}
	}
	// Their targets follow the metadata area.
	after := metaStart + (w.end+BlockSize-1)/BlockSize*BlockSize
	for i, in := range large {
		in.block = uint32(after/BlockSize) + uint32(i)
	}
	for i, in := range w.inodes {
		if i%10000 == 0 && ctx.Err() != nil {
			return ctx.Err()
		}
		if err := w.padTo(metaStart + in.pos); err != nil {
			return err
		}
		if _, err := w.out.Write(encodeInode(in)); err != nil {
			return err
		}
	}
	if err := w.out.align(); err != nil {
		return err
	}
	for _, in := range large {
		if _, err := w.out.Write([]byte(in.target)); err != nil {
			return err
		}
		if err := w.out.align(); err != nil {
			return err
		}
	}
	if err := w.out.flush(); err != nil {
		return err
	}
	end := w.out.pos()
	if err := w.out.f.Truncate(end); err != nil {
		return err
	}
	sb := encodeSuper(super{
		UUID:      uuid,
		Blocks:    uint32(end / BlockSize),
		Inodes:    uint64(len(w.inodes)),
		metaBlock: uint32(metaStart / BlockSize),
		rootSlot:  uint16(root.pos / slotLen),
	})
	if _, err := w.out.f.WriteAt(sb, 0); err != nil {
		return fmt.Errorf("superblock: %w", err)
	}
	return nil
}

func (w *treeWriter) padTo(pos int64) error {
	for w.out.pos() < pos {
		n := min(pos-w.out.pos(), BlockSize)
		if _, err := w.out.Write(zeroBlock[:n]); err != nil {
			return err
		}
	}
	return nil
}

// encodeInode makes an erofs_inode_extended with its attributes and tail.
func encodeInode(in *inode) []byte {
	le := binary.LittleEndian
	b := make([]byte, inodeLen, inodeLen+len(in.xattrs)+len(in.tail))
	format := uint16(extended | layoutPlain<<1)
	if in.tail != nil {
		format = extended | layoutInline<<1
	}
	le.PutUint16(b[0:], format)
	if len(in.xattrs) > 0 {
		le.PutUint16(b[2:], uint16((len(in.xattrs)-xattrHeaderLen)/4+1))
	}
	le.PutUint16(b[4:], uint16(in.mode))
	le.PutUint64(b[8:], uint64(in.size))
	switch in.mode & unix.S_IFMT {
	case unix.S_IFCHR, unix.S_IFBLK:
		le.PutUint32(b[16:], in.rdev)
	case unix.S_IFREG, unix.S_IFDIR, unix.S_IFLNK:
		le.PutUint32(b[16:], in.block)
	}
	le.PutUint32(b[20:], in.number)
	le.PutUint32(b[24:], in.uid)
	le.PutUint32(b[28:], in.gid)
	le.PutUint64(b[32:], uint64(in.mtime))
	le.PutUint32(b[40:], in.mtimeNS)
	le.PutUint32(b[44:], in.links)
	b = append(b, in.xattrs...)
	return append(b, in.tail...)
}

// super is what a superblock says.
type super struct {
	UUID      [16]byte
	Blocks    uint32
	Inodes    uint64
	metaBlock uint32
	rootSlot  uint16
}

// encodeSuper makes block 0.
func encodeSuper(s super) []byte {
	le := binary.LittleEndian
	block := make([]byte, BlockSize)
	b := block[superOffset:]
	le.PutUint32(b[0:], superMagic)
	le.PutUint32(b[8:], compatChecksum|compatMtime)
	b[12] = 12 // log2 of the block size
	le.PutUint16(b[14:], s.rootSlot)
	le.PutUint64(b[16:], s.Inodes)
	le.PutUint32(b[36:], s.Blocks)
	le.PutUint32(b[40:], s.metaBlock)
	copy(b[48:], s.UUID[:])
	le.PutUint32(b[4:], superChecksum(b))
	return block
}

// superChecksum is over the rest of block 0 from the superblock on, its own field zeroed.
func superChecksum(b []byte) uint32 {
	b = slices.Clone(b)
	clear(b[4:8])
	return ^crc32.Checksum(b, crc32.MakeTable(crc32.Castagnoli))
}
