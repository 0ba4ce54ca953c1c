package server

import (
	"context"
	"fmt"
	"io"
	"sync"

	"k8s.io/cri-streaming/pkg/streaming/remotecommand"

	"github.com/crivm/crivm/agentproto"
)

// streamRuntime serves the streams that the streaming library has accepted.
type streamRuntime struct{ s *Server }

// Exec runs a process with a client's streams.
func (r streamRuntime) Exec(ctx context.Context, containerID string, cmd []string, in io.Reader, out, errOut io.WriteCloser, tty bool, resize <-chan remotecommand.TerminalSize) error {
	rec, err := r.s.runningContainer(containerID)
	if err != nil {
		return err
	}
	ctx, cancel := r.s.withLife(ctx)
	defer cancel()
	e := execution{args: cmd, tty: tty, stdin: in, resize: resize}
	if out != nil { // a nil of this type is no nil io.Writer
		e.stdout = out
	}
	if errOut != nil {
		e.stderr = errOut
	}
	code, err := r.s.exec(ctx, rec, e)
	if err != nil {
		return fmt.Errorf("exec in container %s: %w", rec.ID, err)
	}
	if code != 0 {
		return exitError{int(code)}
	}
	return nil
}

// Attach connects a client to the container's own process until it ends or the client goes.
func (r streamRuntime) Attach(ctx context.Context, containerID string, in io.Reader, out, errOut io.WriteCloser, tty bool, resize <-chan remotecommand.TerminalSize) error {
	rec, err := r.s.runningContainer(containerID)
	if err != nil {
		return err
	}
	ctx, cancel := r.s.withLife(ctx)
	defer cancel()
	c := r.s.container(rec.ID)
	c.mu.Lock()
	output := c.output
	c.mu.Unlock()
	if output == nil {
		return notFound("output of container", rec.ID)
	}
	client := output.attach(out != nil, errOut != nil && !tty, cancel)
	if client == nil {
		return nil
	}
	defer output.detach(client)
	agent, err := r.s.containerClient(ctx, rec)
	if err != nil {
		return err
	}
	if resize != nil && tty {
		go r.s.resizes(ctx, agent, rec.ID, "", resize)
	}
	if in != nil && rec.Config.GetStdin() {
		go r.s.copyInput(ctx, agent, &agentproto.Input{ContainerId: rec.ID}, in, rec.Config.GetStdinOnce())
	}
	var copying sync.WaitGroup
	for stream, w := range []io.Writer{out, errOut} {
		chunks := client.chunks[stream]
		if chunks == nil {
			continue
		}
		copying.Go(func() {
			for {
				select {
				case p, ok := <-chunks:
					if !ok {
						return
					}
					if _, err := w.Write(p); err != nil {
						cancel()
						return
					}
				case <-ctx.Done():
					return
				}
			}
		})
	}
	if out == nil && errOut == nil {
		select {
		case <-c.exited:
		case <-ctx.Done():
		}
	}
	copying.Wait()
	return nil
}

// PortForward connects a client to a port on the pod's loopback.
func (r streamRuntime) PortForward(ctx context.Context, podSandboxID string, port int32, stream io.ReadWriteCloser) error {
	rec, err := r.s.visibleSandbox(podSandboxID)
	if err != nil {
		return err
	}
	if port < 1 || port > 65535 {
		return invalid("port", "%d is not a port", port)
	}
	ctx, cancel := r.s.withLife(ctx)
	defer cancel()
	agent, err := r.s.sandbox(rec.ID).client(ctx)
	if err != nil {
		return err
	}
	conn, err := agent.DialPort(ctx, uint32(port))
	if err != nil {
		return fmt.Errorf("sandbox %s: %w", rec.ID, err)
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	toPod := make(chan struct{})
	go func() {
		defer close(toPod)
		if _, err := io.Copy(conn, stream); err != nil {
			conn.Close() // the client is gone
			return
		}
		conn.CloseWrite()
	}()
	_, err = io.Copy(stream, conn)
	stream.Close()
	<-toPod
	if err != nil && ctx.Err() == nil {
		return fmt.Errorf("sandbox %s: port %d: %w", rec.ID, port, err)
	}
	return nil
}

// withLife ends a stream's context with the server too: clients are cut cleanly when the daemon stops.
func (s *Server) withLife(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(s.life, cancel)
	return ctx, func() { stop(); cancel() }
}
