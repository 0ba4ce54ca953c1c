package kvm

import (
	"bytes"
	"context"
	"errors"
	"os"
	"testing"
	"time"

	"github.com/containerd/errdefs"
)

// without returns the program with the bytes of the given ranges replaced by no-ops.
func without(ranges ...[2]int) []byte {
	p := bytes.Clone(program)
	for _, r := range ranges {
		for i := r[0]; i < r[1]; i++ {
			p[i] = 0x90
		}
	}
	return p
}

// The proof itself: a guest that does nothing special runs even in the emulator of a paravirtual KVM, a wrong
// result and an endless guest are told apart.
func TestProbeOutcomes(t *testing.T) {
	if f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0); err != nil {
		t.Skipf("needs a KVM device that creates VMs: %v", err)
	} else {
		f.Close()
	}
	cx16, xsave, int3, loop := [2]int{0x0e, 0x15}, [2]int{0x1c, 0x24}, [2]int{0x26, 0x2c}, [2]int{0x2c, 0x35}
	if err := probe(t.Context(), without(cx16, xsave, int3, loop)); err != nil {
		t.Errorf("plain instructions: %v", err)
	}
	err := probe(t.Context(), without([2]int{0x0e, 0x13}, xsave, [2]int{0x26, 0x27}, loop))
	if !errdefs.IsUnavailable(err) {
		t.Errorf("breakpoint that is not taken: %v", err)
	}
	endless := without(cx16, xsave, int3, loop)
	copy(endless, []byte{0xeb, 0xfe}) // jmp to itself
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	start := time.Now()
	if err := probe(ctx, endless); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("endless guest: %v", err)
	}
	if d := time.Since(start); d > interruptWait {
		t.Errorf("endless guest was interrupted only after %v", d)
	}
}
