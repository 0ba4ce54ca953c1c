package server

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	bolt "go.etcd.io/bbolt"
	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crivm/crivm/server/store"
)

// downgrade writes the database as the first crivm did: schema 1, plain JSON.
func (r *rig) downgrade() {
	r.t.Helper()
	path := filepath.Join(r.opts.StateDir, "crivm.db")
	s, err := store.OpenReadOnly(path)
	if err != nil {
		r.t.Fatal(err)
	}
	sandboxes, containers := s.Sandboxes(), s.Containers("")
	if err := errors.Join(s.Close(), os.Remove(path)); err != nil {
		r.t.Fatal(err)
	}
	db, err := bolt.Open(path, 0o600, nil)
	if err != nil {
		r.t.Fatal(err)
	}
	err = db.Update(func(tx *bolt.Tx) error {
		root, err := tx.CreateBucket([]byte("v1"))
		if err != nil {
			return err
		}
		buckets := map[string]map[string]any{"meta": {}, "sandboxes": {}, "containers": {}}
		for _, r := range sandboxes {
			buckets["sandboxes"][r.ID] = r
		}
		for _, r := range containers {
			buckets["containers"][r.ID] = r
		}
		for name, records := range buckets {
			b, err := root.CreateBucket([]byte(name))
			if err != nil {
				return err
			}
			for id, r := range records {
				text, err := json.Marshal(r)
				if err := errors.Join(err, b.Put([]byte(id), text)); err != nil {
					return err
				}
			}
		}
		meta := root.Bucket([]byte("meta"))
		return errors.Join(meta.Put([]byte("schema"), []byte("1")), meta.Put([]byte("created"), strconv.AppendInt(nil, time.Now().UnixNano(), 10)))
	})
	if err := errors.Join(err, db.Close()); err != nil {
		r.t.Fatal(err)
	}
}

// TestUpgradeAdopts: pods go on over an upgrade from a crivm with an older schema, their output and exit codes whole.
func TestUpgradeAdopts(t *testing.T) {
	r := newRig(t)
	pod := r.runPod("a")
	release := filepath.Join(r.dir, "release")
	id := r.run(pod, "c", "echo before; while [ ! -e "+release+" ]; do sleep 0.05; done; echo after; exit 6")
	r.stop()
	r.downgrade()
	r.start()
	status, err := r.PodSandboxStatus(t.Context(), &cri.PodSandboxStatusRequest{PodSandboxId: pod})
	if err != nil || status.GetStatus().GetState() != cri.PodSandboxState_SANDBOX_READY {
		t.Fatalf("sandbox after the upgrade is %v (%v)", status, err)
	}
	if err := os.WriteFile(release, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if s := r.exit(id); s.GetExitCode() != 6 || r.log(s) != "before\nafter\n" {
		t.Errorf("container is %v, its log %q", s, r.log(s))
	}
}

// TestDamagedRecords: with a database that is lost in part, the daemon starts; a pod with its record goes on, the VM of
// one without is ended, and Status tells.
func TestDamagedRecords(t *testing.T) {
	r := newRig(t)
	kept, lost := r.runPod("kept"), r.runPod("lost")
	id := r.run(kept, "c", "exec sleep 1000")
	vm, err := r.sandbox(lost).machine()
	if err != nil {
		t.Fatal(err)
	}
	r.stop()
	path := filepath.Join(r.opts.StateDir, "crivm.db")
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	const name = `"Name":"lost_ns_u_0"`
	torn := strings.ReplaceAll(string(data), name, strings.ToUpper(name)) // older versions of the record, too
	if torn == string(data) {
		t.Fatal("the record is not in the file")
	}
	if err := os.WriteFile(path, []byte(torn), 0o600); err != nil {
		t.Fatal(err)
	}
	r.start()
	pods, err := r.ListPodSandbox(t.Context(), &cri.ListPodSandboxRequest{})
	if err != nil || len(pods.GetItems()) != 1 || pods.GetItems()[0].GetId() != kept || pods.GetItems()[0].GetState() != cri.PodSandboxState_SANDBOX_READY {
		t.Errorf("pods are %v (%v)", pods, err)
	}
	if s, err := r.ContainerStatus(t.Context(), &cri.ContainerStatusRequest{ContainerId: id}); err != nil || s.GetStatus().GetState() != cri.ContainerState_CONTAINER_RUNNING {
		t.Errorf("container of the pod that was kept is %v (%v)", s, err)
	}
	if !gone(vm.PID()) {
		t.Error("the VM without a record still runs")
	}
	status, err := r.Status(t.Context(), &cri.StatusRequest{Verbose: true})
	if err != nil || !strings.Contains(status.GetInfo()["warnings"], "crivm.db.damaged-") {
		t.Errorf("warnings are %q (%v)", status.GetInfo()["warnings"], err)
	}
	if again := r.runPod("lost"); again == lost { // as kubelet does
		t.Error("the lost pod is there")
	}
}

// unmountNetns removes a named namespace, as a reboot does.
func unmountNetns(path string) error {
	return errors.Join(unix.Unmount(path, unix.MNT_DETACH), os.Remove(path))
}

// TestRebootLeavesNothing: after a reboot the run directory is empty, VMs and namespaces are gone; a daemon says so of all
// that it had, kubelet can remove it and make it anew.
func TestRebootLeavesNothing(t *testing.T) {
	r := newRig(t)
	pod := r.runPod("a")
	running := r.run(pod, "c", "exec sleep 1000")
	created := r.create(pod, "later", "exit 0")
	done := r.run(pod, "done", "exit 4")
	r.exit(done)
	vm, err := r.sandbox(pod).machine()
	if err != nil {
		t.Fatal(err)
	}
	rec, err := r.store.UpdateSandbox(pod, func(rec *store.Sandbox) error { rec.BootID = "an earlier one"; return nil })
	if err != nil {
		t.Fatal(err)
	}
	half := rec
	half.ID, half.Name, half.State = newID(), "half made", store.SandboxCreating
	half.VMDir, half.Dir = filepath.Join(r.opts.RunDir, "vm", half.ID[:16]), filepath.Join(r.opts.StateDir, "pods", half.ID)
	if _, err := r.store.CreateSandbox(half); err != nil {
		t.Fatal(err)
	}
	r.stop()
	if err := errors.Join(vm.Kill(t.Context()), os.RemoveAll(r.opts.RunDir), unmountNetns(rec.NetnsPath)); err != nil {
		t.Fatal(err)
	}
	r.start()
	for id, want := range map[string]int32{running: 137, created: 137, done: 4} {
		s := r.exit(id)
		if s.GetExitCode() != want || want == 137 && s.GetMessage() != "the host was rebooted" {
			t.Errorf("container after a reboot is %v, want code %d", s, want)
		}
	}
	pods, err := r.ListPodSandbox(t.Context(), &cri.ListPodSandboxRequest{})
	if err != nil || len(pods.GetItems()) != 1 || pods.GetItems()[0].GetState() != cri.PodSandboxState_SANDBOX_NOTREADY {
		t.Errorf("pods after a reboot are %v (%v)", pods, err)
	}
	config := r.podConfig("a")
	config.Metadata.Attempt = 1 // as kubelet does, with the old one still there
	resp, err := r.RunPodSandbox(t.Context(), &cri.RunPodSandboxRequest{Config: config})
	if err != nil {
		t.Fatal(err)
	}
	again := r.run(resp.GetPodSandboxId(), "c-again", "exit 3")
	if s := r.exit(again); s.GetExitCode() != 3 {
		t.Errorf("container of the new sandbox is %v", s)
	}
	for range 2 {
		if _, err := r.StopPodSandbox(t.Context(), &cri.StopPodSandboxRequest{PodSandboxId: pod}); err != nil {
			t.Error(err)
		}
	}
	if _, err := r.RemovePodSandbox(t.Context(), &cri.RemovePodSandboxRequest{PodSandboxId: pod}); err != nil {
		t.Error(err)
	}
	c, err := r.Collect(t.Context(), &imageLeftovers{}, true)
	if err != nil || len(c.Leftovers) != 1 { // the layer of the image service's stand-in
		t.Errorf("leftovers: %+v (%v)", c, err)
	}
}
