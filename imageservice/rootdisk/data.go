package rootdisk

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math"
	"os"

	"golang.org/x/sys/unix"
)

// errTooBig means that block numbers do not fit into the 32 bits EROFS has for them.
var errTooBig = errors.New("disk is larger than 16 TiB")

// dataWriter writes a disk front to back, in large writes and with holes where there are only zeros.
// Block 0 is left for the superblock.
type dataWriter struct {
	f      *os.File
	offset int64 // of buf on the disk, a multiple of BlockSize
	buf    []byte
	synced int64 // written back, or being written back, up to here
	inline int   // bytes of tails held in memory
}

const (
	writeSize     = 1 << 20
	writebackSize = 8 << 20
)

func newDataWriter(f *os.File) *dataWriter {
	return &dataWriter{f: f, offset: BlockSize, buf: make([]byte, 0, writeSize)}
}

// pos is the position of the next byte on the disk.
func (w *dataWriter) pos() int64 { return w.offset + int64(len(w.buf)) }

func (w *dataWriter) Write(p []byte) (int, error) {
	n := len(p)
	for len(p) > 0 {
		k := min(len(p), cap(w.buf)-len(w.buf))
		w.buf = append(w.buf, p[:k]...)
		p = p[k:]
		if len(w.buf) == cap(w.buf) {
			if err := w.flush(); err != nil {
				return 0, err
			}
		}
	}
	return n, nil
}

// copyN takes n bytes from r, without a buffer of its own.
func (w *dataWriter) copyN(r io.Reader, n int64) error {
	for n > 0 {
		k := int(min(n, int64(cap(w.buf)-len(w.buf))))
		start := len(w.buf)
		got, err := io.ReadFull(r, w.buf[start:start+k])
		w.buf = w.buf[:start+got]
		if err != nil {
			if err == io.EOF {
				err = io.ErrUnexpectedEOF
			}
			return err
		}
		n -= int64(k)
		if len(w.buf) == cap(w.buf) {
			if err := w.flush(); err != nil {
				return err
			}
		}
	}
	return nil
}

// align fills up the current block with zeros.
func (w *dataWriter) align() error {
	if rest := len(w.buf) % BlockSize; rest != 0 {
		_, err := w.Write(zeroBlock[rest:])
		return err
	}
	return nil
}

var zeroBlock [BlockSize]byte

// flush writes the buffer but for blocks that are all zeros. The buffer is full or ends a block.
func (w *dataWriter) flush() error {
	if w.offset+int64(len(w.buf)) > math.MaxUint32*BlockSize {
		return errTooBig
	}
	for b := w.buf; len(b) > 0; {
		n := 0
		for n < len(b) && !bytes.Equal(b[n:n+BlockSize], zeroBlock[:]) {
			n += BlockSize
		}
		if n > 0 {
			if _, err := w.f.WriteAt(b[:n], w.offset+int64(len(w.buf)-len(b))); err != nil {
				return err
			}
		}
		for n < len(b) && bytes.Equal(b[n:n+BlockSize], zeroBlock[:]) {
			n += BlockSize
		}
		b = b[n:]
	}
	w.offset += int64(len(w.buf))
	w.buf = w.buf[:0]
	// Start writing back early, so that the fsync at the end has little left to wait for. Only a hint.
	if w.offset-w.synced >= writebackSize {
		_ = unix.SyncFileRange(int(w.f.Fd()), w.synced, w.offset-w.synced, unix.SYNC_FILE_RANGE_WRITE)
		w.synced = w.offset
	}
	return nil
}

// file writes the data of a regular file, its end into memory if that may go beside the inode.
func (w *dataWriter) file(in *inode, r io.Reader) error {
	tail := in.size % BlockSize
	if inodeLen+int64(len(in.xattrs))+tail > BlockSize || w.inline+int(tail) > inlineBytes {
		tail = 0
	}
	block := w.pos() / BlockSize
	if block > math.MaxUint32 {
		return errTooBig
	}
	in.block = uint32(block)
	if err := w.copyN(r, in.size-tail); err != nil {
		return fmt.Errorf("data: %w", err)
	}
	if tail == 0 {
		return w.align()
	}
	in.tail = make([]byte, tail)
	w.inline += int(tail)
	if _, err := io.ReadFull(r, in.tail); err != nil {
		return fmt.Errorf("data: %w", err)
	}
	return nil
}
