package agentproto

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"testing"

	"github.com/containerd/errdefs"
)

// TestOutputResumes breaks an output stream again and again and expects each byte once.
func TestOutputResumes(t *testing.T) {
	output := make([]byte, 1<<20)
	rand.NewChaCha8([32]byte{1}).Read(output)
	const perStream = 300 << 10
	c := connect(t, serveAgent(t, &fakeAgent{version: Version}, func(h *StreamHeader, conn net.Conn) {
		from := h.GetOutput().GetOffset()
		if from > uint64(len(output)) {
			WriteReply(conn, errdefs.ErrOutOfRange)
			return
		}
		WriteReply(conn, nil)
		w := NewOutputWriter(conn)
		rest := output[from:]
		if len(rest) > perStream { // break after a while, in mid-frame
			w.WriteData(rest[:perStream])
			conn.Write([]byte{frameData, 0, 1, 0, 0, rest[perStream]})
			return
		}
		w.WriteData(rest)
		w.WriteEnd()
		acked := uint64(0)
		for acked < uint64(len(output)) {
			a, err := w.ReadAck()
			if err != nil || a < acked {
				t.Errorf("acknowledged %d after %d: %v", a, acked, err)
				return
			}
			acked = a
		}
		if _, err := w.ReadAck(); err != io.ErrUnexpectedEOF {
			t.Errorf("after the last acknowledgement: %v", err)
		}
	}))

	var got []byte
	buf := make([]byte, 40000)
	for streams := 0; ; streams++ {
		r, err := c.Output(testContext(t), &Output{ContainerId: "c1", Offset: uint64(len(got))})
		if err != nil {
			t.Fatal(err)
		}
		for err == nil {
			var n int
			n, err = r.Read(buf)
			got = append(got, buf[:n]...)
			if r.Offset() != uint64(len(got)) {
				t.Fatalf("offset %d after %d bytes", r.Offset(), len(got))
			}
			if err == nil && r.Ack(r.Offset()) != nil {
				break // the agent broke the stream meanwhile
			}
		}
		r.Close()
		if err == io.EOF {
			if want := len(output) / (perStream + 1); streams < want {
				t.Errorf("%d streams broke, want %d or more", streams, want)
			}
			break
		}
		if streams > 10 {
			t.Fatal(err)
		}
	}
	if !bytes.Equal(got, output) {
		t.Errorf("%d bytes, differ", len(got))
	}
	if _, err := c.Output(testContext(t), &Output{Offset: 1 << 40}); !errdefs.IsOutOfRange(err) {
		t.Errorf("offset beyond the end: %v", err)
	}
}

func TestAckBounds(t *testing.T) {
	host, guest := net.Pipe()
	defer guest.Close()
	r := newOutputReader(host, 100)
	defer r.Close()
	if err := r.Ack(101); !errdefs.IsInvalidArgument(err) {
		t.Errorf("acknowledging what was not read: %v", err)
	}
	acked := make(chan uint64)
	go func() {
		a, _ := NewOutputWriter(guest).ReadAck()
		acked <- a
	}()
	if err := r.Ack(100); err != nil {
		t.Error(err)
	}
	if a := <-acked; a != 100 {
		t.Errorf("acknowledged %d", a)
	}
	guest.Close()
	if err := r.Ack(100); !errdefs.IsUnavailable(err) {
		t.Errorf("acknowledging to a broken stream: %v", err)
	}
	if _, err := r.Read(make([]byte, 1)); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("read from a broken stream: %v", err)
	}
}

func TestReadAckRefuses(t *testing.T) {
	for name, sent := range map[string]string{
		"data":      "\x01\x00\x00\x00\x01x",
		"short ack": "\x03\x00\x00\x00\x04\x00\x00\x00\x00",
		"long ack":  "\x03\x00\x00\x00\x09\x00\x00\x00\x00\x00\x00\x00\x00\x00",
		"cut ack":   "\x03\x00\x00\x00\x08\x00\x00",
	} {
		f := newFrameReader(bytes.NewReader([]byte(sent)))
		if _, err := f.readAck(); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

// An acknowledgement waits while more of a frame is to come, and only then.
func TestOutputPartial(t *testing.T) {
	const size = 5000 // more than is read ahead
	c := connect(t, serveAgent(t, &fakeAgent{version: Version}, func(h *StreamHeader, conn net.Conn) {
		WriteReply(conn, nil)
		w := NewOutputWriter(conn)
		w.WriteData(make([]byte, size))
		w.WriteData(make([]byte, 1))
		w.WriteEnd()
		w.ReadAck()
	}))
	r, err := c.Output(testContext(t), &Output{ContainerId: "c1"})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	buf := make([]byte, size)
	for r.Offset() <= size {
		at := r.Offset()
		if err := r.Wait(); err != nil || r.Offset() != at {
			t.Fatalf("waited at %d: %v, now at %d", at, err, r.Offset())
		}
		if _, err := r.Read(buf[:size-1]); err != nil {
			t.Fatal(err)
		}
		if want := r.Offset() < size; r.Partial() != want {
			t.Errorf("at %d of %d bytes: partial is %v", r.Offset(), size, !want)
		}
	}
	for range 2 {
		if err := r.Wait(); !errors.Is(err, io.EOF) {
			t.Errorf("waited at the end: %v", err)
		}
	}
}
