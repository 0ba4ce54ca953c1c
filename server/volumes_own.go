package server

import (
	"path"
	"slices"
	"strings"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crivm/crivm/agentproto"
)

// maxOwnVolumes bounds what an image can ask for; real ones have a few.
const maxOwnVolumes = 64

// ownVolumes are the VOLUMEs of a container's image: directories of the container's own on the pod's scratch disk.
// A mount of the configuration at or above one is what the user wants to have there, so that one is left out; so
// is what every container has a mount for.
func ownVolumes(config *cri.ContainerConfig, image ocispec.ImageConfig) ([]*agentproto.Mount, error) {
	if len(image.Volumes) > maxOwnVolumes {
		return nil, invalid("config.image", "the image has %d VOLUMEs, more than %d", len(image.Volumes), maxOwnVolumes)
	}
	taken := []string{"/proc", "/sys", "/dev", "/etc/hostname", "/etc/hosts", "/etc/resolv.conf"}
	for _, m := range config.GetMounts() {
		taken = append(taken, path.Clean(m.GetContainerPath()))
	}
	var mounts []*agentproto.Mount
	seen := map[string]bool{"/": true} // the root file system is the container's own as it is
	for volume := range image.Volumes {
		volume = path.Join("/", volume)
		below := slices.ContainsFunc(taken, func(dir string) bool { return volume == dir || strings.HasPrefix(volume, dir+"/") })
		if below || seen[volume] || strings.Contains(volume, "\x00") {
			continue
		}
		seen[volume] = true
		mounts = append(mounts, &agentproto.Mount{Destination: volume, Source: &agentproto.Mount_Own{Own: &agentproto.OwnDirectory{}}})
	}
	slices.SortFunc(mounts, func(a, b *agentproto.Mount) int { return strings.Compare(a.Destination, b.Destination) })
	return mounts, nil
}
