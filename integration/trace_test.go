//go:build integration

package integration

import (
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestTrace has `crivm trace` tell where the time of a real pod's start went, in the guest too.
func TestTrace(t *testing.T) {
	p := runPod(t, shared)
	p.start("sleep 1000")
	crivm := filepath.Join(shared.Build, "bin/crivm")
	config := filepath.Join(shared.Dir, "config.toml")
	out, err := exec.CommandContext(t.Context(), crivm, "trace", "--config", config, p.config.Metadata.Name).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	t.Logf("\n%s", out)
	for _, want := range []string{
		"RunPodSandbox", "cni add", "boot to agent", "guest: kernel and initramfs", "guest: agent begins", "setup in guest", "guest: network",
		"CreateContainer", "image disk", "guest: root file system", "guest: OCI runtime create", "StartContainer", "guest: OCI runtime start",
	} {
		if !strings.Contains(string(out), want) {
			t.Errorf("no %q in the trace", want)
		}
	}
	for _, plugin := range []string{"bridge", "portmap"} {
		if !strings.Contains(string(out), "cni add: "+plugin) {
			t.Errorf("no span of the plugin %s", plugin)
		}
	}
	if out, err := exec.CommandContext(t.Context(), crivm, "trace", "--config", config, "no-such-pod").CombinedOutput(); err == nil || !strings.Contains(string(out), "no pod") {
		t.Errorf("of no pod: %v: %s", err, out)
	}
}
