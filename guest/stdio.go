package guest

import (
	"context"
	"fmt"
	"io"
	"os"
	"sync"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/crivm/crivm/agentproto"
)

// stdio is the agent's side of a process's standard streams. A terminal has no stderr.
type stdio struct {
	terminal       bool
	stdin          *input // nil when the process has none
	stdout, stderr *output

	mu     sync.Mutex
	master *os.File
	size   unix.Winsize
}

// newStdio makes the pipes that s asks for. The second result is the process's side.
func newStdio(s *agentproto.Stdio, limit int) (*stdio, ChildStdio, error) {
	io := &stdio{
		terminal: s.GetTty(), stdout: newOutput(limit),
		size: unix.Winsize{Row: uint16(s.GetRows()), Col: uint16(s.GetColumns())},
	}
	if s.GetTty() {
		if s.GetStdin() {
			io.stdin = &input{terminal: true}
		}
		return io, ChildStdio{Terminal: true}, nil
	}
	io.stderr = newOutput(limit)
	child := ChildStdio{}
	var err error
	fail := func(err error) (*stdio, ChildStdio, error) {
		io.close()
		child.close()
		return nil, ChildStdio{}, err
	}
	var ours *os.File
	if ours, child.Stdout, err = outputPipe("stdout"); err != nil {
		return fail(err)
	}
	io.stdout.follow(ours)
	if ours, child.Stderr, err = outputPipe("stderr"); err != nil {
		return fail(err)
	}
	io.stderr.follow(ours)
	if s.GetStdin() {
		if child.Stdin, ours, err = inputPipe(); err != nil {
			return fail(err)
		}
		io.stdin = &input{to: ours}
	}
	return io, child, nil
}

// attach connects a terminal's master, once there is one.
func (s *stdio) attach(master *os.File) {
	if master == nil {
		return
	}
	s.mu.Lock()
	s.master = master
	if s.size.Row > 0 || s.size.Col > 0 {
		setWindow(master, s.size)
	}
	s.mu.Unlock()
	if s.stdin != nil {
		s.stdin.connect(master)
	}
	s.stdout.follow(master) // closes it at its end
}

// resize sets the terminal's size.
func (s *stdio) resize(rows, columns uint32) error {
	if !s.terminal {
		return fmt.Errorf("process has no terminal: %w", errdefs.ErrFailedPrecondition)
	}
	if rows > 0xffff || columns > 0xffff {
		return fmt.Errorf("terminal size %dx%d: %w", rows, columns, errdefs.ErrInvalidArgument)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.size = unix.Winsize{Row: uint16(rows), Col: uint16(columns)}
	if s.master == nil {
		return nil // attach applies it
	}
	if err := setWindow(s.master, s.size); err != nil && !isClosed(err) {
		return fmt.Errorf("resize terminal: %w", err)
	}
	return nil
}

// output finds stdout or stderr.
func (s *stdio) output(stderr bool) (*output, error) {
	if !stderr {
		return s.stdout, nil
	}
	if s.stderr == nil {
		return nil, fmt.Errorf("a terminal has no stderr: %w", errdefs.ErrNotFound)
	}
	return s.stderr, nil
}

// ended is called when the process has exited: nobody reads its stdin any more.
func (s *stdio) ended() {
	if s.stdin != nil && !s.terminal {
		s.stdin.close()
	}
}

// discard makes the output of a process that never ran empty.
func (s *stdio) discard() {
	for _, o := range []*output{s.stdout, s.stderr} {
		if o != nil {
			o.discard()
		}
	}
}

// finish ends the output of a process that never ran: nobody else holds the other ends.
func (s *stdio) finish() {
	if s.terminal {
		s.stdout.finish()
	}
}

// close forgets everything.
func (s *stdio) close() {
	if s.stdin != nil {
		s.stdin.close()
	}
	s.stdout.close()
	if s.stderr != nil {
		s.stderr.close()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.master != nil {
		s.master.Close()
	}
}

// input is the writing side of a process's stdin.
type input struct {
	terminal bool

	mu     sync.Mutex // held while writing: two streams do not mix within one frame
	state  sync.Mutex
	to     *os.File
	closed bool
	ready  chan struct{} // terminal: closed by connect
}

// connect gives a terminal's input its master.
func (in *input) connect(master *os.File) {
	in.state.Lock()
	defer in.state.Unlock()
	in.to = master
	if in.ready != nil {
		close(in.ready)
		in.ready = nil
	}
}

// write passes bytes to the process. It blocks while the process does not read; io.ErrClosedPipe when it
// never will again.
func (in *input) write(ctx context.Context, b []byte) error {
	in.mu.Lock()
	defer in.mu.Unlock()
	to, err := in.target(ctx)
	if err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { to.SetWriteDeadline(past) })
	defer func() {
		if !stop() {
			to.SetWriteDeadline(never)
		}
	}()
	if _, err := to.Write(b); err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return io.ErrClosedPipe
	}
	return nil
}

// target waits for the descriptor to write to.
func (in *input) target(ctx context.Context) (*os.File, error) {
	in.state.Lock()
	for {
		to, closed := in.to, in.closed
		if closed || to != nil {
			in.state.Unlock()
			if closed {
				return nil, io.ErrClosedPipe
			}
			return to, nil
		}
		if in.ready == nil {
			in.ready = make(chan struct{})
		}
		ready := in.ready
		in.state.Unlock()
		select {
		case <-ready:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		in.state.Lock()
	}
}

// end is the end of input: it closes a pipe; a terminal has no such thing and stays.
func (in *input) end() {
	if !in.terminal {
		in.close()
	}
}

// close ends the input for good.
func (in *input) close() {
	in.state.Lock()
	in.closed = true
	to := in.to
	if in.ready != nil {
		close(in.ready)
		in.ready = nil
	}
	in.state.Unlock()
	if to != nil && !in.terminal {
		to.Close()
	}
}

func (c ChildStdio) close() {
	closeFiles([]*os.File{c.Stdin, c.Stdout, c.Stderr})
}
