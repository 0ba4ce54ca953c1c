package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crivm/crivm/conf"
	"github.com/crivm/crivm/imageservice"
	"github.com/crivm/crivm/server"
	"github.com/crivm/crivm/server/headroom"
	"github.com/crivm/crivm/vmruntime/cloudhypervisor"
	"github.com/crivm/crivm/vmruntime/kvm"
	"github.com/crivm/crivm/vmruntime/qemu"
)

const (
	// maxMessage of CRI: lists of many containers are long, and clients take 16 MiB.
	maxMessage = 80 << 20
	// stopLimit bounds waiting for calls under way when the daemon stops.
	stopLimit = 10 * time.Second
	// probeLimit bounds finding out what the node can do.
	probeLimit = 10 * time.Second
)

func serveCommand() *cobra.Command {
	var path string
	cmd := &cobra.Command{
		Use:   "serve",
		Short: "Run the daemon: serve CRI on the configured socket",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			config, err := conf.Load(path, cmd.Flags().Changed("config"))
			if err != nil {
				return err
			}
			return serve(cmd.Context(), config)
		},
	}
	cmd.Flags().StringVar(&path, "config", defaultConfigPath, "configuration file; conf.d beside it is read too")
	return cmd
}

// serve wires the parts together and serves until ctx ends. VMs go on running.
func serve(ctx context.Context, config conf.Config) (retErr error) {
	slog.SetDefault(newLogger(config.Log))
	room := headroom.New()
	handlers, warnings, err := handlers(ctx, config)
	if err != nil {
		return err
	}
	for _, w := range warnings {
		slog.Warn(w)
	}
	for _, dir := range []string{config.StateDir, config.RunDir} { // VMM processes of other uids pass through
		if err := os.MkdirAll(dir, 0o711); err != nil {
			return err
		}
	}
	listener, err := listen(config.Socket)
	if err != nil {
		return err
	}
	defer listener.Close()
	network, err := openNetwork(config)
	if err != nil {
		return err
	}
	defer func() { retErr = errors.Join(retErr, network.Close()) }()
	imageConfig := imageConfig(config)
	registry := newRegistry()
	imageConfig.Metrics = registry
	imageConfig.Handlers = slices.Collect(maps.Keys(handlers))
	images, err := imageservice.New(ctx, imageConfig)
	if err != nil {
		return fmt.Errorf("images: %w", err)
	}
	defer func() { retErr = errors.Join(retErr, images.Close()) }()
	runtime, err := server.New(ctx, serverOptions(config, handlers, warnings), network, images)
	if err != nil {
		return fmt.Errorf("server: %w", err)
	}
	defer func() { retErr = errors.Join(retErr, runtime.Close()) }()

	if err := registry.Register(runtime.Collector()); err != nil {
		return fmt.Errorf("metrics: %w", err)
	}
	stopMetrics, err := startMetrics(ctx, config.Metrics, registry)
	if err != nil {
		return err
	}
	defer stopMetrics()
	traced, stopTracing, err := startTracing(ctx, config.Tracing)
	if err != nil {
		return err
	}
	defer stopTracing()
	calls := grpc.NewServer(append(traced, grpc.MaxRecvMsgSize(maxMessage), grpc.MaxSendMsgSize(maxMessage), grpc.InTapHandle(room.Tap), grpc.UnaryInterceptor(server.UnaryInterceptor),
		grpc.StreamInterceptor(server.StreamInterceptor))...)
	cri.RegisterRuntimeServiceServer(calls, &server.Service{Server: runtime})
	cri.RegisterImageServiceServer(calls, images)
	server.RegisterNode(calls, runtime, images)
	ended := make(chan error, 1)
	go func() { ended <- calls.Serve(listener) }()
	slog.Info("serving CRI", "socket", config.Socket, "version", version)
	if _, err := daemon.SdNotify(false, daemon.SdNotifyReady); err != nil {
		slog.Warn("telling systemd", "error", err)
	}
	select {
	case err := <-ended:
		return fmt.Errorf("CRI socket: %w", err)
	case <-ctx.Done():
	}
	slog.Info("stopping; pods go on")
	runtime.EndStreams()
	graceful := make(chan struct{})
	go func() { calls.GracefulStop(); close(graceful) }()
	select {
	case <-graceful:
	case <-time.After(stopLimit):
		calls.Stop()
		<-graceful
	}
	return nil
}

// listen takes the CRI socket; a stale one of a dead daemon is replaced, a live one is not.
func listen(path string) (net.Listener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o711); err != nil {
		return nil, fmt.Errorf("CRI socket: %w", err)
	}
	if conn, err := net.DialTimeout("unix", path, time.Second); err == nil {
		conn.Close()
		return nil, fmt.Errorf("CRI socket %s: another daemon serves it", path)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("CRI socket: %w", err)
	}
	old := unix.Umask(0o177) // root only, from the first moment on
	defer unix.Umask(old)
	listener, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("CRI socket: %w", err)
	}
	return listener, nil
}

// handlers resolves what the configuration names: which VMM runs a handler's pods and how fast. Cloud
// Hypervisor is taken where KVM can run a guest, which is proved, not assumed.
func handlers(ctx context.Context, config conf.Config) (map[string]server.Handler, []string, error) {
	ctx, cancel := context.WithTimeout(ctx, probeLimit)
	defer cancel()
	kvmErr := kvm.Probe(ctx)
	clh, clhErr := cloudhypervisor.New(cloudhypervisor.Config{
		Binary: config.CloudHypervisor.Binary, Seccomp: fmt.Sprint(config.CloudHypervisor.Seccomp), Landlock: config.CloudHypervisor.Landlock,
		ReadDirs: []string{config.Image.DiskDir},
	})
	if clhErr == nil && kvmErr != nil {
		clhErr = fmt.Errorf("KVM cannot run a guest here: %w", kvmErr)
	}
	accel := config.QEMU.Accel
	if accel == "auto" {
		if accel = qemu.KVM; kvmErr != nil {
			accel = qemu.TCG
		}
	}
	emulator := qemu.New(qemu.Config{Binary: config.QEMU.Binary, Firmware: config.QEMU.Firmware, Accel: accel})
	_, qemuErr := qemu.Probe(ctx, config.QEMU.Binary, accel)

	warned := map[string]bool{}
	var warnings []string
	warn := func(text string) {
		if !warned[text] {
			warned[text] = true
			warnings = append(warnings, text)
		}
	}
	out := map[string]server.Handler{}
	for name, vm := range config.Handlers {
		h := server.Handler{
			Kernel: vm.Kernel, Initrd: vm.Initramfs, Cmdline: vm.Cmdline, VCPUs: vm.VCPUs, MaxVCPUs: max(vm.MaxVCPUs, vm.VCPUs),
			Memory: int64(vm.Memory), MaxMemory: int64(vm.MaxMemory), ScratchBytes: int64(vm.ScratchSize), BootTimeout: time.Duration(vm.BootTimeout), Acceleration: "KVM",
			HealthTimeout: time.Duration(vm.HealthTimeout), ShareEmptyDirs: vm.EmptyDir == "shared", EmptyDirBytes: int64(vm.EmptyDirSize),
			PoolSize: vm.PoolSize, Revision: fmt.Sprint(config.VMUsers, config.QEMU, config.CloudHypervisor),
		}
		if vm.MaxVCPUs == 0 {
			h.MaxVCPUs = max(runtime.NumCPU(), vm.VCPUs)
		}
		if vm.MaxMemory == 0 {
			h.MaxMemory = max(hostMemory(), int64(vm.Memory))
		}
		vmm := vm.VMM
		if vmm == "auto" {
			if vmm = "qemu"; clhErr == nil {
				vmm = "cloudhypervisor"
			}
		}
		switch {
		case vmm == "cloudhypervisor" && clhErr == nil:
			h.Driver = clh
		case vmm == "qemu" && qemuErr == nil:
			h.Driver = emulator
			if accel == qemu.TCG {
				h.Acceleration = "software emulation (TCG)"
				h.HealthTimeout *= 3
				warn(fmt.Sprintf("QEMU emulates VMs in software, which is slow: KVM cannot run a guest here: %v", kvmErr))
			}
		case name == "":
			return nil, nil, fmt.Errorf("no VMM for the default handler: %w (run `crivm check`)", errors.Join(clhErr, qemuErr))
		default:
			warn(fmt.Sprintf("handler %q is not offered: no %s: %v", name, vmm, map[string]error{"cloudhypervisor": clhErr, "qemu": qemuErr}[vmm]))
			continue
		}
		for _, file := range []string{h.Kernel, h.Initrd} {
			if _, err := os.Stat(file); err != nil {
				return nil, nil, fmt.Errorf("guest image of handler %q: %w (make it with `crivm guest build`)", name, err)
			}
		}
		out[name] = h
	}
	return out, warnings, nil
}

// hostMemory is the size of the machine's memory in bytes, in units that VMs can have; 0 when it is not told.
func hostMemory() int64 {
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return 0
	}
	return int64(info.Totalram) * int64(info.Unit) / (128 << 20) * (128 << 20)
}

// systemdCgroups resolves "auto": systemd manages the cgroups of a node that it booted with cgroup v2.
func systemdCgroups(driver string) bool {
	if driver != "auto" {
		return driver == "systemd"
	}
	_, systemd := os.Stat("/run/systemd/system")
	_, v2 := os.Stat("/sys/fs/cgroup/cgroup.controllers")
	return systemd == nil && v2 == nil
}

func newLogger(c conf.Log) *slog.Logger {
	var level slog.Level
	if err := level.UnmarshalText([]byte(c.Level)); err != nil {
		level = slog.LevelInfo // conf has checked it
	}
	options := &slog.HandlerOptions{Level: level}
	if c.Format == "json" {
		return slog.New(slog.NewJSONHandler(os.Stderr, options))
	}
	return slog.New(slog.NewTextHandler(os.Stderr, options))
}
