package guest

import (
	"context"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/crivm/crivm/agentproto"
)

// steps collects what the parts of a call took, by the guest's clock; the host shows them in `crivm trace`.
type steps struct {
	start time.Time

	mu   sync.Mutex
	done []*agentproto.Step
}

type stepsKey struct{}

// withSteps begins the record of a call.
func withSteps(ctx context.Context) (context.Context, *steps) {
	s := &steps{start: time.Now()}
	return context.WithValue(ctx, stepsKey{}, s), s
}

// step begins a part of the call that ctx belongs to; the function it returns ends it.
func step(ctx context.Context, name string) func() {
	s, ok := ctx.Value(stepsKey{}).(*steps)
	if !ok {
		return func() {}
	}
	begin := time.Since(s.start)
	return func() {
		took := time.Since(s.start) - begin
		s.mu.Lock()
		defer s.mu.Unlock()
		s.done = append(s.done, &agentproto.Step{Name: name, BeginNanos: int64(begin), TookNanos: int64(took)})
	}
}

func (s *steps) list() []*agentproto.Step {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]*agentproto.Step(nil), s.done...)
}

// begun is when this program began to run, since the start of the kernel.
var begun = sinceBoot()

// sinceBoot is 0 when the clock cannot be read.
func sinceBoot() time.Duration {
	var ts unix.Timespec
	if unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts) != nil {
		return 0
	}
	return time.Duration(ts.Nano())
}

// bootSteps are the boot until the agent serves.
func (a *Agent) bootSteps() []*agentproto.Step {
	return []*agentproto.Step{
		{Name: "kernel and initramfs", TookNanos: int64(begun)},
		{Name: "agent begins", BeginNanos: int64(begun), TookNanos: int64(a.started - begun)},
	}
}
