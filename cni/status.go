package cni

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/version"
)

const (
	statusFresh   = 5 * time.Second  // how old an answer to STATUS may get
	statusPatient = time.Second      // how long Status waits for the first answer of a configuration
	statusTimeout = 10 * time.Second // for STATUS itself
)

// statusCache holds the plugins' last answer to STATUS. At most one STATUS runs at a time, and never in a
// caller of Status.
type statusCache struct {
	mu      sync.Mutex
	list    *libcni.NetworkConfigList // whose answer err is
	err     error
	at      time.Time
	running chan struct{} // closed when the STATUS under way has ended; nil when none is
}

// Status is nil when pods can get a network: a configuration is loaded, its plugins are installed, and,
// from CNI 1.1 on, they answer STATUS well. Otherwise it says why not. It never waits long for a plugin.
func (n *Network) Status() error {
	list, err := n.configuredNetwork()
	if err != nil {
		return err
	}
	file := n.current.Load().file
	for _, plugin := range list.Plugins {
		for _, kind := range []string{plugin.Network.Type, plugin.Network.IPAM.Type} {
			if kind == "" {
				continue
			}
			if _, err := n.exec.FindInPath(kind, n.config.BinDirs); err != nil {
				return fmt.Errorf("network %q of %s: plugin %q not found in %s: %w",
					list.Name, file, kind, strings.Join(n.config.BinDirs, ", "), errdefs.ErrUnavailable)
			}
		}
	}
	if verb, err := version.GreaterThanOrEqualTo(list.CNIVersion, "1.1.0"); err != nil || !verb {
		return nil // version 1.1 brought STATUS
	}
	if err := n.status.answer(n.libcni, list); err != nil {
		return fmt.Errorf("network %q of %s: STATUS: %w", list.Name, file, err)
	}
	return nil
}

// answer returns the last answer for list; while there is none, it waits a little.
func (s *statusCache) answer(cni *libcni.CNIConfig, list *libcni.NetworkConfigList) error {
	s.mu.Lock()
	if s.running == nil && (s.list != list || time.Since(s.at) > statusFresh) {
		s.running = make(chan struct{})
		go s.ask(cni, list)
	}
	known, err, running := s.list == list, s.err, s.running
	s.mu.Unlock()
	if known {
		return err
	}
	select {
	case <-running:
	case <-time.After(statusPatient):
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.list != list {
		return fmt.Errorf("no answer yet: %w", errdefs.ErrUnavailable)
	}
	return s.err
}

func (s *statusCache) ask(cni *libcni.CNIConfig, list *libcni.NetworkConfigList) {
	ctx, cancel := context.WithTimeout(context.Background(), statusTimeout)
	defer cancel()
	err := cni.GetStatusNetworkList(ctx, list)
	var said *types.Error
	if verbUnknown(err) {
		err = nil
	} else if errors.As(err, &said) {
		err = fmt.Errorf("%w: %w", errdefs.ErrUnavailable, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.list, s.err, s.at = list, err, time.Now()
	close(s.running)
	s.running = nil
}

// wait returns when no STATUS is under way; statusTimeout bounds it.
func (s *statusCache) wait() {
	s.mu.Lock()
	running := s.running
	s.mu.Unlock()
	if running != nil {
		<-running
	}
}
