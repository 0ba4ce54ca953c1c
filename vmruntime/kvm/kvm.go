// Package kvm proves whether /dev/kvm runs guests. That the device opens and creates VMs says little: on
// some hosts it is a paravirtual kind whose instruction emulator gives up on an ordinary kernel, after
// minutes at full load. So Probe runs a few instructions of the kinds that such an emulator lacks, and a loop
// that only hardware gets through quickly.
//
// It boots no kernel and starts no process.
package kvm

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
)

// defaultWait bounds a probe whose context has no deadline. Hardware needs about 50 ms.
const defaultWait = 2 * time.Second

// interruptWait is how long the vCPU's thread gets to come back after it was interrupted.
const interruptWait = time.Second

// Probe returns nil when KVM ran a guest in 64-bit mode to its end before ctx did. errdefs.ErrNotFound
// without a device, ErrPermissionDenied when it may not be opened, ErrUnavailable, with the reason,
// when it cannot run the guest.
func Probe(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, defaultWait)
	defer cancel()
	err := probe(ctx, program)
	if errors.Is(err, context.DeadlineExceeded) {
		err = fmt.Errorf("%w: the guest did not get through its first instructions in time: %w", errdefs.ErrUnavailable, err)
	}
	if err != nil {
		return fmt.Errorf("KVM is not usable: %w", err)
	}
	return nil
}
