package server

import (
	"bytes"
	"context"
	"errors"
	"io"
	"path/filepath"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"github.com/crivm/crivm/agentproto"
	"github.com/crivm/crivm/server/store"
)

const (
	streamStdout = 0
	streamStderr = 1

	// maxPending bounds an unfinished line when lines are not cut: the agent's buffer holds what is not
	// acknowledged, and a line as long as that could never end.
	maxPending = 256 << 10
	// logRetry is between tries to write a log that fails, such as on a full disk. The container's writer
	// is blocked meanwhile, by the agent's full buffer.
	logRetry = time.Second
	// attachLimit is how long an attached client may be behind before it is cut off.
	attachLimit = 30 * time.Second
)

// output follows the stdout and stderr of one container: from the agent into the log, and to whoever is
// attached.
type output struct {
	s   *Server
	rec store.Container
	log *logFile

	ctx    context.Context
	cancel context.CancelFunc
	done   chan struct{} // closed when all streams have ended or close was called

	mu      sync.Mutex
	clients map[*attached]struct{}
	shown   [2]uint64 // offsets up to which clients have been shown the streams
	ended   bool
}

// attached is one client that watches the output.
type attached struct {
	chunks [2]chan []byte // nil for a stream that is not wanted; closed at the end of the output
	gone   chan struct{}  // closed by the client
	lags   context.CancelFunc
}

// openOutput opens the log, so that a container without one is never started.
func (s *Server) openOutput(rec store.Container) (*output, error) {
	log, err := openLog(rec.LogPath, s.positionPath(rec))
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(s.life)
	return &output{s: s, rec: rec, log: log, ctx: ctx, cancel: cancel, done: make(chan struct{}), clients: map[*attached]struct{}{}}, nil
}

func (s *Server) positionPath(rec store.Container) string {
	return filepath.Join(s.opts.StateDir, "positions", rec.ID)
}

// start begins to follow; every output that was opened is closed, started or not.
func (o *output) start() {
	streams := 2
	if o.rec.Config.GetTty() {
		streams = 1
	}
	var following sync.WaitGroup
	for stream := range streams {
		following.Add(1)
		o.s.goTask(func() {
			defer following.Done()
			o.follow(stream)
		})
	}
	o.s.goTask(func() {
		following.Wait()
		o.endClients()
		close(o.done)
	})
}

func (o *output) close() {
	o.cancel()
	o.log.close()
}

// follow carries one stream to its end, over as many connections as it takes.
func (o *output) follow(stream int) {
	name := [2]string{"stdout", "stderr"}[stream]
	for o.ctx.Err() == nil {
		end, err := o.followOnce(stream, name)
		if end {
			return
		}
		if errdefs.IsNotFound(err) || errdefs.IsOutOfRange(err) {
			o.s.log.Warn("output is lost", "container", o.rec.ID, "stream", name, "error", err)
			return
		}
		if _, dead := o.s.sandbox(o.rec.SandboxID).machine(); dead != nil {
			return
		}
		o.s.pause(o.ctx, reconnectPause)
	}
}

// followOnce reads from one connection; true when the stream has ended and all of it is in the log.
func (o *output) followOnce(stream int, name string) (bool, error) {
	agent, err := o.s.containerClient(o.ctx, o.rec)
	if err != nil {
		return false, err
	}
	reader, err := agent.Output(o.ctx, &agentproto.Output{ContainerId: o.rec.ID, Stderr: stream == streamStderr, Offset: o.log.offset(stream)})
	if err != nil {
		return false, err
	}
	defer reader.Close()
	stop := context.AfterFunc(o.ctx, func() { reader.Close() })
	defer stop()

	lines := &lineSplitter{stream: name, maxLine: o.s.opts.MaxLogLine}
	if lines.maxLine == 0 || lines.maxLine > maxPending {
		lines.maxLine = maxPending
	}
	for acked := reader.Offset(); ; {
		err := reader.Wait()
		if err == nil {
			acked, err = o.take(reader, lines, stream, acked)
		}
		if errors.Is(err, io.EOF) {
			var entries bytes.Buffer
			lines.finish(&entries, time.Now())
			if err := o.write(entries.Bytes(), stream, reader.Offset()); err != nil {
				return false, err
			}
			return true, nil
		}
		if err != nil {
			return false, err
		}
	}
}

// outputBuffers are shared by all outputs: a silent one holds none.
var outputBuffers = sync.Pool{New: func() any { return &outputBuffer{} }}

type outputBuffer struct {
	read    [32 << 10]byte
	entries bytes.Buffer
}

// take reads what there is, puts whole lines into the log, and acknowledges them unless more comes at once. It returns the offset
// that is acknowledged.
func (o *output) take(reader *agentproto.OutputReader, lines *lineSplitter, stream int, acked uint64) (uint64, error) {
	buf := outputBuffers.Get().(*outputBuffer)
	defer outputBuffers.Put(buf)
	n, err := reader.Read(buf.read[:])
	if err != nil {
		return acked, err
	}
	p := buf.read[:n]
	buf.entries.Reset()
	written := reader.Offset() - uint64(lines.split(&buf.entries, p, time.Now()))
	if buf.entries.Len() > 0 {
		if err := o.write(buf.entries.Bytes(), stream, written); err != nil {
			return acked, err
		}
	}
	if written > acked && !reader.Partial() {
		if err := reader.Ack(written); err != nil {
			return acked, err
		}
		acked = written
	}
	o.broadcast(stream, p, reader.Offset())
	return acked, nil
}

// write appends to the log, again and again while that fails; meanwhile nothing is acknowledged.
func (o *output) write(entries []byte, stream int, offset uint64) error {
	what := "log of container " + o.rec.ID
	defer o.s.troubles.note(what, nil)
	for reported := false; ; reported = true {
		err := o.log.write(entries, stream, offset)
		if err == nil || o.ctx.Err() != nil {
			return err
		}
		o.s.troubles.note(what, err)
		if !reported {
			o.s.log.Error("writing a container log; the container's output waits", "container", o.rec.ID, "path", o.rec.LogPath, "error", err)
		}
		if !o.s.pause(o.ctx, logRetry) {
			return o.ctx.Err()
		}
	}
}

// attach registers a client; nil when the output has ended. lags is called when it does not read.
func (o *output) attach(stdout, stderr bool, lags context.CancelFunc) *attached {
	a := &attached{gone: make(chan struct{}), lags: lags}
	if stdout {
		a.chunks[streamStdout] = make(chan []byte, 16)
	}
	if stderr {
		a.chunks[streamStderr] = make(chan []byte, 16)
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.ended {
		return nil
	}
	o.clients[a] = struct{}{}
	return a
}

// detach ends a client; called once, by the client.
func (o *output) detach(a *attached) {
	close(a.gone)
	o.mu.Lock()
	defer o.mu.Unlock()
	delete(o.clients, a)
}

// broadcast gives a chunk that ends at an offset to the clients, less what they had before a reconnect. One
// that lags holds the output up, as a slow terminal does, but not for longer than attachLimit.
func (o *output) broadcast(stream int, p []byte, end uint64) {
	o.mu.Lock()
	p = p[len(p)-int(min(uint64(len(p)), end-min(end, o.shown[stream]))):]
	o.shown[stream] = max(o.shown[stream], end)
	clients := make([]*attached, 0, len(o.clients))
	for a := range o.clients {
		if a.chunks[stream] != nil {
			clients = append(clients, a)
		}
	}
	o.mu.Unlock()
	if len(clients) == 0 || len(p) == 0 {
		return
	}
	chunk := bytes.Clone(p)
	for _, a := range clients {
		limit := time.NewTimer(attachLimit)
		select {
		case a.chunks[stream] <- chunk:
		case <-a.gone:
		case <-o.ctx.Done():
		case <-limit.C:
			a.lags()
			o.s.log.Warn("attached client does not read and was cut off", "container", o.rec.ID)
		}
		limit.Stop()
	}
}

// endClients tells the clients that no more will come. All senders have ended.
func (o *output) endClients() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.ended = true
	for a := range o.clients {
		for _, c := range a.chunks {
			if c != nil {
				close(c)
			}
		}
	}
	o.clients = nil
}
