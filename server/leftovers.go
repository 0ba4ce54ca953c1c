package server

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/crivm/crivm/cni"
	"github.com/crivm/crivm/server/store"
	"github.com/crivm/crivm/vmruntime"
	"github.com/crivm/crivm/vmruntime/virtiofsd"
)

// Leftover is something that was made by this crivm and that no record owns.
type Leftover struct {
	Kind  string `json:"kind"` // process, directory, log position, cgroup, network, image, layer, image disk, download
	Name  string `json:"name"` // path, ID, or pid and command
	Why   string `json:"why"`  // why it is crivm's and nobody's
	Error string `json:"error,omitempty"`

	remove func(context.Context) error
}

// owned is what the records own, by the names of things on the host. What gets a record of a new kind is added here.
type owned struct {
	vms       map[string]bool // directories of VMs and of their file servers
	pods      map[string]bool // directories of sandboxes
	positions map[string]bool
	networks  map[string]bool // IDs
}

func (s *Server) owned() owned {
	o := owned{vms: map[string]bool{}, pods: map[string]bool{}, positions: map[string]bool{}, networks: map[string]bool{}}
	for _, r := range s.store.Sandboxes() {
		o.vms[filepath.Base(r.VMDir)], o.pods[filepath.Base(r.Dir)], o.networks[r.ID] = true, true, true
	}
	for _, r := range s.store.Containers("") {
		o.positions[filepath.Base(s.positionPath(r))] = true
	}
	return o
}

// leftovers lists what stands in crivm's own directories, runs in them or is marked as made for them, and belongs to no
// record. All is listed before the records are looked at: what is made later has its record first, and what is removed
// meanwhile is gone. Nothing outside of these directories is ever looked for by a name that only looks like crivm's.
func (s *Server) leftovers() ([]Leftover, error) {
	var found []Leftover
	var errs []error
	type entry struct{ place, name string }
	listed := map[entry]bool{} // true: a directory
	vms, shares := filepath.Join(s.opts.RunDir, "vm"), filepath.Join(s.opts.RunDir, shareDirs)
	pods, positions := filepath.Join(s.opts.StateDir, "pods"), filepath.Join(s.opts.StateDir, "positions")
	for _, place := range []string{vms, shares, pods, positions} {
		entries, err := os.ReadDir(place)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, err)
		}
		for _, e := range entries {
			listed[entry{place, e.Name()}] = e.IsDir()
		}
	}
	traces, err := vmruntime.Traces(s.opts.RunDir)
	errs = append(errs, err)
	networks, err := s.net.Traces()
	errs = append(errs, err)
	own := s.owned()

	for _, t := range traces {
		relative, err := filepath.Rel(s.opts.RunDir, t.Dir)
		parts := strings.Split(relative, "/")
		if err != nil || len(parts) < 2 || parts[0] != "vm" && parts[0] != shareDirs || own.vms[parts[1]] {
			continue
		}
		dir := filepath.Join(s.opts.RunDir, parts[0], parts[1])
		l := Leftover{
			Kind: "process", Name: fmt.Sprintf("%d (%s)", t.PID, command(t.PID)), Why: "leads a session in " + t.Dir + ", which it was started for; no sandbox has it",
			remove: func(ctx context.Context) error { return s.endProcesses(ctx, dir) },
		}
		if t.PID == 0 {
			l = Leftover{
				Kind: "cgroup", Name: t.Cgroup, Why: "is marked as made for " + t.Dir + "; no sandbox has it",
				remove: func(context.Context) error { return t.RemoveCgroup() },
			}
		}
		found = append(found, l)
	}
	for e, isDir := range listed {
		known := map[string]map[string]bool{vms: own.vms, shares: own.vms, pods: own.pods, positions: own.positions}[e.place]
		path := filepath.Join(e.place, e.name)
		if _, err := os.Lstat(path); known[e.name] || errors.Is(err, fs.ErrNotExist) {
			continue
		}
		l := Leftover{Kind: "directory", Name: path, Why: "is in a directory of crivm's alone; no sandbox has it"}
		if !isDir {
			l.Kind = "file"
		}
		if e.place == positions {
			l.Kind, l.Why = "log position", "is in a directory of crivm's alone; no container has it"
		}
		l.remove = func(ctx context.Context) error {
			if isDir && (e.place == vms || e.place == shares) {
				if err := s.endProcesses(ctx, path); err != nil {
					return err
				}
			}
			if err := unmounted(path); err != nil {
				return err
			}
			return os.RemoveAll(path)
		}
		found = append(found, l)
	}
	for _, t := range networks {
		gone := !slices.ContainsFunc(t.Paths, func(path string) bool { _, err := os.Lstat(path); return err == nil })
		if !own.networks[t.ID] && !gone {
			found = append(found, Leftover{Kind: "network", Name: t.ID, Why: "crivm has made it (" + strings.Join(t.Paths, ", ") + "); there is no such sandbox"})
		}
	}
	order := []string{"process", "directory", "file", "log position", "cgroup", "network"}
	slices.SortFunc(found, func(a, b Leftover) int {
		if c := slices.Index(order, a.Kind) - slices.Index(order, b.Kind); c != 0 {
			return c
		}
		return strings.Compare(a.Name, b.Name)
	})
	return found, errors.Join(errs...)
}

// removeLeftovers removes leftovers and what the network plugins have of pods that are gone. Each is tried; what fails has an
// Error.
func (s *Server) removeLeftovers(ctx context.Context) ([]Leftover, error) {
	found, err := s.leftovers()
	for i := range found {
		l := &found[i]
		s.log.Warn("removing what no record owns", "kind", l.Kind, "name", l.Name, "why", l.Why)
		if l.remove == nil {
			continue
		}
		if err := l.remove(ctx); err != nil {
			s.log.Error("removing what no record owns", "kind", l.Kind, "name", l.Name, "error", err)
			l.Error = err.Error()
		}
	}
	keep := slices.Collect(maps.Keys(s.owned().networks))
	if gcErr := s.net.GC(ctx, keep); gcErr != nil && ctx.Err() == nil {
		s.log.Warn("collecting leftovers of the network", "error", gcErr)
		left, _ := s.net.Traces()
		for i := range found {
			if found[i].Kind == "network" && slices.ContainsFunc(left, func(t cni.Trace) bool { return t.ID == found[i].Name }) {
				found[i].Error = gcErr.Error()
			}
		}
	}
	return found, err
}

// endProcesses ends what runs with the directory of a VM or of a file server, which may be gone, and removes it and their
// cgroups.
func (s *Server) endProcesses(ctx context.Context, dir string) error {
	if err := unmounted(dir); err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil { // for the records of the sweep
		return err
	}
	var errs []error
	for _, driver := range s.drivers() {
		errs = append(errs, driver.Sweep(ctx, filepath.Base(dir), dir))
	}
	return errors.Join(append(errs, virtiofsd.Sweep(ctx, dir))...)
}

// drivers are those of all handlers, each once.
func (s *Server) drivers() map[string]Driver {
	all := map[string]Driver{}
	for _, h := range s.opts.Handlers {
		all[h.Driver.Name()] = h.Driver
	}
	return all
}

// unmounted fails when somebody has mounted something at or below a path that is about to be removed: its files are not
// crivm's.
func unmounted(path string) error {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return err
	}
	defer f.Close()
	for lines := bufio.NewScanner(f); lines.Scan(); {
		fields := strings.Fields(lines.Text())
		if len(fields) > 4 && (fields[4] == path || strings.HasPrefix(fields[4], path+"/")) {
			return fmt.Errorf("%s is mounted there: %w", fields[4], errdefs.ErrFailedPrecondition)
		}
	}
	return nil
}

func command(pid int) string {
	name, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
	if err != nil {
		return "ended"
	}
	return strings.TrimSpace(string(name))
}

// CollectStopped is Collect for a crivm that does not run: it opens the records for reading, and changes nothing but
// what it removes. NotFound without a database: everything would be a leftover.
func CollectStopped(ctx context.Context, opts Options, network Network, images ImageLeftovers, dryRun bool) (Collected, error) {
	path := filepath.Join(opts.StateDir, "crivm.db")
	if _, err := os.Stat(path); err != nil {
		return Collected{}, fmt.Errorf("records of crivm, without which nothing can be told from a leftover: %w: %w", err, errdefs.ErrNotFound)
	}
	records, err := store.OpenReadOnly(path)
	if err != nil {
		return Collected{}, err
	}
	s := newServer(opts, records, network, nil)
	c, err := s.Collect(ctx, images, dryRun)
	return c, errors.Join(err, records.Close())
}
