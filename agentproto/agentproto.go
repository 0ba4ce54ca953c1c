// Package agentproto is the wire between crivm on the host and crivm-agent in the guest: the control
// calls (agent.proto, carried by ttrpc), the header that opens every stream, the frames of stdio and
// port streams, and the multiplexer for the one byte stream that QEMU's virtio-serial offers.
//
// It owns no process, no file of a container and no policy: both ends import it, it imports neither.
// Everything the host reads here was written by a guest and is bounded: header and reply 64 KiB,
// control messages 4 MiB, frames 1 MiB.
package agentproto

//go:generate sh -c "cd .. && protoc --plugin=$(go tool -n protoc-gen-go) --plugin=$(go tool -n protoc-gen-go-ttrpc) --go_out=. --go_opt=paths=source_relative --go-ttrpc_out=. --go-ttrpc_opt=paths=source_relative agentproto/agent.proto"

import (
	"context"
	"net"
)

// Version of the wire. Both ends must have the same one; Hello refuses otherwise.
const Version = 1

const (
	// VsockPort is where the agent listens for streams on vsock.
	VsockPort = 1024
	// ReadyPort is the host's vsock port that the agent connects to once, when it serves: the event
	// that ends the boot (Cloud Hypervisor: the host listens on "<vsock socket>_1025").
	ReadyPort = 1025
	// SerialPortName is the virtio-serial port of the agent, /dev/virtio-ports/<name> in the guest.
	SerialPortName = "crivm.agent"
	// TransportParameter is the kernel command line parameter by which a VMM driver tells the agent
	// how it is reached: TransportVsock or TransportSerial.
	TransportParameter = "crivm.transport"
	TransportVsock     = "vsock"
	TransportSerial    = "serial"
)

// Dialer opens a new stream to one agent. The stream is a plain byte stream; the header is written by the
// callers in this package.
type Dialer interface {
	Dial(ctx context.Context) (net.Conn, error)
}

// ManifestPath is where the guest image keeps its Manifest (JSON).
const ManifestPath = "/etc/crivm/guest.json"

// Manifest tells the agent what the guest image holds; written by the guest image builder.
type Manifest struct {
	Version int    `json:"version"` // 1
	Kernel  string `json:"kernel"`  // uname -r of the kernel the modules were built for
	// Modules by name, with "_" for "-"; built-in ones are absent.
	Modules map[string]Module `json:"modules"`
	// Boot lists the modules that are loaded before the transport is opened, in order.
	Boot []string `json:"boot"`
	// OCIRuntime is the path of crun or runc in the image.
	OCIRuntime string `json:"ociRuntime"`
}

// Module is one kernel module of the guest image.
type Module struct {
	Path string   `json:"path"`
	Deps []string `json:"deps,omitempty"` // names, to be loaded before
}
