package store

import (
	"path/filepath"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func open(t *testing.T, path string) *Store {
	t.Helper()
	s, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func TestRecordsSurvive(t *testing.T) {
	path := filepath.Join(t.TempDir(), "crivm.db")
	s := open(t, path)
	config := SandboxConfig{&cri.PodSandboxConfig{Hostname: "h", Labels: map[string]string{"a": "b"}}}
	sb, err := s.CreateSandbox(Sandbox{ID: "aaa1", Name: "n", State: SandboxCreating, Config: config})
	if err != nil {
		t.Fatal(err)
	}
	c, err := s.CreateContainer(Container{ID: "ccc1", SandboxID: "aaa1", Name: "n", State: ContainerCreated, Config: ContainerConfig{
		&cri.ContainerConfig{Envs: []*cri.KeyValue{{Key: "k", Value: []byte{0xff}}}},
	}})
	if err != nil {
		t.Fatal(err)
	}
	if !c.CreatedAt.After(sb.CreatedAt) {
		t.Errorf("created at %s, then %s: not strictly increasing", sb.CreatedAt, c.CreatedAt)
	}
	if _, err := s.UpdateSandbox("aaa", func(r *Sandbox) error { r.State = SandboxReady; return nil }); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = open(t, path)
	got, err := s.Sandbox("aaa1")
	if err != nil || got.State != SandboxReady || got.Config.GetHostname() != "h" || !got.CreatedAt.Equal(sb.CreatedAt) {
		t.Errorf("sandbox after reopening is %+v (%v)", got, err)
	}
	if got, err := s.Container("ccc1"); err != nil || string(got.Config.GetEnvs()[0].GetValue()) != "\xff" {
		t.Errorf("container after reopening is %+v (%v)", got, err)
	}
	next, err := s.CreateSandbox(Sandbox{ID: "aaa2", Name: "n2"})
	if err != nil || !next.CreatedAt.After(c.CreatedAt) {
		t.Errorf("created at %s after reopening, before that %s (%v)", next.CreatedAt, c.CreatedAt, err)
	}
	if all := s.Sandboxes(); len(all) != 2 || all[0].ID != "aaa2" {
		t.Errorf("sandboxes are %v; want the newest first", all)
	}
}

func TestNamesAndPrefixes(t *testing.T) {
	s := open(t, filepath.Join(t.TempDir(), "crivm.db"))
	for _, id := range []string{"abc1", "abd2"} {
		if _, err := s.CreateSandbox(Sandbox{ID: id, Name: id}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := s.CreateSandbox(Sandbox{ID: "xyz", Name: "abc1"}); !errdefs.IsAlreadyExists(err) {
		t.Errorf("a name is given twice: %v", err)
	}
	if r, err := s.Sandbox("abc"); err != nil || r.ID != "abc1" {
		t.Errorf("prefix abc finds %v (%v)", r.ID, err)
	}
	for _, id := range []string{"ab", "", "abc12", "x"} {
		if r, err := s.Sandbox(id); !errdefs.IsNotFound(err) {
			t.Errorf("%q finds %v (%v), want NotFound", id, r.ID, err)
		}
	}
	if _, err := s.UpdateSandbox("abc1", func(r *Sandbox) error { r.State = SandboxReady; return errdefs.ErrAborted }); !errdefs.IsAborted(err) {
		t.Errorf("error of a change is %v", err)
	}
	if r, _ := s.Sandbox("abc1"); r.State == SandboxReady {
		t.Error("a change that failed has changed the record")
	}
	for range 2 {
		if err := s.DeleteSandbox("abc1"); err != nil {
			t.Error(err)
		}
	}
	if _, err := s.CreateSandbox(Sandbox{ID: "new", Name: "abc1"}); err != nil {
		t.Errorf("the name of a deleted record is not free: %v", err)
	}
}

func TestClockThatStandsStill(t *testing.T) {
	s := open(t, filepath.Join(t.TempDir(), "crivm.db"))
	s.created = time.Now().Add(time.Hour).UnixNano() // as after a jump back
	a, b := s.nextCreated(), s.nextCreated()
	if !b.After(a) || !a.After(time.Now()) {
		t.Errorf("times are %s and %s", a, b)
	}
}
