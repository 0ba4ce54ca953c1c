package guest

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"github.com/containerd/errdefs"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"github.com/crivm/crivm/agentproto"
)

// sandbox is what SetupSandbox made of the guest. Guarded by Agent.sandboxMu.
type sandbox struct {
	request       *agentproto.SetupSandboxRequest // without clock and entropy
	scratchSerial string
	scratch       string        // directory for writable data
	scratchErr    error         // why there is none
	scratchDone   chan struct{} // closed when one of the two is there
	pause         *Child        // first process of the shared PID namespace; nil without one
}

// SetupSandbox implements agentproto.AgentService. Every step may be done again, so a call that failed
// half way, or whose answer was lost, is simply repeated.
func (a *Agent) SetupSandbox(ctx context.Context, r *agentproto.SetupSandboxRequest) (*agentproto.SetupSandboxResponse, error) {
	ctx, steps := withSteps(ctx)
	a.breakOffRehearsal()
	a.sandboxMu.Lock()
	defer a.sandboxMu.Unlock()
	a.breakOffRehearsal() // one that began meanwhile
	if a.networkDirty != nil {
		return nil, fmt.Errorf("a rehearsal has left something: %w", a.networkDirty)
	}
	request := proto.CloneOf(r)
	request.UnixNanos, request.Entropy = 0, nil
	if a.sandbox != nil && !proto.Equal(a.sandbox.request, request) {
		return nil, fmt.Errorf("guest is sandbox %s already: %w", a.sandbox.request.GetSandboxId(), errdefs.ErrFailedPrecondition)
	}
	if a.machine == nil {
		if a.sandbox == nil {
			a.sandbox = &sandbox{request: request, scratch: a.Dir, scratchDone: make(chan struct{})}
			close(a.sandbox.scratchDone)
			close(a.setUp)
		}
		return &agentproto.SetupSandboxResponse{UserNamespace: r.GetUserNamespace() != nil}, nil
	}
	if err := errors.Join(setClock(r.GetUnixNanos()), addEntropy(r.GetEntropy())); err != nil {
		return nil, err
	}
	if a.sandbox == nil {
		sb := &sandbox{request: request, scratchSerial: r.GetScratchSerial(), scratchDone: make(chan struct{})}
		if err := a.setupSandbox(ctx, sb); err != nil {
			return nil, fmt.Errorf("sandbox %s: %w", r.GetSandboxId(), err)
		}
		a.sandbox = sb
		close(a.setUp)
		go a.attachScratch(sb)
	}
	return &agentproto.SetupSandboxResponse{Steps: steps.list(), UserNamespace: a.namespaces.Load() != nil}, nil
}

// attachScratch mounts the scratch disk after the pod has been reported to be ready: only containers need it, and they
// wait. A pod that cannot have its disk is of no use, so its guest ends, which makes the sandbox NOTREADY and kubelet
// make another.
func (a *Agent) attachScratch(sb *sandbox) {
	ctx, cancel := context.WithTimeout(context.Background(), 2*deviceTimeout)
	defer cancel()
	if sb.scratchErr = a.rehearsed(ctx); sb.scratchErr == nil { // it has used the disk
		sb.scratch, sb.scratchErr = a.mountScratch(ctx, sb.scratchSerial)
	}
	close(sb.scratchDone)
	if sb.scratchErr != nil {
		slog.Error("pod has no disk", "error", sb.scratchErr)
		a.shutdown()
	}
}

// setupSandbox makes the guest the pod, its scratch disk apart.
func (a *Agent) setupSandbox(ctx context.Context, sb *sandbox) error {
	r := sb.request
	if r.GetUserNamespace() != nil && a.namespaces.Load() == nil { // else by an earlier try, or none is wanted
		done := step(ctx, "user namespace")
		n, err := a.makeNamespaces(r.GetUserNamespace())
		if err != nil {
			return err
		}
		a.namespaces.Store(n)
		done()
	}
	namespaces := a.namespaces.Load()
	var wg sync.WaitGroup
	var network error
	wg.Go(func() {
		loaded := step(ctx, "network driver")
		a.machine.modules.Load("virtio_net")
		loaded()
		defer step(ctx, "network")()
		network = applyNetwork(ctx, namespaces, r.GetInterfaces(), r.GetRoutes(), r.GetNeighbours())
	})
	hostname := namespaces.do(func() error { return setHostname(r.GetHostname()) })
	rest := errors.Join(setLoopbackUp(), hostname, writeMachineID(r.GetMachineId()), mountShm(r.GetShmBytes(), namespaces))
	if rest == nil && r.GetSharePidNamespace() && namespaces == nil {
		sb.pause, rest = a.startPause()
	}
	wg.Wait()
	err := errors.Join(network, rest)
	if err == nil {
		err = namespaces.do(func() error { return setSysctls(r.GetSysctls()) }) // some belong to interfaces
	}
	if err != nil && sb.pause != nil {
		a.Reaper.Signal(sb.pause, unix.SIGKILL)
	}
	return err
}

// closeSandbox undoes what must not outlive the agent: the shared PID namespace and the scratch mount.
func (a *Agent) closeSandbox() error {
	a.sandboxMu.Lock()
	defer a.sandboxMu.Unlock()
	if a.sandbox == nil || a.machine == nil {
		return nil
	}
	if a.sandbox.pause != nil {
		a.Reaper.Signal(a.sandbox.pause, unix.SIGKILL)
	}
	if n := a.namespaces.Load(); n != nil {
		a.Reaper.Signal(n.first, unix.SIGKILL)
	}
	unix.Sync()
	<-a.sandbox.scratchDone
	if a.sandbox.scratchErr != nil {
		return nil
	}
	a.trims.remove(a.sandbox.scratch, 0) // nobody reads it any more
	return unmount(a.sandbox.scratch)
}

// UpdateInterfaces implements agentproto.AgentService.
func (a *Agent) UpdateInterfaces(ctx context.Context, r *agentproto.UpdateInterfacesRequest) (*agentproto.UpdateInterfacesResponse, error) {
	a.sandboxMu.Lock()
	defer a.sandboxMu.Unlock()
	if a.sandbox == nil {
		return nil, fmt.Errorf("sandbox is not set up: %w", errdefs.ErrFailedPrecondition)
	}
	if a.machine != nil {
		if err := applyNetwork(ctx, a.namespaces.Load(), r.GetInterfaces(), r.GetRoutes(), r.GetNeighbours()); err != nil {
			return nil, err
		}
	}
	return &agentproto.UpdateInterfacesResponse{}, nil
}

// mountScratch mounts the pod's scratch disk, or a tmpfs when there is none.
func (a *Agent) mountScratch(ctx context.Context, serial string) (string, error) {
	path := filepath.Join(a.Dir, "scratch")
	if err := os.MkdirAll(path, 0o711); err != nil {
		return "", err
	}
	if mounted(path) { // by an earlier try
		return path, nil
	}
	var err error
	if serial == "" {
		err = unix.Mount("tmpfs", path, "tmpfs", unix.MS_NOATIME, "mode=0711")
	} else {
		a.machine.modules.Load("virtio_blk", "ext4")
		var device string
		if device, err = findDisk(ctx, serial); err == nil {
			// No barriers: what a program syncs in a VOLUME of its image is written to the host's file, but the host's disk need
			// not be synced for what dies with this guest. crivm has made the file system for this pod: one that does not
			// mount is crivm's own fault, or the host's disk's.
			if err = unix.Mount(device, path, "ext4", unix.MS_NOATIME, "noinit_itable,nobarrier"); err == nil {
				a.trims.add(path, device)
			} else if errors.Is(err, unix.EIO) {
				err = fmt.Errorf("%w: %w", err, errdefs.ErrUnavailable)
			} else {
				err = fmt.Errorf("%w: %w", err, errdefs.ErrInternal)
			}
		}
	}
	if err != nil {
		return "", fmt.Errorf("mount scratch disk %q: %w", serial, err)
	}
	return path, os.Chmod(path, 0o711)
}

// mountShm makes the pod's /dev/shm; once more with another size changes the size.
func mountShm(size int64, namespaces *podNamespaces) error {
	if size <= 0 {
		size = 64 << 20
	}
	flags := uintptr(unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC)
	if mounted(shmPath) {
		flags |= unix.MS_REMOUNT
	}
	if err := os.MkdirAll(shmPath, 0o755); err != nil {
		return err
	}
	if err := unix.Mount("shm", shmPath, "tmpfs", flags, "mode=1777,size="+strconv.FormatInt(size, 10)); err != nil {
		return fmt.Errorf("mount shared memory: %w", err)
	}
	uid, gid := namespaces.owner(0, 0)
	return os.Chown(shmPath, uid, gid)
}

// mounted tells whether something is mounted on a directory: it is on another device than its parent.
func mounted(path string) bool {
	var st, parent unix.Stat_t
	return unix.Stat(path, &st) == nil && unix.Stat(filepath.Dir(path), &parent) == nil && st.Dev != parent.Dev
}

func setLoopbackUp() error {
	lo, err := netlink.LinkByName("lo")
	if err == nil {
		err = netlink.LinkSetUp(lo)
	}
	if err != nil {
		return fmt.Errorf("loopback: %w", err)
	}
	return nil
}

func setHostname(name string) error {
	if name == "" {
		return nil
	}
	if err := unix.Sethostname([]byte(name)); err != nil {
		return fmt.Errorf("set hostname %q: %w", name, err)
	}
	return nil
}

func writeMachineID(id string) error {
	if id == "" {
		return nil
	}
	return os.WriteFile("/etc/machine-id", []byte(id+"\n"), 0o444)
}

// startPause starts the first process of the pod's shared PID namespace. It reaps what is orphaned there.
func (a *Agent) startPause() (*Child, error) {
	child, err := a.Reaper.Start(Command{
		Path: "/proc/self/exe", Args: []string{PauseArgument}, Dir: "/",
		Env:  []string{"GOGC=off", "GOMAXPROCS=1"},
		Attr: &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWPID},
	})
	if err != nil {
		return nil, fmt.Errorf("shared PID namespace: %w", err)
	}
	go func() {
		<-child.Done()
		slog.Info("first process of the shared PID namespace has ended", "status", child.Status())
	}()
	return child, nil
}

// podPIDNamespace is the path of the pod's shared PID namespace, made when SetupSandbox has not.
func (a *Agent) podPIDNamespace() (string, error) {
	a.sandboxMu.Lock()
	defer a.sandboxMu.Unlock()
	if a.machine == nil {
		return "", nil
	}
	if a.sandbox == nil {
		return "", fmt.Errorf("sandbox is not set up: %w", errdefs.ErrFailedPrecondition)
	}
	if n := a.namespaces.Load(); n != nil {
		return namespacePath(n.pid), nil
	}
	if a.sandbox.pause == nil {
		var err error
		if a.sandbox.pause, err = a.startPause(); err != nil {
			return "", err
		}
	}
	return fmt.Sprintf("/proc/%d/ns/pid", a.sandbox.pause.PID), nil
}

// setSysctls writes kernel parameters. Names are in dots form; one whose first separator is a slash is in
// slashes form, as with sysctl(8), for interfaces with a dot in their name.
func setSysctls(values map[string]string) error {
	root, err := os.OpenRoot("/proc/sys")
	if err != nil {
		return err
	}
	defer root.Close()
	var failed []error
	for name, value := range values {
		path, err := sysctlPath(name)
		if err == nil {
			var f *os.File
			if f, err = root.OpenFile(path, os.O_WRONLY, 0); err == nil {
				_, err = f.WriteString(value)
				err = errors.Join(err, f.Close())
			}
		}
		if err != nil {
			failed = append(failed, fmt.Errorf("sysctl %s: %w", name, err))
		}
	}
	return errors.Join(failed...)
}

// sysctlPath is a parameter's path below /proc/sys.
func sysctlPath(name string) (string, error) {
	separator := strings.IndexAny(name, "./")
	if separator > 0 && name[separator] == '.' {
		name = strings.NewReplacer(".", "/", "/", ".").Replace(name)
	}
	for part := range strings.SplitSeq(name, "/") {
		if separator <= 0 || part == "" || part == "." || part == ".." {
			return "", fmt.Errorf("name of a sysctl: %w", errdefs.ErrInvalidArgument)
		}
	}
	return name, nil
}
