package guest

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/mdlayher/vsock"
	"golang.org/x/sys/unix"

	"github.com/crivm/crivm/agentproto"
)

// transportKind is the way to the host that the kernel command line names.
func transportKind() (string, error) {
	cmdline, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return "", fmt.Errorf("transport: %w", err)
	}
	return parameter(string(cmdline), agentproto.TransportParameter), nil
}

// bootModules leaves out what only another transport needs. The kernel asks for it when a container does.
func bootModules(names []string, kind string) []string {
	if kind != agentproto.TransportSerial {
		return names
	}
	return slices.DeleteFunc(slices.Clone(names), func(name string) bool { return strings.Contains(name, "vsock") })
}

// openTransport opens the way to the host.
func openTransport(ctx context.Context, kind string) (net.Listener, error) {
	switch kind {
	case agentproto.TransportVsock:
		return listenVsock()
	case agentproto.TransportSerial:
		return openSerial(ctx)
	default:
		return nil, fmt.Errorf("kernel parameter %s=%q is neither %s nor %s: %w", agentproto.TransportParameter, kind,
			agentproto.TransportVsock, agentproto.TransportSerial, errdefs.ErrInvalidArgument)
	}
}

// parameter finds the last value of a kernel parameter.
func parameter(cmdline, name string) string {
	value := ""
	for field := range strings.FieldsSeq(cmdline) {
		if v, ok := strings.CutPrefix(field, name+"="); ok {
			value = v
		}
	}
	return value
}

// hostListener accepts connections of the host only; containers can reach vsock ports too.
type hostListener struct{ *vsock.Listener }

func (l hostListener) Accept() (net.Conn, error) {
	for {
		conn, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if addr, ok := conn.RemoteAddr().(*vsock.Addr); ok && addr.ContextID == vsock.Host {
			return conn, nil
		}
		conn.Close()
	}
}

// listenVsock listens and tells the host so, if it wants to know.
func listenVsock() (net.Listener, error) {
	l, err := vsock.Listen(agentproto.VsockPort, nil)
	if err != nil {
		return nil, fmt.Errorf("vsock: %w", err)
	}
	go func() {
		conn, err := vsock.Dial(vsock.Host, agentproto.ReadyPort, nil)
		if err != nil {
			slog.Debug("nobody waits for this guest to be ready", "error", err)
			return
		}
		conn.Close()
	}()
	return hostListener{l}, nil
}

// openSerial opens the virtio-serial port of the agent.
func openSerial(ctx context.Context) (net.Listener, error) {
	device := ""
	err := waitDevice(ctx, "", func() bool {
		names, _ := filepath.Glob("/sys/class/virtio-ports/*/name")
		for _, name := range names {
			b, err := os.ReadFile(name)
			if err == nil && strings.TrimSpace(string(b)) == agentproto.SerialPortName {
				device = "/dev/" + filepath.Base(filepath.Dir(name))
				_, err = os.Stat(device)
				return err == nil
			}
		}
		return false
	})
	if err != nil {
		return nil, fmt.Errorf("virtio-serial port %s: %w", agentproto.SerialPortName, err)
	}
	fd, err := unix.Open(device, unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", device, err)
	}
	return agentproto.ServeSerial(os.NewFile(uintptr(fd), device)), nil
}
