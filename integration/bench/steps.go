package main

import (
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// step is one span of a pod's start.
type step struct {
	Name  string        `json:"name"`
	Begin time.Duration `json:"beginNanos"` // since the call came in
	Took  time.Duration `json:"tookNanos"`
}

// attribute is a key of a log line with its value, perhaps in quotes, as log/slog writes them.
var attribute = regexp.MustCompile(`([a-z_]+)=("(?:[^"\\]|\\.)*"|\S*)`)

// inGuest is the key of the time from the start of the guest's kernel to the agent that serves, by the guest's clock.
const inGuest = "kernel_to_agent"

// stepTables collects the steps of calls from crivm's log, by call.
type stepTables struct {
	order []string
	calls map[string]*callSteps
}

type callSteps struct {
	order       []string
	took, begin map[string][]time.Duration
	total, left []time.Duration
}

func newStepTables() *stepTables { return &stepTables{calls: map[string]*callSteps{}} }

// read takes all calls with steps out of a log. Calls of sandboxes of the warm handler are kept apart.
func (t *stepTables) read(log, warm string) error {
	for line := range strings.Lines(log) {
		fields := attributes(line)
		if fields["steps"] == "" || fields["msg"] != "call" {
			continue
		}
		steps, err := parseSteps(fields["steps"])
		if err != nil {
			return err
		}
		total, err := time.ParseDuration(fields["took"])
		if err != nil {
			return fmt.Errorf("log line %q: %w", line, err)
		}
		name := fields["call"]
		if name == "RunPodSandbox" {
			kind := "cold"
			if warm != "" && fields["handler"] == warm {
				kind = "warm"
			}
			name += ", " + kind
		}
		t.add(name, total, steps)
	}
	return nil
}

func (t *stepTables) add(name string, total time.Duration, steps []step) {
	c := t.calls[name]
	if c == nil {
		c = &callSteps{took: map[string][]time.Duration{}, begin: map[string][]time.Duration{}}
		t.calls[name] = c
		t.order = append(t.order, name)
	}
	c.total = append(c.total, total)
	for _, s := range steps {
		if c.took[s.Name] == nil {
			c.order = append(c.order, s.Name)
		}
		c.took[s.Name], c.begin[s.Name] = append(c.took[s.Name], s.Took), append(c.begin[s.Name], s.Begin)
	}
	c.left = append(c.left, uncovered(steps, total))
}

// tables has one a call, in the order in which they were seen first; the share is of the median of the whole call. Steps may
// overlap, so shares may add up to more than all.
func (t *stepTables) tables() (tables []*table) {
	for _, name := range t.order {
		c := t.calls[name]
		whole := times(c.total)
		out := &table{Title: fmt.Sprintf("steps of %s (ms, n = %d)", name, whole.N), Steps: true}
		for _, s := range c.order {
			d := times(c.took[s])
			out.Rows = append(out.Rows, row{Name: s, Unit: "ms", Crivm: d, Begins: times(c.begin[s]).P50, Share: over(d, whole)})
		}
		left := times(c.left)
		out.Rows = append(out.Rows, row{Name: "not covered by a step", Unit: "ms", Crivm: left, Share: over(left, whole)},
			row{Name: "whole call", Unit: "ms", Crivm: whole, Share: 1})
		tables = append(tables, out)
	}
	return tables
}

// attributes are the keys and values of a line of log/slog's text handler.
func attributes(line string) map[string]string {
	fields := map[string]string{}
	for _, m := range attribute.FindAllStringSubmatch(line, -1) {
		value := m[2]
		if text, err := strconv.Unquote(value); err == nil && strings.HasPrefix(value, `"`) {
			value = text
		}
		fields[m[1]] = value
	}
	return fields
}

// readySteps finds the log line of a sandbox that became ready: kernel_to_agent=2.1s steps="name=begin+duration, ..."
func readySteps(log, sandbox string) ([]step, error) {
	for line := range strings.Lines(log) {
		if !strings.Contains(line, "sandbox="+sandbox) || !strings.Contains(line, `msg="sandbox ready"`) {
			continue
		}
		fields := attributes(line)
		steps, err := parseSteps(fields["steps"])
		if err == nil && fields[inGuest] != "" {
			took, err := time.ParseDuration(fields[inGuest])
			if err != nil {
				return nil, fmt.Errorf("log line of sandbox %s: %w", sandbox, err)
			}
			steps = within(steps, "boot to agent", step{Name: "of it guest, from its kernel's start to its agent", Took: took})
		}
		return steps, err
	}
	return nil, fmt.Errorf("crivm's log has no steps of sandbox %s", sandbox)
}

// within inserts a part after the step whose end it shares, nearly: the agent's answer has to come through.
func within(steps []step, whole string, part step) []step {
	i := slices.IndexFunc(steps, func(s step) bool { return s.Name == whole })
	if i < 0 {
		return steps
	}
	part.Begin = max(steps[i].Begin, steps[i].Begin+steps[i].Took-part.Took)
	return slices.Insert(steps, i+1, part)
}

func parseSteps(text string) ([]step, error) {
	var steps []step
	for part := range strings.SplitSeq(text, ", ") {
		name, times, ok := strings.Cut(part, "=")
		begin, took, ok2 := strings.Cut(times, "+")
		s := step{Name: name}
		var err error
		if s.Begin, err = time.ParseDuration(begin); err == nil {
			s.Took, err = time.ParseDuration(took)
		}
		if !ok || !ok2 || err != nil {
			return nil, fmt.Errorf("step %q is not name=begin+duration", part)
		}
		steps = append(steps, s)
	}
	return steps, nil
}

// uncovered is how much of a call no step accounts for. Steps may overlap.
func uncovered(steps []step, total time.Duration) time.Duration {
	left, at := time.Duration(0), time.Duration(0)
	for _, s := range steps { // in order of Begin
		if s.Begin > at {
			left += s.Begin - at
		}
		at = max(at, s.Begin+s.Took)
	}
	return left + max(total-at, 0)
}
