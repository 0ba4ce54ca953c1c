package agentproto

import (
	"bytes"
	"errors"
	"io"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"
)

// FuzzPreamble: whatever a peer sends is a message or an error of a class, within bounds.
func FuzzPreamble(f *testing.F) {
	var good bytes.Buffer
	if err := writePreamble(&good, &StreamHeader{Kind: &StreamHeader_Dial{Dial: &DialPort{Port: 80}}}); err != nil {
		f.Fatal(err)
	}
	f.Add(good.Bytes())
	f.Add([]byte("CVM\x01\x00\x00\x00\x00"))
	f.Add([]byte("CVM\x02\xff\xff\xff\xff"))
	f.Fuzz(func(t *testing.T, p []byte) {
		r := bytes.NewReader(p)
		var h StreamHeader
		err := readPreamble(r, &h)
		if used := len(p) - r.Len(); used > preamblePrefix+maxPreamble {
			t.Errorf("read %d bytes", used)
		}
		if err != nil {
			if !errdefs.IsInvalidArgument(err) && !errdefs.IsFailedPrecondition(err) && !errdefs.IsUnavailable(err) {
				t.Errorf("class of %v", err)
			}
			return
		}
		var again bytes.Buffer
		if err := writePreamble(&again, &h); err != nil {
			t.Fatal(err)
		}
		var h2 StreamHeader
		if err := readPreamble(&again, &h2); err != nil || !proto.Equal(&h, &h2) {
			t.Errorf("%v became %v: %v", &h, &h2, err)
		}
	})
}

// FuzzFrames: reading ends, yields no more than was sent, and io.EOF only after an END frame.
func FuzzFrames(f *testing.F) {
	f.Add([]byte("\x01\x00\x00\x00\x02ab\x02\x00\x00\x00\x00"), 3)
	f.Add([]byte("\x03\x00\x00\x00\x08\x00\x00\x00\x00\x00\x00\x00\x00"), 1)
	f.Fuzz(func(t *testing.T, p []byte, size int) {
		if size < 1 || size > 1<<20 {
			size = 1
		}
		in := newFrameReader(bytes.NewReader(p))
		buf := make([]byte, size)
		total, steps := 0, 0
		for {
			n, err := in.readData(buf)
			total += n
			if steps++; n == 0 && err == nil || steps > len(p)+1 {
				t.Fatal("no progress")
			}
			if err == nil {
				continue
			}
			if err == io.EOF && !bytes.Contains(p, []byte{frameEnd, 0, 0, 0, 0}) {
				t.Error("EOF without END")
			}
			break
		}
		if total > len(p) {
			t.Errorf("%d bytes out of %d", total, len(p))
		}
		acks := newFrameReader(bytes.NewReader(p))
		for n := 0; ; n++ {
			if _, err := acks.readAck(); err != nil {
				break
			}
			if n > len(p) {
				t.Fatal("acknowledgements without end")
			}
		}
	})
}

// FuzzFrameRoundTrip: what is written as frames is read back, however it is cut.
func FuzzFrameRoundTrip(f *testing.F) {
	f.Add([]byte("hello"), 2, 3)
	f.Fuzz(func(t *testing.T, p []byte, cut, size int) {
		cut, size = min(max(cut, 0), len(p)), min(max(size, 1), 1<<16)
		var wire bytes.Buffer
		writeData(&wire, p[:cut])
		writeData(&wire, p[cut:])
		writeFrame(&wire, frameEnd, nil)
		in := newFrameReader(&wire)
		var got []byte
		buf := make([]byte, size)
		for {
			n, err := in.readData(buf)
			got = append(got, buf[:n]...)
			if err == io.EOF {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		if !bytes.Equal(got, p) {
			t.Errorf("got %q for %q", got, p)
		}
	})
}

// FuzzSerialScanner: a session's bytes arrive whatever was on the port before, wherever the session before was
// cut, and in whatever pieces; of the session that was cut, only its true beginning arrives.
func FuzzSerialScanner(f *testing.F) {
	f.Add([]byte("noise"), []byte("one\xf5\xf6"), 3, []byte("two\xf6"), 7)
	f.Add([]byte("\xf5crivm1"), []byte("\xf5crivm1"+tokenB), 40, []byte("\xf5\xf5"), 1)
	f.Fuzz(func(t *testing.T, noise, one []byte, cut int, two []byte, piece int) {
		wire := bytes.Clone(noise)
		first := appendEscaped(serialOpen(tokenA), one)
		wire = append(wire, first[:min(max(cut, 0), len(first))]...)
		wire = append(wire, serialOpen(tokenB)...)
		wire = appendEscaped(wire, two)
		tokens, data := scanAll(wire, min(max(piece, 1), len(wire)))
		if n := len(tokens); n == 0 || tokens[n-1] != tokenB || !bytes.Equal(data[n-1], two) {
			t.Fatalf("tokens %q, data %q", tokens, data)
		}
		for i, token := range tokens[:len(tokens)-1] {
			if token == tokenA && !bytes.Contains(noise, []byte(tokenA)) && !bytes.HasPrefix(one, data[i]) {
				t.Errorf("session 1 is %q, of %q", data[i], one)
			}
		}
		whole, wholeData := scanAll(wire)
		if strings.Join(whole, " ") != strings.Join(tokens, " ") || !bytes.Equal(bytes.Join(wholeData, nil), bytes.Join(data, nil)) {
			t.Errorf("pieces of %d bytes give %q %q, the whole %q %q", piece, tokens, data, whole, wholeData)
		}
	})
}

// FuzzEscape: no payload contains a mark on the wire.
func FuzzEscape(f *testing.F) {
	f.Add([]byte("\xf5\xf6\x00"))
	f.Fuzz(func(t *testing.T, p []byte) {
		if wire := appendEscaped(nil, p); bytes.IndexByte(wire, serialMark) >= 0 || len(wire) > 2*len(p) {
			t.Errorf("%q is sent as %q", p, wire)
		}
	})
}

// FuzzGuards: the host's two guards decide the same however the bytes are cut.
func FuzzGuards(f *testing.F) {
	f.Add([]byte(muxFrame(muxData, 0, 3, "abc")+muxFrame(2, 1, 0, "")), 5)
	f.Add([]byte("\x00\x00\x00\x02\x00\x00\x00\x01\x02\x00hi\x00\x10\x00\x00\x00\x00\x00\x01\x02\x00"), 1)
	f.Fuzz(func(t *testing.T, p []byte, piece int) {
		piece = min(max(piece, 1), len(p)+1)
		var mux, muxCut muxGuard
		var control, controlCut controlGuard
		for name, check := range map[string][2]func([]byte) error{
			"mux":     {mux.check, muxCut.check},
			"control": {control.check, controlCut.check},
		} {
			whole := check[0](p)
			var cut error
			for rest := p; len(rest) > 0 && cut == nil; rest = rest[min(piece, len(rest)):] {
				cut = check[1](rest[:min(piece, len(rest))])
			}
			if (whole == nil) != (cut == nil) || cut != nil && !errors.Is(cut, errdefs.ErrDataLoss) {
				t.Errorf("%s: %v and %v", name, whole, cut)
			}
		}
	})
}
