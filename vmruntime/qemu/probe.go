package qemu

import (
	"context"
	"fmt"
	"os/exec"
	"regexp"
	"time"

	"github.com/containerd/errdefs"

	"github.com/crivm/crivm/vmruntime/kvm"
)

// kvmWait bounds the proof that KVM runs a guest.
const kvmWait = 3 * time.Second

// Info is what Probe found.
type Info struct {
	Version string // of QEMU, such as "7.2.22"
	Accel   string // KVM or TCG
	// Reason is why Auto came to TCG; "" otherwise.
	Reason string
}

var versionLine = regexp.MustCompile(`version (\d+\.\d+(?:\.\d+)?)`)

// Probe runs the binary for its version and decides on acceleration as VMs would. errdefs.ErrNotFound
// when there is no such binary, ErrFailedPrecondition when accel is KVM and KVM does not run a guest.
func Probe(ctx context.Context, binary, accel string) (Info, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, binary, "--version").Output()
	if err != nil {
		return Info{}, fmt.Errorf("QEMU %s: %w: %w", binary, errdefs.ErrNotFound, err)
	}
	m := versionLine.FindSubmatch(out)
	if m == nil {
		return Info{}, fmt.Errorf("QEMU %s tells no version: %w", binary, errdefs.ErrFailedPrecondition)
	}
	info := Info{Version: string(m[1])}
	info.Accel, info.Reason, err = chooseAccel(ctx, accel)
	return info, err
}

// chooseAccel turns Auto into KVM or TCG, with the reason when it is TCG for want of KVM.
func chooseAccel(ctx context.Context, accel string) (chosen, reason string, err error) {
	switch accel {
	case TCG:
		return TCG, "", nil
	case KVM, Auto, "":
	default:
		return "", "", fmt.Errorf("acceleration %q is not one of auto, kvm, tcg: %w", accel, errdefs.ErrInvalidArgument)
	}
	probing, cancel := context.WithTimeout(ctx, kvmWait)
	defer cancel()
	err = kvm.Probe(probing)
	switch {
	case err == nil:
		return KVM, "", nil
	case ctx.Err() != nil: // says nothing about KVM
		return "", "", fmt.Errorf("probe KVM: %w", ctx.Err())
	case accel == KVM:
		return "", "", fmt.Errorf("%w: %w", errdefs.ErrFailedPrecondition, err)
	}
	return TCG, err.Error(), nil
}
