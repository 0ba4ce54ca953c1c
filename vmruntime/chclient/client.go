// Package chclient speaks Cloud Hypervisor's REST API over its unix socket: typed requests and replies, the
// event monitor's stream, and which versions are fit for use. It owns no process and keeps no state of a VM;
// package cloudhypervisor does.
//
// The VMM's HTTP server takes one request at a time, has no timeouts, wants a Content-Length and at most ten
// connections, and a reply may be lost without the action being undone. So a Client sends one request at a time
// too, each on a connection of its own that is closed afterwards, written with a single sendmsg(2) so that file
// descriptors can travel with it. A request that ran into its deadline may still be carried out: ask Info.
//
// The VMM may have been taken over by its guest: all that is read from it is bounded.
package chclient

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strconv"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
)

const (
	// bodyLimit is the largest request body that releases before v54 accept; longBodyLimit is that of later ones.
	bodyLimit     = 51200
	longBodyLimit = 4 << 20
	// errorLimit and replyLimit bound what is read of an error and of a result. The device tree of vm.info is
	// the longest result: some KiB a device, at most 31 devices a segment.
	errorLimit = 64 << 10
	replyLimit = 4 << 20
	// maxFiles is how many file descriptors the VMM receives with one request.
	maxFiles = 253
)

// Deadlines of calls when the caller's context has none that is earlier. All calls wait for what the VMM does
// at the time, so they are long.
const (
	callTimeout = 10 * time.Second
	longTimeout = 60 * time.Second // boot, reboot, pause (drains I/O), snapshot, restore, virtio-fs
)

// Client sends requests to one VMM. It is safe for concurrent use; requests are serialised.
type Client struct {
	socket  string
	turn    chan struct{} // holds one token; whoever has it may send
	version atomic.Pointer[Version]
}

// New returns a client of the VMM that listens on the unix socket. Nothing is sent before the first call.
func New(socket string) *Client {
	c := &Client{socket: socket, turn: make(chan struct{}, 1)}
	c.turn <- struct{}{}
	return c
}

// call is one request: in and out may be nil, files travel as SCM_RIGHTS.
type call struct {
	method  string
	action  string // "vm.boot"
	in      any
	out     any
	files   []*os.File
	timeout time.Duration
}

func (c *Client) put(ctx context.Context, action string, in any) error {
	return c.do(ctx, call{method: http.MethodPut, action: action, in: in, timeout: callTimeout})
}

func (c *Client) putLong(ctx context.Context, action string, in any) error {
	return c.do(ctx, call{method: http.MethodPut, action: action, in: in, timeout: longTimeout})
}

func (c *Client) get(ctx context.Context, action string, out any) error {
	return c.do(ctx, call{method: http.MethodGet, action: action, out: out, timeout: callTimeout})
}

func (c *Client) do(ctx context.Context, q call) error {
	request, err := c.encode(q)
	if err != nil {
		return fmt.Errorf("cloud-hypervisor %s: %w", q.action, err)
	}
	ctx, cancel := context.WithTimeout(ctx, q.timeout)
	defer cancel()
	select {
	case <-c.turn:
		defer func() { c.turn <- struct{}{} }()
	case <-ctx.Done():
		return fmt.Errorf("cloud-hypervisor %s: waiting for an earlier request: %w", q.action, ctx.Err())
	}
	if err := c.exchange(ctx, q, request); err != nil {
		if ctx.Err() != nil { // the connection was closed under the exchange
			err = ctx.Err()
		}
		return fmt.Errorf("cloud-hypervisor %s: %w", q.action, err)
	}
	return nil
}

// encode builds the whole request, since it has to leave in one message.
func (c *Client) encode(q call) ([]byte, error) {
	var body []byte
	if q.in != nil {
		var err error
		if body, err = json.Marshal(q.in); err != nil {
			return nil, fmt.Errorf("encode: %w", err)
		}
		if limit := c.bodyLimit(); len(body) > limit {
			return nil, fmt.Errorf("body of %d bytes is longer than the %d that the VMM takes: %w", len(body), limit, errdefs.ErrResourceExhausted)
		}
	}
	if len(q.files) > maxFiles {
		return nil, fmt.Errorf("%d files with one request, at most %d: %w", len(q.files), maxFiles, errdefs.ErrInvalidArgument)
	}
	b := make([]byte, 0, 256+len(body))
	b = append(b, q.method+" /api/v1/"+q.action+" HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n"...)
	if q.in != nil {
		b = append(b, "Content-Type: application/json\r\n"...)
	}
	b = append(b, "Content-Length: "+strconv.Itoa(len(body))+"\r\n\r\n"...)
	return append(b, body...), nil
}

func (c *Client) bodyLimit() int {
	if v := c.version.Load(); v != nil && v.Major >= 54 {
		return longBodyLimit
	}
	return bodyLimit
}

func (c *Client) exchange(ctx context.Context, q call, request []byte) error {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", c.socket)
	if err != nil {
		return fmt.Errorf("%w: %w", err, errdefs.ErrUnavailable)
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()

	sendErr := send(conn.(*net.UnixConn), request, q.files)
	if sendErr != nil && !errors.Is(sendErr, syscall.EPIPE) {
		return fmt.Errorf("send: %w: %w", sendErr, errdefs.ErrUnavailable)
	}
	// After EPIPE there may still be an answer: one connection too many is refused unheard. Otherwise the
	// connection stays open until the reply is there, since a half-closed one is dropped.
	r := bufio.NewReader(io.LimitReader(conn, replyLimit+8<<10))
	resp, err := http.ReadResponse(r, &http.Request{Method: q.method})
	if err != nil {
		if errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET) {
			return fmt.Errorf("the VMM closed the connection without a reply: %w", errdefs.ErrUnavailable)
		}
		return fmt.Errorf("reply: %w: %w", err, errdefs.ErrUnavailable)
	}
	defer resp.Body.Close()
	return receive(resp, q.out)
}

// send writes the request in one message with the files attached; a short write is completed without them.
func send(conn *net.UnixConn, request []byte, files []*os.File) error {
	var rights []byte
	if len(files) > 0 {
		fds := make([]int, len(files))
		for i, f := range files {
			fds[i] = int(f.Fd())
		}
		rights = syscall.UnixRights(fds...)
	}
	n, _, err := conn.WriteMsgUnix(request, rights, nil)
	if err == nil && n < len(request) {
		_, err = conn.Write(request[n:])
	}
	return err
}

func receive(resp *http.Response, out any) error {
	if resp.StatusCode/100 != 2 {
		body, err := io.ReadAll(io.LimitReader(resp.Body, errorLimit))
		if err != nil && len(body) == 0 {
			return fmt.Errorf("status %d, body: %w", resp.StatusCode, err)
		}
		return &Error{Status: resp.StatusCode, Messages: parseMessages(body)}
	}
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return fmt.Errorf("reply: %w", err)
	}
	if out == nil {
		return nil
	}
	if len(bytes.TrimSpace(body)) == 0 {
		return nil // cold add of a device: 204
	}
	if err := json.Unmarshal(body, out); err != nil {
		return fmt.Errorf("decode reply: %w", err)
	}
	return nil
}
