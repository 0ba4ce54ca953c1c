package server

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crivm/crivm/agentproto"
	"github.com/crivm/crivm/server/store"
)

// newPoolRig is a rig whose default handler has a pool of n slots, which are ready.
func newPoolRig(t *testing.T, n int) *rig {
	t.Helper()
	r := newRig(t)
	r.setPool(n)
	r.awaitPool(func(f PoolFigures) bool { return f.Ready == n })
	t.Cleanup(func() { // before newRig's, which looks for what is left
		r.setPool(0)
	})
	return r
}

// setPool is a restart with another size of the pool.
func (r *rig) setPool(n int) {
	r.t.Helper()
	r.changeHandler(func(h *Handler) { h.PoolSize = n })
}

func (r *rig) changeHandler(change func(*Handler)) {
	r.t.Helper()
	h := r.opts.Handlers[""]
	change(&h)
	r.stop()
	r.opts.Handlers = map[string]Handler{"": h}
	r.start()
}

func (r *rig) pool() PoolFigures {
	r.t.Helper()
	all := r.PoolFigures()
	if len(all) != 1 {
		r.t.Fatalf("%d pools", len(all))
	}
	return all[0]
}

// awaitPool waits until the pool is as wanted.
func (r *rig) awaitPool(ok func(PoolFigures) bool) PoolFigures {
	r.t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for limit := time.Now().Add(time.Minute); time.Now().Before(limit); <-tick.C {
		if f := r.pool(); ok(f) {
			return f
		}
	}
	r.t.Fatalf("pool is %+v", r.pool())
	return PoolFigures{}
}

// slotIDs are the records of slots in a state.
func (r *rig) slotIDs(state store.SandboxState) (ids []string) {
	for _, rec := range r.store.Sandboxes() {
		if rec.State == state {
			ids = append(ids, rec.ID)
		}
	}
	return ids
}

func TestPoolHit(t *testing.T) {
	r := newPoolRig(t, 1)
	slot := r.slotIDs(store.SandboxPooled)[0]
	if list, err := r.ListPodSandbox(t.Context(), &cri.ListPodSandboxRequest{}); err != nil || len(list.GetItems()) > 0 {
		t.Errorf("a slot is listed: %v (%v)", list, err)
	}
	if _, err := r.PodSandboxStatus(t.Context(), &cri.PodSandboxStatusRequest{PodSandboxId: slot}); !errdefs.IsNotFound(err) {
		t.Errorf("a slot has a status (%v)", err)
	}
	for _, verb := range []func() error{
		func() error {
			_, err := r.StopPodSandbox(t.Context(), &cri.StopPodSandboxRequest{PodSandboxId: slot})
			return err
		},
		func() error {
			_, err := r.RemovePodSandbox(t.Context(), &cri.RemovePodSandboxRequest{PodSandboxId: slot})
			return err
		},
	} {
		if err := verb(); err != nil {
			t.Error(err)
		}
	}
	before := time.Now()
	pod := r.runPod("a")
	if pod != slot {
		t.Errorf("pod is %s, the slot was %s", pod, slot)
	}
	status, err := r.PodSandboxStatus(t.Context(), &cri.PodSandboxStatusRequest{PodSandboxId: pod, Verbose: true})
	if err != nil || status.GetStatus().GetState() != cri.PodSandboxState_SANDBOX_READY || status.GetStatus().GetMetadata().GetName() != "a" ||
		status.GetStatus().GetCreatedAt() < before.UnixNano() {
		t.Errorf("status is %v (%v)", status, err)
	}
	if s := r.exit(r.run(pod, "c", "echo one; exit 3")); s.GetExitCode() != 3 || r.log(s) != "one\n" {
		t.Errorf("container is %v", s)
	}
	f := r.awaitPool(func(f PoolFigures) bool { return f.Ready == 1 })
	if f.Hits != 1 || len(f.Misses) > 0 || f.Booted != 2 {
		t.Errorf("figures are %+v", f)
	}
	info, err := r.Status(t.Context(), &cri.StatusRequest{Verbose: true})
	if err != nil || !strings.Contains(info.GetInfo()["pools"], `"hits":1`) {
		t.Errorf("status shows %v (%v)", info.GetInfo()["pools"], err)
	}
	if _, err := r.RunPodSandbox(t.Context(), &cri.RunPodSandboxRequest{Config: r.podConfig("a")}); !errdefs.IsAlreadyExists(err) {
		t.Errorf("a second sandbox of the same name: %v", err)
	}
	if f := r.pool(); f.Ready != 1 || f.Hits != 1 {
		t.Errorf("a refused pod took a slot: %+v", f)
	}
	r.restart() // a pod from a slot is a pod
	if s := r.exit(r.run(pod, "d", "exit 4")); s.GetExitCode() != 4 {
		t.Errorf("container after a restart is %v", s)
	}
}

// TestPoolMisses: pods that no slot fits, and a pool that is empty.
func TestPoolMisses(t *testing.T) {
	r := newPoolRig(t, 1)
	run := func(name string, limit int64) error {
		config := r.podConfig(name)
		config.Linux = &cri.LinuxPodSandboxConfig{Resources: &cri.LinuxContainerResources{MemoryLimitInBytes: limit}}
		_, err := r.RunPodSandbox(t.Context(), &cri.RunPodSandboxRequest{Config: config})
		return err
	}
	r.changeHandler(func(h *Handler) { h.Memory = 192 << 20 })
	r.awaitPool(func(f PoolFigures) bool { return f.Ready == 1 })
	slot := r.slotIDs(store.SandboxPooled)[0]
	if err := run("small", 16<<20); err != nil { // with the guest's reserve less than what the slot has
		t.Error(err)
	}
	if err := run("large", 1<<30); err != nil {
		t.Error(err)
	}
	if f := r.pool(); f.Misses[missSmaller] != 1 || f.Misses[missLarger] != 1 || f.Hits != 0 {
		t.Errorf("figures are %+v", f)
	}
	release := r.bootsCold() // keeps the pool from being filled
	if err := run("grows", 64<<20); err != nil {
		t.Error(err)
	}
	rec, err := r.store.Sandbox(slot)
	if err != nil || rec.VM.BootMemory != 192<<20 || rec.VM.Memory != 64<<20+guestReserve {
		t.Errorf("VM of a pod that is bigger than the slot: %+v (%v)", rec.VM, err)
	}
	if err := run("late", 0); err != nil {
		t.Error(err)
	}
	if f := r.pool(); f.Hits != 1 || f.Misses[missEmpty] != 1 || f.Booting != 0 || f.Ready != 0 {
		t.Errorf("figures are %+v", f)
	}
	release()
	r.awaitPool(func(f PoolFigures) bool { return f.Ready == 1 })
}

// TestPoolShared: handlers whose VMs are alike share a pool, and a pod has the handler that it asked for.
func TestPoolShared(t *testing.T) {
	r := newRig(t)
	r.stop()
	plain := r.opts.Handlers[""]
	pooled := plain
	pooled.PoolSize = 1
	other := plain
	other.Cmdline = "other"
	r.opts.Handlers = map[string]Handler{"": plain, "alike": pooled, "other": other}
	r.start()
	defer r.setPool(0)
	f := r.awaitPool(func(f PoolFigures) bool { return f.Ready == 1 })
	if fmt.Sprint(f.Handlers) != "[ alike]" {
		t.Errorf("pool of %q", f.Handlers)
	}
	slot := r.slotIDs(store.SandboxPooled)[0]
	if _, err := r.RunPodSandbox(t.Context(), &cri.RunPodSandboxRequest{Config: r.podConfig("o"), RuntimeHandler: "other"}); err != nil {
		t.Fatal(err)
	}
	pod, err := r.RunPodSandbox(t.Context(), &cri.RunPodSandboxRequest{Config: r.podConfig("a"), RuntimeHandler: "alike"})
	if err != nil || pod.GetPodSandboxId() != slot {
		t.Fatalf("pod is %v (%v), the slot was %s", pod, err, slot)
	}
	status, err := r.PodSandboxStatus(t.Context(), &cri.PodSandboxStatusRequest{PodSandboxId: slot})
	if err != nil || status.GetStatus().GetRuntimeHandler() != "alike" {
		t.Errorf("status is %v (%v)", status, err)
	}
	r.removeAll()
}

// TestPoolIdentity: what makes a guest a pod differs between two pods from the pool.
func TestPoolIdentity(t *testing.T) {
	r := newPoolRig(t, 2)
	var setups []*agentproto.SetupSandboxRequest
	for _, name := range []string{"a", "b"} {
		rec, err := r.store.Sandbox(r.runPod(name))
		if err != nil || rec.Slot == nil {
			t.Fatalf("pod is %+v (%v)", rec, err)
		}
		setup, err := setupRequest(rec, rec.Config.PodSandboxConfig)
		if err != nil {
			t.Fatal(err)
		}
		setups = append(setups, setup)
	}
	a, b := setups[0], setups[1]
	if len(a.GetEntropy()) < 32 || bytes.Equal(a.GetEntropy(), b.GetEntropy()) || a.GetMachineId() == b.GetMachineId() || a.GetHostname() != "a" || b.GetHostname() != "b" ||
		a.GetInterfaces()[0].GetMatchMac() == b.GetInterfaces()[0].GetMatchMac() || a.GetInterfaces()[0].GetMac() != "02:00:00:00:00:01" || a.GetUnixNanos() == b.GetUnixNanos() {
		t.Errorf("pods are set up as\n%v\n%v", a, b)
	}
}

// TestPoolModel is TestModel on a node with a warm pool.
func TestPoolModel(t *testing.T) {
	playModel(t, newPoolRig(t, 1), map[bool]time.Duration{false: 10 * time.Second, true: 5 * time.Second}[testing.Short() || raceDetector])
}

// TestPoolBound: no more slots boot at a time than allowed.
func TestPoolBound(t *testing.T) {
	r := newRig(t)
	r.opts.PoolBoots = 2
	most := 0
	r.setPool(6)
	defer r.setPool(0)
	r.awaitPool(func(f PoolFigures) bool {
		most = max(most, f.Booting, len(r.slotIDs(store.SandboxBooting)))
		return f.Ready == 6
	})
	if most > 2 {
		t.Errorf("%d slots booted at a time", most)
	}
}

// TestPoolCalm: no slot boots while pods start, nor soon after, unless that goes on and on.
func TestPoolCalm(t *testing.T) {
	now := time.Now()
	for name, c := range map[string]struct {
		w    *warm
		want time.Duration
	}{
		"nothing has started": {&warm{lacking: now}, 0},
		"a pod starts":        {&warm{lacking: now, starting: 1}, calmPatience * time.Minute},
		"for long":            {&warm{lacking: now.Add(-calmPatience * time.Minute), starting: 1}, 0},
		"one has just":        {&warm{lacking: now, started: now.Add(-10 * time.Second)}, 50 * time.Second},
		"one has":             {&warm{lacking: now, started: now.Add(-time.Minute)}, 0},
		"again and again":     {&warm{lacking: now.Add(-calmPatience*time.Minute + time.Second), started: now}, time.Second},
	} {
		if got := max(c.w.calmLocked(time.Minute, now), 0); got != c.want {
			t.Errorf("%s: %v, want %v", name, got, c.want)
		}
	}

	r := newRig(t)
	r.opts.PoolCalm = time.Hour
	r.setPool(1)
	defer r.setPool(0)
	r.awaitPool(func(f PoolFigures) bool { return f.Ready == 1 })
	pod := r.runPod("a")
	r.run(pod, "c", "sleep 1000")
	if p, wait := r.nextBoot(); p != nil || wait < time.Minute {
		t.Errorf("after a pod has taken a slot, one boots: %v, %v", p != nil, wait)
	}
	if f := r.pool(); f.Hits != 1 || f.Booting != 0 || f.Ready != 0 {
		t.Errorf("figures are %+v", f)
	}
	r.warm.mu.Lock()
	r.warm.started = time.Now().Add(-time.Hour)
	r.warm.mu.Unlock()
	r.warm.poke()
	r.awaitPool(func(f PoolFigures) bool { return f.Ready == 1 })
}

// TestPoolDeadSlot: a slot whose VM ends is replaced; one that died unnoticed is not given to a pod.
func TestPoolDeadSlot(t *testing.T) {
	r := newPoolRig(t, 1)
	slot := r.slotIDs(store.SandboxPooled)[0]
	vm, err := r.sandbox(slot).machine()
	if err != nil {
		t.Fatal(err)
	}
	if err := vm.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	f := r.awaitPool(func(f PoolFigures) bool { return f.Ready == 1 && f.Booted == 2 })
	if f.Dropped["dead"] != 1 || r.slotIDs(store.SandboxPooled)[0] == slot {
		t.Errorf("figures are %+v", f)
	}
	r.runPod("a")
	if f := r.pool(); f.Hits != 1 {
		t.Errorf("figures are %+v", f)
	}
}

// TestPoolRestart: healthy slots are taken over; those that are not wanted or not well are undone.
func TestPoolRestart(t *testing.T) {
	r := newPoolRig(t, 3)
	before := r.slotIDs(store.SandboxPooled)
	r.restart()
	if f, after := r.pool(), r.slotIDs(store.SandboxPooled); f.Ready != 3 || f.Booted != 0 || fmt.Sprint(after) != fmt.Sprint(before) {
		t.Errorf("slots were %v, are %v; %+v", before, after, f)
	}
	vm, err := r.sandbox(before[0]).machine()
	if err != nil {
		t.Fatal(err)
	}
	r.stop()
	if err := vm.Kill(t.Context()); err != nil { // while no daemon looks
		t.Fatal(err)
	}
	h := r.opts.Handlers[""]
	h.PoolSize = 1
	r.opts.Handlers[""] = h
	r.start()
	if f := r.pool(); f.Ready != 1 || f.Dropped["restart"] != 2 || len(r.store.Sandboxes()) != 1 {
		t.Errorf("figures are %+v, records %d", f, len(r.store.Sandboxes()))
	}
	r.changeHandler(func(h *Handler) { h.Cmdline = "other" })
	f := r.awaitPool(func(f PoolFigures) bool { return f.Ready == 1 })
	if f.Booted != 1 {
		t.Errorf("a slot with another command line was kept: %+v", f)
	}
	r.setPool(0)
	if len(r.PoolFigures()) != 0 || len(r.store.Sandboxes()) != 0 {
		t.Errorf("a pool of 0 leaves %v", r.store.Sandboxes())
	}
}

// TestPoolNewKernel: no pod gets a slot that has booted another kernel than the handler's, and it is replaced.
func TestPoolNewKernel(t *testing.T) {
	r := newPoolRig(t, 1)
	slot := r.slotIDs(store.SandboxPooled)[0]
	path := r.opts.Handlers[""].Kernel
	if err := os.WriteFile(path+".new", make([]byte, 4096), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
	if pod := r.runPod("a"); pod == slot {
		t.Error("a pod got a slot with an old kernel")
	}
	r.awaitPool(func(f PoolFigures) bool {
		return f.Ready == 1 && f.Dropped["changed"] == 1 && f.Misses[missChanged]+f.Misses[missEmpty] == 1
	})
}

// TestPoolFailedPod: a pod from a slot that cannot be made leaves nothing, like any other.
func TestPoolFailedPod(t *testing.T) {
	r := newPoolRig(t, 1)
	r.net.fail = errors.New("no luck")
	if _, err := r.RunPodSandbox(t.Context(), &cri.RunPodSandboxRequest{Config: r.podConfig("a")}); err == nil {
		t.Error("no error")
	}
	r.net.fail = nil
	r.awaitPool(func(f PoolFigures) bool { return f.Hits == 1 && f.Ready == 1 })
	if n := len(r.store.Sandboxes()); n != 1 {
		t.Errorf("%d records", n)
	}
	r.net.block = make(chan struct{})
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if _, err := r.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: r.podConfig("a")}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("error of a request that ended is %v", err)
	}
	close(r.net.block)
	r.runPod("a")
}

// TestPoolBootFails: a pool whose slots cannot boot tries again, and keeps no pod of another handler from being made. A
// handler that is no more has no slots.
func TestPoolBootFails(t *testing.T) {
	r := newRig(t)
	good := r.opts.Handlers[""]
	h := good
	h.Initrd, h.PoolSize = good.Initrd+"2", 1
	makeInitrd := func() {
		if err := os.WriteFile(h.Initrd, make([]byte, 4096), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	makeInitrd()
	r.stop()
	r.opts.Handlers = map[string]Handler{"": good, "b": h}
	r.start()
	r.awaitPool(func(f PoolFigures) bool { return f.Ready == 1 })
	if err := os.Remove(h.Initrd); err != nil {
		t.Fatal(err)
	}
	vm, err := r.sandbox(r.slotIDs(store.SandboxPooled)[0]).machine()
	if err != nil {
		t.Fatal(err)
	}
	if err := vm.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	r.awaitPool(func(f PoolFigures) bool { return f.BootsFailed > 0 && f.LastFailure != "" && f.Ready == 0 })
	r.runPod("a")
	makeInitrd()
	r.awaitPool(func(f PoolFigures) bool { return f.Ready == 1 && f.LastFailure == "" })
	r.stop()
	r.opts.Handlers = map[string]Handler{"": good}
	r.start()
	if n := len(r.slotIDs(store.SandboxPooled)) + len(r.slotIDs(store.SandboxBooting)); n > 0 {
		t.Errorf("%d slots of a handler that is no more", n)
	}
}
