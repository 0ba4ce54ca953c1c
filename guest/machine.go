package guest

import "path/filepath"

// machine is a guest that the agent owns: it may load modules, mount, and change the clock and the network.
type machine struct {
	modules *moduleLoader
	images  *images
	blocks  *blockDevices
	// prepared is closed when containers can be made.
	prepared chan struct{}
}

// shmPath is the tmpfs that is /dev/shm of all containers of the pod.
const shmPath = "/run/crivm/shm"

// newMachine is the machine that this process runs on and has for itself.
func newMachine(dir string, modules *moduleLoader) *machine {
	return &machine{
		modules:  modules,
		blocks:   &blockDevices{users: map[string]map[string]bool{}},
		prepared: make(chan struct{}),
		images:   &images{dir: filepath.Join(dir, "images"), mounts: map[string]*imageMount{}},
	}
}
