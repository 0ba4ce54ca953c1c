package kvm

import (
	"context"
	"os"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m)
}

// Whatever this machine has, the answer comes in time, is the same again, and gives a reason.
func TestProbe(t *testing.T) {
	start := time.Now()
	err := Probe(t.Context())
	if d := time.Since(start); d > defaultWait+interruptWait+time.Second {
		t.Errorf("took %v", d)
	}
	t.Logf("after %v: %v", time.Since(start), err)
	if again := Probe(t.Context()); (again == nil) != (err == nil) {
		t.Errorf("first %v, then %v", err, again)
	}
	_, statErr := os.Stat("/dev/kvm")
	switch {
	case statErr != nil && !errdefs.IsNotFound(err):
		t.Errorf("no device: %v", err)
	case err != nil && !errdefs.IsUnavailable(err) && !errdefs.IsNotFound(err) && !errdefs.IsPermissionDenied(err):
		t.Errorf("error without class: %v", err)
	}
}

func TestProbeEndsWithContext(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	start := time.Now()
	err := Probe(ctx)
	if d := time.Since(start); d > interruptWait+time.Second {
		t.Errorf("took %v", d)
	}
	// The loop alone takes longer than a millisecond everywhere.
	if err == nil {
		t.Error("no error")
	}
}
