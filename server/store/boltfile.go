package store

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
)

// The bbolt library trusts its file: a torn page makes it panic, fault or loop, some of that in goroutines of its own,
// where nobody can catch it. So the file is read here, once at start, by a reader that believes nothing: it checks every
// offset, visits no page twice, and goes on behind what is damaged. The library only ever opens files that were
// written just before.
//
// A file is pages of one size. Pages 0 and 1 are meta pages, written in turn, the one with the higher transaction id
// and a right checksum counts; it names the page of the root bucket. A bucket is a tree of branch and leaf pages; the
// value of a leaf element with the flag bucketElement is the header of a bucket in it.
const (
	boltMagic     = 0xED0CDAED
	boltVersion   = 2
	pageHeader    = 16 // id u64, flags u16, count u16, overflow u32
	elementHeader = 16
	bucketHeader  = 16 // root page u64, sequence u64; a root of 0: the page follows, in the value itself
	metaBytes     = 64 // behind the page header; the last 8 are the checksum of the others

	branchPage    = 0x01
	leafPage      = 0x02
	bucketElement = 0x01

	maxBuckets = 16 // in one another; crivm has two
)

var le = binary.LittleEndian

// boltFile is the content of a bbolt file.
type boltFile struct {
	data     []byte
	pageSize uint64
	visited  map[uint64]bool
	damage   []error // what was found wrong, without which the rest was read
}

// bucket is what was found in a bucket.
type bucket struct {
	values  map[string][]byte
	buckets map[string]*bucket
}

func (b *bucket) in(name []byte) *bucket {
	if b == nil {
		return nil
	}
	return b.buckets[string(name)]
}

func (b *bucket) value(key []byte) []byte {
	if b == nil {
		return nil
	}
	return b.values[string(key)]
}

// readBolt returns the root bucket as far as it can be read, and what is damaged.
func readBolt(data []byte) (*bucket, error) {
	f := &boltFile{data: data, visited: map[uint64]bool{}}
	root, err := f.root()
	if err != nil {
		return nil, err
	}
	b := f.bucket(root, 0)
	return b, errors.Join(f.damage...)
}

// root finds the page of the root bucket by the newest meta page that is whole.
func (f *boltFile) root() (uint64, error) {
	var root, newest uint64
	// The second meta page lies one page on, whose size only the first one tells: try those that exist.
	for offset := uint64(0); offset <= 64<<10; offset = max(2*offset, 1<<10) {
		m, ok := f.meta(offset)
		if !ok || (f.pageSize != 0 && m.txid <= newest) || offset != 0 && offset != m.pageSize {
			continue
		}
		f.pageSize, root, newest = m.pageSize, m.root, m.txid
	}
	if f.pageSize == 0 {
		return 0, errors.New("no meta page is whole")
	}
	return root, nil
}

type meta struct{ pageSize, root, txid uint64 }

func (f *boltFile) meta(offset uint64) (meta, bool) {
	if uint64(len(f.data)) < offset+pageHeader+metaBytes {
		return meta{}, false
	}
	b := f.data[offset+pageHeader:][:metaBytes]
	sum := fnv.New64a()
	sum.Write(b[:metaBytes-8])
	m := meta{pageSize: uint64(le.Uint32(b[8:])), root: le.Uint64(b[16:]), txid: le.Uint64(b[48:])}
	ok := le.Uint32(b) == boltMagic && le.Uint32(b[4:]) == boltVersion && le.Uint64(b[56:]) == sum.Sum64() && m.pageSize >= 512 && m.pageSize <= 64<<10
	return m, ok
}

func (f *boltFile) damaged(format string, args ...any) {
	if len(f.damage) < 20 {
		f.damage = append(f.damage, fmt.Errorf(format, args...))
	}
}

func (f *boltFile) bucket(page uint64, depth int) *bucket {
	b := &bucket{values: map[string][]byte{}, buckets: map[string]*bucket{}}
	f.tree(page, b, depth)
	return b
}

// tree reads a page and those below it into b.
func (f *boltFile) tree(page uint64, b *bucket, depth int) {
	if f.visited[page] {
		f.damaged("page %d is in use twice", page)
		return
	}
	f.visited[page] = true
	if page < 2 || page >= uint64(len(f.data))/f.pageSize {
		f.damaged("page %d does not exist", page)
		return
	}
	p := f.data[page*f.pageSize:]
	if le.Uint64(p) != page {
		f.damaged("page %d says that it is page %d", page, le.Uint64(p))
		return
	}
	size := (uint64(le.Uint32(p[12:])) + 1) * f.pageSize
	if size > uint64(len(p)) {
		f.damaged("page %d is cut off", page)
		return
	}
	f.elements(page, p[:size], b, depth)
}

// elements reads those of one page, which may be one within the value of another page.
func (f *boltFile) elements(page uint64, p []byte, b *bucket, depth int) {
	flags, count := le.Uint16(p[8:]), uint64(le.Uint16(p[10:]))
	if flags != branchPage && flags != leafPage || pageHeader+count*elementHeader > uint64(len(p)) {
		f.damaged("page %d holds neither branch nor leaf", page)
		return
	}
	for i := range count {
		at := pageHeader + i*elementHeader
		e := p[at:]
		if flags == branchPage {
			f.tree(le.Uint64(e[8:]), b, depth)
			continue
		}
		pos, keySize, valueSize := uint64(le.Uint32(e[4:])), uint64(le.Uint32(e[8:])), uint64(le.Uint32(e[12:]))
		if at+pos+keySize+valueSize > uint64(len(p)) {
			f.damaged("page %d: element %d is cut off", page, i)
			continue
		}
		key, value := string(e[pos:pos+keySize]), e[pos+keySize:][:valueSize]
		if b.buckets[key] != nil || b.values[key] != nil {
			f.damaged("page %d: %q is there twice", page, key)
			continue
		}
		if le.Uint32(e)&bucketElement == 0 {
			b.values[key] = bytes.Clone(value)
			continue
		}
		if child := f.child(page, value, depth+1); child != nil {
			b.buckets[key] = child
		}
	}
}

// child reads the bucket whose header is a value.
func (f *boltFile) child(page uint64, header []byte, depth int) *bucket {
	if len(header) < bucketHeader || depth > maxBuckets {
		f.damaged("page %d: bucket without a header, or too deep", page)
		return nil
	}
	if root := le.Uint64(header); root != 0 {
		return f.bucket(root, depth)
	}
	inline := header[bucketHeader:]
	if len(inline) < pageHeader || le.Uint16(inline[8:]) != leafPage {
		f.damaged("page %d: bucket in a value is cut off", page)
		return nil
	}
	b := &bucket{values: map[string][]byte{}, buckets: map[string]*bucket{}}
	f.elements(page, inline, b, depth)
	return b
}
