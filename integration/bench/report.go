package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
)

// report is all that has been measured, by section. A run replaces the sections it measures and keeps the others.
type report struct {
	Sections []*section `json:"sections"`
}

// section is a group of figures from one run on one machine.
type section struct {
	Name       string    `json:"name"`
	Title      string    `json:"title"`
	Date       time.Time `json:"date"`
	Took       float64   `json:"tookSeconds"`
	Machine    machine   `json:"machine"`
	LoadBefore string    `json:"loadAverageBefore"`
	LoadAfter  string    `json:"loadAverageAfter"`
	Ratios     []ratio   `json:"ratios,omitempty"`
	Tables     []*table  `json:"tables"`
	Notes      []string  `json:"notes,omitempty"`
}

// ratio compares medians of one run, with the bar that we hold ourselves to; Bar 0 is none.
type ratio struct {
	Name    string  `json:"name"`
	Value   float64 `json:"value"`
	Bar     float64 `json:"bar,omitempty"`
	AtLeast bool    `json:"atLeast,omitempty"` // the bar is a floor, not a ceiling
}

func (r ratio) met() bool {
	if r.AtLeast {
		return r.Value >= r.Bar
	}
	return r.Value <= r.Bar
}

// table has a row a figure.
type table struct {
	Title string `json:"title"`
	Steps bool   `json:"steps,omitempty"` // rows are steps of one call: when they begin, and their share of it
	Rows  []row  `json:"rows"`
}

// row is one figure of crivm and, where it was measured, of containerd.
type row struct {
	Name   string  `json:"name"`
	Unit   string  `json:"unit"`
	Crivm  *dist   `json:"crivm,omitempty"`
	Peer   *dist   `json:"containerd,omitempty"`
	Begins float64 `json:"begins,omitempty"` // of a step: p50, in ms since the call came in
	Share  float64 `json:"share,omitempty"`  // of a step: p50 in parts of the call's
}

// dist is a distribution of samples.
type dist struct {
	N       int       `json:"n"`
	Min     float64   `json:"min"`
	P50     float64   `json:"p50"`
	P95     float64   `json:"p95"`
	Max     float64   `json:"max"`
	Samples []float64 `json:"samples"`
}

// newDist is nil without samples.
func newDist(samples []float64) *dist {
	if len(samples) == 0 {
		return nil
	}
	d := slices.Sorted(slices.Values(samples))
	return &dist{
		N: len(d), Min: d[0], P50: (d[(len(d)-1)/2] + d[len(d)/2]) / 2, P95: d[int(math.Ceil(0.95*float64(len(d))))-1], Max: d[len(d)-1],
		Samples: samples,
	}
}

// times is a distribution in milliseconds.
func times(d []time.Duration) *dist {
	samples := make([]float64, len(d))
	for i, t := range d {
		samples[i] = float64(t.Microseconds()) / 1000
	}
	return newDist(samples)
}

// over is the ratio of two medians, 0 when one was not measured.
func over(a, b *dist) float64 {
	if a == nil || b == nil || b.P50 == 0 {
		return 0
	}
	return a.P50 / b.P50
}

// compare adds a ratio to the section if both were measured.
func (s *section) compare(name string, a, b *dist, bar float64, atLeast bool) {
	if v := over(a, b); v != 0 {
		s.Ratios = append(s.Ratios, ratio{name, v, bar, atLeast})
	}
}

// table adds a table.
func (s *section) table(title string) *table {
	t := &table{Title: title}
	s.Tables = append(s.Tables, t)
	return t
}

// add adds a row if anything of it was measured.
func (t *table) add(name, unit string, crivm, peer *dist) {
	if crivm != nil || peer != nil {
		t.Rows = append(t.Rows, row{Name: name, Unit: unit, Crivm: crivm, Peer: peer})
	}
}

// missed lists the bars that are not met.
func (r *report) missed() (missed []string) {
	for _, s := range r.Sections {
		for _, q := range s.Ratios {
			if q.Bar != 0 && !q.met() {
				missed = append(missed, fmt.Sprintf("%s: %.2f, bar %.2f", q.Name, q.Value, q.Bar))
			}
		}
	}
	return missed
}

// put replaces a section or adds it, in the order of the list of sections.
func (r *report) put(s *section) {
	r.Sections = slices.DeleteFunc(r.Sections, func(old *section) bool { return old.Name == s.Name })
	r.Sections = append(r.Sections, s)
	place := func(name string) int {
		return slices.IndexFunc(measurements, func(m measurement) bool { return m.name == name })
	}
	slices.SortStableFunc(r.Sections, func(a, b *section) int { return place(a.Name) - place(b.Name) })
}

// print writes a section for people.
func (s *section) print(w io.Writer) {
	m := s.Machine
	fmt.Fprintf(w, "%s\n\n", s.Title)
	fmt.Fprintf(w, "measured   %s, in %s\n", s.Date.Format("2006-01-02 15:04"), time.Duration(s.Took*float64(time.Second)).Round(time.Second))
	fmt.Fprintf(w, "machine    %s, %d CPUs, %d MiB, Linux %s\n", m.CPU, m.CPUs, m.MemoryMiB, m.Kernel)
	fmt.Fprintf(w, "VMM        %s, acceleration %s; guest Linux %s\n", m.VMM, m.Acceleration, m.GuestKernel)
	if m.Peer != "" {
		fmt.Fprintf(w, "beside it  %s\n", m.Peer)
	}
	fmt.Fprintf(w, "load       %s before, %s after\n", s.LoadBefore, s.LoadAfter)
	if busy := max(oneMinute(s.LoadBefore), oneMinute(s.LoadAfter)) / float64(max(m.CPUs, 1)); busy > 4 {
		fmt.Fprintf(w, "BUSY       %.0f runnable tasks a CPU from other work: take no figure of this section for more than a hint\n", busy)
	}
	if len(s.Ratios) > 0 {
		fmt.Fprintln(w)
		t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
		for _, q := range s.Ratios {
			bar, verdict := "", "met"
			if !q.met() {
				verdict = "MISSED"
			}
			if q.Bar != 0 && q.AtLeast {
				bar = fmt.Sprintf("bar: at least %.2f, %s", q.Bar, verdict)
			} else if q.Bar != 0 {
				bar = fmt.Sprintf("bar: at most %.2f, %s", q.Bar, verdict)
			}
			fmt.Fprintln(t, strings.TrimRight(fmt.Sprintf("%s\t%.2f\t%s", q.Name, q.Value, bar), "\t"))
		}
		t.Flush()
	}
	for _, t := range s.Tables {
		fmt.Fprintln(w)
		t.print(w)
	}
	for _, n := range s.Notes {
		fmt.Fprintf(w, "\n%s\n", n)
	}
}

// oneMinute is the first of three load averages; 0 when there is none.
func oneMinute(load string) float64 {
	first, _, _ := strings.Cut(load, " ")
	f, err := strconv.ParseFloat(first, 64)
	if err != nil {
		return 0
	}
	return f
}

func (t *table) print(out io.Writer) {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	defer w.Flush()
	if t.Steps {
		fmt.Fprintf(w, "%s\tbegins\tp50\tp95\tshare\n", t.Title)
		for _, r := range t.Rows {
			fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%.0f %%\n", r.Name, number(r.Begins), number(r.Crivm.P50), number(r.Crivm.P95), 100*r.Share)
		}
		return
	}
	beside := slices.ContainsFunc(t.Rows, func(r row) bool { return r.Peer != nil })
	if beside {
		fmt.Fprintf(w, "%s\t\tcrivm p50\tp95\tn\tcontainerd p50\tp95\tn\tratio\n", t.Title)
	} else {
		fmt.Fprintf(w, "%s\t\tp50\tp95\tn\n", t.Title)
	}
	for _, r := range t.Rows {
		cells := append([]string{r.Name, r.Unit}, r.Crivm.cells()...)
		if beside {
			cells = append(cells, r.Peer.cells()...)
			if q := over(r.Crivm, r.Peer); q != 0 {
				cells = append(cells, fmt.Sprintf("%.2f", q))
			}
		}
		fmt.Fprintln(w, strings.Join(cells, "\t"))
	}
}

func (d *dist) cells() []string {
	if d == nil {
		return []string{"", "", ""}
	}
	return []string{number(d.P50), number(d.P95), fmt.Sprint(d.N)}
}

// number has three digits or so.
func number(f float64) string {
	switch {
	case math.Abs(f) >= 100:
		return fmt.Sprintf("%.0f", f)
	case math.Abs(f) >= 10:
		return fmt.Sprintf("%.1f", f)
	}
	return fmt.Sprintf("%.2f", f)
}

// load reads what earlier runs have measured.
func load(path string) (*report, error) {
	r := &report{}
	text, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return r, nil
	}
	if err == nil {
		err = json.Unmarshal(text, r)
	}
	if err != nil {
		return nil, fmt.Errorf("figures of earlier runs: %w", err)
	}
	return r, nil
}

// save writes everything for programs.
func (r *report) save(path string) error {
	text, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(path, append(text, '\n'), 0o644)
}
