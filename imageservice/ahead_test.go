package imageservice

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// TestAheadLayers: layers that are decompressed ahead are what they are when read one by one, also a second time; one that
// is damaged fails where it is read; and stop ends what nobody reads.
func TestAheadLayers(t *testing.T) {
	reg := newRegistry(t, false)
	s := newService(t, func(c *Config) { write(t, c.RegistriesConf, insecure(reg)) })
	var layers []v1.Layer
	var want [][]byte
	for i := range 7 {
		size := i * 10000
		if i == 3 || i == 6 {
			size = 4 << 20 // is not read whole before somebody wants it
		}
		l := tarLayer(t, map[string]string{"file": strings.Repeat(string(rune('a'+i)), size)})
		plain, err := l.Uncompressed()
		if err != nil {
			t.Fatal(err)
		}
		content, err := io.ReadAll(plain)
		if err := errors.Join(err, plain.Close()); err != nil {
			t.Fatal(err)
		}
		layers, want = append(layers, l), append(want, content)
	}
	id := pull(t, s, reg.push(t, "app:1", newImage(t, nil, layers...)))
	r, err := s.record(strings.TrimPrefix(id, "sha256:"))
	if err != nil {
		t.Fatal(err)
	}
	read := func(open func() (io.ReadCloser, error)) ([]byte, error) {
		stream, err := open()
		if err != nil {
			return nil, err
		}
		content, err := io.ReadAll(stream)
		return content, errors.Join(err, stream.Close())
	}
	open, stop := s.aheadLayers(t.Context(), r.layers)
	for i := len(open) - 1; i >= 0; i-- {
		for range 2 {
			if got, err := read(open[i]); err != nil || !bytes.Equal(got, want[i]) {
				t.Errorf("layer %d: %d bytes instead of %d, %v", i, len(got), len(want[i]), err)
			}
		}
	}
	stop()

	if err := os.Truncate(s.blobPath(r.layers[4].blob), 100); err != nil {
		t.Fatal(err)
	}
	open, stop = s.aheadLayers(t.Context(), r.layers)
	for _, i := range []int{6, 5, 4} {
		if _, err := read(open[i]); (err != nil) != (i == 4) || errors.Is(err, io.EOF) {
			t.Errorf("layer %d: %v", i, err)
		}
	}
	stop() // while the layers below wait for a reader
	ctx, cancel := context.WithCancel(t.Context())
	open, stop = s.aheadLayers(ctx, r.layers)
	stream, err := open[6]()
	if err != nil {
		t.Fatal(err)
	}
	cancel()
	if _, err := io.Copy(io.Discard, stream); !errors.Is(err, context.Canceled) {
		t.Errorf("after the end of the context: %v", err)
	}
	if err := stream.Close(); err != nil {
		t.Error(err)
	}
	stop()
}
