package cni

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
)

// phase is how far a pod's network has come. It is written before the effect that it announces.
//
//	Prepare → prepared ──Add──▶ adding ──▶ added
//	             └───────────────┴──Del──────┴──▶ no record
type phase string

const (
	phasePrepared phase = "prepared" // no plugin has run: Del runs none either
	phaseAdding   phase = "adding"   // plugins may have run: Del runs DEL
	phaseAdded    phase = "added"    // Attachment is valid
)

// record is what Del, Check and GC need to know of a pod, in a later daemon too.
type record struct {
	ID             string
	Phase          phase
	TapUID, TapGID int
	Network        string         `json:",omitempty"` // name of the network that ADD was started for
	Config         []byte         `json:",omitempty"` // its configuration list, complete in itself
	Args           [][2]string    `json:",omitempty"` // CNI_ARGS
	Capabilities   map[string]any `json:",omitempty"`
	Attachment     *Attachment    `json:",omitempty"`
}

func (n *Network) recordDir() string { return filepath.Join(n.config.CacheDir, "pods") }

func (n *Network) recordPath(id string) string { return filepath.Join(n.recordDir(), id+".json") }

// newPath is of a record that is being written; a daemon that was killed amid it leaves it behind.
func (n *Network) newPath(id string) string { return n.recordPath(id) + ".new" }

// readRecord fails with errdefs.ErrNotFound for an unknown pod.
func (n *Network) readRecord(id string) (record, error) {
	data, err := os.ReadFile(n.recordPath(id))
	if errors.Is(err, fs.ErrNotExist) {
		return record{}, fmt.Errorf("network of %s: no record: %w", id, errdefs.ErrNotFound)
	}
	if err != nil {
		return record{}, fmt.Errorf("network of %s: %w", id, err)
	}
	var rec record
	if err := json.Unmarshal(data, &rec); err != nil {
		return record{}, fmt.Errorf("network of %s: record %s: %s: %w", id, n.recordPath(id), err.Error(), errdefs.ErrDataLoss)
	}
	if rec.ID != id || (rec.Phase == phaseAdded) != (rec.Attachment != nil) {
		return record{}, fmt.Errorf("network of %s: record %s is inconsistent: %w", id, n.recordPath(id), errdefs.ErrDataLoss)
	}
	return rec, nil
}

// writeRecord replaces the record as a whole. It is not flushed to disk: what it describes does not
// survive a crash of the kernel either, save for IPAM leases, which DEL with the current configuration
// and GC return.
func (n *Network) writeRecord(rec record) error {
	data, err := json.Marshal(rec)
	if err != nil {
		return fmt.Errorf("network of %s: record: %w", rec.ID, err)
	}
	if err := os.WriteFile(n.newPath(rec.ID), data, 0o600); err != nil {
		return fmt.Errorf("network of %s: %w", rec.ID, err)
	}
	if err := os.Rename(n.newPath(rec.ID), n.recordPath(rec.ID)); err != nil {
		return fmt.Errorf("network of %s: %w", rec.ID, err)
	}
	return nil
}

func (n *Network) removeRecord(id string) error {
	for _, path := range []string{n.newPath(id), n.recordPath(id)} {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("network of %s: %w", id, err)
		}
	}
	return nil
}

// recordedIDs lists the pods that have a record, readable or not, or the beginning of one.
func (n *Network) recordedIDs() ([]string, error) {
	entries, err := os.ReadDir(n.recordDir())
	if err != nil {
		return nil, err
	}
	var ids []string
	for _, entry := range entries {
		if id, ok := strings.CutSuffix(strings.TrimSuffix(entry.Name(), ".new"), ".json"); ok && validID(id) == nil {
			ids = append(ids, id)
		}
	}
	return ids, nil
}
