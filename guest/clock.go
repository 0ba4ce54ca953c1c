package guest

import (
	"encoding/binary"
	"fmt"
	"os"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// clockTolerance is how far the guest's clock may be from the host's before it is set.
const clockTolerance = 100 * time.Millisecond

// setClock sets the wall clock to the host's.
func setClock(unixNanos int64) error {
	if unixNanos <= 0 || time.Since(time.Unix(0, unixNanos)).Abs() <= clockTolerance {
		return nil
	}
	ts := unix.NsecToTimespec(unixNanos)
	if err := unix.ClockSettime(unix.CLOCK_REALTIME, &ts); err != nil {
		return fmt.Errorf("set clock: %w", err)
	}
	return nil
}

// maxEntropy bounds one contribution; the kernel's pool holds 32 bytes.
const maxEntropy = 512

// addEntropy gives the kernel's generator the host's random bytes, counts them as such, and has it use
// them at once. A guest that was cloned or is young shares its state with others until then.
func addEntropy(b []byte) error {
	if len(b) == 0 {
		return nil
	}
	b = b[:min(len(b), maxEntropy)]
	// struct rand_pool_info: entropy_count in bits, buf_size in bytes, buf
	info := make([]byte, 8+maxEntropy)
	binary.NativeEndian.PutUint32(info, uint32(len(b)*8))
	binary.NativeEndian.PutUint32(info[4:], uint32(len(b)))
	copy(info[8:], b)
	f, err := os.OpenFile("/dev/urandom", os.O_RDWR, 0)
	if err != nil {
		return fmt.Errorf("add entropy: %w", err)
	}
	defer f.Close()
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), unix.RNDADDENTROPY, uintptr(unsafe.Pointer(&info[0]))); errno != 0 {
		return fmt.Errorf("add entropy: %w", errno)
	}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), unix.RNDRESEEDCRNG, 0); errno != 0 {
		return fmt.Errorf("reseed random numbers: %w", errno)
	}
	return nil
}
