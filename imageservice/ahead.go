package imageservice

import (
	"context"
	"io"
	"runtime"
	"sync"

	"github.com/crivm/crivm/imageservice/rootdisk"
)

const (
	// aheadChunk and aheadChunks bound what is kept of a layer that is decompressed ahead.
	aheadChunk  = 1 << 20
	aheadChunks = 8
	// maxAhead bounds how many layers are decompressed at a time.
	maxAhead = 4
)

// aheadLayers gives the layers of an image to rootdisk.Build, which reads them one after the other, uppermost first: while
// it reads one, those below are decompressed and checked already, on the other CPUs, as far as there is room for them.
// stop, called after Build, ends what it has not read.
func (s *Service) aheadLayers(ctx context.Context, layers []layer) (_ []rootdisk.Layer, stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	var running sync.WaitGroup
	begun := make([]*aheadReader, len(layers)) // nil again when they were given away
	next := len(layers) - 1                    // to begin
	begin := func(down int) {
		for ; next >= max(down, 0); next-- {
			if layers[next].blob != "" {
				begun[next] = s.readAhead(ctx, &running, layers[next])
			}
		}
	}
	depth := min(max(runtime.GOMAXPROCS(0)-1, 1), maxAhead)
	var open []rootdisk.Layer
	for i, l := range layers {
		open = append(open, func() (io.ReadCloser, error) {
			if l.blob == "" {
				return s.openLayer(l.id)
			}
			begin(i - depth)
			if r := begun[i]; r != nil {
				begun[i] = nil
				return r, nil
			}
			return s.openBlob(ctx, l) // a second time
		})
	}
	return open, func() {
		cancel()
		running.Wait()
	}
}

// aheadReader is a layer that is read by a goroutine of its own.
type aheadReader struct {
	cancel context.CancelFunc
	chunks chan []byte // closed after err is set
	rest   []byte      // of the chunk that is being read
	err    error       // at the end: io.EOF, or what went wrong
}

func (s *Service) readAhead(ctx context.Context, running *sync.WaitGroup, l layer) *aheadReader {
	ctx, cancel := context.WithCancel(ctx)
	r := &aheadReader{cancel: cancel, chunks: make(chan []byte, aheadChunks)}
	running.Go(func() {
		defer cancel()
		defer close(r.chunks)
		r.err = s.sendLayer(ctx, l, r.chunks)
	})
	return r
}

// sendLayer reads a layer to its end and returns how it ended, io.EOF when it is whole.
func (s *Service) sendLayer(ctx context.Context, l layer, chunks chan<- []byte) error {
	stream, err := s.openBlob(ctx, l)
	if err != nil {
		return err
	}
	defer stream.Close()
	size := int(min(max(4*l.bytes, 4<<10), aheadChunk))
	for {
		chunk := make([]byte, size)
		n := 0
		for n < len(chunk) && err == nil {
			var got int
			got, err = stream.Read(chunk[n:])
			n += got
		}
		if n > 0 {
			select {
			case chunks <- chunk[:n]:
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		if err != nil {
			return err
		}
	}
}

func (r *aheadReader) Read(p []byte) (int, error) {
	for len(r.rest) == 0 {
		var more bool
		if r.rest, more = <-r.chunks; !more {
			return 0, r.err
		}
	}
	n := copy(p, r.rest)
	r.rest = r.rest[n:]
	return n, nil
}

// Close ends the reading; stop of aheadLayers waits for it.
func (r *aheadReader) Close() error {
	r.cancel()
	return nil
}
