package server

import (
	"context"
	"fmt"
	"runtime"
	"sync"
	"time"
)

// parallelBoots is how many pods boot their VMs at a time. A boot is work for a CPU: VMs that share the CPUs with all the
// others that a node starts, after a reboot say, are none of them ready before all are, or before their timeouts.
func parallelBoots() int { return max(4, 2*runtime.GOMAXPROCS(0)) }

// bootTurn waits until a VM may boot, the first comer first. The turn ends with the function that it returns, or after
// limit: VMs that hang hold the others up for no longer.
func (s *Server) bootTurn(ctx context.Context, limit time.Duration) (done func(), err error) {
	select {
	case s.boots <- struct{}{}:
	default:
		defer timingsOf(ctx).span("wait for other boots")()
		select {
		case s.boots <- struct{}{}:
		case <-ctx.Done():
			return nil, fmt.Errorf("waiting for other VMs to boot: %w", ctx.Err())
		}
	}
	end := sync.OnceFunc(func() { <-s.boots })
	timer := time.AfterFunc(limit, end)
	return func() {
		timer.Stop()
		end()
	}, nil
}
