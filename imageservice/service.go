// Package imageservice is the node's image store: the CRI ImageService, and for every image one read-only
// disk that all its containers share.
//
// Images are pulled with containers/image, configured by the files that this library documents
// (containers-registries.conf(5), containers-policy.json(5), containers-auth.json(5), containers-certs.d(5)). Their
// names, manifests and configurations are in containers/storage; layers are kept as they came (blobs.go). From them
// package rootdisk makes the disk, DiskDir/<ID>.erofs. A pull is complete, and its image becomes visible, when the disk is.
// Images of unusual kinds, and those from before layers were kept so, have layers that containers/storage has unpacked.
//
// What is on disk always has one owner: images belong to containers/storage, layers to the images that name them, a disk
// belongs to the image it is named after. An image that is being pulled has only a name under crivm.invalid; New and
// failing pulls remove images that have no other name, layers of no image, and disks of no image. So a crash
// at any moment leaves nothing that the next New does not find.
//
// Nothing is ever mounted here, and only images, never anything a guest wrote, are parsed.
package imageservice

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.podman.io/image/v5/types"
	"go.podman.io/storage"
	"golang.org/x/sync/semaphore"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Config says where images are kept and which files steer pulls.
type Config struct {
	Root    string // containers/storage graph root
	RunRoot string // containers/storage run root
	// StorageDriver is the containers/storage driver. "" uses the one the root was made with, else overlay
	// where the kernel and file system can do it, else vfs.
	StorageDriver string
	// DiskDir holds the disks. It is created with mode 0711 and disks have 0644, so that an unprivileged
	// VMM can open the one it is given.
	DiskDir string
	// ScratchDir holds the containers' writable disks; only ImageFsInfo looks at it. "" reports Root.
	ScratchDir string

	// Paths of the libraries' configuration; "" is the system's default as in the manual pages.
	RegistriesConf, RegistriesConfDir, SignaturePolicy, AuthFile, CertsDir, ShortNameAliases string

	PullProgressTimeout  time.Duration // a pull that receives no byte for so long fails; 0 means 5 minutes
	MaxParallelDownloads uint          // layers of one image at a time; 0 is the library's default
	Pinned               []string      // references of images that kubelet must never garbage-collect
	Handlers             []string      // runtime handlers that pulls may be for; images are the same for all

	Metrics prometheus.Registerer // nil: nobody is told

	KeepLeftovers bool // New removes nothing; Leftovers can
}

// Service is the image store. It implements the CRI ImageService.
type Service struct {
	cri.UnimplementedImageServiceServer

	config Config
	store  storage.Store
	pinned map[string]bool // normalized names

	figures figures

	space *space
	stop  context.CancelFunc // ends pulls and builds
	pulls flights[string]
	disks flights[string]
	// fetches are layers that are being received, by their blobs' digests; whoever wants one joins.
	fetches flights[struct{}]
	held    holds
	library bool           // for tests: every image is left to the image library
	sums    sync.WaitGroup // disks that are being read for their sums
	// building bounds disk builds at a time: each holds up to 32 MiB of file ends.
	building *semaphore.Weighted

	// pulling is held for reading by pulls and for writing by the sweep of layers, which only tries.
	pulling  sync.RWMutex
	removals atomic.Int64 // so far; tells a pull that its layers may have been removed under it

	mu      sync.Mutex
	records map[string]*record // by image ID; what never changes of an image
	slots   map[int]*pullState // pulls under way, by their names

	warnPolicy sync.Once
}

const (
	defaultPullProgressTimeout = 5 * time.Minute
	parallelBuilds             = 2 // of disks
)

// New opens the image store and removes what interrupted pulls and disk builds left. The process must
// have called reexec.Init (go.podman.io/storage/pkg/reexec) at the start of main, since the image library
// unpacks layers of unusual images in a child process that is this program again.
func New(ctx context.Context, config Config) (*Service, error) {
	for _, dir := range []string{config.Root, config.RunRoot, config.DiskDir} {
		if !filepath.IsAbs(dir) {
			return nil, fmt.Errorf("image store: path %q is not absolute", dir)
		}
	}
	if config.PullProgressTimeout == 0 {
		config.PullProgressTimeout = defaultPullProgressTimeout
	}
	if err := os.MkdirAll(config.DiskDir, 0o711); err != nil {
		return nil, fmt.Errorf("image disks: %w", err)
	}
	if err := os.Chmod(config.DiskDir, 0o711); err != nil { // whatever the umask
		return nil, fmt.Errorf("image disks: %w", err)
	}
	if err := os.MkdirAll(filepath.Join(config.Root, blobsDir), 0o700); err != nil {
		return nil, fmt.Errorf("image layers: %w", err)
	}
	torn := false
	if !config.KeepLeftovers {
		var err error
		if torn, err = setAsideTorn(config.Root); err != nil {
			return nil, fmt.Errorf("image store %s: %w", config.Root, err)
		}
	}
	store, err := openStore(config)
	if err != nil {
		return nil, fmt.Errorf("image store %s: %w", config.Root, err)
	}
	if torn { // files of what was on the lists
		if err := store.GarbageCollect(); err != nil {
			slog.Warn("image store: files of damaged lists are left", "error", err)
		}
	}
	life, stop := context.WithCancel(context.Background())
	s := &Service{
		config:   config,
		figures:  newFigures(),
		store:    store,
		pinned:   map[string]bool{},
		stop:     stop,
		building: semaphore.NewWeighted(parallelBuilds),
		space:    &space{root: config.Root, disks: config.DiskDir, room: roomOf},
		records:  map[string]*record{},
		slots:    map[int]*pullState{},
	}
	s.pulls.life, s.disks.life, s.fetches.life = life, life, life
	s.fetches.settle = true
	if err := s.register(config.Metrics); err != nil {
		_ = s.Close()
		return nil, err
	}
	for _, ref := range config.Pinned {
		named, err := normalize(ref)
		if err != nil {
			_ = s.Close()
			return nil, fmt.Errorf("pinned image %q: %w", ref, err)
		}
		s.pinned[named.String()] = true
	}
	if config.KeepLeftovers {
		return s, nil
	}
	if err := s.sweep(ctx); err != nil {
		_ = s.Close()
		return nil, fmt.Errorf("image store %s: %w", config.Root, err)
	}
	return s, nil
}

// openStore opens containers/storage without the private mount the overlay driver would else leave.
func openStore(config Config) (storage.Store, error) {
	drivers := []string{config.StorageDriver}
	if config.StorageDriver == "" {
		drivers = []string{"overlay", "vfs"}
		for _, d := range drivers {
			if _, err := os.Stat(filepath.Join(config.Root, d+"-images")); err == nil {
				drivers = []string{d}
				break
			}
		}
	}
	var errs []error
	for _, driver := range drivers {
		options := storage.StoreOptions{
			GraphRoot:       config.Root,
			RunRoot:         config.RunRoot,
			GraphDriverName: driver,
			// Partial pulls would give the same image another ID on other nodes.
			PullOptions: map[string]string{"enable_partial_images": "false"},
		}
		if driver == "overlay" {
			options.GraphDriverOptions = []string{"overlay.skip_mount_home=true"}
		}
		store, err := storage.GetStore(options)
		if err == nil {
			if len(errs) > 0 {
				slog.Warn("image store cannot use overlay; layers are stored as full copies", "error", errors.Join(errs...))
			}
			return store, nil
		}
		errs = append(errs, fmt.Errorf("driver %s: %w", driver, err))
	}
	return nil, errors.Join(errs...)
}

// Close ends pulls and disk builds and waits for them. The store itself needs no closing.
func (s *Service) Close() error {
	s.stop()
	s.pulls.wait()
	s.fetches.wait()
	s.disks.wait()
	s.sums.Wait()
	s.store.Free()
	return nil
}

func (s *Service) tempDir() string { return filepath.Join(s.config.Root, "crivm-tmp") }

// system makes the libraries' view of the configuration, for one pull or look-up.
func (s *Service) system() *types.SystemContext {
	return &types.SystemContext{
		SystemRegistriesConfPath:    s.config.RegistriesConf,
		SystemRegistriesConfDirPath: s.config.RegistriesConfDir,
		SignaturePolicyPath:         s.config.SignaturePolicy,
		AuthFilePath:                s.config.AuthFile,
		DockerPerHostCertDirPath:    s.config.CertsDir,
		UserShortNameAliasConfPath:  s.config.ShortNameAliases,
		OSChoice:                    "linux",
		ArchitectureChoice:          runtime.GOARCH,
		DockerRegistryUserAgent:     "crivm",
		BigFilesTemporaryDir:        s.tempDir(),
		BlobInfoCacheDir:            s.config.Root,
	}
}

// sweep removes what a crash left: downloads, images that were never named, layers of no image, unfinished
// disks and disks of no image.
func (s *Service) sweep(ctx context.Context) error {
	if err := os.RemoveAll(s.tempDir()); err != nil {
		return err
	}
	if err := os.Mkdir(s.tempDir(), 0o700); err != nil {
		return err
	}
	left, err := s.Leftovers(ctx, true)
	if err != nil {
		return err
	}
	var errs []error
	for _, l := range left {
		slog.Info("removing what an interrupted pull left", "kind", l.Kind, "name", l.Name)
		errs = append(errs, l.Err)
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	images, err := s.store.Images()
	if err != nil {
		return err
	}
	for _, img := range images {
		if kept := permanent(img.Names); len(kept) < len(img.Names) {
			if err := s.store.SetNames(img.ID, kept); err != nil {
				return fmt.Errorf("image %s: %w", img.ID, err)
			}
		}
		if _, err := s.record(img.ID); err != nil {
			slog.Warn("image cannot be used", "image", img.ID, "error", err)
		}
	}
	return nil
}
