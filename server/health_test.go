package server

import (
	"strings"
	"testing"
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crivm/crivm/vmruntime/vmtest"
)

// TestSilentGuest: a guest that does not answer, or with nonsense only, is ended within the limit; one that lives goes
// on, and so do the other pods.
func TestSilentGuest(t *testing.T) {
	const limit = 3 * time.Second
	for name, silence := range map[string]func(*testing.T, *rig, string){
		"stopped": func(t *testing.T, r *rig, pod string) {
			vm, err := r.sandbox(pod).machine()
			if err != nil {
				t.Fatal(err)
			}
			if err := vm.Pause(t.Context()); err != nil {
				t.Fatal(err)
			}
		},
		"nonsense": func(t *testing.T, r *rig, pod string) {
			r.spoil(pod, vmtest.Faults{VsockReply: "OK 1\nnonsense without an end"})
		},
		"flood": func(t *testing.T, r *rig, pod string) {
			r.spoil(pod, vmtest.Faults{VsockReply: strings.Repeat("x", 8<<20)})
		},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t)
			handler := r.opts.Handlers[""]
			handler.HealthTimeout = limit
			r.opts.Handlers[""] = handler
			r.restart()
			pod, other := r.runPod("a"), r.runPod("b")
			id, well := r.run(pod, "c", "exec sleep 1000"), r.run(other, "d", "exec sleep 1000")
			start := time.Now()
			silence(t, r, pod)
			s := r.exit(id)
			took := time.Since(start)
			if s.GetExitCode() != 137 || !strings.Contains(s.GetMessage(), "silent") {
				t.Errorf("container of a silent guest is %v", s)
			}
			if took > limit+2*time.Second { // the machine may be slow, the limit is not
				t.Errorf("noticed after %s", took)
			}
			status, err := r.PodSandboxStatus(t.Context(), &cri.PodSandboxStatusRequest{PodSandboxId: pod})
			if err != nil || status.GetStatus().GetState() != cri.PodSandboxState_SANDBOX_NOTREADY {
				t.Errorf("sandbox of a silent guest is %v (%v)", status, err)
			}
			exec, err := r.ExecSync(t.Context(), &cri.ExecSyncRequest{ContainerId: well, Cmd: []string{"true"}, Timeout: 20})
			if err != nil || exec.GetExitCode() != 0 {
				t.Errorf("exec in the other pod: %v (%v)", exec, err)
			}
			if _, err := r.StopPodSandbox(t.Context(), &cri.StopPodSandboxRequest{PodSandboxId: pod}); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestStuckConnection: a guest that answers on a new connection is not silent.
func TestStuckConnection(t *testing.T) {
	r := newRig(t)
	pod := r.runPod("a")
	sb := r.sandbox(pod)
	vm, err := sb.machine()
	if err != nil {
		t.Fatal(err)
	}
	if err := sb.dial.lock(t.Context()); err != nil { // somebody hangs in dialling
		t.Fatal(err)
	}
	sb.disconnect()
	r.watchHealth(sb, vm, 4*time.Second) // a hello has 1.4 s, for a machine that is busy
	select {
	case <-vm.Done():
		t.Error("the VM was ended: " + vm.Exit().Reason)
	case <-time.After(5 * time.Second):
	}
	sb.dial.unlock()
}

// spoil makes faults of a pod's VM happen to the next connection to its agent, and breaks the one that there is.
func (r *rig) spoil(pod string, f vmtest.Faults) {
	r.t.Helper()
	rec, err := r.store.Sandbox(pod)
	if err != nil {
		r.t.Fatal(err)
	}
	vmtest.Inject(r.t, rec.VMDir, f)
	r.sandbox(pod).disconnect()
}
