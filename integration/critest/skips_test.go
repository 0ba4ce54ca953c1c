//go:build integration

package critest

import (
	"strings"
	"testing"
)

// skip is why a spec, or several, is not run; a part of the name suffices.
type skip struct {
	name, reason string
	ask          bool // left out on our own wish; the others skip themselves
	elsewhere    bool // the spec exists on other machines only
}

// skips are all that may be skipped. The list only ever gets shorter.
var skips = []skip{
	{name: "HostIpc is true", reason: "needs a pod that shares the node's IPC namespace; refused until there are host pods", ask: true},
	{name: "HostNetwork is true", reason: "needs a pod that shares the node's network; refused until there are host pods", ask: true},
	{name: "portforward in host network", reason: "needs a pod that shares the node's network; refused until there are host pods", ask: true},
	{name: "HostPID", reason: "needs a pod that shares the node's PIDs; refused until there are host pods. The spec looks at the pod's own processes only and would " +
		"pass with the guest's PIDs, but a pod that asks for the node's must not be given others in silence", ask: true},
	{name: "mount with 'rshared' should support propagation", reason: "Bidirectional propagation is refused: mounts of a VM cannot appear on the node", ask: true},
	{name: "public image with digest should be pulled and removed", reason: "the image is pinned by a digest that only its public registry has", ask: true},
	{name: "AppArmor", reason: "AppArmor profiles are the node's; the guest's kernel has none", ask: true},
	{name: "SELinux", reason: "SELinux labels are the node's; the guest's kernel has none", ask: true, elsewhere: true},
}

// reason why a spec may be skipped; "" when there is none.
func reason(name string) string {
	for _, s := range skips {
		if strings.Contains(name, s.name) {
			return s.reason
		}
	}
	return ""
}

// checkSkips wants a reason for every spec that was skipped, and a skipped spec for every reason.
func checkSkips(t *testing.T, specs []spec) {
	t.Helper()
	needed := map[string]bool{}
	for _, s := range specs {
		if s.Status != "skipped" {
			continue
		}
		why := reason(s.Name)
		if why == "" {
			t.Errorf("%s was skipped, and no reason is listed", s.Name)
		}
		needed[why] = true
	}
	for _, s := range skips {
		if !needed[s.reason] && !s.elsewhere {
			t.Errorf("nothing that is called %q was skipped: take it off the list", s.name)
		}
	}
}
