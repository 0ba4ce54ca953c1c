package server

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"github.com/crivm/crivm/agentproto"
	"github.com/crivm/crivm/server/store"
)

const (
	// adoptLimit bounds finding out about one sandbox at start, for a handler without a health timeout. Others have twice
	// that: the guest is given time on a node where all is being taken over at once.
	adoptLimit = 20 * time.Second
	// serveAfter is how long the CRI is held back for sandboxes that are not settled yet. Those that are well take
	// milliseconds each; kubelet must not wait for the others.
	serveAfter = 500 * time.Millisecond
)

// restore compares the records with what really runs. A sandbox that was READY and whose VM and agent answer
// goes on; whatever is in doubt becomes NOTREADY, which only RemovePodSandbox deletes; what was half made
// is undone.
//
// It returns when all is settled, or after serveAfter. The rest goes on beside the serving of CRI: status and list
// calls answer from the records, verbs on a sandbox wait until it is settled, new ones until leftovers are gone.
func (s *Server) restore() {
	for _, c := range s.store.Containers("") { // the daemon died while a removal of the sandbox and a creation in it raced
		if _, err := s.store.Sandbox(c.SandboxID); errdefs.IsNotFound(err) {
			if err := s.eraseContainer(c); err != nil {
				s.log.Error("removing a container without a sandbox", "container", c.ID, "error", err)
			}
		}
	}
	var settling, collecting sync.WaitGroup
	for _, rec := range s.store.Sandboxes() {
		sb := s.sandbox(rec.ID)
		sb.settled = make(chan struct{})
		settling.Add(1)
		s.goTask(func() {
			defer settling.Done()
			defer close(sb.settled)
			if err := s.restoreSandbox(s.life, rec); err != nil && s.life.Err() == nil {
				s.log.Error("restoring a sandbox", "sandbox", rec.ID, "error", err)
			}
		})
	}
	collecting.Add(1)
	s.goTask(func() {
		defer collecting.Done()
		if _, err := s.removeLeftovers(s.life); err != nil { // there are many after the loss of the database
			s.log.Warn("looking for leftovers", "error", err)
		}
		close(s.collected)
	})
	s.goTask(func() {
		settling.Wait()
		collecting.Wait()
		close(s.restored)
	})
	limit := time.NewTimer(serveAfter)
	defer limit.Stop()
	select {
	case <-s.restored:
	case <-limit.C:
		s.log.Warn("some sandboxes of an earlier daemon do not answer yet; serving meanwhile")
	}
}

// awaitSandbox waits until the state of a sandbox is certain that an earlier daemon left. At once for others, and for
// such as there are none.
func (s *Server) awaitSandbox(ctx context.Context, id string) error {
	rec, err := s.store.Sandbox(id)
	if err != nil {
		return nil
	}
	settled := s.sandbox(rec.ID).settled
	if settled == nil {
		return nil
	}
	select {
	case <-settled:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("sandbox %s is still being taken over from the daemon before: %w", rec.ID, ctx.Err())
	}
}

// awaitContainer is awaitSandbox for a container's sandbox.
func (s *Server) awaitContainer(ctx context.Context, id string) error {
	rec, err := s.store.Container(id)
	if err != nil {
		return nil
	}
	return s.awaitSandbox(ctx, rec.SandboxID)
}

// awaitRoom waits until a sandbox of this name can be made: what an earlier daemon had half made of it is undone, and
// no plugin is collecting leftovers, among which it would count the new one's addresses.
func (s *Server) awaitRoom(ctx context.Context, name string) error {
	if holder, ok := s.store.SandboxByName(name); ok {
		if err := s.awaitSandbox(ctx, holder.ID); err != nil {
			return err
		}
	}
	select {
	case <-s.collected:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("leftovers of the daemon before are still being collected: %w", ctx.Err())
	}
}

func (s *Server) restoreSandbox(ctx context.Context, rec store.Sandbox) error {
	sb := s.sandbox(rec.ID)
	switch rec.State {
	case store.SandboxBooting, store.SandboxPooled:
		return s.restoreSlot(ctx, sb, rec)
	case store.SandboxCreating:
		s.abandon(ctx, sb, errors.New("crivm was restarted while the sandbox was being made"))
		return nil
	case store.SandboxStopping:
		// If its VM still answers, what ran keeps its last output and its true exit code.
		if err := s.adopt(ctx, sb, rec); ctx.Err() != nil {
			return err
		} else if err != nil {
			s.log.Info("VM of a sandbox that is being stopped does not answer any more", "sandbox", rec.ID, "error", err)
		}
		return s.stopSandbox(ctx, sb)
	case store.SandboxNotReady:
		return s.settleDead(ctx, rec, rec.Reason)
	}
	err := s.adopt(ctx, sb, rec)
	if err == nil {
		s.log.Info("sandbox adopted", "sandbox", rec.ID)
		return nil
	}
	if ctx.Err() != nil {
		return err // this daemon ends, and has found out nothing; the next one does
	}
	reason := "VM did not survive: " + err.Error()
	if rec.BootID != s.bootID {
		reason = "the host was rebooted"
	}
	_, updateErr := s.store.UpdateSandbox(rec.ID, func(r *store.Sandbox) error {
		r.State, r.Reason = store.SandboxNotReady, reason
		return nil
	})
	return errors.Join(err, updateErr, s.settleDead(ctx, rec, reason))
}

// settleDead makes the containers of a sandbox that is NOTREADY what such containers are: EXITED, as soon as it is
// certain that nothing runs any more.
func (s *Server) settleDead(ctx context.Context, rec store.Sandbox, reason string) error {
	defer s.markExited(rec.ID)
	unsettled := slices.DeleteFunc(s.store.Containers(rec.ID), func(c store.Container) bool { return c.State == store.ContainerExited })
	if rec.State == store.SandboxNotReady && len(unsettled) == 0 {
		return nil
	}
	if driver := s.driver(rec.Driver); driver != nil {
		if err := driver.Sweep(ctx, rec.ID, rec.VMDir); err != nil {
			return fmt.Errorf("ending the VM: %w", err)
		}
	}
	errs := []error{s.exitContainers(rec.ID, time.Now(), reason)}
	for _, c := range unsettled {
		if c.State == store.ContainerCreating {
			errs = append(errs, s.eraseContainer(c))
		}
	}
	return errors.Join(errs...)
}

// adopt takes a running VM and its containers over from an earlier daemon.
func (s *Server) adopt(ctx context.Context, sb *sandbox, rec store.Sandbox) error {
	limit := adoptLimit
	if health := s.opts.Handlers[rec.Handler].HealthTimeout; health > 0 {
		limit = 2 * health
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	driver := s.driver(rec.Driver)
	if driver == nil {
		return fmt.Errorf("VMM driver %q is not configured any more: %w", rec.Driver, errdefs.ErrFailedPrecondition)
	}
	vm, err := driver.Reattach(ctx, rec.ID, rec.VMDir)
	if err != nil {
		return err
	}
	sb.mu.Lock()
	sb.vm, sb.hugepages = vm, -1
	sb.mu.Unlock()
	if err := s.adoptFileServer(ctx, sb, rec, vm); err != nil {
		return err
	}
	agent, err := sb.client(ctx)
	if err != nil {
		return vmFailure(vm, err)
	}
	list, err := agent.ListContainers(ctx, &agentproto.ListContainersRequest{})
	if err != nil {
		return fmt.Errorf("asking the agent for its containers: %w", err)
	}
	known := map[string]*agentproto.ContainerInfo{}
	for _, info := range list.GetContainers() {
		known[info.GetContainerId()] = info
	}
	containers := s.store.Containers(rec.ID)
	sb.mu.Lock()
	for _, c := range containers { // all of them before any is undone: disks are shared
		sb.useDisk(c.ImageDisk, c.ID)
		for _, serial := range c.VolumeDisks {
			sb.useDisk(serial, c.ID)
		}
	}
	sb.mu.Unlock()
	s.adoptCopies(sb, containers, list.GetVolumes())
	for _, c := range containers {
		if err := s.adoptContainer(ctx, sb, c, known[c.ID]); err != nil {
			s.log.Error("restoring a container", "container", c.ID, "error", err)
		}
		delete(known, c.ID)
	}
	for id := range known { // the daemon died before its record, or after its removal
		if _, err := agent.DeleteContainer(ctx, &agentproto.DeleteContainerRequest{ContainerId: id}); err != nil {
			s.log.Error("removing a container without a record", "container", id, "error", err)
		}
	}
	s.dropStrays(ctx, sb, agent, list.GetVolumes())
	s.watch(sb, vm)
	s.resizeDevices(func(sandboxID string, _ uint64) bool { return sandboxID == rec.ID })
	return nil
}

func (s *Server) adoptContainer(ctx context.Context, sb *sandbox, rec store.Container, info *agentproto.ContainerInfo) error {
	if rec.State == store.ContainerCreating {
		return s.removeContainer(ctx, rec)
	}
	switch {
	case rec.State == store.ContainerExited:
		s.markExited(rec.SandboxID)
		return nil
	case info == nil:
		return s.exited(rec.ID, exitRecord{at: time.Now(), code: 255, reason: reasonUnknown, message: "the guest does not know the container any more"})
	case rec.State == store.ContainerCreated && info.GetState() == agentproto.State_STATE_CREATED:
		return nil
	case rec.State == store.ContainerCreated: // it was started, and the daemon died before it said so
		var err error
		rec, err = s.store.UpdateContainer(rec.ID, func(r *store.Container) error {
			r.State, r.StartedAt = store.ContainerRunning, time.Now()
			return nil
		})
		if err != nil {
			return err
		}
	}
	out, err := s.openOutput(rec)
	if errors.Is(err, fs.ErrNotExist) { // the directory of the pod's logs was removed; its exits count all the same
		s.log.Warn("output of a container is dropped from now on", "container", rec.ID, "error", err)
		rec.LogPath = os.DevNull
		out, err = s.openOutput(rec)
	}
	if err != nil {
		return fmt.Errorf("log: %w", err)
	}
	c := s.container(rec.ID)
	c.mu.Lock()
	c.output = out
	c.mu.Unlock()
	out.start()
	s.watchContainer(rec, out)
	return nil
}

// markExited lets waiters see exits that an earlier daemon recorded.
func (s *Server) markExited(sandboxID string) {
	for _, r := range s.store.Containers(sandboxID) {
		if r.State == store.ContainerExited {
			c := s.container(r.ID)
			c.once.Do(func() { close(c.exited) })
		}
	}
}
