package server

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/crivm/crivm/server/store"
)

// The kernel tells of a block device that has another size by an event (uevent) of that device. crivm passes the size
// on to the guests that have the device; when events were lost, and when a VM is adopted, to all of them.

const (
	// resizeLimit bounds telling one guest of one size.
	resizeLimit = 30 * time.Second
	// eventBuffer is what the kernel may keep of events meanwhile, in bytes.
	eventBuffer = 1 << 20
)

// watchBlockDevices listens until the server's life ends. Without events only adoption notices sizes.
func (s *Server) watchBlockDevices() {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, unix.NETLINK_KOBJECT_UEVENT)
	if err == nil {
		if err = unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: 1}); err != nil {
			unix.Close(fd)
		}
	}
	if err != nil {
		s.log.Warn("no device events: guests do not see new sizes of block devices until crivm is restarted", "error", err)
		return
	}
	_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, eventBuffer) // less will do
	socket := os.NewFile(uintptr(fd), "device events")
	s.goTask(func() {
		defer socket.Close()
		defer context.AfterFunc(s.life, func() { _ = socket.SetReadDeadline(time.Unix(1, 0)) })()
		if err := s.readDeviceEvents(socket); err != nil && s.life.Err() == nil {
			s.log.Error("device events: guests do not see new sizes of block devices until crivm is restarted", "error", err)
		}
	})
}

func (s *Server) readDeviceEvents(socket *os.File) error {
	raw, err := socket.SyscallConn()
	if err != nil {
		return err
	}
	buf := make([]byte, 16<<10)
	for {
		var n int
		var from unix.Sockaddr
		var recvErr error
		err := raw.Read(func(fd uintptr) bool {
			n, from, recvErr = unix.Recvfrom(int(fd), buf, 0)
			return !errors.Is(recvErr, unix.EAGAIN)
		})
		if err != nil {
			return err
		}
		switch kernel, ok := from.(*unix.SockaddrNetlink); {
		case errors.Is(recvErr, unix.ENOBUFS):
			s.resizeDevices(func(string, uint64) bool { return true })
		case errors.Is(recvErr, unix.EINTR):
		case recvErr != nil:
			return recvErr
		case ok && kernel.Pid == 0: // any process may send such messages
			if number, ok := changedBlockDevice(buf[:n]); ok {
				s.resizeDevices(func(_ string, device uint64) bool { return device == number })
			}
		}
	}
}

// changedBlockDevice reads an event: "change@/devices/...", then NAME=value, all ended by zero bytes.
func changedBlockDevice(event []byte) (number uint64, ok bool) {
	values := map[string]string{}
	for field := range strings.SplitSeq(string(event), "\x00") {
		if name, value, ok := strings.Cut(field, "="); ok {
			values[name] = value
		}
	}
	major, majorErr := strconv.ParseUint(values["MAJOR"], 10, 32)
	minor, minorErr := strconv.ParseUint(values["MINOR"], 10, 32)
	if values["SUBSYSTEM"] != "block" || values["ACTION"] != "change" || majorErr != nil || minorErr != nil {
		return 0, false
	}
	return unix.Mkdev(uint32(major), uint32(minor)), true
}

// resizeDevices tells guests of the sizes of the devices that are chosen, each VM in its own time.
func (s *Server) resizeDevices(chosen func(sandboxID string, device uint64) bool) {
	told := map[string]bool{}
	for _, c := range s.store.Containers("") {
		for _, serial := range c.VolumeDisks {
			number, ok := deviceNumber(serial)
			if !ok || !chosen(c.SandboxID, number) || told[c.SandboxID+serial] {
				continue
			}
			told[c.SandboxID+serial] = true
			rec, err := s.store.Sandbox(c.SandboxID)
			if err != nil || rec.State != store.SandboxReady {
				continue
			}
			sb := s.sandbox(c.SandboxID)
			sb.mu.Lock()
			waiting := sb.resizing[serial] // it looks at the size when its turn has come
			sb.resizing[serial] = true
			sb.mu.Unlock()
			if !waiting {
				s.goTask(func() { s.resizeDevice(sb, serial, number) })
			}
		}
	}
}

func (s *Server) resizeDevice(sb *sandbox, serial string, number uint64) {
	ctx, cancel := context.WithTimeout(s.life, resizeLimit)
	defer cancel()
	err := sb.plug.lock(ctx)
	sb.mu.Lock()
	delete(sb.resizing, serial)
	sb.mu.Unlock()
	if err != nil {
		s.log.Warn("telling a guest of the size of a block device", "sandbox", sb.id, "disk", serial, "error", err)
		return
	}
	defer sb.plug.unlock()
	size, err := deviceSize(number)
	vm, gone := sb.machine()
	if gone != nil {
		return
	}
	if err == nil {
		err = vm.ResizeDisk(ctx, serial, size)
	}
	switch {
	case errdefs.IsNotFound(err): // not plugged yet, or not any more
	case err != nil:
		s.log.Warn("telling a guest of the size of a block device", "sandbox", sb.id, "disk", serial, "error", err)
	default:
		s.log.Info("guest told of the size of a block device", "sandbox", sb.id, "disk", serial, "bytes", size)
	}
}

// deviceSize is the size of a block device in bytes.
func deviceSize(number uint64) (int64, error) {
	text, err := os.ReadFile(fmt.Sprintf("/sys/dev/block/%d:%d/size", unix.Major(number), unix.Minor(number)))
	if err != nil {
		return 0, fmt.Errorf("size of the device: %w", err)
	}
	sectors, err := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64)
	if err != nil || sectors <= 0 {
		return 0, fmt.Errorf("size of the device is %q: %w", text, errdefs.ErrUnavailable)
	}
	return sectors * 512, nil // in units of 512 bytes, whatever the device's sectors
}
