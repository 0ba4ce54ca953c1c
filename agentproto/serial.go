package agentproto

import (
	"bytes"
	"crypto/rand"
	"encoding/hex"
	"io"
	"time"

	"github.com/hashicorp/yamux"
)

// QEMU's virtio-serial port is one byte stream per VM. The guest's end stays open for as long as the guest
// lives, while the host's end, a unix socket, is connected anew by every daemon. The port tells neither
// side: bytes that the guest wrote for one connection are delivered to the next, and what one host process
// began to write is continued by what the next writes. So a session has to be found in the stream:
//
//   - The host opens a session with serialMark, serialMagic and a fresh random token. Whatever else it
//     sends is escaped so that the byte serialMark never occurs in it. The guest, which always looks at the
//     raw bytes first, therefore knows at that one byte that the session before is over, wherever that one
//     was cut, and no payload (a container's stdin, a forwarded connection) can spell it.
//   - The guest answers with the same bytes. The host discards everything up to its own token, which
//     nothing older can contain; from there on the guest's bytes are the session's, unescaped.
//
// Inside a session both speak yamux; every stream of it starts with a StreamHeader like a vsock connection.
const (
	serialMark    = 0xf5
	serialEscape  = 0xf6 // followed by 0 for serialMark, by 1 for itself
	serialMagic   = "crivm1"
	serialToken   = 32 // hex digits
	serialOpening = 1 + len(serialMagic) + serialToken

	// serialChunk is how much is read from the port or the socket at once, in bytes.
	serialChunk = 64 << 10
	// serialStreams is how many streams the host keeps open in one session at most. With serialWindow it
	// bounds what a guest can make the host buffer.
	serialStreams = 256
	serialWindow  = 1 << 20
	// serialBacklog is how many streams may wait to be accepted by the agent.
	serialBacklog = 64
	// muxTimeout is how long yamux waits for a frame to be sent, for a stream to be accepted, or for a
	// stream's closing to be answered. Generous: under software emulation a guest can be very slow.
	muxTimeout = 30 * time.Second
)

// newSerialToken returns 32 random hex digits.
func newSerialToken() string {
	var b [serialToken / 2]byte
	rand.Read(b[:]) // never fails
	return hex.EncodeToString(b[:])
}

// serialOpen is how both ends open a session.
func serialOpen(token string) []byte {
	return append(append([]byte{serialMark}, serialMagic...), token...)
}

// appendEscaped appends p to dst in the form in which the host sends it.
func appendEscaped(dst, p []byte) []byte {
	from := 0
	for i, c := range p {
		if c == serialMark || c == serialEscape {
			dst = append(append(dst, p[from:i]...), serialEscape, c-serialMark)
			from = i + 1
		}
	}
	return append(dst, p[from:]...)
}

// serialScanner takes the host's bytes apart in the guest. The zero value waits for the first session.
type serialScanner struct {
	live    bool   // inside a session
	escaped bool   // the byte before was serialEscape
	opening bool   // after serialMark
	got     []byte // what followed serialMark
}

// serialEvent is what a serialScanner found at the end of some data.
type serialEvent int

const (
	serialNothing serialEvent = iota
	serialOver                // the session ended; no data follows before serialNew
	serialNew                 // a session begins
)

// next decodes p, in place, up to the next event, and returns the data before it, the bytes after it, and
// for serialNew the token. Call it again with rest until it is empty.
func (s *serialScanner) next(p []byte) (data []byte, event serialEvent, token string, rest []byte) {
	for s.opening && len(p) > 0 {
		c := p[0]
		p = p[1:]
		if c == serialMark { // the host that sent the mark before died meanwhile
			s.got = s.got[:0]
			continue
		}
		s.got = append(s.got, c)
		switch n := len(s.got); {
		case n <= len(serialMagic):
			s.opening = c == serialMagic[n-1]
		case !(c >= '0' && c <= '9' || c >= 'a' && c <= 'f'):
			s.opening = false
		case n == serialOpening-1:
			s.opening, s.live, s.escaped = false, true, false
			return nil, serialNew, string(s.got[len(serialMagic):]), p
		}
	}
	mark := bytes.IndexByte(p, serialMark)
	data = p
	if mark >= 0 {
		data, rest = p[:mark], p[mark+1:]
	}
	wasLive := s.live
	if s.live {
		data = s.unescape(data)
	} else {
		data = nil
	}
	if mark >= 0 {
		s.opening, s.live, s.got = true, false, s.got[:0]
	}
	if wasLive && !s.live {
		event = serialOver
	}
	return data, event, "", rest
}

// unescape decodes a session's bytes in place. A wrong escape ends the session: nobody honest sends one.
func (s *serialScanner) unescape(p []byte) []byte {
	out := p[:0]
	for len(p) > 0 {
		if s.escaped {
			if p[0] > 1 {
				s.live = false
				return out
			}
			s.escaped = false
			out = append(out, serialMark+p[0])
			p = p[1:]
			continue
		}
		n := bytes.IndexByte(p, serialEscape)
		if n < 0 {
			return append(out, p...)
		}
		out = append(out, p[:n]...)
		s.escaped = true
		p = p[n+1:]
	}
	return out
}

// muxConfig is the same on both ends. There is no keepalive: the driver knows when the VM is dead, and a
// guest that merely is slow or paused must not lose its streams.
func muxConfig() *yamux.Config {
	return &yamux.Config{
		AcceptBacklog:          serialBacklog,
		KeepAliveInterval:      time.Hour, // unused, but it has to be set
		ConnectionWriteTimeout: muxTimeout,
		StreamOpenTimeout:      muxTimeout,
		StreamCloseTimeout:     muxTimeout,
		MaxStreamWindowSize:    serialWindow,
		LogOutput:              io.Discard, // it would let the other end write to our log
	}
}

// A yamux frame starts with a header: version 0, type, flags (2 bytes), stream (4), length (4), all
// big-endian. Only data frames have a body.
const (
	muxHeader = 12
	muxData   = 0
	muxWindow = 1
	muxSYN    = 1 << 0 // flag: opens a stream
)

// joinWriter puts a data frame's header, which yamux writes by itself, before the body that it writes next,
// so that a frame is one write to the port or the socket.
type joinWriter struct {
	buf []byte // a header that waits for its body
}

// join returns what is to be written for p, nil when p has to wait. The result is valid until the next call.
func (j *joinWriter) join(p []byte) []byte {
	if len(j.buf) == 0 && len(p) == muxHeader && p[1] == muxData && !bytes.Equal(p[8:], []byte{0, 0, 0, 0}) {
		j.buf = append(j.buf, p...)
		return nil
	}
	if len(j.buf) == 0 {
		return p
	}
	out := append(j.buf, p...)
	j.buf = out[:0]
	return out
}
