package server

import (
	"context"
	"fmt"
	"math"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crivm/crivm/agentproto"
)

const ms = time.Millisecond

func TestGuestSteps(t *testing.T) {
	told := []*agentproto.Step{{Name: "a", BeginNanos: 0, TookNanos: int64(20 * ms)}, {Name: "b", BeginNanos: int64(20 * ms), TookNanos: int64(40 * ms)}}
	for before, want := range map[time.Duration]time.Duration{2: 120 * ms, 1: 140 * ms} {
		got := guestSteps(100*ms, 200*ms, before, told)
		if len(got) != 2 || got[0].begin != want || got[1].begin != want+20*ms || got[1].end != want+60*ms || got[0].name != "guest: a" || !got[0].guest {
			t.Errorf("1/%d before: %+v", before, got)
		}
	}
}

// TestGuestStepsAreBounded has a guest that lies.
func TestGuestStepsAreBounded(t *testing.T) {
	lies := []*agentproto.Step{
		nil,
		{Name: "steps=\"x\", y=1ms+2ms\n\x1b[31m", BeginNanos: math.MinInt64, TookNanos: math.MinInt64},
		{Name: strings.Repeat("long", 1000), BeginNanos: math.MaxInt64, TookNanos: math.MaxInt64},
		{Name: "negative", BeginNanos: int64(time.Hour), TookNanos: -int64(2 * time.Hour)},
	}
	for range 10000 {
		lies = append(lies, &agentproto.Step{Name: "many", BeginNanos: int64(time.Hour), TookNanos: 1})
	}
	got := guestSteps(10*ms, 30*ms, 2, lies)
	if len(got) != maxSteps/2 {
		t.Errorf("%d steps", len(got))
	}
	for _, s := range got {
		if s.begin < 10*ms || s.end > 30*ms || s.end < s.begin || len(s.name) > 70 || strings.ContainsAny(s.name, "\"=,+\n\x1b") {
			t.Errorf("%+v", s)
		}
	}
	tm := newTimings(time.Now())
	for range 100 {
		tm.remote("host")(lies)
	}
	if len(tm.steps) > maxSteps {
		t.Errorf("%d steps are kept", len(tm.steps))
	}
}

func TestWaterfall(t *testing.T) {
	c := &traces{first: &timings{call: "RunPodSandbox", took: 100 * ms, steps: []step{
		{name: "guest: kernel", begin: 50 * ms, end: 90 * ms, guest: true}, {name: "record", begin: 0, end: 10 * ms}, {name: "boot", begin: 10 * ms, end: 100 * ms},
	}}}
	c.later = append(c.later, &timings{call: "StartContainer", start: time.Now()})
	text := c.waterfall()
	lines := strings.Split(text, "\n")
	for i, want := range []string{
		"RunPodSandbox  100.0 ms", "begins",
		"0.0 ms     10.0 ms   10 %  █████                                             record",
		"10.0 ms     90.0 ms   90 %      ████████████████████████████████████████████  boot",
		"50.0 ms     40.0 ms   40 %                          ▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒▒      guest: kernel",
		"", "StartContainer  under way",
	} {
		if !strings.Contains(lines[i], want) {
			t.Errorf("line %d has no %q:\n%s", i, want, text)
		}
	}
	if text := new(traces).waterfall(); !strings.Contains(text, "before this daemon") {
		t.Errorf("of a pod that was adopted: %q", text)
	}
}

// TestTraceOfAPod starts a pod and looks at what the daemon tells of it.
func TestTraceOfAPod(t *testing.T) {
	r := newRig(t)
	call := func(name string, req any, f func(ctx context.Context) (any, error)) any {
		t.Helper()
		resp, err := UnaryInterceptor(t.Context(), req, &grpc.UnaryServerInfo{FullMethod: "/runtime.v1.RuntimeService/" + name}, func(ctx context.Context, _ any) (any, error) { return f(ctx) })
		if err != nil {
			t.Fatal(err)
		}
		return resp
	}
	run := &cri.RunPodSandboxRequest{Config: r.podConfig("traced")}
	pod := call("RunPodSandbox", run, func(ctx context.Context) (any, error) { return r.RunPodSandbox(ctx, run) }).(*cri.RunPodSandboxResponse).GetPodSandboxId()
	for i := range keptCalls + 3 {
		call(fmt.Sprintf("Call%d", i), nil, func(ctx context.Context) (any, error) {
			timingsOf(ctx).span("step")()
			r.keepTrace(ctx, pod, "")
			return nil, nil
		})
	}
	status, err := r.PodSandboxStatus(t.Context(), &cri.PodSandboxStatusRequest{PodSandboxId: pod, Verbose: true})
	if err != nil {
		t.Fatal(err)
	}
	text := status.GetInfo()["trace"]
	for _, want := range []string{"RunPodSandbox", "record", "cni add", "boot to agent", "guest: kernel and initramfs", "setup in guest", "Call3 ", "Call17"} {
		if !strings.Contains(text, want) {
			t.Errorf("no %q in\n%s", want, text)
		}
	}
	if strings.Contains(text, "Call2 ") {
		t.Errorf("more than %d calls are kept:\n%s", keptCalls, text)
	}
}
