package guest

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/crivm/crivm/agentproto"
)

// moduleLoader loads the kernel modules of the guest image. A nil one loads nothing.
type moduleLoader struct {
	manifest agentproto.Manifest

	mu    sync.Mutex
	loads map[string]*moduleLoad
}

type moduleLoad struct {
	once sync.Once
	err  error
}

// readManifest reads the description of the guest image. A guest without one (kernel with everything
// built in) has an empty manifest.
func readManifest(path string) (agentproto.Manifest, error) {
	var m agentproto.Manifest
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return m, nil
	}
	if err == nil {
		err = json.Unmarshal(b, &m)
	}
	if err != nil {
		return m, fmt.Errorf("guest image manifest: %w", err)
	}
	return m, nil
}

// newModuleLoader loads the modules of a manifest, on demand.
func newModuleLoader(m agentproto.Manifest) *moduleLoader {
	return &moduleLoader{manifest: m, loads: map[string]*moduleLoad{}}
}

// Load loads modules and what they depend on, each once. What fails is logged: whether it matters shows when
// the thing is used, since a module that is not in the manifest may be built into the kernel.
func (m *moduleLoader) Load(names ...string) {
	if m == nil {
		return
	}
	for _, name := range names {
		m.load(moduleName(name), 0)
	}
}

// moduleName is a module's name as the kernel spells it.
func moduleName(s string) string { return strings.ReplaceAll(s, "-", "_") }

// maxModuleDepth bounds chains of dependencies, which a broken manifest could close to a circle.
const maxModuleDepth = 16

func (m *moduleLoader) load(name string, depth int) {
	module, ok := m.manifest.Modules[name]
	if !ok || depth > maxModuleDepth {
		return
	}
	m.mu.Lock()
	l := m.loads[name]
	if l == nil {
		l = &moduleLoad{}
		m.loads[name] = l
	}
	m.mu.Unlock()
	for _, dep := range module.Deps {
		m.load(moduleName(dep), depth+1)
	}
	l.once.Do(func() {
		if l.err = insertModule(module.Path); l.err != nil {
			slog.Warn("kernel module", "module", name, "error", l.err)
		}
	})
}

// moduleCompressed is MODULE_INIT_COMPRESSED_FILE of finit_module(2).
const moduleCompressed = 4

// insertModule gives a module's file to the kernel and, since the initramfs is memory, deletes it.
func insertModule(path string) error {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // loaded by another process, and deleted
	}
	if err != nil {
		return err
	}
	defer f.Close()
	err = unix.FinitModule(int(f.Fd()), "", finitFlags(path))
	if err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("load %s: %w", path, err)
	}
	return notExist(os.Remove(path))
}

// borrow loads a module that depends on no other, with parameters, until giveBack is called, and keeps its file. One that
// the image does not have is not loaded; neither is one that is there already.
func (m *moduleLoader) borrow(name, parameters string) (giveBack func() error, _ error) {
	nothing := func() error { return nil }
	if m == nil {
		return nothing, nil
	}
	module, ok := m.manifest.Modules[name]
	if !ok || len(module.Deps) > 0 {
		return nothing, nil
	}
	f, err := os.Open(module.Path)
	if errors.Is(err, fs.ErrNotExist) {
		return nothing, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if err := unix.FinitModule(int(f.Fd()), parameters, finitFlags(module.Path)); errors.Is(err, unix.EEXIST) {
		return nothing, nil
	} else if err != nil {
		return nil, fmt.Errorf("load %s: %w", module.Path, err)
	}
	return func() error {
		if err := unix.DeleteModule(name, unix.O_NONBLOCK); err != nil {
			return fmt.Errorf("unload kernel module %s: %w", name, err)
		}
		return nil
	}, nil
}

// finitFlags are those of finit_module(2) for a module's file.
func finitFlags(path string) int {
	if strings.HasSuffix(path, ".ko") {
		return 0
	}
	return moduleCompressed
}

// modprobe is what the kernel calls when it wants a module, by name or by an alias such as "fs-erofs",
// "rtnl-link-bridge" or "nfnetlink-subsys-10". Aliases are looked for in the modules themselves.
func modprobe(name string) error {
	manifest, err := readManifest(agentproto.ManifestPath)
	if err != nil {
		return err
	}
	m := newModuleLoader(manifest)
	if _, ok := manifest.Modules[moduleName(name)]; ok {
		m.Load(name)
		return nil
	}
	alias := []byte("\x00alias=" + name + "\x00")
	for candidate, module := range manifest.Modules {
		b, err := os.ReadFile(module.Path)
		if err == nil && bytes.Contains(b, alias) {
			m.Load(candidate)
			return nil
		}
	}
	return fmt.Errorf("kernel module %s: %w", name, errdefs.ErrNotFound)
}
