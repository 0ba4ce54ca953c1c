package store

import (
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
)

func TestClaim(t *testing.T) {
	path := filepath.Join(t.TempDir(), "crivm.db")
	s := open(t, path)
	for _, r := range []Sandbox{{ID: "a", Name: "slot_a", State: SandboxPooled, Slot: &Slot{Class: "c"}}, {ID: "b", Name: "pod", State: SandboxReady}} {
		if _, err := s.CreateSandbox(r); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := s.ClaimSandbox("a", "pod", func(*Sandbox) {}); !errdefs.IsAlreadyExists(err) {
		t.Errorf("a taken name: %v", err)
	}
	if _, err := s.ClaimSandbox("b", "other", func(*Sandbox) {}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("a pod's sandbox: %v", err)
	}
	claimed, err := s.ClaimSandbox("a", "new", func(r *Sandbox) { r.Handler = "h" })
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = open(t, path)
	got, ok := s.SandboxByName("new")
	if !ok || got.ID != "a" || got.State != SandboxCreating || got.Handler != "h" || got.Slot.Class != "c" || !got.CreatedAt.Equal(claimed.CreatedAt) {
		t.Errorf("claimed is %+v", got)
	}
	if all := s.Sandboxes(); all[0].ID != "a" {
		t.Errorf("newest is %s; a pod is as old as its claim", all[0].ID)
	}
	if _, taken := s.SandboxByName("slot_a"); taken {
		t.Error("the slot's name is still taken")
	}
}
