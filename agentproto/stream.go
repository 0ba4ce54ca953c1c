package agentproto

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

// A stream opens with one message from the host, a StreamHeader, and one answer from the agent, a
// StreamReply. Each is
//
//	"CVM" | version, 1 byte | length, 4 bytes big-endian | protobuf, at most maxPreamble bytes
//
// This outer form is the same in every version, so that two ends of different versions can still tell
// each other so. What follows the reply depends on the kind of the header: ttrpc for Control, frames
// (frame.go) for all others.
const (
	preambleMagic  = "CVM"
	preamblePrefix = len(preambleMagic) + 1 + 4
	maxPreamble    = 64 << 10

	// maxMessage bounds the error texts that one end takes from the other, in bytes.
	maxMessage = 4 << 10

	// openTimeout bounds dial-to-reply on the host when the caller's context does not. A guest under
	// software emulation on a loaded machine answers within seconds.
	openTimeout = 60 * time.Second
	// headerTimeout is how long the agent waits for the header of a stream that was opened.
	headerTimeout = 30 * time.Second
	// writeTimeout is how long a write of control messages or acknowledgements may be stuck before the
	// stream is given up. It bounds what a guest that stopped reading can hold on the host.
	writeTimeout = 30 * time.Second
)

// ReadHeader reads what the host wants from a stream that was just accepted. It takes at most half a
// minute and 64 KiB, and reads nothing beyond the header. FailedPrecondition when the host speaks another
// Version, InvalidArgument for anything that is not a header: the caller answers both with WriteReply.
func ReadHeader(conn net.Conn) (*StreamHeader, error) {
	if err := conn.SetReadDeadline(time.Now().Add(headerTimeout)); err != nil {
		return nil, fmt.Errorf("stream header: %w", err)
	}
	var h StreamHeader
	if err := readPreamble(conn, &h); err != nil {
		return nil, fmt.Errorf("stream header: %w", err)
	}
	if h.Kind == nil {
		return nil, fmt.Errorf("stream header: unknown kind of stream: %w", errdefs.ErrInvalidArgument)
	}
	if err := conn.SetReadDeadline(time.Time{}); err != nil {
		return nil, fmt.Errorf("stream header: %w", err)
	}
	return &h, nil
}

// WriteReply answers a header: with success when err is nil, else with the class and text of err.
func WriteReply(conn net.Conn, err error) error {
	var r StreamReply
	if err != nil {
		st := status.Convert(errgrpc.ToGRPC(err))
		r.Code, r.Message = int32(st.Code()), boundText(st.Message())
		if st.Code() == codes.OK { // an error that claims to be none
			r.Code = int32(codes.Unknown)
		}
	}
	if err := conn.SetWriteDeadline(time.Now().Add(writeTimeout)); err != nil {
		return fmt.Errorf("stream reply: %w", err)
	}
	if err := writePreamble(conn, &r); err != nil {
		return fmt.Errorf("stream reply: %w", err)
	}
	if err := conn.SetWriteDeadline(time.Time{}); err != nil {
		return fmt.Errorf("stream reply: %w", err)
	}
	return nil
}

// openStream dials the agent and asks for a stream of the given kind. The connection that it returns has
// no deadline; it lives on when ctx ends.
func openStream(ctx context.Context, d Dialer, h *StreamHeader) (_ net.Conn, retErr error) {
	ctx, cancel := context.WithTimeout(ctx, openTimeout)
	defer cancel()
	conn, err := d.Dial(ctx)
	if err != nil {
		return nil, fmt.Errorf("dial agent: %w", err)
	}
	defer func() {
		if retErr != nil {
			conn.Close()
		}
	}()
	interrupted := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		conn.SetDeadline(time.Unix(1, 0))
		close(interrupted)
	})
	var r StreamReply
	err = ask(conn, h, &r)
	if !stop() {
		<-interrupted
		return nil, fmt.Errorf("open stream to agent: %w", ctx.Err())
	}
	if err != nil {
		return nil, fmt.Errorf("open stream to agent: %w", err)
	}
	if err := nativeError(codes.Code(r.Code), r.Message); err != nil {
		return nil, err
	}
	return conn, nil
}

// ask sends a header and reads the reply.
func ask(conn net.Conn, h *StreamHeader, r *StreamReply) error {
	if err := writePreamble(conn, h); err != nil {
		return err
	}
	return readPreamble(conn, r)
}

// nativeError makes an errdefs error of a status that the other end sent. Nothing but the code and a
// bounded text is taken over: status details are trees of the sender's choice.
func nativeError(code codes.Code, text string) error {
	return errgrpc.ToNative(status.Error(code, boundText(text)))
}

// boundText cuts a text to maxMessage bytes, on a character's border.
func boundText(s string) string {
	if len(s) > maxMessage {
		s = s[:maxMessage]
	}
	return strings.ToValidUTF8(s, "")
}

func writePreamble(w io.Writer, m proto.Message) error {
	b := make([]byte, preamblePrefix, 256)
	copy(b, preambleMagic)
	b[len(preambleMagic)] = Version
	b, err := proto.MarshalOptions{}.MarshalAppend(b, m)
	if err != nil {
		return fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	n := len(b) - preamblePrefix
	if n > maxPreamble {
		return fmt.Errorf("message of %d bytes exceeds %d: %w", n, maxPreamble, errdefs.ErrInvalidArgument)
	}
	binary.BigEndian.PutUint32(b[preamblePrefix-4:], uint32(n))
	if _, err := w.Write(b); err != nil {
		return unavailable(err)
	}
	return nil
}

func readPreamble(r io.Reader, m proto.Message) error {
	var p [preamblePrefix]byte
	if _, err := io.ReadFull(r, p[:]); err != nil {
		return unavailable(err)
	}
	if string(p[:len(preambleMagic)]) != preambleMagic {
		return fmt.Errorf("not a crivm stream: starts with %q: %w", p[:], errdefs.ErrInvalidArgument)
	}
	if v := p[len(preambleMagic)]; v != Version {
		return versionMismatch(uint32(v))
	}
	n := binary.BigEndian.Uint32(p[preamblePrefix-4:])
	if n > maxPreamble {
		return fmt.Errorf("message of %d bytes exceeds %d: %w", n, maxPreamble, errdefs.ErrInvalidArgument)
	}
	b := make([]byte, n)
	if _, err := io.ReadFull(r, b); err != nil {
		return unavailable(err)
	}
	if err := proto.Unmarshal(b, m); err != nil {
		return fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	return nil
}

func versionMismatch(peer uint32) error {
	return fmt.Errorf("peer speaks version %d of the agent protocol, this end version %d: %w",
		peer, Version, errdefs.ErrFailedPrecondition)
}

// unavailable gives an error of the connection the class ErrUnavailable, and keeps it in the chain.
func unavailable(err error) error {
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return fmt.Errorf("%w: %w", err, errdefs.ErrUnavailable)
}
