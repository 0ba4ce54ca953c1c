package server

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crivm/crivm/agentproto"
	"github.com/crivm/crivm/server/store"
	"github.com/crivm/crivm/vmruntime"
	"github.com/crivm/crivm/vmruntime/virtiofsd"
)

// sandbox is the live side of a sandbox record: its VM and the connection to the agent.
type sandbox struct {
	id string
	op opLock // held by verbs on the sandbox itself
	// settled is closed when restore knows what has become of it; nil for one that this daemon made.
	settled chan struct{}

	mu    sync.Mutex // guards the fields below, never held over I/O
	vm    vmruntime.VM
	agent *agentproto.Client
	disks map[string]map[string]bool // IDs of the containers that use an image disk, by its serial
	files *virtiofsd.Server          // serves host directories; nil until a container needs one
	// sharePlugged tells that this daemon has seen the VM have the share.
	sharePlugged bool
	cause        string // why the VM was killed, when it was not asked to be

	resizing map[string]bool // serials of block devices of which the guest is about to be told the size

	// hugepages is what the guest has ready, in bytes; -1 when that is not known. Guarded by size.
	hugepages int64

	dial  opLock // one at a time connects to the agent
	plug  opLock // one at a time plugs or unplugs image disks
	share opLock // one at a time changes the share
	size  opLock // one at a time changes the VM's size
	ended chan struct{}
	stats sampler

	traces traces

	copies  map[string]*hostCopy // by name; guarded by mu
	copying opLock               // one at a time changes which copies there are
	uploads chan struct{}        // holds a value for each upload under way
}

func newSandbox(id string) *sandbox {
	return &sandbox{id: id, op: newOpLock(), dial: newOpLock(), plug: newOpLock(), share: newOpLock(), copying: newOpLock(), uploads: make(chan struct{}, copyWorkers), size: newOpLock(), disks: map[string]map[string]bool{}, resizing: map[string]bool{}, ended: make(chan struct{})}
}

// sandbox finds the live side of a record. That of a sandbox without a record is a dead one, of the caller's own.
func (s *Server) sandbox(id string) *sandbox {
	s.mu.Lock()
	defer s.mu.Unlock()
	sb, ok := s.sandboxes[id]
	if !ok {
		sb = newSandbox(id)
		if _, err := s.store.Sandbox(id); err == nil {
			s.sandboxes[id] = sb
		}
	}
	return sb
}

// useDisk notes a user of an image disk; sb.mu is held.
func (sb *sandbox) useDisk(serial, containerID string) {
	if sb.disks[serial] == nil {
		sb.disks[serial] = map[string]bool{}
	}
	sb.disks[serial][containerID] = true
}

func (s *Server) forgetSandbox(id string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.sandboxes, id)
}

// machine is the VM, or Unavailable when there is none (any more).
func (sb *sandbox) machine() (vmruntime.VM, error) {
	sb.mu.Lock()
	defer sb.mu.Unlock()
	if sb.vm == nil {
		return nil, fmt.Errorf("sandbox %s has no VM: %w", sb.id, errdefs.ErrUnavailable)
	}
	select {
	case <-sb.vm.Done():
		return nil, fmt.Errorf("VM of sandbox %s is dead: %s: %w", sb.id, sb.vm.Exit().Reason, errdefs.ErrUnavailable)
	default:
		return sb.vm, nil
	}
}

// client is the connection to the agent, made anew when it broke.
func (sb *sandbox) client(ctx context.Context) (*agentproto.Client, error) {
	if c := sb.connected(); c != nil {
		return c, nil
	}
	if err := sb.dial.lock(ctx); err != nil {
		return nil, fmt.Errorf("agent of sandbox %s: %w", sb.id, err)
	}
	defer sb.dial.unlock()
	if c := sb.connected(); c != nil {
		return c, nil
	}
	vm, err := sb.machine()
	if err != nil {
		return nil, err
	}
	c, err := agentproto.Connect(ctx, vm)
	if err != nil {
		return nil, fmt.Errorf("agent of sandbox %s: %w", sb.id, err)
	}
	sb.mu.Lock()
	old := sb.agent
	sb.agent = c
	sb.mu.Unlock()
	if old != nil {
		old.Close()
	}
	return c, nil
}

func (sb *sandbox) connected() *agentproto.Client {
	sb.mu.Lock()
	defer sb.mu.Unlock()
	if sb.agent == nil {
		return nil
	}
	select {
	case <-sb.agent.Done():
		return nil
	default:
		return sb.agent
	}
}

func (sb *sandbox) disconnect() {
	sb.mu.Lock()
	defer sb.mu.Unlock()
	if sb.agent != nil {
		sb.agent.Close()
		sb.agent = nil
	}
}

// watch turns the death of a VM into records: sandbox NOTREADY, containers EXITED; a guest that is silent is made
// a dead VM. It ends with the VM or the server.
func (s *Server) watch(sb *sandbox, vm vmruntime.VM) {
	if rec, err := s.store.Sandbox(sb.id); err == nil {
		s.watchHealth(sb, vm, s.opts.Handlers[rec.Handler].HealthTimeout)
	}
	s.goTask(func() {
		select {
		case <-s.life.Done():
			return
		case <-vm.Done():
		}
		sb.disconnect()
		s.forgetCopies(sb)
		exit := vm.Exit()
		sb.mu.Lock()
		if sb.cause != "" {
			exit.Reason = sb.cause
		}
		sb.mu.Unlock()
		reason := fmt.Sprintf("VM ended: %s", exit.Reason)
		s.untilDone("recording a dead VM", sb.id, func() error {
			_, err := s.store.UpdateSandbox(sb.id, func(r *store.Sandbox) error {
				if r.State == store.SandboxReady {
					s.log.Warn("sandbox died", "sandbox", sb.id, "reason", exit.Reason, "console", vm.Console())
					r.State, r.Reason = store.SandboxNotReady, reason
				}
				return nil
			})
			return errors.Join(ignoreMissing(err), s.exitContainers(sb.id, exit.At, reason))
		})
	})
}

// recordRetry is between tries to record what has happened while that fails, such as on a full disk.
const recordRetry = time.Second

// untilDone does what must not be forgotten, such as recording an exit, again and again until it succeeds or the
// server ends; then the next daemon finds it out anew.
func (s *Server) untilDone(what, id string, do func() error) {
	trouble := what + " " + id
	defer s.troubles.note(trouble, nil)
	for reported := false; ; reported = true {
		err := do()
		if err == nil {
			return
		}
		s.troubles.note(trouble, err)
		if !reported {
			s.log.Error(what+" fails and is tried again", "id", id, "error", err)
		}
		if !s.pause(s.life, recordRetry) {
			return
		}
	}
}

// exitContainers marks what ran in a dead VM as exited. The code is that of a killed process; never 0,
// which would make a Job succeed.
func (s *Server) exitContainers(sandboxID string, at time.Time, message string) error {
	var errs []error
	for _, r := range s.store.Containers(sandboxID) {
		if r.State != store.ContainerRunning && r.State != store.ContainerCreated {
			continue
		}
		errs = append(errs, s.exited(r.ID, exitRecord{at: at, code: 137, reason: reasonError, message: message}))
	}
	return errors.Join(errs...)
}

// newID makes an ID in the form that CRI users know: 64 hex digits.
func newID() string {
	var b [32]byte
	rand.Read(b[:])
	return hex.EncodeToString(b[:])
}

// newMAC makes a locally administered unicast MAC.
func newMAC() string {
	var b [6]byte
	rand.Read(b[:])
	b[0] = b[0]&^1 | 2
	return fmt.Sprintf("%02x:%02x:%02x:%02x:%02x:%02x", b[0], b[1], b[2], b[3], b[4], b[5])
}

// sandboxName is what must be unique: kubelet raises the attempt for a further try.
func sandboxName(m *cri.PodSandboxMetadata) string {
	return strings.Join([]string{m.GetName(), m.GetNamespace(), m.GetUid(), fmt.Sprint(m.GetAttempt())}, "_")
}

// vmFailure adds to an error what the VM itself has to say.
func vmFailure(vm vmruntime.VM, err error) error {
	if vm == nil || err == nil {
		return err
	}
	select {
	case <-vm.Done():
		err = fmt.Errorf("%w; VM ended: %s", err, vm.Exit().Reason)
	default:
	}
	if console := strings.TrimSpace(vm.Console()); console != "" {
		err = fmt.Errorf("%w; last lines of the console: %s", err, lastLines(console, 8))
	}
	return err
}

func lastLines(text string, n int) string {
	lines := strings.Split(text, "\n")
	if len(lines) > n {
		lines = lines[len(lines)-n:]
	}
	return strings.Join(lines, " | ")
}

// uid picks an unused uid for a VMM process. ResourceExhausted when the range is used up.
func (s *Server) uid() (int, error) {
	if s.opts.UIDCount == 0 {
		return 0, nil
	}
	used := map[int]bool{}
	for _, r := range s.store.Sandboxes() {
		used[r.UID] = true
	}
	for uid := s.opts.UIDBase; uid < s.opts.UIDBase+s.opts.UIDCount; uid++ {
		if !used[uid] {
			return uid, nil
		}
	}
	return 0, fmt.Errorf("all %d uids for VMM processes are in use: %w", s.opts.UIDCount, errdefs.ErrResourceExhausted)
}

// ignoreMissing drops the errors of things that are already gone.
func ignoreMissing(err error) error {
	if errdefs.IsNotFound(err) {
		return nil
	}
	return err
}
