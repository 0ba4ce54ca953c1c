package server

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// conditionStorage is a condition of Status beside those that CRI knows: false while something that must not be lost
// cannot be written. kubelet ignores it; `crictl info` shows it.
const conditionStorage = "StorageWritable"

// troubles are writes that fail and are tried again, by what they write. Safe for concurrent use.
type troubles struct {
	mu      sync.Mutex
	current map[string]error
}

// note remembers the result of a try; nil ends the trouble.
func (t *troubles) note(what string, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if err == nil {
		delete(t.current, what)
		return
	}
	if t.current == nil {
		t.current = map[string]error{}
	}
	t.current[what] = err
}

// shownTroubles bounds a condition's message.
const shownTroubles = 5

func (t *troubles) condition() *cri.RuntimeCondition {
	t.mu.Lock()
	defer t.mu.Unlock()
	c := &cri.RuntimeCondition{Type: conditionStorage, Status: len(t.current) == 0}
	if c.Status {
		return c
	}
	c.Reason = "WritesFail"
	var parts []string
	for i, what := range slices.Sorted(maps.Keys(t.current)) {
		if i == shownTroubles {
			parts = append(parts, fmt.Sprintf("and %d more", len(t.current)-i))
			break
		}
		parts = append(parts, fmt.Sprintf("%s: %v", what, t.current[what]))
	}
	c.Message = strings.Join(parts, "; ")
	return c
}
