package store

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	bolt "go.etcd.io/bbolt"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// stored makes a copy of a database that a crivm of some schema has written, with 3 sandboxes and 6 containers.
func stored(t *testing.T, schema int) string {
	t.Helper()
	data, err := os.ReadFile(fmt.Sprintf("testdata/schema-%d.db", schema))
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "crivm.db")
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestStoredSchemas: what every earlier crivm has written is read in full, and twice the same.
func TestStoredSchemas(t *testing.T) {
	if len(migrations) != schemaVersion-1 {
		t.Fatalf("%d migrations lead to schema %d", len(migrations), schemaVersion)
	}
	for schema := 1; schema <= schemaVersion; schema++ {
		path := stored(t, schema)
		for range 2 {
			s := open(t, path)
			if s.Damage() != "" {
				t.Errorf("schema %d: %s", schema, s.Damage())
			}
			sandboxes, containers := s.Sandboxes(), s.Containers("")
			if len(sandboxes) != 3 || len(containers) != 6 {
				t.Fatalf("schema %d: %d sandboxes, %d containers", schema, len(sandboxes), len(containers))
			}
			sb, c := sandboxes[2], containers[5]
			if sb.Name != "pod0_ns_u_0" || sb.State != SandboxReady || sb.UID != 900000 || sb.VM.MaxMemory != 4<<30 || sb.Config.GetLabels()["a"] != "b" ||
				sb.Network.IPs[0].String() != "10.0.0.2" || sb.BootID != "cafe\n" {
				t.Errorf("schema %d: sandbox is %+v", schema, sb)
			}
			if c.SandboxID != sb.ID || c.State != ContainerRunning || c.StartedAt.Unix() != 1700000000 || c.StopSignal != 15 || c.User.Groups[0] != 3 || !bytes.Equal(c.Config.GetEnvs()[0].GetValue(), []byte{0xff}) {
				t.Errorf("schema %d: container is %+v", schema, c)
			}
			if next, err := s.CreateSandbox(Sandbox{ID: "new", Name: "new", Config: SandboxConfig{&cri.PodSandboxConfig{}}}); err != nil || !next.CreatedAt.After(containers[0].CreatedAt) {
				t.Errorf("schema %d: next creation at %s (%v)", schema, next.CreatedAt, err)
			}
			if err := errors.Join(s.DeleteSandbox("new"), s.Close()); err != nil {
				t.Error(err)
			}
		}
		left, err := filepath.Glob(filepath.Join(filepath.Dir(path), "*"))
		if err != nil || len(left) != 2 { // and the lock
			t.Errorf("schema %d leaves %v (%v)", schema, left, err)
		}
	}
}

// TestNewerSchemaIsLeftAlone: not one byte of a newer crivm's database changes.
func TestNewerSchemaIsLeftAlone(t *testing.T) {
	path := stored(t, schemaVersion)
	db, err := bolt.Open(path, 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	err = db.Update(func(tx *bolt.Tx) error {
		meta := tx.Bucket(bucketRoot).Bucket(bucketMeta)
		return errors.Join(meta.Put(keySchema, []byte("99")), meta.Put(keySchemaSum, []byte(formatSum(recordSum(bucketMeta, string(keySchema), []byte("99"))))))
	})
	if err := errors.Join(err, db.Close()); err != nil {
		t.Fatal(err)
	}
	before, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for _, open := range []func(string) (*Store, error){Open, OpenReadOnly} {
		if _, err := open(path); !errdefs.IsFailedPrecondition(err) {
			t.Errorf("a newer database opens: %v", err)
		}
		if after, err := os.ReadFile(path); err != nil || !bytes.Equal(before, after) {
			t.Errorf("a newer database was changed (%v)", err)
		}
	}
}

// TestHeld: only one process at a time has the database.
func TestHeld(t *testing.T) {
	defer func(limit time.Duration) { lockLimit = limit }(lockLimit)
	lockLimit = 50 * time.Millisecond
	path := stored(t, schemaVersion)
	for _, first := range []func(string) (*Store, error){Open, OpenReadOnly} {
		s, err := first(path)
		if err != nil {
			t.Fatal(err)
		}
		for _, second := range []func(string) (*Store, error){Open, OpenReadOnly} {
			if _, err := second(path); !errdefs.IsUnavailable(err) {
				t.Errorf("it can be opened twice: %v", err)
			}
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
	ro, err := OpenReadOnly(path)
	if err != nil {
		t.Fatal(err)
	}
	defer ro.Close()
	if err := ro.DeleteSandbox(ro.Sandboxes()[0].ID); !errdefs.IsFailedPrecondition(err) || len(ro.Sandboxes()) != 3 {
		t.Errorf("what is opened for reading can be changed: %v", err)
	}
}

// mended opens a database that something was done to: it must open, hold nothing that was not written, be sound
// afterwards, and tell of it when anything is missing.
func mended(t *testing.T, what, path string, want map[string]bool) (kept int) {
	t.Helper()
	s, err := Open(path)
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}
	sandboxes, containers, damage := s.Sandboxes(), s.Containers(""), s.Damage()
	for _, r := range sandboxes {
		text, _, _ := seal(bucketSandboxes, r.ID, r)
		if !want[canonical(text)] {
			t.Errorf("%s: sandbox %s has become %s", what, r.ID, text)
		}
	}
	for _, r := range containers {
		text, _, _ := seal(bucketContainers, r.ID, r)
		if !want[canonical(text)] {
			t.Errorf("%s: container %s has become %s", what, r.ID, text)
		}
	}
	kept = len(sandboxes) + len(containers)
	if copies, _ := filepath.Glob(path + damagedSuffix + "*"); kept < 9 && (damage == "" || len(copies) != 1) || len(copies) > 1 || (damage == "") != (len(copies) == 0) {
		t.Errorf("%s: %d records, damage %q, copies %v", what, kept, damage, copies)
	}
	if _, err := s.CreateSandbox(Sandbox{ID: "new", Name: "new", Config: SandboxConfig{&cri.PodSandboxConfig{}}}); err != nil {
		t.Errorf("%s: %v", what, err)
	}
	if err := s.Close(); err != nil {
		t.Errorf("%s: %v", what, err)
	}
	s, err = Open(path)
	if err != nil || s.Damage() != "" || len(s.Sandboxes())+len(s.Containers("")) != kept+1 {
		t.Fatalf("%s: opened again: %v, %d records, %s", what, err, kept, s.Damage())
	}
	s.Close()
	return kept
}

// canonical is a record without its sum, which depends on how spaces are put.
func canonical(text []byte) string {
	return string(bytes.ReplaceAll(bytes.ReplaceAll(text[sumBytes:], []byte(", "), []byte(",")), []byte(": "), []byte(":")))
}

// TestPowerCut opens the database with every page torn in every way that a cut leaves: missing, zeroed, half of it
// from before, swapped with another, and with flipped bits at random places.
func TestPowerCut(t *testing.T) {
	s := open(t, stored(t, schemaVersion))
	want := map[string]bool{}
	for _, r := range s.Sandboxes() {
		text, _, _ := seal(bucketSandboxes, r.ID, r)
		want[canonical(text)] = true
	}
	for _, r := range s.Containers("") {
		text, _, _ := seal(bucketContainers, r.ID, r)
		want[canonical(text)] = true
	}
	s.Close()
	whole, err := os.ReadFile("testdata/schema-2.db")
	if err != nil {
		t.Fatal(err)
	}
	const page, sector = 4096, 512
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	base := t.TempDir()
	if memory, err := os.MkdirTemp("/dev/shm", "crivm-store-"); err == nil { // some 4,000 flushes
		base = memory
		defer os.RemoveAll(memory)
	}
	try := func(what string, change func(data []byte) []byte) int {
		dir, err := os.MkdirTemp(base, "")
		if err != nil {
			t.Fatal(err)
		}
		defer os.RemoveAll(dir)
		path := filepath.Join(dir, "crivm.db")
		if err := os.WriteFile(path, change(bytes.Clone(whole)), 0o600); err != nil {
			t.Fatal(err)
		}
		return mended(t, what, path, want)
	}
	least, trials := 9, 0
	check := func(kept int) {
		least, trials = min(least, kept), trials+1
	}
	for at := 0; at < len(whole); at += sector {
		check(try(fmt.Sprintf("cut off at %d", at), func(data []byte) []byte { return data[:at] }))
		check(try(fmt.Sprintf("sector at %d is zero", at), func(data []byte) []byte {
			clear(data[at:][:sector])
			return data
		}))
		check(try(fmt.Sprintf("sector at %d is random", at), func(data []byte) []byte {
			for i := range sector / 8 {
				binary.LittleEndian.PutUint64(data[at+8*i:], random.Uint64())
			}
			return data
		}))
	}
	for at := 0; at < len(whole); at += page {
		check(try(fmt.Sprintf("page at %d is zero", at), func(data []byte) []byte {
			clear(data[at:][:page])
			return data
		}))
		other := random.IntN(len(whole)/page) * page
		check(try(fmt.Sprintf("page at %d is that of %d", at, other), func(data []byte) []byte {
			copy(data[at:][:page], whole[other:])
			return data
		}))
	}
	for range 400 {
		at, bit := random.IntN(len(whole)), random.IntN(8)
		check(try(fmt.Sprintf("bit %d at %d is flipped", bit, at), func(data []byte) []byte {
			data[at] ^= 1 << bit
			return data
		}))
	}
	t.Logf("%d torn databases, the worst kept %d of 9 records", trials, least)
}

// TestDamageUnderWay: a file that is destroyed while it is open is replaced by what is in memory.
func TestDamageUnderWay(t *testing.T) {
	for what, destroy := range map[string]func(*os.File) error{
		"cut off": func(f *os.File) error { return f.Truncate(4096) },
		"zeroed":  func(f *os.File) error { _, err := f.WriteAt(make([]byte, 60<<10), 4096); return err },
	} {
		path := stored(t, schemaVersion)
		s := open(t, path)
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(destroy(f), f.Close()); err != nil {
			t.Fatal(err)
		}
		for _, r := range s.Sandboxes() {
			if _, err := s.UpdateSandbox(r.ID, func(r *Sandbox) error { r.Reason = what; return nil }); err != nil {
				t.Errorf("%s: %v", what, err)
			}
		}
		again := filepath.Join(t.TempDir(), "copy.db") // the process still holds the original
		data, err := os.ReadFile(path)
		if err == nil {
			err = os.WriteFile(again, data, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
		s = open(t, again)
		if s.Damage() != "" || len(s.Sandboxes()) != 3 || len(s.Containers("")) != 6 || s.Sandboxes()[1].Reason != what {
			t.Errorf("%s: %s, sandboxes %v", what, s.Damage(), s.Sandboxes())
		}
	}
}
