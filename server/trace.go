package server

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"time"
)

// keptCalls is how many calls on a pod are kept beside its start, for `crivm trace`: some kilobytes.
const keptCalls = 15

// traces are the calls that made a pod what it is, while the daemon runs.
type traces struct {
	mu    sync.Mutex
	first *timings // RunPodSandbox
	later []*timings
}

// keepTrace keeps the steps of the call that ctx belongs to with its sandbox.
func (s *Server) keepTrace(ctx context.Context, sandboxID, containerID string) {
	t := timingsOf(ctx)
	t.note("sandbox", sandboxID)
	if containerID != "" {
		t.note("container", containerID)
	}
	sb := s.sandbox(sandboxID)
	sb.traces.mu.Lock()
	defer sb.traces.mu.Unlock()
	if t.call == "RunPodSandbox" {
		sb.traces.first = t
		return
	}
	sb.traces.later = append(sb.traces.later, t)
	if len(sb.traces.later) > keptCalls {
		sb.traces.later = append(sb.traces.later[:0], sb.traces.later[1:]...)
	}
}

// waterfall draws the calls that were kept, with every step's begin, duration and share of its call.
func (c *traces) waterfall() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	var text strings.Builder
	if c.first == nil {
		text.WriteString("The pod was started before this daemon was.\n")
	} else {
		c.first.draw(&text)
	}
	for _, t := range c.later {
		text.WriteByte('\n')
		t.draw(&text)
	}
	return text.String()
}

// draw is one call: a line a step, with a bar on the call's time line.
func (t *timings) draw(to *strings.Builder) {
	const width = 48
	steps, took := t.sorted()
	if took == 0 {
		fmt.Fprintf(to, "%s  %s  under way since %s\n", t.start.Format("2006-01-02 15:04:05.000"), t.call, milliseconds(time.Since(t.start)))
		took = time.Since(t.start)
	} else {
		fmt.Fprintf(to, "%s  %s  %s\n", t.start.Format("2006-01-02 15:04:05.000"), t.call, milliseconds(took))
	}
	fmt.Fprintf(to, "%11s %11s  share\n", "begins", "took")
	for _, s := range steps {
		from := min(int(int64(width)*int64(s.begin)/int64(took)), width-1)
		to2 := min(max(int((int64(width)*int64(s.end)+int64(took)-1)/int64(took)), from+1), width)
		block := "█"
		if s.guest {
			block = "▒"
		}
		bar := strings.Repeat(" ", from) + strings.Repeat(block, to2-from) + strings.Repeat(" ", width-to2)
		fmt.Fprintf(to, "%11s %11s  %3d %%  %s  %s\n", milliseconds(s.begin), milliseconds(s.end-s.begin), int64(100*(s.end-s.begin)/took), bar, s.name)
	}
}

func milliseconds(d time.Duration) string {
	return fmt.Sprintf("%.1f ms", float64(d.Microseconds())/1000)
}
