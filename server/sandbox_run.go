package server

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sync/errgroup"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crivm/crivm/agentproto"
	"github.com/crivm/crivm/cni"
	"github.com/crivm/crivm/server/store"
	"github.com/crivm/crivm/vmruntime"
)

// teardownLimit bounds undoing a sandbox; kubelet's own deadline for a stop is 2 minutes.
const teardownLimit = 100 * time.Second

// RunPodSandbox boots a VM and makes it a pod: READY, with its IP known, when it returns. On any error, the
// end of the request included, everything is undone. Calls for one name share one sandbox: see once.
func (s *Server) RunPodSandbox(ctx context.Context, req *cri.RunPodSandboxRequest) (*cri.RunPodSandboxResponse, error) {
	config := req.GetConfig()
	handler, ok := s.opts.Handlers[req.GetRuntimeHandler()]
	if !ok {
		return nil, fmt.Errorf("runtime handler %q is not configured: %w", req.GetRuntimeHandler(), errdefs.ErrInvalidArgument)
	}
	if err := validateSandbox(config); err != nil {
		return nil, err
	}
	if err := fitHugepages("config.linux.resources", hugepages(config.GetLinux().GetResources()), vmSize(handler, config).MemoryBytes); err != nil {
		return nil, err
	}
	defer s.starts()()
	name := sandboxName(config.GetMetadata())
	id, err := s.once(ctx, "sandbox "+name, s.ready, func() (string, error) {
		return s.runSandbox(ctx, name, req.GetRuntimeHandler(), handler, config)
	})
	if err != nil {
		return nil, err
	}
	return &cri.RunPodSandboxResponse{PodSandboxId: id}, nil
}

// ready tells whether a sandbox can be used.
func (s *Server) ready(id string) bool {
	rec, err := s.store.Sandbox(id)
	return err == nil && rec.State == store.SandboxReady
}

func (s *Server) runSandbox(ctx context.Context, name, handlerName string, handler Handler, config *cri.PodSandboxConfig) (_ string, retErr error) {
	start := time.Now()
	steps := timingsOf(ctx)
	if err := s.awaitRoom(ctx, name); err != nil {
		return "", err
	}
	done := steps.span("record")
	rec, warm, err := s.takeSlot(ctx, name, handlerName, handler, config)
	if err == nil && !warm {
		rec, err = s.reserveSandbox(name, handlerName, handler, config, nil)
	}
	if err != nil {
		return "", err
	}
	done()
	sb := s.sandbox(rec.ID)
	if err := sb.op.lock(context.WithoutCancel(ctx)); err != nil { // nobody else has its ID yet; a record must not stay
		return "", err
	}
	defer sb.op.unlock()
	defer func() { // reads retErr only
		if retErr != nil {
			retErr = fmt.Errorf("sandbox %s: %w", rec.ID, retErr)
			s.abandon(ctx, sb, retErr)
		}
	}()

	// The tap must exist before the VMM does; CNI ADD then runs while the VM boots. A slot has both, and its VM.
	var network cni.Slot
	booted := func() {}
	if !warm {
		defer s.bootsCold()() // while it waits, too: slots do not go first
		if booted, err = s.bootTurn(ctx, handler.BootTimeout/4); err != nil {
			return "", err
		}
		defer booted()
		done = steps.span("netns and tap")
		if rec, network, err = s.prepareNetwork(ctx, rec); err != nil {
			return "", err
		}
		done()
	}
	pod := networkPod(rec, config)
	var agent *agentproto.Client
	var attachment cni.Attachment
	group, groupCtx := errgroup.WithContext(ctx)
	group.Go(func() (err error) {
		if warm {
			agent, err = s.enlist(groupCtx, sb, rec, handler, config, steps)
		} else {
			agent, err = s.boot(groupCtx, sb, rec, handler, s.podProcess(rec, config), network, steps)
			booted()
		}
		return err
	})
	group.Go(func() (err error) {
		ctx, done := steps.plugins(groupCtx, "cni add")
		defer done()
		if attachment, err = s.net.Add(ctx, pod); err != nil {
			return fmt.Errorf("network: %w", err)
		}
		return nil
	})
	if err := group.Wait(); err != nil {
		return "", err
	}
	rec, err = s.store.UpdateSandbox(rec.ID, func(r *store.Sandbox) error { r.Network = &attachment; return nil })
	if err != nil {
		return "", err
	}
	inGuest := steps.remote("setup in guest")
	if err := s.plugInterfaces(ctx, sb, attachment); err != nil {
		return "", err
	}
	setup, err := setupRequest(rec, config)
	if err != nil {
		return "", err
	}
	made, err := agent.SetupSandbox(ctx, setup)
	if err != nil {
		return "", vmFailure(sb.vm, fmt.Errorf("setting up the guest: %w", err))
	}
	inGuest(made.GetSteps())
	if err := checkUserNamespace(setup, made); err != nil {
		return "", err
	}
	if err := s.settleHugepages(ctx, sb); err != nil { // while memory is in one piece
		return "", err
	}
	if _, err := s.store.UpdateSandbox(rec.ID, func(r *store.Sandbox) error { r.State = store.SandboxReady; return nil }); err != nil {
		return "", err
	}
	s.watch(sb, sb.vm)
	s.keepTrace(ctx, rec.ID, "")
	s.observed.start(handlerName, warm, time.Since(start))
	s.log.Info("sandbox ready", "sandbox", rec.ID, "pod", config.GetMetadata().GetNamespace()+"/"+config.GetMetadata().GetName(),
		"vmm", rec.Driver, "warm", warm, "total", time.Since(start).Round(time.Millisecond),
		"kernel_to_agent", time.Duration(agent.Info().GetBootNanos()).Round(time.Millisecond), "steps", steps)
	return rec.ID, nil
}

// reserveSandbox writes the record: from now on everything that is made has an owner. That of a slot for the warm pool
// is BOOTING, and no pod can have its name.
func (s *Server) reserveSandbox(name, handlerName string, handler Handler, config *cri.PodSandboxConfig, slot *store.Slot) (store.Sandbox, error) {
	s.mu.Lock() // two reservations must not pick the same uid
	defer s.mu.Unlock()
	uid, err := s.uid()
	if err != nil {
		return store.Sandbox{}, err
	}
	id := newID()
	size := vmSize(handler, config)
	state := store.SandboxCreating
	if slot != nil {
		name, state = "slot_"+id, store.SandboxBooting
	}
	return s.store.CreateSandbox(store.Sandbox{
		ID: id, Name: name, State: state, Slot: slot, Handler: handlerName, Driver: handler.Driver.Name(), UID: uid, MAC: newMAC(), BootID: s.bootID,
		VMDir: filepath.Join(s.opts.RunDir, "vm", id[:16]), Dir: filepath.Join(s.opts.StateDir, "pods", id), Config: store.SandboxConfig{PodSandboxConfig: config},
		VM: store.VMSize{
			BootVCPUs: size.VCPUs, VCPUs: size.VCPUs, MaxVCPUs: max(handler.MaxVCPUs, size.VCPUs),
			BootMemory: size.MemoryBytes, Memory: size.MemoryBytes, MaxMemory: max(handler.MaxMemory, size.MemoryBytes),
		},
	})
}

// prepareNetwork makes the network namespace and the tap.
func (s *Server) prepareNetwork(ctx context.Context, rec store.Sandbox) (store.Sandbox, cni.Slot, error) {
	network, err := s.net.Prepare(ctx, rec.ID, rec.UID, rec.UID)
	if err != nil {
		return rec, cni.Slot{}, fmt.Errorf("network namespace: %w", err)
	}
	rec, err = s.store.UpdateSandbox(rec.ID, func(r *store.Sandbox) error { r.NetnsPath = network.NetnsPath; return nil })
	return rec, network, err
}

// podProcess is where the VMM of a pod runs.
func (s *Server) podProcess(rec store.Sandbox, config *cri.PodSandboxConfig) vmruntime.ProcessSpec {
	score := int(config.GetLinux().GetResources().GetOomScoreAdj()) // not the daemon's own
	return vmruntime.ProcessSpec{NetnsPath: rec.NetnsPath, UID: rec.UID, GID: rec.UID, OOMScoreAdj: &score, Cgroup: vmruntime.Cgroup{
		Systemd: s.opts.SystemdCgroups, Parent: s.cgroupParent(config), Name: "crivm-" + rec.ID,
	}}
}

// boot starts the VM and returns when its agent has said hello.
func (s *Server) boot(ctx context.Context, sb *sandbox, rec store.Sandbox, handler Handler, process vmruntime.ProcessSpec, network cni.Slot, steps *timings) (*agentproto.Client, error) {
	ctx, cancel := context.WithTimeout(ctx, handler.BootTimeout)
	defer cancel()
	done := steps.span("scratch disk")
	scratch, err := s.makeScratch(ctx, rec, handler.ScratchBytes)
	if err != nil {
		return nil, fmt.Errorf("scratch disk: %w", err)
	}
	if err := makeOwned(rec.VMDir, 0o700, rec.UID); err != nil {
		return nil, fmt.Errorf("directory of the VM: %w", err)
	}
	done()
	done = steps.span("vmm start")
	vm, err := handler.Driver.Start(ctx, vmruntime.Spec{
		ID: rec.ID, Dir: rec.VMDir, Kernel: handler.Kernel, Initrd: handler.Initrd, Cmdline: handler.Cmdline,
		VCPUs: rec.VM.BootVCPUs, MaxVCPUs: rec.VM.MaxVCPUs, MemoryBytes: rec.VM.BootMemory, MaxMemoryBytes: rec.VM.MaxMemory,
		Disks:        []vmruntime.Disk{{Serial: scratchSerial, Path: scratch}},
		NICs:         []vmruntime.NIC{{ID: "eth0", Tap: network.Tap, MAC: rec.MAC}},
		HotplugDirs:  []string{rec.Dir},
		SharedMemory: true, // a volume may need it; which volumes there will be is not known yet
		Process:      process,
	})
	if err != nil {
		return nil, fmt.Errorf("starting the VM: %w", err)
	}
	done()
	sb.mu.Lock()
	sb.vm = vm
	sb.mu.Unlock()
	booted := steps.boots("boot to agent")
	for { // one try lasts a minute at most, a boot under software emulation may take longer
		agent, err := sb.client(ctx)
		if err == nil {
			booted(agent.Info().GetBootSteps())
			return agent, nil
		}
		if _, dead := sb.machine(); dead != nil || ctx.Err() != nil || !errors.Is(err, context.DeadlineExceeded) {
			return nil, vmFailure(vm, fmt.Errorf("waiting for the agent (boot timeout %s): %w", handler.BootTimeout, err))
		}
	}
}

// plugInterfaces adds the NICs of what meta-plugins made beside eth0.
func (s *Server) plugInterfaces(ctx context.Context, sb *sandbox, a cni.Attachment) error {
	if len(a.Interfaces) == 0 {
		return fmt.Errorf("network: no interface in the result of the CNI plugins: %w", errdefs.ErrInternal)
	}
	for _, i := range a.Interfaces[1:] {
		if err := sb.vm.AddNIC(ctx, vmruntime.NIC{ID: i.Name, Tap: i.Tap, MAC: i.MAC, MTU: i.MTU}); err != nil {
			return fmt.Errorf("interface %s: %w", i.Name, err)
		}
	}
	return nil
}

// abandon undoes a sandbox that could not be made. What cannot be undone now is kept as NOTREADY, for
// kubelet's Stop and Remove to try again.
func (s *Server) abandon(ctx context.Context, sb *sandbox, cause error) {
	ctx, cancel := detached(ctx, teardownLimit)
	defer cancel()
	rec, err := s.store.Sandbox(sb.id)
	if err != nil {
		return
	}
	err = s.teardown(ctx, sb, rec)
	if err == nil {
		err = s.eraseSandbox(rec)
	}
	if err == nil {
		s.forgetSandbox(sb.id)
		return
	}
	s.log.Error("undoing a failed sandbox; it stays NOTREADY", "sandbox", sb.id, "error", err)
	_, err = s.store.UpdateSandbox(sb.id, func(r *store.Sandbox) error {
		r.State, r.Reason = store.SandboxNotReady, cause.Error()
		return nil
	})
	if err != nil {
		s.log.Error("recording a failed sandbox", "sandbox", sb.id, "error", err)
	}
}

func (s *Server) cgroupParent(config *cri.PodSandboxConfig) string {
	if parent := config.GetLinux().GetCgroupParent(); parent != "" {
		return parent
	}
	return s.opts.CgroupParent
}

// networkPod is the pod as the CNI plugins see it.
func networkPod(rec store.Sandbox, config *cri.PodSandboxConfig) cni.Pod {
	m := config.GetMetadata()
	pod := cni.Pod{
		ID: rec.ID, Name: m.GetName(), Namespace: m.GetNamespace(), UID: m.GetUid(), Hostname: config.GetHostname(),
		CgroupParent: config.GetLinux().GetCgroupParent(), Annotations: config.GetAnnotations(),
		DNS: cni.DNS{Servers: config.GetDnsConfig().GetServers(), Searches: config.GetDnsConfig().GetSearches(), Options: config.GetDnsConfig().GetOptions()},
	}
	pod.IngressBandwidth, _ = bandwidth(config, "kubernetes.io/ingress-bandwidth") // validateSandbox has checked it
	pod.EgressBandwidth, _ = bandwidth(config, "kubernetes.io/egress-bandwidth")
	for _, p := range config.GetPortMappings() {
		if p.GetHostPort() == 0 {
			continue
		}
		pod.PortMappings = append(pod.PortMappings, cni.PortMapping{
			Protocol: p.GetProtocol().String(), ContainerPort: p.GetContainerPort(), HostPort: p.GetHostPort(), HostIP: p.GetHostIp(),
		})
	}
	return pod
}

// setupRequest is all that makes the booted guest this pod.
func setupRequest(rec store.Sandbox, config *cri.PodSandboxConfig) (*agentproto.SetupSandboxRequest, error) {
	entropy := make([]byte, 64)
	rand.Read(entropy)
	hostname := config.GetHostname()
	if hostname == "" {
		var err error
		if hostname, err = os.Hostname(); err != nil {
			return nil, fmt.Errorf("hostname: %w", err)
		}
	}
	req := &agentproto.SetupSandboxRequest{
		SandboxId: rec.ID, Hostname: hostname, UnixNanos: time.Now().UnixNano(), Entropy: entropy,
		Sysctls: config.GetLinux().GetSysctls(), ScratchSerial: scratchSerial, MachineId: rec.ID[:32],
		SharePidNamespace: config.GetLinux().GetSecurityContext().GetNamespaceOptions().GetPid() == cri.NamespaceMode_POD,
		UserNamespace:     guestUserNamespace(config),
	}
	for n, i := range rec.Network.Interfaces {
		match := i.MAC
		if n == 0 {
			match = rec.MAC
		}
		nic := &agentproto.Interface{MatchMac: match, Mac: i.MAC, Name: i.Name, Mtu: uint32(i.MTU)}
		for _, a := range i.Addresses {
			nic.Addresses = append(nic.Addresses, a.String())
		}
		req.Interfaces = append(req.Interfaces, nic)
	}
	for _, r := range rec.Network.Routes {
		route := &agentproto.Route{
			Destination: r.Destination.String(), Interface: r.Interface, Mtu: uint32(r.MTU), Advmss: uint32(r.AdvMSS),
			Priority: uint32(r.Priority), Table: uint32(r.Table), Scope: uint32(r.Scope),
		}
		if r.Gateway.IsValid() {
			route.Gateway = r.Gateway.String()
		}
		if r.Source.IsValid() {
			route.Source = r.Source.String()
		}
		req.Routes = append(req.Routes, route)
	}
	for _, n := range rec.Network.Neighbours {
		req.Neighbours = append(req.Neighbours, &agentproto.Neighbour{Address: n.Address.String(), Mac: n.MAC, Interface: n.Interface})
	}
	return req, nil
}

// bandwidth reads a quantity in bits per second from the annotation that Kubernetes uses.
func bandwidth(config *cri.PodSandboxConfig, key string) (int64, error) {
	text := config.GetAnnotations()[key]
	if text == "" {
		return 0, nil
	}
	multiplier := int64(1)
	switch text[len(text)-1] {
	case 'k', 'K':
		multiplier = 1e3
	case 'M':
		multiplier = 1e6
	case 'G':
		multiplier = 1e9
	}
	if multiplier > 1 {
		text = text[:len(text)-1]
	}
	n, err := strconv.ParseInt(text, 10, 64)
	if err != nil || n <= 0 || n > 1e15/multiplier || n*multiplier < 1000 {
		return 0, fmt.Errorf("annotation %s: %q is not a bandwidth between 1k and 1P bits/s: %w", key, config.GetAnnotations()[key], errdefs.ErrInvalidArgument)
	}
	return n * multiplier, nil
}
