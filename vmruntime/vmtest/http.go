package vmtest

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"
)

// Limits of the real server.
const (
	maxConnections = 10
	maxLine        = 1024
	maxBody        = 51200
	maxRights      = 253
)

// request is one that has been read whole.
type request struct {
	method, path string
	hasBody      bool
	body         []byte
	files        []int
}

// response has a body of JSON, or none.
type response struct {
	status int
	body   []byte
	after  func() // once it has been sent
}

func refuse(status int, messages ...string) response {
	b, _ := json.Marshal(messages) // strings always can
	return response{status: status, body: b}
}

// server is the API's HTTP server: one request at a time over all connections.
type server struct {
	handle func(request) response
	turn   sync.Mutex

	mu    sync.Mutex
	conns int
}

func (s *server) serve(l *net.UnixListener) {
	for {
		conn, err := l.AcceptUnix()
		if err != nil {
			return
		}
		s.mu.Lock()
		full := s.conns == maxConnections
		if !full {
			s.conns++
		}
		s.mu.Unlock()
		if full {
			io.WriteString(conn, "HTTP/1.1 503\r\nServer: Firecracker API\r\nConnection: close\r\nContent-Length: 40\r\n\r\n{ \"error\": \"Too many open connections\" }")
			conn.Close()
			continue
		}
		go func() {
			defer func() {
				conn.Close()
				s.mu.Lock()
				s.conns--
				s.mu.Unlock()
			}()
			s.converse(conn)
		}()
	}
}

func (s *server) converse(conn *net.UnixConn) {
	r := &rightsReader{conn: conn}
	for {
		q, err := r.request()
		if err != nil {
			if err != io.EOF {
				// As the real parser does: no JSON, with a newline amid a string.
				body := fmt.Sprintf("{ \"error\": \"%v\nAll previous unanswered requests will be dropped.\" }", err)
				fmt.Fprintf(conn, "HTTP/1.1 400 \r\nServer: Firecracker API\r\nConnection: keep-alive\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
			}
			return
		}
		if !s.answer(conn, q) {
			return
		}
	}
}

// answer handles a request; false when the connection is of no more use.
func (s *server) answer(conn *net.UnixConn, q request) bool {
	s.turn.Lock()
	defer s.turn.Unlock()
	action := strings.TrimPrefix(q.path, "/api/v1/")
	f := loadFaults()
	requests++
	if f.CrashAfter > 0 && requests >= f.CrashAfter {
		syscall.Kill(syscall.Getpid(), syscall.SIGKILL)
		select {}
	}
	if f.Hang == action {
		select {} // with the turn taken: nothing else is served either
	}
	if f.Garbage == action || f.Garbage == "*" {
		io.WriteString(conn, "\x00\xff garbage\r\n\r\n")
		return false
	}
	resp := refuse(500, "Error from API", "fault injected")
	if f.Fail != action {
		resp = s.handle(q)
	}
	for _, fd := range q.files {
		unix.Close(fd)
	}
	if f.Drop == action || halfClosed(conn) {
		return false
	}
	var b bytes.Buffer
	fmt.Fprintf(&b, "HTTP/1.1 %d \r\nServer: Cloud Hypervisor API\r\nConnection: keep-alive\r\n", resp.status)
	if resp.status != 204 {
		fmt.Fprintf(&b, "Content-Type: application/json\r\nContent-Length: %d\r\n", len(resp.body))
	}
	b.WriteString("\r\n")
	b.Write(resp.body)
	_, err := conn.Write(b.Bytes())
	if resp.after != nil {
		resp.after()
	}
	return err == nil
}

// requests counts API requests; under the server's turn.
var requests int

// halfClosed tells whether the client has shut its sending side: the real server drops such a connection.
func halfClosed(conn *net.UnixConn) bool {
	raw, err := conn.SyscallConn()
	if err != nil {
		return true
	}
	closed := false
	raw.Control(func(fd uintptr) {
		n, _, err := unix.Recvfrom(int(fd), make([]byte, 1), unix.MSG_PEEK|unix.MSG_DONTWAIT)
		closed = err == nil && n == 0
	})
	return closed
}

// rightsReader reads requests and the file descriptors that come with any part of them.
type rightsReader struct {
	conn  *net.UnixConn
	buf   []byte
	files []int
}

// fill reads more, at most 1024 bytes as the real server does.
func (r *rightsReader) fill() error {
	b, oob := make([]byte, 1024), make([]byte, unix.CmsgSpace(4*maxRights))
	n, oobn, _, _, err := r.conn.ReadMsgUnix(b, oob)
	if oobn > 0 {
		msgs, parseErr := unix.ParseSocketControlMessage(oob[:oobn])
		if parseErr != nil {
			return parseErr
		}
		for _, m := range msgs {
			if fds, err := unix.ParseUnixRights(&m); err == nil {
				r.files = append(r.files, fds...)
			}
		}
	}
	if n == 0 || err != nil {
		return io.EOF
	}
	r.buf = append(r.buf, b[:n]...)
	return nil
}

func (r *rightsReader) line() (string, error) {
	for {
		if i := bytes.Index(r.buf, []byte("\r\n")); i >= 0 {
			line := string(r.buf[:i])
			r.buf = r.buf[i+2:]
			return line, nil
		}
		if len(r.buf) >= maxLine {
			return "", worded("Invalid HTTP Request")
		}
		if err := r.fill(); err != nil {
			return "", err
		}
	}
}

func (r *rightsReader) request() (request, error) {
	first, err := r.line()
	if err != nil {
		return request{}, err
	}
	parts := strings.Split(first, " ")
	if len(parts) != 3 || parts[2] != "HTTP/1.1" && parts[2] != "HTTP/1.0" {
		return request{}, worded("Invalid HTTP Request")
	}
	q := request{method: parts[0], path: parts[1]}
	switch q.method {
	case "GET", "PUT", "PATCH":
	default:
		return request{}, worded("Invalid HTTP Method: Unsupported HTTP method.")
	}
	length := 0
	for {
		line, err := r.line()
		if err != nil {
			return request{}, err
		}
		if line == "" {
			break
		}
		key, val, ok := strings.Cut(line, ":")
		if !ok {
			return request{}, worded("Invalid header")
		}
		val = strings.TrimSpace(val)
		switch strings.ToLower(key) {
		case "content-length":
			if length, err = strconv.Atoi(val); err != nil || length < 0 {
				return request{}, worded("Invalid content length")
			}
		case "transfer-encoding":
			return request{}, worded("Transfer encoding is not supported")
		}
	}
	if length > maxBody {
		return request{}, worded("Request payload with size %d is larger than the limit of %d allowed by server.", length, maxBody)
	}
	for len(r.buf) < length {
		if err := r.fill(); err != nil {
			return request{}, err
		}
	}
	q.hasBody = length > 0
	q.body = append([]byte(nil), r.buf[:length]...)
	r.buf = r.buf[length:]
	q.files, r.files = r.files, nil
	return q, nil
}
