package server

import (
	"fmt"
	"slices"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestOwnVolumes(t *testing.T) {
	config := &cri.ContainerConfig{Mounts: []*cri.Mount{{ContainerPath: "/data/"}, {ContainerPath: "/srv/www/static"}}}
	image := ocispec.ImageConfig{Volumes: map[string]struct{}{}}
	for _, volume := range []string{"/", "/var/lib/db", "var/cache/", "/var/cache", "/data", "/data/db", "/database", "/srv/www", "/sys/fs/cgroup", "/../x", "/dev", "/etc/hosts", "/nul\x00"} {
		image.Volumes[volume] = struct{}{}
	}
	mounts, err := ownVolumes(config, image)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, m := range mounts {
		if m.GetOwn() == nil || m.GetReadonly() {
			t.Errorf("mount is %v", m)
		}
		got = append(got, m.GetDestination())
	}
	if want := []string{"/database", "/srv/www", "/var/cache", "/var/lib/db", "/x"}; !slices.Equal(got, want) {
		t.Errorf("VOLUMEs are at %q, want %q", got, want)
	}
	for i := range maxOwnVolumes {
		image.Volumes[fmt.Sprintf("/v%d", i)] = struct{}{}
	}
	if _, err := ownVolumes(config, image); err == nil {
		t.Error("any number of VOLUMEs is accepted")
	}
}
