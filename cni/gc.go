package cni

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"
)

// GC removes the networks of all pods but those in keep and those this process has prepared: what is
// recorded, cached or has a namespace file gets a Del. Then plugins that know the GC verb (CNI 1.1) are
// told which attachments are valid, so that they drop what even the records do not know. All is tried;
// the errors are joined.
func (n *Network) GC(ctx context.Context, keep []string) error {
	kept := map[string]bool{}
	for _, id := range keep {
		kept[id] = true
	}
	found, err := n.knownIDs()
	if err != nil {
		return fmt.Errorf("CNI GC: %w", err)
	}
	var errs []error
	for _, id := range found {
		if kept[id] {
			continue
		}
		if err := n.collect(ctx, id); err != nil {
			errs = append(errs, fmt.Errorf("CNI GC: %w", err))
		}
	}
	if ctx.Err() != nil {
		return errors.Join(append(errs, fmt.Errorf("CNI GC: %w", ctx.Err()))...)
	}

	list, err := n.configuredNetwork()
	if err != nil {
		return errors.Join(errs...) // no plugins to tell
	}
	n.collecting.Lock()
	defer n.collecting.Unlock()
	n.live.Range(func(id, _ any) bool {
		kept[id.(string)] = true
		return true
	})
	args := &libcni.GCArgs{ValidAttachments: []types.GCAttachment{}}
	for id := range kept {
		args.ValidAttachments = append(args.ValidAttachments, types.GCAttachment{ContainerID: id, IfName: ifName})
	}
	slices.SortFunc(args.ValidAttachments, func(a, b types.GCAttachment) int { return strings.Compare(a.ContainerID, b.ContainerID) })
	ctx, cancel := context.WithTimeout(ctx, n.config.DelTimeout)
	defer cancel()
	for _, err := range unjoin(n.libcni.GCNetworkList(ctx, list, args)) {
		if !verbUnknown(err) {
			errs = append(errs, fmt.Errorf("CNI GC: network %q: %w", list.Name, classify(ctx, err)))
		}
	}
	return errors.Join(errs...)
}

// Trace is what there is of one pod's network.
type Trace struct {
	ID    string
	Paths []string // record, cached results, namespace file
}

// Traces lists every pod of which there is a trace, but those that this process has prepared.
func (n *Network) Traces() ([]Trace, error) {
	ids, err := n.knownIDs()
	if err != nil {
		return nil, fmt.Errorf("networks of pods: %w", err)
	}
	var found []Trace
	for _, id := range ids {
		if _, live := n.live.Load(id); live {
			continue
		}
		t := Trace{ID: id}
		for _, pattern := range []string{n.recordPath(id), n.newPath(id), filepath.Join(n.config.CacheDir, "results", "*-"+id+"-*"), n.netnsPath(id)} {
			paths, err := filepath.Glob(pattern)
			if err != nil {
				return nil, fmt.Errorf("network of %s: %w", id, err)
			}
			t.Paths = append(t.Paths, paths...)
		}
		found = append(found, t)
	}
	return found, nil
}

// collect removes one pod's network unless this process has taken the id into use meanwhile.
func (n *Network) collect(ctx context.Context, id string) error {
	unlock, err := n.pods.lock(ctx, id)
	if err != nil {
		return fmt.Errorf("network of %s: %w", id, err)
	}
	defer unlock()
	if _, ok := n.live.Load(id); ok {
		return nil
	}
	return n.delLocked(ctx, Pod{ID: id})
}

// knownIDs lists every pod of which there is a trace.
func (n *Network) knownIDs() ([]string, error) {
	ids, err := n.recordedIDs()
	if err != nil {
		return nil, err
	}
	cached, err := n.libcni.GetCachedAttachments("")
	if err != nil {
		return nil, fmt.Errorf("cached results: %w", err)
	}
	for _, c := range cached {
		ids = append(ids, c.ContainerID)
	}
	files, err := os.ReadDir(n.config.NetnsDir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	for _, file := range files {
		if id, ok := strings.CutPrefix(file.Name(), netnsPrefix); ok {
			ids = append(ids, id)
		}
	}
	ids = slices.DeleteFunc(ids, func(id string) bool { return validID(id) != nil })
	slices.Sort(ids)
	return slices.Compact(ids), nil
}

func unjoin(err error) []error {
	if joined, ok := err.(interface{ Unwrap() []error }); ok {
		return joined.Unwrap()
	}
	if err == nil {
		return nil
	}
	return []error{err}
}
