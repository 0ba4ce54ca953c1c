package guest

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"os"
	"path/filepath"
	"sync"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// filterAnnotation gives crun a system call filter that is compiled already (crun(1)). Other runtimes ignore it
// and compile the spec's profile, which stays in place.
const filterAnnotation = "run.oci.seccomp_bpf_data"

const (
	// maxFilter is the largest filter that the kernel takes, in bytes.
	maxFilter = 4096 * filterInstruction
	// filterInstruction is the size of one instruction.
	filterInstruction = 8
	// keptFilters bounds the cache. A pod's containers mostly have the same profile.
	keptFilters = 8
)

// filterCache keeps compiled system call filters. Compiling the usual profile takes crun most of the time of
// creating a container, and crun leaves the result in its state directory.
type filterCache struct {
	mu      sync.Mutex
	filters map[[sha256.Size]byte]string // profile → filter, base64
}

// filterKey identifies a profile.
func filterKey(p *specs.LinuxSeccomp) ([sha256.Size]byte, bool) {
	b, err := json.Marshal(p)
	return sha256.Sum256(b), p != nil && err == nil
}

// apply adds the compiled filter to a spec, if there is one for its profile.
func (f *filterCache) apply(s *specs.Spec) {
	key, ok := filterKey(s.Linux.Seccomp)
	if !ok {
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if filter, ok := f.filters[key]; ok {
		s.Annotations = map[string]string{filterAnnotation: filter}
	}
}

// learn keeps the filter that the runtime has compiled for a container, if it left one.
func (f *filterCache) learn(s *specs.Spec, stateDir string) {
	key, ok := filterKey(s.Linux.Seccomp)
	if !ok || s.Annotations[filterAnnotation] != "" {
		return
	}
	b, err := os.ReadFile(filepath.Join(stateDir, "seccomp.bpf"))
	if err != nil || len(b) == 0 || len(b) > maxFilter || len(b)%filterInstruction != 0 {
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.filters == nil || len(f.filters) >= keptFilters {
		f.filters = map[[sha256.Size]byte]string{}
	}
	f.filters[key] = base64.StdEncoding.EncodeToString(b)
}
