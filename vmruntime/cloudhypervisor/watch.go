package cloudhypervisor

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/crivm/crivm/vmruntime"
	"github.com/crivm/crivm/vmruntime/chclient"
)

const (
	sigkill = syscall.SIGKILL
	// powerOffWait is how long a VMM may take to exit after its guest is gone.
	powerOffWait = 1500 * time.Millisecond
	// drainWait is how long the events of a VMM that has exited are still read.
	drainWait = time.Second
)

// watch starts all that goes on beside the VM until it is dead. console may be nil.
func (v *vm) watch(events *os.File, resync bool, c *console) {
	read := make(chan struct{})
	v.watchers.Go(func() {
		defer close(read)
		defer events.Close()
		v.readEvents(eventReader{events}, resync)
	})
	if c != nil {
		v.watchers.Go(func() { c.copy(v.done) })
	}
	v.watchers.Go(func() { vmruntime.WatchFiles(v.done, logPath(v.dir), consolePath(v.dir)) })
	v.watchers.Go(func() {
		<-v.proc.Done()
		select { // its last words may explain its end
		case <-read:
		case <-time.After(drainWait):
			events.SetReadDeadline(time.Unix(1, 0))
		}
		v.exit = v.describe()
		close(v.done)
	})
}

// readEvents acts upon events until the stream ends with the VMM, or is unusable.
func (v *vm) readEvents(r io.Reader, resync bool) {
	d := chclient.NewEventDecoder(r, resync)
	for {
		e, err := d.Next()
		if err != nil {
			v.streamEnded(err)
			return
		}
		switch e.Name() {
		case "vm/rebooting", "vm/rebooted":
			// There is no option to exit instead: left alone, an empty guest would boot in its place.
			v.end("guest rebooted")
		case "guest/panic":
			v.end("guest kernel panicked")
		case "vm/device-removed":
			v.mu.Lock()
			close(v.changed)
			v.changed = make(chan struct{})
			v.mu.Unlock()
		case "vm/shutdown", "vm/deleted", "vmm/shutdown":
			v.guestGone()
		}
	}
}

// guestGone sees to it that a VMM without a guest exits.
func (v *vm) guestGone() {
	v.mu.Lock()
	first := !v.power
	v.power = true
	v.mu.Unlock()
	if !first {
		return
	}
	v.watchers.Go(func() {
		select {
		case <-v.proc.Done():
		case <-time.After(powerOffWait):
			v.end("guest powered off, and the VMM did not exit")
		}
	})
}

func (v *vm) streamEnded(err error) {
	if !errors.Is(err, io.EOF) && !errors.Is(err, os.ErrDeadlineExceeded) {
		v.end("VMM's event stream is unusable: " + err.Error())
		return
	}
	select {
	case <-v.proc.Done():
	case <-time.After(drainWait):
		v.end("VMM closed its event stream")
	}
}

// describe tells how the VMM ended.
func (v *vm) describe() vmruntime.Exit {
	e := vmruntime.Exit{At: time.Now()}
	e.Code, e.Signal = v.proc.ExitStatus()
	v.mu.Lock()
	defer v.mu.Unlock()
	if e.Reason = v.reason; e.Reason == "" {
		e.Reason = exitReason(e, v.power, vmruntime.TailFile(logPath(v.dir)))
	}
	return e
}

// exitReason explains an end that the driver did not bring about. Exit status 0 is no proof of health: the VMM
// also ends so when a thread of its own has failed, and then only its log tells.
func exitReason(e vmruntime.Exit, guestGone bool, log string) string {
	fault := lastFault(log, e.Code > 0)
	reason := ""
	switch {
	case e.Signal == int(syscall.SIGSYS):
		reason = "VMM was killed by its seccomp filter"
	case e.Signal != 0:
		reason = fmt.Sprintf("VMM was killed by signal %d (%s)", e.Signal, unix.SignalName(syscall.Signal(e.Signal)))
	case e.Code > 0:
		reason = fmt.Sprintf("VMM exited with status %d", e.Code)
	case fault != "":
		reason = "VMM failed"
	case guestGone:
		reason = "guest powered off"
	case e.Code == 0:
		reason = "VMM exited"
	default: // adopted, and its events tell nothing
		reason = "VMM is gone"
	}
	if fault != "" {
		reason += ": " + fault
	}
	return reason
}

// lastFault finds the last line of the log with an error that can end a VMM: a panic, or an error of any thread but
// those that serve requests, which log refusals as errors, too. With all, also one of these.
func lastFault(log string, all bool) string {
	lines := strings.Split(log, "\n")
	for i := len(lines) - 1; i >= 0; i-- {
		line := lines[i]
		if head, text, ok := strings.Cut(line, " ERROR:"); ok {
			if !all && (strings.HasSuffix(head, "<vmm>") || strings.HasSuffix(head, "<http-server>")) {
				continue
			}
			if _, message, ok := strings.Cut(text, " -- "); ok {
				text = message
			}
			return text
		}
		if strings.HasPrefix(line, "thread '") && strings.Contains(line, "panicked at") || strings.HasPrefix(line, "Error: ") {
			return line
		}
	}
	return ""
}

// console is the guest's serial port on its way into a bounded file.
type console struct {
	conn *net.UnixConn
	file *os.File
}

// openConsole connects to the serial port. A later daemon gets what was written while none was there, up to 1 MiB.
func (v *vm) openConsole(ctx context.Context, keep bool) (*console, error) {
	flags := os.O_WRONLY | os.O_CREATE | os.O_APPEND | unix.O_NOFOLLOW
	if !keep {
		flags |= os.O_TRUNC
	}
	f, err := os.OpenFile(consolePath(v.dir), flags, 0o600)
	if err != nil {
		return nil, fmt.Errorf("console: %w", err)
	}
	conn, err := v.dialRun(ctx, serialPath(v.dir))
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("console: %w", err)
	}
	return &console{conn: conn, file: f}, nil
}

// A guest that writes without end keeps neither the disk nor the daemon busy: the VMM drops what is too much.
const (
	consoleChunk = 32 << 10
	consolePause = 20 * time.Millisecond
)

func (c *console) copy(done <-chan struct{}) {
	defer c.file.Close()
	defer c.conn.Close()
	closed := make(chan struct{})
	defer close(closed)
	go func() {
		select {
		case <-done:
			c.conn.SetReadDeadline(time.Now().Add(drainWait)) // the rest of it
		case <-closed:
		}
	}()
	buf := make([]byte, consoleChunk)
	for got := 0; ; {
		n, err := c.conn.Read(buf)
		if n > 0 {
			if _, err := c.file.Write(buf[:n]); err != nil {
				return // the disk is full; the console is not worth the VM
			}
		}
		if err != nil {
			return
		}
		if got += n; got >= consoleChunk {
			got = 0
			time.Sleep(consolePause)
		}
	}
}
