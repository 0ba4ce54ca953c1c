package server

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"k8s.io/cri-streaming/pkg/streaming/remotecommand"

	"github.com/crivm/crivm/agentproto"
	"github.com/crivm/crivm/server/store"
)

const (
	// execDrain bounds waiting for output after the process has ended: a child may hold the pipe.
	execDrain = 5 * time.Second
	// execStart bounds how long the start of a process goes on when the request for it has ended.
	execStart = time.Minute
	// execCleanup bounds telling the agent to kill and forget an exec.
	execCleanup = 20 * time.Second
)

// execution is one further process in a container.
type execution struct {
	args           []string
	tty            bool
	stdin          io.Reader // nil: none
	stdout, stderr io.Writer // nil: dropped
	resize         <-chan remotecommand.TerminalSize
}

// exec runs a process to its end and returns its exit code. When ctx ends before, the process tree is killed
// and ctx's error returned. NotFound when there is no such command.
func (s *Server) exec(ctx context.Context, rec store.Container, e execution) (int32, error) {
	agent, err := s.containerClient(ctx, rec)
	if err != nil {
		return 0, err
	}
	id := newID()[:16]
	forget := func() {
		cleanup, cancel := detached(ctx, execCleanup)
		defer cancel()
		if _, err := agent.DeleteExec(cleanup, &agentproto.DeleteExecRequest{ContainerId: rec.ID, ExecId: id}); err != nil && !s.vmDead(rec) {
			s.log.Warn("ending an exec", "container", rec.ID, "exec", id, "error", err)
		}
	}
	// The agent's answer is awaited even when ctx has ended, and only then the exec is forgotten: one that is
	// still being started could not be killed, and would run on as nobody's.
	answer := make(chan error, 1)
	inGuest := timingsOf(ctx).remote("start in guest")
	s.goTask(func() {
		call, cancel := context.WithCancel(context.WithoutCancel(ctx))
		defer cancel()
		defer context.AfterFunc(ctx, func() { time.AfterFunc(execStart, cancel) })()
		resp, err := agent.Exec(call, &agentproto.ExecRequest{
			ContainerId: rec.ID, ExecId: id, Args: e.args, Stdio: &agentproto.Stdio{Stdin: e.stdin != nil, Tty: e.tty},
		})
		inGuest(resp.GetSteps())
		answer <- err
	})
	select {
	case err = <-answer:
	case <-ctx.Done():
		s.goTask(func() { <-answer; forget() })
		return 0, ctx.Err()
	}
	ended := false
	defer func() {
		if ended { // nothing is left to kill: the caller need not wait
			s.goTask(forget)
			return
		}
		defer timingsOf(ctx).span("forget in guest")()
		forget()
	}()
	if err != nil {
		return 0, err
	}
	streamsCtx, endStreams := context.WithCancel(ctx)
	defer endStreams()
	var outputs sync.WaitGroup
	for stream, w := range []io.Writer{e.stdout, e.stderr} {
		if stream == streamStderr && e.tty {
			break
		}
		if w == nil {
			w = io.Discard
		}
		outputs.Go(func() {
			if err := copyOutput(streamsCtx, agent, rec.ID, id, stream == streamStderr, w); err != nil && streamsCtx.Err() == nil {
				s.log.Debug("output of exec", "container", rec.ID, "exec", id, "error", err)
			}
		})
	}
	if e.stdin != nil {
		go s.copyInput(streamsCtx, agent, &agentproto.Input{ContainerId: rec.ID, ExecId: id}, e.stdin, true)
	}
	if e.resize != nil {
		go s.resizes(streamsCtx, agent, rec.ID, id, e.resize)
	}
	waited := timingsOf(ctx).span("wait for its end")
	resp, err := agent.Wait(ctx, &agentproto.WaitRequest{ContainerId: rec.ID, ExecId: id})
	if ctx.Err() != nil {
		return 0, ctx.Err()
	}
	if err != nil {
		return 0, err
	}
	ended = true
	waited()
	defer timingsOf(ctx).span("output")()
	drained := make(chan struct{})
	go func() { outputs.Wait(); close(drained) }()
	limit := time.NewTimer(execDrain)
	defer limit.Stop()
	select {
	case <-drained:
	case <-ctx.Done():
	case <-limit.C:
	}
	endStreams()
	<-drained
	return resp.GetExit().GetCode(), nil
}

// copyOutput carries one output stream to its end.
func copyOutput(ctx context.Context, agent *agentproto.Client, container, exec string, stderr bool, w io.Writer) error {
	reader, err := agent.Output(ctx, &agentproto.Output{ContainerId: container, ExecId: exec, Stderr: stderr})
	if err != nil {
		return err
	}
	defer reader.Close()
	defer context.AfterFunc(ctx, func() { reader.Close() })()
	buf := make([]byte, 32<<10)
	for {
		n, err := reader.Read(buf)
		if n > 0 {
			if _, err := w.Write(buf[:n]); err != nil {
				return err
			}
			if !reader.Partial() {
				if err := reader.Ack(reader.Offset()); err != nil {
					return err
				}
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// copyInput carries a client's input to a process; its end closes the process's stdin if closeAtEnd.
func (s *Server) copyInput(ctx context.Context, agent *agentproto.Client, to *agentproto.Input, from io.Reader, closeAtEnd bool) {
	conn, err := agent.Input(ctx, to)
	if err != nil {
		s.log.Debug("input", "container", to.GetContainerId(), "exec", to.GetExecId(), "error", err)
		return
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	if _, err := io.Copy(conn, from); err != nil || !closeAtEnd {
		return
	}
	if err := conn.CloseWrite(); err != nil {
		return
	}
	conn.Read(make([]byte, 1)) // the agent's END, or its close: the input has been taken
}

func (s *Server) resizes(ctx context.Context, agent *agentproto.Client, container, exec string, sizes <-chan remotecommand.TerminalSize) {
	for {
		select {
		case <-ctx.Done():
			return
		case size, ok := <-sizes:
			if !ok {
				return
			}
			_, err := agent.ResizeTTY(ctx, &agentproto.ResizeTTYRequest{ContainerId: container, ExecId: exec, Rows: uint32(size.Height), Columns: uint32(size.Width)})
			if err != nil && ctx.Err() == nil && !errdefs.IsNotFound(err) {
				s.log.Debug("resizing a terminal", "container", container, "exec", exec, "error", err)
			}
		}
	}
}

// limitedBuffer keeps the first bytes and drops the rest, as CRI asks of ExecSync.
type limitedBuffer struct {
	bytes.Buffer
	limit int
}

func (b *limitedBuffer) Write(p []byte) (int, error) {
	room := max(b.limit-b.Len(), 0)
	b.Buffer.Write(p[:min(len(p), room)])
	return len(p), nil
}

// exitError is an exit code for the streaming library, which passes it on to the client.
type exitError struct{ code int }

func (e exitError) Error() string   { return fmt.Sprintf("command terminated with exit code %d", e.code) }
func (e exitError) String() string  { return e.Error() }
func (e exitError) Exited() bool    { return true }
func (e exitError) ExitStatus() int { return e.code }
