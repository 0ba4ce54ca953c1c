package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// opening is how a host addresses the agent behind QEMU's virtio-serial port: agentproto's session mark and
// magic, and 32 hex digits that the agent echoes. Copied, because this program knows crivm from outside only;
// should it ever differ, no floor gets an answer and the bench fails.
const opening = "\xf5crivm1" + "00112233445566778899aabbccddeeff"

const tapName = "benchtap"

// floor starts the VMM of a pod again, without crivm: no cgroup, no user, no CNI, nobody at the monitor.
type floor struct {
	path string
	dir  string   // private directory instead of the VM's
	full []string // the pod's command line, with sockets and disk of the bench's own
	bare []string // the same without disk, NIC, rng, balloon and ports to plug into
}

// floorSample is one boot of the floor.
type floorSample struct {
	Wall time.Duration `json:"wallNanos"` // from the start of the VMM to the agent's first byte
	CPU  time.Duration `json:"vmmCPUNanos"`
}

func newFloor(v vmm, dir string) (*floor, error) {
	if v.Name != "qemu" || len(v.args) == 0 {
		return nil, fmt.Errorf("VMM %q: only QEMU is started by its command line alone; set the handler's vmm to qemu to measure", v.Name)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	f := &floor{path: v.args[0], dir: dir}
	var disk string
	f.full, disk = rebuild(v.args[1:], v.dir, dir)
	f.bare = bareArguments(f.full)
	if disk != "" { // never mounted: an empty one does
		if err := os.WriteFile(disk, nil, 0o600); err != nil {
			return nil, err
		}
		if err := os.Truncate(disk, 1<<30); err != nil {
			return nil, err
		}
	}
	for _, fifo := range []string{"console.in", "console.out"} {
		if err := unix.Mkfifo(filepath.Join(dir, fifo), 0o600); err != nil {
			return nil, fmt.Errorf("console: %w", err)
		}
	}
	return f, nil
}

// boot starts the VMM, waits for the agent's first byte and kills the VMM.
func (f *floor) boot(ctx context.Context, args []string) (s floorSample, retErr error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	files, conn, err := f.channels()
	defer func() {
		for _, file := range files {
			file.Close()
		}
	}()
	if err != nil {
		return s, err
	}
	defer conn.Close()
	log, err := os.Create(filepath.Join(f.dir, "vmm.log"))
	if err != nil {
		return s, err
	}
	defer log.Close()
	cmd := exec.CommandContext(ctx, f.path, args...)
	cmd.Dir, cmd.Stdout, cmd.Stderr, cmd.ExtraFiles = f.dir, log, log, files
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // as crivm's: the scheduler shares CPUs among sessions
	cmd.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
	if _, err := io.WriteString(conn, opening); err != nil {
		return s, fmt.Errorf("agent channel: %w", err)
	}
	start := time.Now()
	if err := cmd.Start(); err != nil {
		return s, err
	}
	exited := make(chan struct{})
	go func() { // a VMM that ends by itself leaves nobody to answer
		cmd.Wait()
		conn.Close()
		close(exited)
	}()
	_, err = conn.Read(make([]byte, 1))
	s.Wall = time.Since(start)
	if err == nil {
		s.CPU, err = cpuTime(cmd.Process.Pid)
	}
	cancel() // kills
	<-exited
	if err != nil {
		said, _ := os.ReadFile(log.Name())
		return s, fmt.Errorf("no byte of the agent after %s: %w: %s", s.Wall.Round(time.Millisecond), err, said)
	}
	return s, nil
}

// channels makes what QEMU inherits, and connects to the agent's socket.
func (f *floor) channels() (files []*os.File, conn net.Conn, err error) {
	for _, name := range []string{"qmp.sock", "agent.sock"} {
		path := filepath.Join(f.dir, name)
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			return files, nil, err
		}
		l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
		if err != nil {
			return files, nil, err
		}
		l.SetUnlinkOnClose(false)
		file, err := l.File()
		l.Close()
		if err != nil {
			return files, nil, err
		}
		files = append(files, file)
	}
	tap := &netlink.Tuntap{
		LinkAttrs: netlink.LinkAttrs{Name: tapName}, Mode: netlink.TUNTAP_MODE_TAP,
		Flags: netlink.TUNTAP_NO_PI | netlink.TUNTAP_VNET_HDR | netlink.TUNTAP_ONE_QUEUE, NonPersist: true, Queues: 1,
	}
	if err := netlink.LinkAdd(tap); err != nil {
		return files, nil, fmt.Errorf("tap: %w", err)
	}
	files = append(files, tap.Fds...)
	conn, err = net.Dial("unix", filepath.Join(f.dir, "agent.sock"))
	return files, conn, err
}

// rebuild is a pod's command line with another directory and another disk in place of the pod's.
func rebuild(args []string, vmDir, dir string) (rebuilt []string, disk string) {
	for i, a := range args {
		a = strings.ReplaceAll(a, vmDir, dir)
		if i > 0 && args[i-1] == "-blockdev" {
			const key = `"filename":"`
			if _, rest, ok := strings.Cut(a, key); ok {
				if path, _, ok := strings.Cut(rest, `"`); ok {
					disk = filepath.Join(dir, "disk.img")
					a = strings.Replace(a, path, disk, 1)
				}
			}
		}
		rebuilt = append(rebuilt, a)
	}
	return rebuilt, disk
}

// bareArguments leaves out all devices but the agent's port and the console, and what only they need.
func bareArguments(args []string) []string {
	var bare []string
	for i := 0; i < len(args); i++ {
		next := ""
		if i+1 < len(args) {
			next = args[i+1]
		}
		switch args[i] {
		case "-device":
			if !strings.HasPrefix(next, "virtio-serial-pci") && !strings.HasPrefix(next, "virtserialport") {
				i++
				continue
			}
		case "-blockdev", "-netdev":
			i++
			continue
		case "-object":
			if !strings.Contains(next, "id=ram,") {
				i++
				continue
			}
		}
		bare = append(bare, args[i])
	}
	return slices.Clip(bare)
}

func splitCommandLine(line []byte) []string {
	return strings.Split(strings.TrimSuffix(string(line), "\x00"), "\x00")
}
