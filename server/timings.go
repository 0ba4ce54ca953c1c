package server

import (
	"context"
	"log/slog"
	"sort"
	"strings"
	"sync"
	"time"

	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/trace"

	"github.com/crivm/crivm/agentproto"
	"github.com/crivm/crivm/cni"
)

// tracer makes the spans of calls and their steps; they go nowhere unless cmd/crivm has configured a collector.
var tracer = otel.Tracer("github.com/crivm/crivm/server")

// maxSteps of one call are kept. Calls of kubelet have about ten; a guest may tell of as many as it likes.
const maxSteps = 64

// timings collects what each step of a call took: for the log line of the call, for `crivm trace`, and as
// spans. Steps may overlap.
type timings struct {
	ctx   context.Context // of the call: parent of the spans
	call  string
	start time.Time

	mu    sync.Mutex
	steps []step
	took  time.Duration // 0: under way
}

type step struct {
	name       string
	begin, end time.Duration // since the call came in
	guest      bool          // told by the guest
}

type timingsKey struct{}

// withTimings begins the record of a call.
func withTimings(ctx context.Context, call string) (context.Context, *timings) {
	t := &timings{ctx: ctx, call: call, start: time.Now()}
	return context.WithValue(ctx, timingsKey{}, t), t
}

// newTimings is the record of what is no call.
func newTimings(start time.Time) *timings { return &timings{ctx: context.Background(), start: start} }

// timingsOf is the record of the call that ctx belongs to; one that nobody reads outside a call.
func timingsOf(ctx context.Context) *timings {
	if t, ok := ctx.Value(timingsKey{}).(*timings); ok {
		return t
	}
	return &timings{ctx: ctx, start: time.Now()}
}

// span begins a step; the function it returns ends it.
func (t *timings) span(name string) func() {
	end := t.remote(name)
	return func() { end(nil) }
}

// plugins begins a step that consists of others, of CNI plugins; ctx has them told of.
func (t *timings) plugins(ctx context.Context, name string) (_ context.Context, done func()) {
	begin := time.Since(t.start)
	spans, span := tracer.Start(t.ctx, name)
	ctx = cni.WithSpans(ctx, func(plugin string) func() {
		plugin = name + ": " + plainName(plugin)
		begin := time.Since(t.start)
		_, span := tracer.Start(spans, plugin)
		return func() {
			span.End()
			t.add(step{name: plugin, begin: begin, end: time.Since(t.start)})
		}
	})
	return ctx, func() {
		span.End()
		t.add(step{name: name, begin: begin, end: time.Since(t.start)})
	}
}

// remote begins a step that is a call to the guest; the function it returns ends it, with what the guest says it did.
// The guest's clock is another: what it tells is put in the middle of the step.
func (t *timings) remote(name string) func([]*agentproto.Step) { return t.partly(name, 2) }

// boots begins a step that ends with the guest's boot.
func (t *timings) boots(name string) func([]*agentproto.Step) { return t.partly(name, 1) }

// partly puts before what the guest tells a fraction, 1/before, of the time that it does not account for.
func (t *timings) partly(name string, before time.Duration) func([]*agentproto.Step) {
	begin := time.Since(t.start)
	ctx, span := tracer.Start(t.ctx, name)
	return func(inGuest []*agentproto.Step) {
		end := time.Since(t.start)
		told := guestSteps(begin, end, before, inGuest)
		for _, s := range told {
			_, child := tracer.Start(ctx, s.name, trace.WithTimestamp(t.start.Add(s.begin)))
			child.End(trace.WithTimestamp(t.start.Add(s.end)))
		}
		span.End()
		t.add(append([]step{{name: name, begin: begin, end: end}}, told...)...)
	}
}

func (t *timings) add(steps ...step) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.steps = append(t.steps, steps[:min(len(steps), maxSteps-len(t.steps))]...)
}

// finish ends the call.
func (t *timings) finish() time.Duration {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.took = time.Since(t.start)
	return t.took
}

// sorted are the steps in order of begin; those that began together, longest first.
func (t *timings) sorted() ([]step, time.Duration) {
	t.mu.Lock()
	defer t.mu.Unlock()
	steps := append([]step(nil), t.steps...)
	sort.SliceStable(steps, func(i, j int) bool {
		if steps[i].begin != steps[j].begin {
			return steps[i].begin < steps[j].begin
		}
		return steps[i].end > steps[j].end
	})
	return steps, t.took
}

// LogValue prints "name=begin+duration" in order of begin.
func (t *timings) LogValue() slog.Value {
	steps, _ := t.sorted()
	parts := make([]string, len(steps))
	for i, s := range steps {
		parts[i] = s.name + "=" + s.begin.Round(10*time.Microsecond).String() + "+" + (s.end - s.begin).Round(10*time.Microsecond).String()
	}
	return slog.StringValue(strings.Join(parts, ", "))
}

// guestSteps places what a guest tells of a call into the call as the host saw it, so that nothing sticks out.
// Everything in it may be a lie.
func guestSteps(begin, end, before time.Duration, told []*agentproto.Step) (steps []step) {
	told = told[:min(len(told), maxSteps/2)]
	whole := time.Duration(0)
	for _, s := range told {
		whole = max(whole, inside(s.GetBeginNanos()+s.GetTookNanos(), end-begin))
	}
	shift := begin + (end-begin-whole)/before
	for _, s := range told {
		from := inside(s.GetBeginNanos(), whole)
		to := inside(s.GetBeginNanos()+s.GetTookNanos(), whole)
		steps = append(steps, step{name: "guest: " + plainName(s.GetName()), begin: shift + from, end: shift + max(from, to), guest: true})
	}
	return steps
}

func inside(nanos int64, most time.Duration) time.Duration {
	return min(max(time.Duration(nanos), 0), most)
}

// plainName leaves of a guest's text what can stand in a log line.
func plainName(name string) string {
	name = strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune(" -_./", r) {
			return r
		}
		return -1
	}, name[:min(len(name), 60)])
	return strings.TrimSpace(name)
}

// note says in the call's span what it is about.
func (t *timings) note(key, value string) {
	trace.SpanFromContext(t.ctx).SetAttributes(attribute.String("crivm."+key, value))
}
