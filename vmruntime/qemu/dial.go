package qemu

import (
	"context"
	"fmt"
	"net"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"github.com/crivm/crivm/agentproto"
)

// retryPause is kept between attempts that fail at once.
const retryPause = 50 * time.Millisecond

// agentLink is the one connection to the agent's port, made when it is first needed and again when it broke.
type agentLink struct {
	path  string
	ended chan struct{} // the VM is dead

	mu      sync.Mutex
	fresh   bool // nobody has been connected before
	mux     *agentproto.SerialMux
	opening chan struct{} // closed when the attempt under way has ended; nil without one
	err     error         // of the last attempt
}

func (a *agentLink) init(path string) {
	a.path, a.ended = path, make(chan struct{})
}

// session returns a live session. It waits for a guest that is still booting until ctx ends. The waiting
// attempt is shared by all callers and outlives each of them.
func (a *agentLink) session(ctx context.Context) (*agentproto.SerialMux, error) {
	for {
		a.mu.Lock()
		if a.mux != nil {
			select {
			case <-a.mux.Done():
				a.mux = nil
			default:
				defer a.mu.Unlock()
				return a.mux, nil
			}
		}
		if a.opening == nil {
			a.opening = make(chan struct{})
			go a.open()
		}
		opening := a.opening
		a.mu.Unlock()
		select {
		case <-opening:
		case <-a.ended:
			return nil, errdefs.ErrUnavailable
		case <-ctx.Done():
			a.mu.Lock()
			defer a.mu.Unlock()
			if a.err != nil {
				return nil, fmt.Errorf("%w: %w", ctx.Err(), a.err)
			}
			return nil, ctx.Err()
		}
	}
}

// open makes one attempt, which lasts until the agent answers, the VM ends or the socket refuses.
func (a *agentLink) open() {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	go func() {
		select {
		case <-a.ended:
			cancel()
		case <-ctx.Done():
		}
	}()
	mux, err := a.connect(ctx)
	if err != nil {
		select {
		case <-time.After(retryPause):
		case <-ctx.Done():
		}
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	select {
	case <-a.ended:
		if mux != nil {
			mux.Close()
		}
	default:
		a.mux, a.err = mux, err
	}
	close(a.opening)
	a.opening = nil
}

// connect opens a session. The first connection that a port ever had cannot find it stuck, so it just waits for the
// guest: connecting anew, as OpenSerial does now and then, would only give an answer away that is on its way.
func (a *agentLink) connect(ctx context.Context) (*agentproto.SerialMux, error) {
	a.mu.Lock()
	fresh := a.fresh
	a.fresh = false
	a.mu.Unlock()
	if !fresh {
		return agentproto.OpenSerial(ctx, a.path)
	}
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", a.path)
	if err != nil {
		return nil, fmt.Errorf("connect to serial port: %w: %w", errdefs.ErrUnavailable, err)
	}
	return agentproto.DialSerial(ctx, conn)
}

// close ends the session and every wait for one.
func (a *agentLink) close() {
	a.mu.Lock()
	defer a.mu.Unlock()
	close(a.ended)
	if a.mux != nil {
		a.mux.Close()
	}
}

// Dial opens a stream to the agent. The first one waits for the guest to boot until ctx ends.
func (vm *VM) Dial(ctx context.Context) (net.Conn, error) {
	for try := 0; ; try++ {
		if err := vm.dead(); err != nil {
			return nil, err
		}
		mux, err := vm.agent.session(ctx)
		if err != nil {
			if dead := vm.dead(); dead != nil {
				return nil, dead
			}
			return nil, fmt.Errorf("VM %s: reach agent: %w", vm.spec.ID, err)
		}
		conn, err := mux.Dial(ctx)
		if err == nil {
			return conn, nil
		}
		// A session that broke just now is made anew, once.
		if try > 0 || !errdefs.IsUnavailable(err) {
			return nil, fmt.Errorf("VM %s: reach agent: %w", vm.spec.ID, err)
		}
	}
}
