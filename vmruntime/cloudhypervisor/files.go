package cloudhypervisor

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/crivm/crivm/agentproto"
	"github.com/crivm/crivm/vmruntime"
)

func apiPath(dir string) string     { return filepath.Join(dir, "api.sock") }
func eventsPath(dir string) string  { return filepath.Join(dir, "events") }
func logPath(dir string) string     { return filepath.Join(dir, "vmm.log") }
func consolePath(dir string) string { return filepath.Join(dir, "console.log") }
func runPath(dir string) string     { return filepath.Join(dir, "run") }
func vsockPath(dir string) string   { return filepath.Join(dir, "run", "vsock") }
func serialPath(dir string) string  { return filepath.Join(dir, "run", "serial") }
func readyPath(dir string) string {
	return vsockPath(dir) + "_" + strconv.Itoa(agentproto.ReadyPort)
}

// eventRoom is how many bytes of events can wait, about 200 each.
const eventRoom = 256 << 10

// kept are the files that the daemon holds while it starts a VMM: the last three are handed over to the watchers,
// the first two are inherited by the VMM.
type kept struct {
	api    *os.File
	fifo   *os.File // read-write, keeps the FIFO alive while no daemon reads
	events *os.File
	ready  *net.UnixListener
}

func (k *kept) closeInherited() {
	k.api.Close()
	k.fifo.Close()
}

// prepare makes what is in a VM's directory, all anew: remains are those of a VM that was not swept.
func prepare(dir string, p vmruntime.ProcessSpec) (_ *kept, retErr error) {
	if err := removeFiles(dir); err != nil {
		return nil, err
	}
	for _, log := range []string{logPath(dir), consolePath(dir)} {
		if err := os.Remove(log); err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, err
		}
	}
	k := &kept{}
	defer func() {
		if retErr != nil {
			for _, f := range []*os.File{k.api, k.fifo, k.events} {
				f.Close() // nil ones are fine
			}
			if k.ready != nil {
				k.ready.Close()
			}
			retErr = errors.Join(retErr, removeFiles(dir))
		}
	}()
	if p.UID != 0 {
		// The VMM passes through the directory and reads or writes nothing in it but run/.
		if err := os.Chown(dir, os.Geteuid(), p.GID); err != nil {
			return nil, err
		}
		if err := os.Chmod(dir, 0o710); err != nil {
			return nil, err
		}
	}
	if err := os.Mkdir(runPath(dir), 0o700); err != nil {
		return nil, err
	}
	var err error
	if k.ready, err = listen(readyPath(dir)); err != nil {
		return nil, err
	}
	api, err := listen(apiPath(dir))
	if err != nil {
		return nil, err
	}
	k.api, err = api.File()
	api.Close() // the duplicate goes on listening
	if err != nil {
		return nil, err
	}
	if err := unix.Mkfifo(eventsPath(dir), 0o600); err != nil {
		return nil, fmt.Errorf("event FIFO: %w", err)
	}
	fd, err := unix.Open(eventsPath(dir), unix.O_RDWR|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, fmt.Errorf("event FIFO: %w", err)
	}
	k.fifo = os.NewFile(uintptr(fd), "events")
	// Room for what a guest may do while the daemon is busy or away; without it the default of 64 KiB has to do.
	_, _ = unix.FcntlInt(uintptr(fd), unix.F_SETPIPE_SZ, eventRoom)
	if k.events, err = openEvents(dir); err != nil {
		return nil, err
	}
	if os.Geteuid() != 0 {
		return k, nil
	}
	for _, path := range []string{runPath(dir), readyPath(dir), eventsPath(dir)} {
		if err := os.Lchown(path, p.UID, p.GID); err != nil {
			return nil, err
		}
	}
	return k, nil
}

func listen(path string) (*net.UnixListener, error) {
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, err
	}
	l.SetUnlinkOnClose(false)
	if err := os.Chmod(path, 0o600); err != nil {
		l.Close()
		return nil, err
	}
	return l, nil
}

// openEvents opens the reading end of the FIFO.
func openEvents(dir string) (*os.File, error) {
	f, err := os.OpenFile(eventsPath(dir), os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, fmt.Errorf("event FIFO: %w", err)
	}
	return f, nil
}

// eventReader fails when so much waits in the FIFO that events may have been dropped: writes fill pages, and one
// that does not fit into the rest of a page starts the next.
type eventReader struct{ fifo *os.File }

var errEventsLost = errors.New("more events than were read")

func (r eventReader) Read(b []byte) (int, error) {
	waiting, size, err := pipeFill(r.fifo)
	if err == nil && waiting > size/4*3 {
		err = errEventsLost
	}
	if err != nil {
		return 0, err
	}
	return r.fifo.Read(b)
}

// pipeFill tells how many bytes wait in a pipe, and how many it holds at most.
func pipeFill(f *os.File) (waiting, size int, _ error) {
	raw, err := f.SyscallConn()
	if err != nil {
		return 0, 0, err
	}
	var waitErr, sizeErr error
	err = raw.Control(func(fd uintptr) {
		waiting, waitErr = unix.IoctlGetInt(int(fd), unix.TIOCINQ) // FIONREAD
		size, sizeErr = unix.FcntlInt(fd, unix.F_GETPIPE_SZ, 0)
	})
	return waiting, size, errors.Join(err, waitErr, sizeErr)
}

// removeFiles removes all but the logs. The VMM no longer runs. Links in run/ are removed, not followed.
func removeFiles(dir string) error {
	errs := []error{os.RemoveAll(runPath(dir))}
	for _, path := range []string{apiPath(dir), eventsPath(dir), vmruntime.DeviceDir(dir)} {
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("remove files of VM: %w", err)
	}
	return nil
}

// peerIs fails unless the process that listens at (or has connected from) the other end is pid.
func peerIs(conn *net.UnixConn, pid int) error {
	raw, err := conn.SyscallConn()
	if err != nil {
		return err
	}
	var cred *unix.Ucred
	var credErr error
	if err := raw.Control(func(fd uintptr) {
		cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return err
	}
	if credErr != nil {
		return fmt.Errorf("peer of socket: %w", credErr)
	}
	if int(cred.Pid) != pid {
		return fmt.Errorf("%w: process %d, want %d", errForeignSocket, cred.Pid, pid)
	}
	return nil
}

// errForeignSocket means that the VMM put another's socket in the place of its own.
var errForeignSocket = errors.New("socket belongs to another process than the VMM")
