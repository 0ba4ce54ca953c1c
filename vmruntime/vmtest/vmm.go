package vmtest

import (
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// fatal is a failed start of the VMM, or a broken test.
func fatal(message string) {
	fmt.Fprintln(os.Stderr, "Error: "+message)
	exitNow(1)
}

// options is the command line, as far as an API-only start has one.
type options struct {
	api, events string // "path=..." or "fd=..."
	version     bool
}

func parseOptions(args []string) (options, error) {
	var o options
	for len(args) > 0 {
		flag := args[0]
		args = args[1:]
		switch flag {
		case "-v", "-vv", "-vvv":
			continue
		case "--version", "-V":
			o.version = true
			continue
		case "--api-socket", "--event-monitor", "--seccomp", "--log-file":
		default:
			return o, fmt.Errorf("unexpected argument '%s' found", flag)
		}
		if len(args) == 0 {
			return o, fmt.Errorf("a value is required for '%s'", flag)
		}
		val := args[0]
		args = args[1:]
		switch flag {
		case "--api-socket":
			if !strings.Contains(val, "=") {
				val = "path=" + val
			}
			o.api = val
		case "--event-monitor":
			o.events = val
		case "--seccomp":
			if val != "true" && val != "false" && val != "log" && val != "errno" {
				return o, fmt.Errorf("invalid value '%s' for '--seccomp'", val)
			}
		}
	}
	return o, nil
}

// vmmMain is the VMM process; it returns the exit status.
func vmmMain(args []string) int {
	f := loadFaults()
	if f.Version == "" {
		f.Version = "v53.0"
	}
	o, err := parseOptions(args)
	if err != nil {
		fmt.Fprintln(os.Stderr, "error: "+err.Error())
		return 2
	}
	if o.version {
		fmt.Printf("%s %s\nMigration Protocol Versions: 0\n", vmmName, f.Version)
		return 0
	}
	if f.ExitAtStart != 0 {
		fmt.Fprintln(os.Stderr, "Error: fault injected at start")
		return f.ExitAtStart
	}
	if o.api == "" {
		fmt.Fprintln(os.Stderr, "error: nothing to do")
		return 2
	}
	unix.Umask(0o077)
	m := &machine{events: openMonitor(o.events), version: f.Version, devices: map[string]*device{}, taps: map[string][]int{}}
	m.events.send("vmm", "starting", nil)
	l, apiPath := listenAPI(o.api)
	m.apiPath = apiPath
	signals := make(chan os.Signal, 16)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT, SignalReboot, SignalPanic, SignalVCPUError, SignalFlood)
	go m.obey(signals)
	s := &server{handle: m.handle}
	s.serve(l)
	return 0
}

// listenAPI takes the inherited socket, or makes one as the real one does: with a lock beside it, and in place
// of a stale one.
func listenAPI(option string) (*net.UnixListener, string) {
	if n, ok := strings.CutPrefix(option, "fd="); ok {
		fd, err := strconv.Atoi(n)
		if err != nil {
			fatal("api socket: " + err.Error())
		}
		f := os.NewFile(uintptr(fd), "api")
		l, err := net.FileListener(f)
		if err != nil {
			fatal("api socket: " + err.Error())
		}
		f.Close()
		return l.(*net.UnixListener), ""
	}
	path, ok := strings.CutPrefix(option, "path=")
	if !ok {
		fatal("api socket: " + option)
	}
	lock, err := unix.Open(path+".lock", unix.O_WRONLY|unix.O_CREAT|unix.O_CLOEXEC, 0o600)
	if err != nil {
		fatal("Error creating API server's socket: " + err.Error())
	}
	if err := unix.FcntlFlock(uintptr(lock), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_WRLCK}); err != nil {
		fatal("API socket is in use: " + path)
	}
	os.Remove(path)
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		fatal("Error creating API server's socket: " + err.Error())
	}
	return l, path
}

// monitor is the event monitor: never blocks, drops what does not fit.
type monitor struct {
	fd    int
	start time.Time
}

func openMonitor(option string) *monitor {
	mon := &monitor{fd: -1, start: time.Now()}
	if path, ok := strings.CutPrefix(option, "path="); ok {
		fd, err := unix.Open(path, unix.O_WRONLY|unix.O_CREAT|unix.O_TRUNC|unix.O_CLOEXEC, 0o600)
		if err != nil {
			fatal("Error opening event monitor: " + err.Error())
		}
		mon.fd = fd
	} else if n, ok := strings.CutPrefix(option, "fd="); ok {
		fd, err := strconv.Atoi(n)
		if err != nil {
			fatal("event monitor: " + err.Error())
		}
		mon.fd = fd
	}
	if mon.fd >= 0 {
		unix.SetNonblock(mon.fd, true)
	}
	return mon
}

func (mon *monitor) send(source, event string, properties map[string]string) {
	if mon.fd < 0 {
		return
	}
	t := time.Since(mon.start)
	e := struct {
		Timestamp struct {
			Secs  int64 `json:"secs"`
			Nanos int64 `json:"nanos"`
		} `json:"timestamp"`
		Source     string            `json:"source"`
		Event      string            `json:"event"`
		Properties map[string]string `json:"properties"`
	}{Source: source, Event: event, Properties: properties}
	e.Timestamp.Secs, e.Timestamp.Nanos = int64(t/time.Second), int64(t%time.Second)
	b, _ := json.MarshalIndent(e, "", "  ") // plain values always can
	unix.Write(mon.fd, b)
	unix.Write(mon.fd, []byte("\n\n"))
}

// raw writes what is no event.
func (mon *monitor) raw(s string) { unix.Write(mon.fd, []byte(s)) }

// obey ends the VMM on SIGTERM, and lets tests play the guest.
func (m *machine) obey(signals <-chan os.Signal) {
	for s := range signals {
		switch s {
		case SignalReboot:
			m.reboot()
		case SignalPanic:
			m.events.send("guest", "panic", map[string]string{"event": "panic"})
		case SignalVCPUError:
			fmt.Fprintln(os.Stderr, "cloud-hypervisor:   1.000000s: <vcpu0> ERROR:vmm/src/cpu.rs:1 -- VCPU generated error: injected")
			m.exit()
		case SignalFlood:
			for range loadFaults().EventFlood {
				m.events.send("virtio-device", "reset", map[string]string{"id": "disk-scratch"})
			}
		default:
			m.exit()
		}
	}
}
