package rootdisk

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
)

// Info is what the superblock of a disk tells.
type Info struct {
	Bytes  int64 // size of the disk; holes count
	Inodes uint64
}

// Verify reads the superblock of a disk and checks that it is one of Build's for this UUID and has its
// full length. File data is not read.
func Verify(f *os.File, uuid [16]byte) (Info, error) {
	block := make([]byte, BlockSize)
	if _, err := f.ReadAt(block, 0); err != nil {
		return Info{}, fmt.Errorf("superblock: %w", err)
	}
	le := binary.LittleEndian
	b := block[superOffset:]
	if le.Uint32(b) != superMagic || le.Uint32(b[4:]) != superChecksum(b) {
		return Info{}, errors.New("superblock is damaged")
	}
	if [16]byte(b[48:64]) != uuid {
		return Info{}, errors.New("superblock has another UUID")
	}
	info := Info{Bytes: int64(le.Uint32(b[36:])) * BlockSize, Inodes: le.Uint64(b[16:])}
	st, err := f.Stat()
	if err != nil {
		return Info{}, err
	}
	if st.Size() != info.Bytes {
		return Info{}, fmt.Errorf("disk has %d bytes instead of %d", st.Size(), info.Bytes)
	}
	return info, nil
}
