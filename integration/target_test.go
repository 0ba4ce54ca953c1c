//go:build integration

package integration

import (
	"strings"
	"testing"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// An ephemeral container (kubectl debug --target) sees the processes of the container that it is for, of no other one,
// and can reach its root file system.
func TestPIDNamespaceOfATarget(t *testing.T) {
	parallel(t)
	p := runPod(t, shared)
	target := p.start("echo mine > /tmp/mark; exec sleep 4711")
	p.start("exec sleep 4712")
	into := func(id string) func(*cri.ContainerConfig) {
		return func(c *cri.ContainerConfig) {
			c.Linux.SecurityContext.NamespaceOptions = &cri.NamespaceOption{Pid: cri.NamespaceMode_TARGET, TargetId: id}
			c.Linux.SecurityContext.Capabilities = &cri.Capability{AddCapabilities: []string{"SYS_PTRACE"}}
		}
	}
	st, log := p.run("tr '\\0' ' ' < /proc/1/cmdline; echo; ps; cat /proc/1/root/tmp/mark; kill -0 1 && echo reached", into(target))
	if !strings.HasPrefix(log, "sleep 4711 \n") || strings.Contains(log, "4712") || !strings.HasSuffix(log, "mine\nreached\n") || st.ExitCode != 0 {
		t.Errorf("in the target's PID namespace: %q, exit code %d", log, st.ExitCode)
	}
	if resp, err := p.n.Runtime.ContainerStatus(t.Context(), target, false); err != nil || resp.Status.State != cri.ContainerState_CONTAINER_RUNNING {
		t.Errorf("the target is %v (%v) after the end of the other one", resp, err)
	}
	other := runPod(t, shared)
	if _, err := other.create("true", into(target)); err == nil || !strings.Contains(err.Error(), target) {
		t.Errorf("a target in another pod: %v", err)
	}
}
