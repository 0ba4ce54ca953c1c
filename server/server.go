// Package server is the CRI RuntimeService: pod sandboxes and containers, one verb a file, their records,
// exit watching, logs and streaming. Only this package knows what a pod is. It owns no VMM detail, no CNI
// detail and no image: those are vmruntime, cni and imageservice.
//
// Verbs on one sandbox or container are serialised by an operation lock that waits no longer than the
// request; status and list calls read records only and never wait for a verb or a guest.
package server

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/cri-streaming/pkg/streaming"

	"github.com/crivm/crivm/server/store"
)

// Options are plain values, decided by the configuration.
type Options struct {
	Version  string // of crivm, semver
	StateDir string // records, scratch disks; survives a reboot
	RunDir   string // sockets of VMs; may be lost at a reboot

	Handlers map[string]Handler // by RuntimeClass handler; "" is the default
	Warnings []string           // shown in Status, such as software emulation

	SystemdCgroups bool   // RuntimeConfig's cgroup driver
	CgroupParent   string // for a sandbox without cgroup_parent

	MaxLogLine        int           // bytes of one line in a container log; longer ones are split and tagged P
	StreamAddress     string        // host:port of the streaming server, port 0 picks one
	StreamIdleTimeout time.Duration // of exec, attach and port-forward connections

	PoolBoots int // slots of warm pools that boot at the same time; 0 is 1
	// PoolCalm is how long no pod or container must have been starting before a slot boots; five times that is waited for it at
	// most.
	PoolCalm   time.Duration
	PoolWeight int // CPU weight of all slots together, 100 is that of others; 0 does not set it

	UIDBase, UIDCount int // each VMM process gets a uid of its own from this range; count 0 runs them as root
}

// Handler is what a RuntimeClass handler means.
type Handler struct {
	Driver          Driver
	Kernel, Initrd  string
	Cmdline         string
	VCPUs, MaxVCPUs int
	Memory          int64 // bytes, for a pod without limits
	MaxMemory       int64 // bytes, the ceiling for resizing
	ScratchBytes    int64 // size of the pod's scratch disk, its hard quota
	EmptyDirBytes   int64 // size of the disk of an emptyDir, its hard quota
	ShareEmptyDirs  bool  // emptyDirs are the host's directories
	BootTimeout     time.Duration
	HealthTimeout   time.Duration // of a guest that does not answer any more; 0: none
	Acceleration    string        // for people: "KVM", "software emulation (TCG)"
	PoolSize        int           // VMs kept booted for pods to come
	Revision        string        // what else VMs depend on, such as the VMM's configuration; slots of another are dropped
}

// Server implements the CRI RuntimeService.
type Server struct {
	cri.UnimplementedRuntimeServiceServer

	opts    Options
	store   *store.Store
	net     Network
	images  Images
	bootID  string
	log     *slog.Logger
	started time.Time

	events events

	streams     *streamServer
	streamHTTP  *http.Server
	streamsDone chan struct{}

	// The things below outlive requests and end with Close.
	life   context.Context
	cancel context.CancelFunc
	tasks  sync.WaitGroup

	watches *hostWatch // of host directories that guests have copies of

	scratchMu  sync.Mutex // one at a time formats a scratch template
	collecting sync.Mutex // one at a time collects leftovers

	troubles troubles

	collected chan struct{} // closed when restore has removed leftovers
	restored  chan struct{} // closed when restore is done with everything

	boots chan struct{} // one for each pod whose VM boots: see bootTurn
	warm  warm

	observed observed // for Prometheus

	mu         sync.Mutex // guards the maps, never held over I/O
	sandboxes  map[string]*sandbox
	containers map[string]*container
	calls      calls
}

// New opens the records, adopts what still runs, and starts the streaming server. The CRI is served when
// it returns; what cannot be adopted is NOTREADY or EXITED by then, but for what takes long to find out: see restore.
func New(ctx context.Context, opts Options, network Network, images Images) (_ *Server, retErr error) {
	if _, ok := opts.Handlers[""]; !ok {
		return nil, fmt.Errorf("no default handler configured: %w", errdefs.ErrInvalidArgument)
	}
	bootID, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return nil, fmt.Errorf("boot id of the host: %w", err)
	}
	// VMM processes of other uids pass through these directories to their own.
	for _, dir := range []string{opts.StateDir, filepath.Join(opts.StateDir, "pods"), opts.RunDir, filepath.Join(opts.RunDir, "vm")} {
		if err := os.MkdirAll(dir, 0o711); err != nil {
			return nil, err
		}
	}
	if opts.UIDCount > 0 {
		dirs := []string{opts.StateDir, opts.RunDir}
		for _, h := range opts.Handlers {
			dirs = append(dirs, filepath.Dir(h.Kernel), filepath.Dir(h.Initrd))
		}
		for _, dir := range dirs {
			if err := reachable(dir); err != nil && !errors.Is(err, fs.ErrNotExist) { // a guest image may come later
				return nil, err
			}
		}
	}
	records, err := store.Open(filepath.Join(opts.StateDir, "crivm.db"))
	if err != nil {
		return nil, err
	}
	if damage := records.Damage(); damage != "" {
		slog.Error("records were lost: pods without one are ended", "damage", damage)
		opts.Warnings = append(slices.Clone(opts.Warnings), damage)
	}
	s := newServer(opts, records, network, images)
	s.bootID = string(bootID)
	s.watches = newHostWatch(s.log)
	s.store.Observe(s.observers())
	s.life, s.cancel = context.WithCancel(context.WithoutCancel(ctx))
	defer func() {
		if retErr != nil {
			retErr = errors.Join(retErr, s.Close())
		}
	}()
	if err := s.serveStreams(); err != nil {
		return nil, err
	}
	s.makePools()
	s.watchBlockDevices()
	s.restore()
	if len(s.warm.pools) > 0 {
		s.goTask(s.keepPools)
	}
	return s, nil
}

// newServer is a server that does nothing yet.
func newServer(opts Options, records *store.Store, network Network, images Images) *Server {
	return &Server{
		opts: opts, store: records, net: network, images: images, log: slog.Default(), started: time.Now(), observed: newObserved(),
		boots: make(chan struct{}, parallelBoots()), sandboxes: map[string]*sandbox{}, containers: map[string]*container{}, collected: make(chan struct{}), restored: make(chan struct{}),
	}
}

// reachable checks that processes of other uids can pass through a directory: VMMs do, to their own files.
func reachable(dir string) error {
	for ; dir != filepath.Dir(dir); dir = filepath.Dir(dir) {
		info, err := os.Stat(dir)
		if err != nil {
			return err
		}
		if info.Mode()&0o001 == 0 {
			return fmt.Errorf("VMM processes of other users cannot pass through %s (mode %s): make it %#o, choose other directories, or run VMMs as root: %w",
				dir, info.Mode(), info.Mode().Perm()|0o111, errdefs.ErrFailedPrecondition)
		}
	}
	return nil
}

// Close stops serving streams and watching; VMs go on running.
func (s *Server) Close() error {
	s.cancel()
	s.EndStreams()
	if s.streamHTTP != nil {
		s.streamHTTP.Close()
		<-s.streamsDone
	}
	s.mu.Lock()
	for _, sb := range s.sandboxes {
		sb.disconnect()
	}
	s.mu.Unlock()
	s.watches.close() // it starts tasks
	s.tasks.Wait()
	return s.store.Close()
}

// serveStreams starts the HTTP server of exec, attach and port-forward.
func (s *Server) serveStreams() error {
	listener, err := net.Listen("tcp", s.opts.StreamAddress)
	if err != nil {
		return fmt.Errorf("streaming server: %w", err)
	}
	config := streaming.DefaultConfig
	config.Addr = listener.Addr().String()
	config.StreamIdleTimeout = s.opts.StreamIdleTimeout
	library, err := streaming.NewServer(config, streamRuntime{s})
	if err != nil {
		return errors.Join(fmt.Errorf("streaming server: %w", err), listener.Close())
	}
	s.streams = &streamServer{Server: library, runtime: streamRuntime{s}, idle: config.StreamIdleTimeout, requests: map[string]streamRequest{}}
	s.streamHTTP = &http.Server{Handler: s.streams, ReadHeaderTimeout: 30 * time.Second}
	s.streamsDone = make(chan struct{})
	go func() {
		defer close(s.streamsDone)
		if err := s.streamHTTP.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
			s.log.Error("streaming server ended", "error", err)
		}
	}()
	return nil
}

// goTask runs f until Close; f must end when the server's life does.
func (s *Server) goTask(f func()) {
	s.tasks.Add(1)
	go func() {
		defer s.tasks.Done()
		f()
	}()
}

// detached gives teardown its own time: it must not end with the request that failed.
func detached(ctx context.Context, limit time.Duration) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(ctx), limit)
}

// opLock serialises verbs; waiting ends with the request.
type opLock chan struct{}

func newOpLock() opLock { return make(opLock, 1) }

func (l opLock) lock(ctx context.Context) error {
	select {
	case l <- struct{}{}:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("waiting for another call on it: %w", ctx.Err())
	}
}

func (l opLock) unlock() { <-l }
