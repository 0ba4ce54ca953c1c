//go:build integration

package integration

import (
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestDaemonRestart(t *testing.T) {
	p := runPod(t, shared)
	const lines = 100_000
	script, image := writer(lines, 1, "echo written > /done; sleep 1000")
	writer := p.start(script, image)
	sleeper := p.start("sleep 1000")
	created, err := p.create("sleep 1000")
	if err != nil {
		t.Fatal(err)
	}
	short := p.start("sleep 6; exit 9")
	ip := p.status().Network.Ip
	for i, end := range []func() error{shared.KillDaemon, shared.StopDaemon, shared.KillDaemon} {
		if err := end(); err != nil {
			t.Fatalf("end %d: %v", i, err)
		}
		if err := shared.StartDaemon(testContext(t, 2*time.Minute)); err != nil {
			t.Fatal(err)
		}
		status := p.status()
		if status.State != cri.PodSandboxState_SANDBOX_READY || status.Network.Ip != ip {
			t.Fatalf("after restart %d the sandbox is %v", i, status)
		}
		if out := p.exec(sleeper, "echo", "alive"); out != "alive\n" {
			t.Errorf("exec after restart %d says %q", i, out)
		}
	}
	if s := p.wait(short); s.ExitCode != 9 {
		t.Errorf("exit code over a restart is %d, want 9", s.ExitCode)
	}
	if err := shared.Runtime.StartContainer(t.Context(), created); err != nil {
		t.Errorf("starting a container that was created before: %v", err)
	}
	eventually(t, 2*time.Minute, "the writer has written all", func() error {
		_, _, err := shared.Runtime.ExecSync(t.Context(), writer, []string{"cat", "/done"}, 30*time.Second)
		return err
	})
	eventually(t, time.Minute, "the last line is logged", func() error {
		if text := p.logText(writer); !strings.Contains(text, fmt.Sprintf("%09d ", lines)) {
			return fmt.Errorf("log has %d bytes", len(text))
		}
		return nil
	})
	numbered(t, p.logText(writer), lines)
}

func TestDeadVM(t *testing.T) {
	p := runPod(t, shared)
	c := p.start("sleep 1000")
	vmm, err := os.FindProcess(p.vmmPID())
	if err != nil {
		t.Fatal(err)
	}
	killed := time.Now()
	if err := vmm.Kill(); err != nil {
		t.Fatal(err)
	}
	eventually(t, 2*time.Second, "the sandbox is NOTREADY and its container EXITED", func() error {
		if s := p.status(); s.State != cri.PodSandboxState_SANDBOX_NOTREADY {
			return fmt.Errorf("sandbox is %s", s.State)
		}
		resp, err := shared.Runtime.ContainerStatus(t.Context(), c, false)
		if err != nil {
			return err
		}
		if s := resp.Status; s.State != cri.ContainerState_CONTAINER_EXITED || s.ExitCode == 0 || s.Reason == "" {
			return fmt.Errorf("container is %v", s)
		}
		return nil
	})
	t.Logf("the death of a real VMM was told after %s", time.Since(killed).Round(time.Millisecond))
	if _, err := p.create("true"); err == nil {
		t.Error("a container can be made in a dead sandbox")
	}
}

// vmmPID is the pod's VMM.
func (p *pod) vmmPID() int {
	p.t.Helper()
	answer, err := p.n.Runtime.PodSandboxStatus(p.t.Context(), p.id, true)
	if err != nil {
		p.t.Fatal(err)
	}
	var info struct{ PID int }
	if err := json.Unmarshal([]byte(answer.Info["info"]), &info); err != nil || info.PID < 2 {
		p.t.Fatalf("VMM process %d: %v", info.PID, err)
	}
	return info.PID
}
