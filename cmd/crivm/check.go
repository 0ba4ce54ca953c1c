package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/crivm/crivm/conf"
)

// checkLimit bounds all of `crivm check`.
const checkLimit = time.Minute

// status is how a finding bears on the node.
type status string

const (
	statusOK      status = "ok"
	statusWarning status = "warning" // pods run, but not as well or as safely as they could
	statusFail    status = "FAIL"    // pods do not run
)

// finding is one line of `crivm check`.
type finding struct {
	Name   string `json:"name"`
	Status status `json:"status"`
	Detail string `json:"detail"`           // what was found
	Advice string `json:"advice,omitempty"` // what to do about it
}

func ok(name, format string, args ...any) finding {
	return finding{Name: name, Status: statusOK, Detail: fmt.Sprintf(format, args...)}
}

func warning(name, advice, format string, args ...any) finding {
	return finding{name, statusWarning, fmt.Sprintf(format, args...), advice}
}

func fail(name, advice, format string, args ...any) finding {
	return finding{name, statusFail, fmt.Sprintf(format, args...), advice}
}

// report is the whole of `crivm check`.
type report struct {
	Fit      bool      `json:"fit"`
	Version  string    `json:"version"` // of crivm
	Findings []finding `json:"findings"`
}

func newReport(findings []finding) report {
	r := report{Fit: true, Version: version, Findings: findings}
	for _, f := range findings {
		r.Fit = r.Fit && f.Status != statusFail
	}
	return r
}

// errUnfit is what `crivm check` ends with when a finding is a failure.
var errUnfit = errors.New("this node cannot run pods: see the lines marked FAIL")

func checkCommand() *cobra.Command {
	var path string
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "check",
		Short: "Tell whether this node is fit to run pods; exit status 1 when it is not",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctx, cancel := context.WithTimeout(cmd.Context(), checkLimit)
			defer cancel()
			r := newReport(checkNode(ctx, path, cmd.Flags().Changed("config")))
			write := r.writeText
			if asJSON {
				write = func(w io.Writer) error { return writeJSON(w, r) }
			}
			if err := write(cmd.OutOrStdout()); err != nil {
				return err
			}
			if !r.Fit {
				return errUnfit
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&path, "config", defaultConfigPath, "configuration file; conf.d beside it is read too")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

// checkNode looks at everything that pods need. A configuration that cannot be read is a finding like
// others; the rest is then checked against the defaults.
func checkNode(ctx context.Context, path string, mustExist bool) []finding {
	config, err := conf.Load(path, mustExist)
	findings := []finding{ok("configuration", "%s", path)}
	if _, statErr := os.Stat(path); statErr != nil {
		findings[0] = ok("configuration", "defaults, as there is no %s", path)
	}
	if err != nil {
		findings[0] = fail("configuration", "correct the file; `crivm config default` prints one with every key explained", "%v", err)
		config = conf.Default()
	}
	findings = append(findings, checkRoot())
	findings = append(findings, checkVMMs(ctx, config)...)
	findings = append(findings, checkGuestImages(config)...)
	findings = append(findings, checkCgroups(config.CRI.CgroupDriver, "/sys/fs/cgroup", "/proc/cgroups"))
	findings = append(findings, checkNetwork(config.CNI)...)
	findings = append(findings, checkPrograms()...)
	findings = append(findings, checkFilesystems("/proc/filesystems"))
	findings = append(findings, checkSpace("state_dir", config.StateDir))
	if !strings.HasPrefix(config.Image.Root, config.StateDir+"/") {
		findings = append(findings, checkSpace("image.root", config.Image.Root))
	}
	findings = append(findings, checkSysctls("/proc/sys")...)
	return findings
}

// writeText prints a line a finding, with what to do on a line of its own.
func (r report) writeText(w io.Writer) error {
	table := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, f := range r.Findings {
		fmt.Fprintf(table, "%s\t%s\t%s\n", f.Status, f.Name, oneLine(f.Detail))
		if f.Advice != "" {
			fmt.Fprintf(table, "\t\t→ %s\n", f.Advice)
		}
	}
	verdict := "This node is fit to run pods."
	if !r.Fit {
		verdict = "This node is NOT fit to run pods."
	}
	fmt.Fprintf(table, "\n%s\n", verdict)
	return table.Flush()
}

// writeJSON is what --json prints of every command.
func writeJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	e.SetEscapeHTML(false)
	return e.Encode(v)
}
