//go:build integration

package critest

import (
	"encoding/xml"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
)

// page is written from a run, never by hand.
const page = "../../docs/conformance.md"

// spec is what one of critest's specs came to.
type spec struct {
	Name    string  `xml:"name,attr"`
	Status  string  `xml:"status,attr"`
	Seconds float64 `xml:"time,attr"`
	Failure struct {
		Message string `xml:"message,attr"`
	} `xml:"failure"`
}

// failed: neither passed nor skipped; ginkgo knows several ways.
func (s spec) failed() bool { return s.Status != "passed" && s.Status != "skipped" }

// readReport reads ginkgo's JUnit file.
func readReport(path string) ([]spec, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var report struct {
		Suites []struct {
			Cases []spec `xml:"testcase"`
		} `xml:"testsuite"`
	}
	if err := xml.Unmarshal(text, &report); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	var specs []spec
	for _, suite := range report.Suites {
		for _, s := range suite.Cases {
			name, isSpec := strings.CutPrefix(s.Name, "[It] ")
			if !isSpec {
				if s.failed() { // something around the specs
					return nil, fmt.Errorf("%s: %s", s.Name, s.Failure.Message)
				}
				continue
			}
			s.Name = strings.TrimPrefix(name, "[k8s.io] ")
			specs = append(specs, s)
		}
	}
	if len(specs) == 0 {
		return nil, fmt.Errorf("no specs in %s", path)
	}
	return specs, nil
}

// checkPage wants docs/conformance.md to say what a run says, or writes it.
func checkPage(t *testing.T, specs []spec) {
	t.Helper()
	if t.Failed() {
		return
	}
	slices.SortFunc(specs, func(a, b spec) int { return strings.Compare(a.Name, b.Name) })
	var skipped, passed strings.Builder
	skips := 0
	for _, s := range specs {
		name := strings.ReplaceAll(s.Name, "|", "\\|")
		if s.Status == "skipped" {
			skips++
			fmt.Fprintf(&skipped, "| %s | %s |\n", name, reason(s.Name))
			continue
		}
		fmt.Fprintf(&passed, "- %s\n", name)
	}
	text := fmt.Sprintf(`# Conformance

What critest v1.36.0, Kubernetes' own tests of container runtimes, says of crivm, on real VMs. This page is written by the test that
runs it (`+"`make conformance`"+`), never by hand; `+"`make test`"+` runs the same and fails when a spec fails, when one is skipped that is
not listed here, and when this page is not true any more. It does so twice: one spec after the other with VMs from a warm pool, and in %d
processes side by side with VMs that boot for each pod; both must come to this. The images that the specs pull are rebuilt from Debian's busybox and served
by a registry on loopback; see `+"`integration/images`"+`.

**%d specs: %d passed, 0 failed, %d skipped.**

## Skipped

| spec | why |
|---|---|
%s
## Passed

%s`, inParallel, len(specs), len(specs)-skips, skips, skipped.String(), passed.String())
	if *update {
		if err := os.WriteFile(page, []byte(text), 0o644); err != nil {
			t.Error(err)
		}
		return
	}
	if old, err := os.ReadFile(page); err != nil || string(old) != text {
		t.Errorf("%s is not what this run says (%v); write it with `make conformance`", page, err)
	}
}
