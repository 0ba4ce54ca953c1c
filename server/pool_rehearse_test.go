package server

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/crivm/crivm/imageservice/rootdisk"
	"github.com/crivm/crivm/server/store"
	"github.com/crivm/crivm/vmruntime"
)

// TestRehearsalDisk: the disk of a rehearsal is an image, and neither it nor its file stays in a slot, also when a daemon
// has died with it plugged.
func TestRehearsalDisk(t *testing.T) {
	r := newPoolRig(t, 1)
	rehearsed := func(f PoolFigures) bool { return f.Rehearsed == 1 }
	for _, after := range []string{"rehearsal", "restart"} {
		r.awaitPool(rehearsed)
		rec, err := r.store.Sandbox(r.slotIDs(store.SandboxPooled)[0])
		if err != nil {
			t.Fatal(err)
		}
		if _, err := os.Stat(rehearsalDisk(rec)); !os.IsNotExist(err) {
			t.Errorf("after a %s its file is there (%v)", after, err)
		}
		sb := r.sandbox(rec.ID)
		vm, err := sb.machine()
		if err != nil {
			t.Fatal(err)
		}
		other := vmruntime.Disk{Serial: rehearsalSerial, Path: filepath.Join(r.dir, "disk"), ReadOnly: true}
		if err := vm.AddDisk(t.Context(), other); err != nil { // AlreadyExists if the disk is there
			t.Errorf("after a %s: %v", after, err)
		}
		if err := vm.RemoveDisk(t.Context(), rehearsalSerial); err != nil {
			t.Error(err)
		}
		if after == "restart" {
			break
		}
		for range 2 {
			if err := r.plugRehearsal(t.Context(), sb, rec); err != nil {
				t.Fatal(err)
			}
		}
		f, err := os.Open(rehearsalDisk(rec))
		if err != nil {
			t.Fatal(err)
		}
		if info, err := f.Stat(); err != nil || info.Mode().Perm() != 0o644 { // VMMs are of other users
			t.Errorf("the disk is %v (%v)", info.Mode(), err)
		}
		if _, err := rootdisk.Verify(f, [16]byte{}); err != nil {
			t.Error(err)
		}
		f.Close()
		r.restart()
	}
}
