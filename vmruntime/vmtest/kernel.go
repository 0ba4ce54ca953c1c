package vmtest

import "encoding/binary"

// TinyKernel is an ELF file with a PVH entry note, for a real VMM: its guest runs this 32-bit code once, with
// interrupts off, and halts.
func TinyKernel(code ...byte) []byte {
	const (
		entry  = 0x100000 // where the code is loaded
		offset = 0x1000   // of the code in the file
		header = 64
		ph     = 56
	)
	code = append([]byte{0xfa}, code...)                                      // cli
	code = append(code, 0xf4, 0xeb, 0xfd)                                     // hlt; jmp to it
	note := []byte("\x04\x00\x00\x00\x04\x00\x00\x00\x12\x00\x00\x00Xen\x00") // XEN_ELFNOTE_PHYS32_ENTRY
	note = binary.LittleEndian.AppendUint32(note, entry)

	le := binary.LittleEndian
	b := append([]byte("\x7fELF\x02\x01\x01"), make([]byte, 9)...)
	for _, v := range []uint16{2, 62} { // executable, x86-64
		b = le.AppendUint16(b, v)
	}
	b = le.AppendUint32(b, 1)
	for _, v := range []uint64{entry, header, 0} {
		b = le.AppendUint64(b, v)
	}
	b = le.AppendUint32(b, 0)
	for _, v := range []uint16{header, ph, 2, 0, 0, 0} { // two program headers
		b = le.AppendUint16(b, v)
	}
	b = le.AppendUint32(b, 1) // PT_LOAD
	b = le.AppendUint32(b, 7)
	for _, v := range []uint64{offset, entry, entry, uint64(len(code)), uint64(len(code)), 0x1000} {
		b = le.AppendUint64(b, v)
	}
	b = le.AppendUint32(b, 4) // PT_NOTE
	b = le.AppendUint32(b, 4)
	for _, v := range []uint64{header + 2*ph, 0, 0, uint64(len(note)), uint64(len(note)), 4} {
		b = le.AppendUint64(b, v)
	}
	b = append(b, note...)
	b = append(b, make([]byte, offset-len(b))...)
	return append(b, code...)
}
