// Package cni gives each pod its network: a named network namespace, a tap for the pod's VM, the CNI
// plugins run on that namespace as for any other container runtime, and a tc redirect that ties what the
// plugins made (eth0) to the tap, both ways. The guest then takes over eth0's MAC, addresses and routes.
//
// The package never talks to a VM or to a guest and knows nothing of CRI; its callers pass plain values.
//
// # What the namespace holds
//
//	host │ pod namespace crivm-<id>                                     │ VM
//	     │            tc ingress, mirred redirect                       │
//	veth─┼─ eth0 ─────────────────────────────▶ tap0 (persistent) ──────┼─ virtio-net: eth0's MAC and IPs
//	     │       ◀─────────────────────────────                         │
//
// eth0 keeps its addresses and routes in the namespace. The redirect takes every frame at ingress, before
// the namespace's own IP stack can see it, so the host's kernel never answers ARP, ND or anything else in
// place of the guest. And plugins need them: the bridge plugin's DEL learns from eth0's addresses which
// masquerading rules to remove, its CHECK compares them, macvlan's multicast filter follows them.
//
// # Records
//
// Below Config.CacheDir, which must belong to crivm alone (GC removes what it does not know):
//
//	results/<network>-<id>-<ifname>  libcni's cache: configuration and result of ADD, used by DEL and CHECK
//	pods/<id>.json                   ours, written before each effect: prepared → adding → added; it holds
//	                                 the configuration ADD was started with, so that DEL uses that one even
//	                                 when ADD failed (libcni caches nothing then) or the file has changed
package cni

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/invoke"
	"github.com/containernetworking/cni/pkg/utils"
	"github.com/vishvananda/netlink"
)

const (
	ifName         = "eth0" // kubelet and every other runtime expect this name
	tapName        = "tap0"
	netnsPrefix    = "crivm-"
	defaultTimeout = 60 * time.Second
)

// Config says where things are and how long plugins may take.
type Config struct {
	ConfDir  string   // network configurations, as /etc/cni/net.d; created when missing
	BinDirs  []string // plugins, searched in this order
	CacheDir string   // private to crivm; survives reboots, so that DEL can follow one
	NetnsDir string   // named network namespaces, as /run/netns

	AddTimeout time.Duration // for all plugins of an ADD or CHECK together; a plugin still running is killed; 0: 60 s
	DelTimeout time.Duration // the same for DEL and GC; 0: 60 s
}

// Network runs the node's pod network. All methods are safe for concurrent use; those that change a pod
// are serialised for that pod alone.
type Network struct {
	config  Config
	libcni  *libcni.CNIConfig
	exec    invoke.Exec
	pods    keyedLock
	current atomic.Pointer[configuration]
	watcher *watcher
	status  statusCache

	// noMatchall is set once the kernel has been found to lack the matchall classifier.
	noMatchall atomic.Bool
	// sharedDir guards making NetnsDir a shared mount.
	sharedDir sync.Mutex
	// live holds the ids that this process has prepared; GC leaves them alone whatever it is told.
	live sync.Map
	// collecting is held while plugins collect what does not belong to the pods they were told of; a pod that is
	// prepared meanwhile waits, so that its addresses are not taken away.
	collecting sync.RWMutex
}

// Slot is a prepared namespace with a tap in it.
type Slot struct {
	NetnsPath string // bind-mounted file
	Tap       string // name of the tap inside
}

// New loads the configuration and watches its directory until Close. A missing or broken configuration is
// no error here; Status tells.
func New(config Config) (*Network, error) {
	return newNetwork(config, &pluginExec{})
}

func newNetwork(config Config, exec invoke.Exec) (*Network, error) {
	for name, dir := range map[string]string{
		"ConfDir": config.ConfDir, "CacheDir": config.CacheDir, "NetnsDir": config.NetnsDir,
	} {
		if !filepath.IsAbs(dir) {
			return nil, fmt.Errorf("%s %q is not an absolute path: %w", name, dir, errdefs.ErrInvalidArgument)
		}
	}
	if len(config.BinDirs) == 0 {
		return nil, fmt.Errorf("no directory with CNI plugins: %w", errdefs.ErrInvalidArgument)
	}
	if config.AddTimeout <= 0 {
		config.AddTimeout = defaultTimeout
	}
	if config.DelTimeout <= 0 {
		config.DelTimeout = defaultTimeout
	}
	for _, dir := range []string{filepath.Join(config.CacheDir, "pods"), filepath.Join(config.CacheDir, "results")} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, fmt.Errorf("CNI cache: %w", err)
		}
	}
	n := &Network{
		config: config,
		libcni: libcni.NewCNIConfigWithCacheDir(config.BinDirs, config.CacheDir, exec),
		exec:   exec,
	}
	n.pods.held = map[string]*heldLock{}
	var err error
	if n.watcher, err = n.watch(); err != nil {
		return nil, fmt.Errorf("watch CNI configurations in %s: %w", config.ConfDir, err)
	}
	return n, nil
}

// Close stops watching. Pods and their networks stay.
func (n *Network) Close() error {
	err := n.watcher.close()
	n.status.wait()
	return err
}

// Prepare makes the namespace of id with loopback up and a persistent tap, owned by uid and gid, that a
// VMM with these credentials can open without privileges: IFF_VNET_HDR, IFF_NO_PI, one queue, up.
// Idempotent.
func (n *Network) Prepare(ctx context.Context, id string, uid, gid int) (Slot, error) {
	if err := validID(id); err != nil {
		return Slot{}, err
	}
	unlock, err := n.pods.lock(ctx, id)
	if err != nil {
		return Slot{}, fmt.Errorf("network of %s: %w", id, err)
	}
	defer unlock()

	rec, err := n.readRecord(id)
	if errdefs.IsNotFound(err) {
		rec, err = record{ID: id, Phase: phasePrepared}, nil
	}
	if err != nil {
		return Slot{}, err
	}
	rec.TapUID, rec.TapGID = uid, gid
	n.collecting.RLock()
	n.live.Store(id, struct{}{})
	n.collecting.RUnlock()
	if err := n.writeRecord(rec); err != nil {
		return Slot{}, err
	}
	path := n.netnsPath(id)
	if err := n.shareNetnsDir(); err != nil {
		return Slot{}, err
	}
	if err := createNamespace(path); err != nil {
		return Slot{}, fmt.Errorf("network namespace %s: %w", path, err)
	}
	err = inNamespace(path, func(h *netlink.Handle) error {
		lo, err := h.LinkByName("lo")
		if err != nil {
			return fmt.Errorf("lo: %w", err)
		}
		if err := h.LinkSetUp(lo); err != nil {
			return fmt.Errorf("lo up: %w", err)
		}
		_, err = ensureTap(h, tap{name: tapName, uid: uid, gid: gid})
		return err
	})
	if err != nil {
		return Slot{}, fmt.Errorf("network namespace %s: %w", path, err)
	}
	return Slot{NetnsPath: path, Tap: tapName}, nil
}

// Check runs the plugins' CHECK with the cached result of ADD and looks whether namespace, taps and
// redirects are in place. Plugins of a CNI version before 0.4.0 have no CHECK and are not asked.
func (n *Network) Check(ctx context.Context, id string) error {
	if err := validID(id); err != nil {
		return err
	}
	unlock, err := n.pods.lock(ctx, id)
	if err != nil {
		return fmt.Errorf("network of %s: %w", id, err)
	}
	defer unlock()
	rec, err := n.readRecord(id)
	if err != nil {
		return err
	}
	if rec.Phase != phaseAdded {
		return fmt.Errorf("network of %s: ADD has not completed: %w", id, errdefs.ErrFailedPrecondition)
	}
	path := n.netnsPath(id)
	if !isNamespace(path) {
		return fmt.Errorf("network namespace %s: %w", path, errdefs.ErrNotFound)
	}
	err = inNamespace(path, func(h *netlink.Handle) error {
		for _, i := range rec.Attachment.Interfaces {
			if err := checkRedirect(h, i.Name, i.Tap); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("network of %s: %w", id, err)
	}
	list, err := parseConfiguration(rec.Config)
	if err != nil {
		return fmt.Errorf("network of %s: recorded configuration: %w", id, err)
	}
	ctx, cancel := context.WithTimeout(ctx, n.config.AddTimeout)
	defer cancel()
	err = n.libcni.CheckNetworkList(ctx, list, n.runtimeConf(rec))
	if errors.Is(err, libcni.ErrorCheckNotSupp) {
		slog.DebugContext(ctx, "CNI CHECK not supported", "network", list.Name, "cniVersion", list.CNIVersion)
		return nil
	}
	if err != nil {
		return fmt.Errorf("network of %s: CHECK of network %q: %w", id, list.Name, classify(ctx, err))
	}
	return nil
}

func (n *Network) netnsPath(id string) string {
	return filepath.Join(n.config.NetnsDir, netnsPrefix+id)
}

// validID holds ids to what CNI allows for a container ID, which also makes them safe file names.
func validID(id string) error {
	if err := utils.ValidateContainerID(id); err != nil {
		return fmt.Errorf("pod id %q: %s: %w", id, err.Error(), errdefs.ErrInvalidArgument)
	}
	if len(netnsPrefix+id) > 255 || strings.Contains(id, "..") {
		return fmt.Errorf("pod id %q: not usable as a file name: %w", id, errdefs.ErrInvalidArgument)
	}
	return nil
}
