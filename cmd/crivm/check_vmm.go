package main

import (
	"context"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"

	"github.com/crivm/crivm/conf"
	"github.com/crivm/crivm/guest/image"
	"github.com/crivm/crivm/vmruntime/chclient"
	"github.com/crivm/crivm/vmruntime/kvm"
	"github.com/crivm/crivm/vmruntime/qemu"
)

// versionLimit bounds the run of a VMM for its version.
const versionLimit = 10 * time.Second

func checkRoot() finding {
	if uid := os.Geteuid(); uid != 0 {
		return fail("user", "run crivm, and this check, as root", "user id %d cannot make network namespaces, cgroups and mounts", uid)
	}
	return ok("user", "root")
}

// checkVMMs tells of KVM and of each VMM, and then for each handler whether one remains to run it.
func checkVMMs(ctx context.Context, config conf.Config) []finding {
	kvmErr := kvm.Probe(ctx)
	clh, clhWorks := checkCloudHypervisor(ctx, config.CloudHypervisor.Binary)
	emulator, qemuWorks := checkQEMU(ctx, config.QEMU)
	findings := []finding{checkKVM(kvmErr), clh, emulator}
	return append(findings, checkHandlers(config, clhWorks && kvmErr == nil, qemuWorks)...)
}

// checkKVM never fails: QEMU can do without.
func checkKVM(err error) finding {
	const name = "KVM"
	switch {
	case err == nil:
		return ok(name, "runs guests")
	case errdefs.IsNotFound(err):
		return warning(name, "enable virtualisation in the firmware (or nested virtualisation for this VM) and load kvm_intel or kvm_amd", "%v", err)
	case errdefs.IsPermissionDenied(err):
		return warning(name, "let root open /dev/kvm", "%v", err)
	}
	return warning(name, "virtualisation here is too limited to run guests: use other hardware, or enable nested virtualisation; QEMU can emulate meanwhile, slowly", "%v", err)
}

// checkCloudHypervisor tells whether the program may be used. That it may not is a warning: whether the
// node is unfit for it is for checkHandlers to say.
func checkCloudHypervisor(ctx context.Context, binary string) (_ finding, works bool) {
	const name = "cloud-hypervisor"
	advice := fmt.Sprintf("install cloud-hypervisor %s or later", chclient.Recommended)
	path, err := exec.LookPath(binary)
	if err != nil {
		return warning(name, advice, "%v", err), false
	}
	ctx, cancel := context.WithTimeout(ctx, versionLimit)
	defer cancel()
	out, err := exec.CommandContext(ctx, path, "--version").Output()
	if err != nil {
		return warning(name, advice, "%s --version: %v", path, err), false
	}
	if err := chclient.CheckVersion(string(out)); err != nil {
		return warning(name, advice, "%s is refused: %v", path, err), false
	}
	v, err := chclient.ParseVersion(string(out))
	if err != nil {
		return warning(name, advice, "%s is refused: %v", path, err), false
	}
	if v.Less(chclient.Recommended) {
		return warning(name, advice, "%s: %v works, but lacks fixes of %v", path, v, chclient.Recommended), true
	}
	return ok(name, "%s: %v", path, v), true
}

// checkQEMU is checkCloudHypervisor for QEMU and its firmware.
func checkQEMU(ctx context.Context, config conf.QEMU) (_ finding, works bool) {
	const name = "QEMU"
	const advice = "install the package qemu-system-x86"
	path, err := exec.LookPath(config.Binary)
	if err != nil {
		return warning(name, advice, "%v", err), false
	}
	info, err := qemu.Probe(ctx, path, config.Accel)
	if err != nil {
		return warning(name, advice, "%v", err), false
	}
	if config.Firmware != "" {
		if _, err := os.Stat(config.Firmware); err != nil {
			return warning(name, advice+", or name its qboot.rom as qemu.firmware", "firmware: %v", err), false
		}
	}
	if info.Accel == qemu.TCG {
		return warning(name, "", "%s: %s, emulating in software, which is slow", path, info.Version), true
	}
	return ok(name, "%s: %s with KVM", path, info.Version), true
}

// checkHandlers tells which VMM runs each handler. A default handler without one makes the node unfit;
// another handler is only not offered.
func checkHandlers(config conf.Config, clhWorks, qemuWorks bool) []finding {
	var findings []finding
	run := map[string][]string{} // handlers by VMM
	for _, name := range slices.Sorted(maps.Keys(config.Handlers)) {
		vmm := config.Handlers[name].VMM
		title := name
		if name == "" {
			title = "(default)"
		}
		switch {
		case vmm != "qemu" && clhWorks:
			run["Cloud Hypervisor"] = append(run["Cloud Hypervisor"], title)
		case vmm != "cloudhypervisor" && qemuWorks:
			run["QEMU"] = append(run["QEMU"], title)
		case name == "":
			findings = append(findings, fail("handler "+title, "install QEMU, or Cloud Hypervisor where KVM works", "no VMM can run it (vmm = %q)", vmm))
		default:
			findings = append(findings, warning("handler "+title, "", "no VMM can run it (vmm = %q): pods that name it are refused", vmm))
		}
	}
	for _, vmm := range slices.Sorted(maps.Keys(run)) {
		findings = append(findings, ok("handlers", "%s: run by %s", strings.Join(run[vmm], ", "), vmm))
	}
	return findings
}

// checkGuestImages checks each kernel and initramfs once.
func checkGuestImages(config conf.Config) []finding {
	const advice = "build one with `crivm guest build`"
	var findings []finding
	seen := map[[2]string]bool{}
	for _, name := range slices.Sorted(maps.Keys(config.Handlers)) {
		vm := config.Handlers[name]
		pair := [2]string{vm.Kernel, vm.Initramfs}
		if seen[pair] {
			continue
		}
		seen[pair] = true
		title := "guest image"
		if vm.Kernel != config.VM.Kernel || vm.Initramfs != config.VM.Initramfs {
			title += " of handler " + name
		}
		findings = append(findings, checkGuestImage(title, advice, vm.Kernel, vm.Initramfs))
	}
	return findings
}

func checkGuestImage(title, advice, kernel, initramfs string) finding {
	for _, file := range []string{kernel, initramfs} {
		if _, err := os.Stat(file); err != nil {
			return fail(title, advice, "%v", err)
		}
	}
	d, err := image.Verify(kernel, initramfs)
	switch {
	case err == nil:
		return ok(title, "kernel %s, %d modules, %s", d.Kernel, len(d.Modules), d.OCIRuntime)
	case errdefs.IsNotFound(err):
		return warning(title, advice, "kernel %s and initramfs %s are not described, so nobody can tell whether they belong together: %v", kernel, initramfs, err)
	}
	return fail(title, advice, "%v", err)
}

// oneLine joins the lines of joined errors.
func oneLine(text string) string {
	return strings.Join(strings.FieldsFunc(text, func(r rune) bool { return r == '\n' || r == '\t' }), "; ")
}
