package server

import (
	"context"
	"fmt"
	"time"

	"github.com/crivm/crivm/agentproto"
	"github.com/crivm/crivm/server/store"
	"github.com/crivm/crivm/vmruntime"
)

// watchHealth ends a VM whose agent has been silent for the limit. A guest that hangs has no end that the VMM could
// tell, and kubelet would count its containers as running for ever. 0 is no limit.
//
// In each round the agent is asked once, after three tenths of the limit: one small message each way. When it does
// not answer it is asked anew on a connection of its own, so that neither a stuck connection nor a standstill of this
// process or of the host is taken for a silent guest.
func (s *Server) watchHealth(sb *sandbox, vm vmruntime.VM, limit time.Duration) {
	if limit <= 0 {
		return
	}
	s.goTask(func() {
		round := time.NewTicker(limit * 3 / 10)
		defer round.Stop()
		for {
			select {
			case <-s.life.Done():
				return
			case <-vm.Done():
				return
			case <-round.C:
			}
			if s.within(limit*7/20, func(ctx context.Context) error { return sb.ping(ctx) }) {
				continue
			}
			if s.within(limit*7/20, func(ctx context.Context) error { return sayHello(ctx, vm) }) {
				sb.disconnect() // the connection was at fault
				continue
			}
			if rec, err := s.store.Sandbox(sb.id); s.life.Err() != nil || err != nil || rec.State != store.SandboxReady {
				continue // whoever stops it ends the VM
			}
			s.endVM(sb, vm, fmt.Sprintf("the guest was silent for %s", limit))
		}
	})
}

// within tries until it succeeds; false when it has not in that time.
func (s *Server) within(limit time.Duration, try func(context.Context) error) bool {
	ctx, cancel := context.WithTimeout(s.life, limit)
	defer cancel()
	for {
		if try(ctx) == nil {
			return true
		}
		if !s.pause(ctx, reconnectPause) {
			return false
		}
	}
}

func (sb *sandbox) ping(ctx context.Context) error {
	agent, err := sb.client(ctx)
	if err == nil {
		_, err = agent.Ping(ctx, &agentproto.PingRequest{})
	}
	return err
}

func sayHello(ctx context.Context, vm vmruntime.VM) error {
	agent, err := agentproto.Connect(ctx, vm)
	if err != nil {
		return err
	}
	return agent.Close()
}
