package server

import (
	"context"
	"encoding/json"
	"strings"
	"testing"
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// awaitSlot waits until the pool has a slot, as Status tells; the daemon may die amid it.
func (n *killNode) awaitSlot() {
	n.t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for limit := time.Now().Add(2 * time.Minute); time.Now().Before(limit); <-tick.C {
		var pools []PoolFigures
		n.must("Status", func(ctx context.Context) error {
			resp, err := n.cri.Status(ctx, &cri.StatusRequest{Verbose: true})
			if err != nil {
				return err
			}
			return json.Unmarshal([]byte(resp.GetInfo()["pools"]), &pools)
		})
		if len(pools) == 1 && pools[0].Ready == 1 {
			return
		}
	}
	n.t.Fatal("the pool has no slot")
}

// drain turns the pool off, which a restart does.
func (n *killNode) drain() {
	n.t.Helper()
	n.kill()
	n.plan.Pool = 0
	n.start()
}

// slotStory is a pod that takes a slot, the pool that is filled again, and its end.
func slotStory(n *killNode) {
	n.awaitSlot()
	pod := n.runPod()
	job := n.create(pod, "job", "exit 3")
	n.startContainer(job)
	if s := n.exit(job); s.GetExitCode() != 3 {
		n.t.Errorf("job is %v", s)
	}
	n.once("job")
	n.stays(pod)
	n.removePod(pod)
	n.awaitSlot()
	n.drain()
}

// drainStory is a pool that is turned off as soon as it is there.
func drainStory(n *killNode) {
	n.awaitSlot()
	n.drain()
}

// slotRollbackStory is a pod that takes a slot and fails.
func slotRollbackStory(n *killNode) {
	n.awaitSlot()
	rollbackStory(n)
	n.drain()
}

// TestKillPool is TestKillMatrix for the warm pool: what is done beside the pods, and what a pod does differently. Slots
// and pods come and go beside each other, so which point comes first differs from run to run.
func TestKillPool(t *testing.T) {
	t.Parallel()
	m := killMatrix{vmm: killVMM(t)}
	pod, drain := killStory{name: "slot", play: slotStory, pool: 1}, killStory{name: "drain", play: drainStory, pool: 1}
	rollback := killStory{name: "slotRollback", play: slotRollbackStory, pool: 1, failAdd: true}
	t.Run("points", func(t *testing.T) {
		for _, point := range tracePoints(t, m.vmm, pod) {
			if !strings.Contains(point, "container") && !strings.Contains(point, "Container") { // those are the matrix's
				m.run(t, pod, 1, point)
			}
		}
		for _, point := range tracePoints(t, m.vmm, rollback) {
			if strings.Contains(point, "sandbox record") || strings.Contains(point, "VM.") {
				m.run(t, rollback, 1, point)
			}
		}
		for _, point := range tracePoints(t, m.vmm, drain, "") { // a daemon that finds a slot that is not wanted
			m.run(t, drain, 1, "", point)
		}
		for _, first := range []string{"sandbox record BOOTING#1", "after Driver.Start#1", "sandbox record POOLED#1", "sandbox record CREATING#1", "before VM.Move#1", "after VM.Move#1"} {
			for _, point := range tracePoints(t, m.vmm, pod, first) {
				m.run(t, pod, 2, first, point)
			}
		}
	})
	m.wants(t, 60)
}
