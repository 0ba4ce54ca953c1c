package guest

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"github.com/crivm/crivm/agentproto"
)

// A guest that waits for a pod has time. What it will do as a pod it does once before, so that programs, kernel code and
// compiled filters are in memory, and under software emulation translated, when a pod waits for them. Nothing of it stays:
// addresses are taken off the NIC again, which has sent no frame, and the container is one of the agent's own program, of
// an agent with a directory of its own.

const (
	// rehearsalTimeout bounds a rehearsal: a slot yields the CPU to everything else.
	rehearsalTimeout = 2 * time.Minute
	// rehearsalID names the container; no container of a pod can have it, as those are named by the host at random.
	rehearsalID = "rehearsal"
	// rehearsalProgram is the agent's program in the container.
	rehearsalProgram = "/agent"
)

// rehearsal is one try.
type rehearsal struct {
	breakOff context.CancelCauseFunc
	done     chan struct{} // closed when all that can be undone is
	err      error         // valid when done is closed, as is dirty
	dirty    error         // what could not be undone: this guest must not become a pod
}

type idleTimeKey struct{}

// inIdleTime tells whether programs that are run for ctx have to make way for everything else.
func inIdleTime(ctx context.Context) bool { return ctx.Value(idleTimeKey{}) != nil }

// errPodComes is why a rehearsal is broken off.
var errPodComes = fmt.Errorf("a pod has come: %w", errdefs.ErrAborted)

// Rehearse implements agentproto.AgentService.
func (a *Agent) Rehearse(ctx context.Context, r *agentproto.RehearseRequest) (*agentproto.RehearseResponse, error) {
	if a.machine == nil { // nothing here takes longer the first time
		return &agentproto.RehearseResponse{}, nil
	}
	ctx, cancel := context.WithTimeout(ctx, rehearsalTimeout)
	defer cancel()
	ctx, steps := withSteps(ctx)
	// What is translated before a module is loaded may be so again after: the kernel patches itself.
	a.machine.modules.Load(setupModules...)
	a.machine.modules.Load(containerModules...)
	a.machine.modules.Load(laterModules...)
	a.sandboxMu.Lock()
	if a.sandbox != nil {
		a.sandboxMu.Unlock()
		return nil, fmt.Errorf("guest is a pod: %w", errdefs.ErrFailedPrecondition)
	}
	if err := rehearseIdentity(r.GetSandbox()); err != nil {
		a.sandboxMu.Unlock()
		return nil, err
	}
	try := a.rehearsal.Load()
	if try != nil { // an earlier call's; it has answered nobody if the host was restarted
		a.sandboxMu.Unlock()
		select {
		case <-try.done:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	} else {
		try = &rehearsal{done: make(chan struct{})}
		ctx, try.breakOff = context.WithCancelCause(ctx)
		a.rehearsal.Store(try)
		try.err, a.networkDirty = a.rehearseNetwork(ctx, r.GetSandbox()) // SetupSandbox waits for the lock
		try.dirty = a.networkDirty
		a.sandboxMu.Unlock()
		if try.err == nil && try.dirty == nil {
			try.err, try.dirty = a.rehearseContainer(context.WithValue(ctx, idleTimeKey{}, true), r)
		}
		if try.err != nil && ctx.Err() != nil {
			try.err = fmt.Errorf("%w: %w", context.Cause(ctx), try.err)
		}
		if try.err == nil {
			debug.FreeOSMemory() // the agent's garbage, and the first collection of it
		}
		try.breakOff(nil)
		close(try.done)
	}
	switch {
	case try.dirty != nil:
		return nil, fmt.Errorf("a rehearsal has left something: %w: %w", try.dirty, errdefs.ErrDataLoss)
	case try.err != nil:
		a.rehearsal.CompareAndSwap(try, nil) // it may be tried again
		return nil, fmt.Errorf("rehearsal: %w", try.err)
	}
	return &agentproto.RehearseResponse{Steps: steps.list()}, nil
}

// breakOffRehearsal has one that is under way end soon. It does not wait.
func (a *Agent) breakOffRehearsal() {
	if try := a.rehearsal.Load(); try != nil {
		try.breakOff(errPodComes)
	}
}

// rehearsed waits until a rehearsal has been undone; the error tells that it could not be. Without one it does not wait.
func (a *Agent) rehearsed(ctx context.Context) error {
	try := a.rehearsal.Load()
	if try == nil {
		return nil
	}
	select {
	case <-try.done:
		return try.dirty
	case <-ctx.Done():
		return fmt.Errorf("undoing a rehearsal: %w", ctx.Err())
	}
}

// rehearseIdentity does what makes a guest a pod, without making it one: what is set is what is so already, or is set
// again for the pod, like clock and entropy.
func rehearseIdentity(r *agentproto.SetupSandboxRequest) error {
	if request := proto.CloneOf(r); !proto.Equal(request, r) {
		return fmt.Errorf("request differs from its copy: %w", errdefs.ErrInternal)
	}
	name, err := os.Hostname()
	if err != nil {
		return err
	}
	return errors.Join(setClock(r.GetUnixNanos()), addEntropy(r.GetEntropy()), setHostname(name), setSysctls(map[string]string{}))
}

// rehearseNetwork sets a network up and undoes that: all of it in a network namespace that nobody else sees, then, with
// the pod's NIC, what sends no frame.
func (a *Agent) rehearseNetwork(ctx context.Context, r *agentproto.SetupSandboxRequest) (err, dirty error) {
	defer step(ctx, "network")()
	if err, dirty := a.rehearseElsewhere(ctx); err != nil || dirty != nil {
		return err, dirty
	}
	for _, nic := range r.GetInterfaces() {
		if nic.GetMatchMac() == "" {
			continue
		}
		if err := context.Cause(ctx); err != nil {
			return err, nil
		}
		return rehearseNIC(ctx, nic)
	}
	return nil, nil
}

// rehearseElsewhere sets a network up in a namespace of its own, which goes with the thread's return from it, with the
// driver of a NIC without a wire, if this kernel has it.
func (a *Agent) rehearseElsewhere(ctx context.Context) (err, dirty error) {
	giveBack, err := a.machine.modules.borrow("dummy", "numdummies=0")
	if err != nil {
		return err, nil
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread()
		var home *os.File
		if home, err = os.Open("/proc/thread-self/ns/net"); err != nil {
			runtime.UnlockOSThread()
			return
		}
		defer home.Close()
		if err = unix.Unshare(unix.CLONE_NEWNET); err == nil {
			err = rehearseLinks(ctx)
			if dirty = unix.Setns(int(home.Fd()), unix.CLONE_NEWNET); dirty != nil {
				return // and the thread ends
			}
		}
		runtime.UnlockOSThread()
	}()
	<-done
	return err, errors.Join(dirty, giveBack())
}

// rehearseLinks sets the interfaces of the thread's own network namespace up as a pod's.
func rehearseLinks(ctx context.Context) error {
	if err := setLoopbackUp(); err != nil {
		return err
	}
	const name, mac = "eth0", "02:00:00:00:00:01"
	nic := &netlink.Dummy{LinkAttrs: netlink.NewLinkAttrs()}
	nic.Name = "nic"
	if err := netlink.LinkAdd(nic); err != nil { // this kernel has no such driver
		return applyNetwork(ctx, nil, []*agentproto.Interface{{Name: "lo", Addresses: []string{"fd00::3/128"}}}, nil, nil)
	}
	defer netlink.LinkDel(nic)
	if err := errors.Join(netlink.LinkSetARPOn(nic), netlink.LinkSetMulticastOn(nic), netlink.LinkSetName(nic, name)); err != nil {
		return err
	}
	return applyNetwork(ctx, nil, []*agentproto.Interface{{Mac: mac, Name: name, Mtu: 1450, Addresses: []string{"10.1.2.3/24", "fd00::3/64"}}},
		[]*agentproto.Route{
			{Destination: "10.1.2.1/32", Interface: name, Scope: unix.RT_SCOPE_LINK}, {Destination: "0.0.0.0/0", Gateway: "10.1.2.1", Interface: name},
			{Destination: "fd00::1/128", Interface: name}, {Destination: "::/0", Gateway: "fd00::1", Interface: name},
		},
		[]*agentproto.Neighbour{{Address: "10.1.2.1", Mac: mac, Interface: name}, {Address: "fd00::1", Mac: mac, Interface: name}})
}

// rehearseNIC gives the pod's NIC another MAC, IPv4 addresses, routes and a neighbour, and brings it up, for as long as
// it takes. IPv6, with which a NIC that comes up says hello to all, is off meanwhile.
func rehearseNIC(ctx context.Context, nic *agentproto.Interface) (err, dirty error) {
	link, err := network{&netlink.Handle{}, nil, nil}.findLink(ctx, nic)
	if err != nil {
		return err, nil
	}
	before := link.Attrs()
	if before.Flags&net.FlagUp != 0 {
		return fmt.Errorf("interface %s is up: %w", before.Name, errdefs.ErrFailedPrecondition), nil
	}
	ipv6 := filepath.Join("/proc/sys/net/ipv6/conf", before.Name, "disable_ipv6")
	if err := notExist(os.WriteFile(ipv6, []byte("1"), 0)); err != nil {
		return err, nil
	}
	mac := slices.Clone(before.HardwareAddr)
	mac[len(mac)-1] ^= 1
	const address, gateway = "169.254.254.1/30", "169.254.254.2"
	err = applyNetwork(ctx, nil, []*agentproto.Interface{{MatchMac: nic.GetMatchMac(), Mac: mac.String(), Name: before.Name, Mtu: uint32(before.MTU - 50), Addresses: []string{address}}},
		[]*agentproto.Route{{Destination: gateway + "/32", Interface: before.Name}, {Destination: "0.0.0.0/0", Gateway: gateway, Interface: before.Name}},
		[]*agentproto.Neighbour{{Address: gateway, Mac: nic.GetMatchMac(), Interface: before.Name}})
	dirty = errors.Join(
		clearLink(link),
		netlink.LinkSetDown(link), // what it knows of neighbours goes with that
		netlink.LinkSetMTU(link, before.MTU),
		netlink.LinkSetHardwareAddr(link, before.HardwareAddr),
		notExist(os.WriteFile(ipv6, []byte("0"), 0)),
	)
	return err, dirty
}

// clearLink takes an interface's addresses, routes and neighbours off.
func clearLink(link netlink.Link) error {
	var failed []error
	neighbours, err := netlink.NeighList(link.Attrs().Index, netlink.FAMILY_ALL)
	failed = append(failed, err)
	for _, n := range neighbours {
		if n.State == netlink.NUD_PERMANENT {
			failed = append(failed, netlink.NeighDel(&n))
		}
	}
	routes, err := netlink.RouteList(link, netlink.FAMILY_ALL) // of the main table; the kernel's own go with their addresses
	failed = append(failed, err)
	for _, r := range routes {
		if r.Protocol == unix.RTPROT_KERNEL {
			continue
		}
		if err := netlink.RouteDel(&r); err != nil && !errors.Is(err, unix.ESRCH) && !errors.Is(err, unix.ENOENT) {
			failed = append(failed, fmt.Errorf("route %s: %w", r.Dst, err))
		}
	}
	addresses, err := netlink.AddrList(link, netlink.FAMILY_ALL)
	failed = append(failed, err)
	for _, a := range addresses {
		failed = append(failed, netlink.AddrDel(link, &a))
	}
	return errors.Join(failed...)
}

// rehearseContainer makes, starts, enters and deletes a container, on the pod's scratch disk, as an agent of its own.
func (a *Agent) rehearseContainer(ctx context.Context, r *agentproto.RehearseRequest) (err, dirty error) {
	dir := filepath.Join(agentDir, rehearsalID)
	defer func() { dirty = errors.Join(dirty, os.RemoveAll(dir)) }()
	images := &images{dir: filepath.Join(dir, "images"), mounts: map[string]*imageMount{}}
	if r.GetContainer().GetRootfs().GetImageSerial() == "" { // the host has no disk for it
		lower := filepath.Join(dir, "lower")
		for _, d := range []string{"proc", "dev", "sys"} {
			if err := os.MkdirAll(filepath.Join(lower, d), 0o755); err != nil {
				return err, nil
			}
		}
		images.mounts[rehearsalID] = &imageMount{users: 1, path: lower} // mounted already, and for good
	}
	twin, err := NewAgent(Options{Runtime: a.Runtime, Reaper: a.Reaper, Dir: dir, machine: &machine{
		modules: a.machine.modules, blocks: &blockDevices{users: map[string]map[string]bool{}}, prepared: a.machine.prepared, images: images,
	}})
	if err != nil {
		return err, nil
	}
	select {
	case <-a.machine.prepared:
	case <-ctx.Done():
		return ctx.Err(), nil
	}
	done := step(ctx, "scratch disk")
	sb := &sandbox{request: r.GetSandbox(), scratchDone: make(chan struct{})}
	if sb.scratch, err = twin.mountScratch(ctx, r.GetSandbox().GetScratchSerial()); err != nil {
		return err, untilFree(func() error { return unmount(filepath.Join(dir, "scratch")) })
	}
	done()
	close(sb.scratchDone)
	twin.sandbox = sb
	defer func() {
		dirty = errors.Join(dirty, os.RemoveAll(filepath.Join(sb.scratch, "containers")), untilFree(func() error { return unmount(sb.scratch) }))
	}()
	defer func() { // whatever has become of it
		if errors.Is(context.Cause(ctx), errPodComes) { // which goes first; its containers wait for the scratch disk
			select {
			case <-a.setUp:
			case <-time.After(cleanupTimeout): // its set-up has failed, and may be tried again
			}
		}
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupTimeout)
		defer cancel()
		defer step(ctx, "delete")()
		dirty = errors.Join(dirty, untilFree(func() error { return twin.deleteContainer(ctx, rehearsalID) }))
	}()
	return twin.play(ctx, r.GetContainer()), nil
}

// untilFree undoes what concerns a file system that may be held for a moment yet: the kernel ends the mount namespace of
// a container after its last process, in its own time.
func untilFree(undo func() error) error {
	const pause = 20 * time.Millisecond
	for limit := time.Now().Add(cleanupTimeout); ; time.Sleep(pause) {
		err := undo()
		if !errors.Is(err, unix.EBUSY) || time.Now().After(limit) {
			return err
		}
	}
}

// play runs a container of the agent's program, and a second process in it, whose output is read as the host reads it.
func (a *Agent) play(ctx context.Context, r *agentproto.CreateContainerRequest) error {
	spec, err := parseSpec(r.GetOciSpec())
	if err != nil {
		return err
	}
	spec.Process.Args = []string{rehearsalProgram, PauseArgument}
	spec.Mounts = append(spec.Mounts, specs.Mount{Destination: rehearsalProgram, Source: "/init", Type: "bind", Options: []string{"bind", "ro"}})
	text, err := json.Marshal(spec)
	if err != nil {
		return fmt.Errorf("OCI spec: %w", err)
	}
	create := &agentproto.CreateContainerRequest{
		ContainerId: rehearsalID, OciSpec: text, User: r.GetUser(), Stdio: r.GetStdio(),
		Rootfs: &agentproto.Rootfs{ImageSerial: cmp.Or(r.GetRootfs().GetImageSerial(), rehearsalID), Readonly: r.GetRootfs().GetReadonly()},
	}
	done := step(ctx, "create")
	created, err := a.CreateContainer(ctx, create)
	if err := errors.Join(err, throughWire(create, created)); err != nil {
		return err
	}
	done()
	done = step(ctx, "start")
	start := &agentproto.StartContainerRequest{ContainerId: rehearsalID}
	started, err := a.StartContainer(ctx, start)
	if err := errors.Join(err, throughWire(start, started)); err != nil {
		return err
	}
	done()
	defer step(ctx, "exec")()
	run := &agentproto.ExecRequest{ContainerId: rehearsalID, ExecId: rehearsalID, Args: []string{rehearsalProgram, "version"}, Stdio: &agentproto.Stdio{}}
	running, err := a.Exec(ctx, run)
	if err := errors.Join(err, throughWire(run, running)); err != nil {
		return err
	}
	for _, stderr := range []bool{false, true} {
		if err := a.readOutput(ctx, &agentproto.Output{ContainerId: rehearsalID, ExecId: rehearsalID, Stderr: stderr}); err != nil {
			return err
		}
	}
	wait := &agentproto.WaitRequest{ContainerId: rehearsalID, ExecId: rehearsalID}
	ended, err := a.Wait(ctx, wait)
	if err == nil && ended.GetExit().GetCode() != 0 {
		err = fmt.Errorf("exec ended with %d: %w", ended.GetExit().GetCode(), errdefs.ErrUnknown)
	}
	if err := errors.Join(err, throughWire(wait, ended)); err != nil {
		return err
	}
	forget := &agentproto.DeleteExecRequest{ContainerId: rehearsalID, ExecId: rehearsalID}
	forgotten, err := a.DeleteExec(ctx, forget)
	return errors.Join(err, throughWire(forget, forgotten))
}

// throughWire encodes and decodes messages as the wire does: what that needs of each kind is worked out the first time. The
// calls themselves are not made over a wire, as one that is broken off would go on unseen.
func throughWire(messages ...proto.Message) error {
	for _, m := range messages {
		b, err := proto.Marshal(m)
		if err == nil {
			err = proto.Unmarshal(b, m.ProtoReflect().New().Interface())
		}
		if err != nil {
			return fmt.Errorf("%s through the wire: %w", m.ProtoReflect().Descriptor().Name(), err)
		}
	}
	return nil
}

// readOutput reads the output of a process to its end, as the host does.
func (a *Agent) readOutput(ctx context.Context, o *agentproto.Output) error {
	here, there := net.Pipe()
	var serving sync.WaitGroup
	defer serving.Wait()
	defer here.Close()
	serving.Go(func() {
		defer there.Close()
		a.serveStream(ctx, there)
	})
	out, err := agentproto.AskOutput(here, o)
	if err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, out)
	return errors.Join(err, out.Ack(out.Offset()))
}
