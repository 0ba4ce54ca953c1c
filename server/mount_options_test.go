package server

import (
	"testing"

	"github.com/containerd/errdefs"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crivm/crivm/server/store"
)

func TestMountOptions(t *testing.T) {
	for option, ok := range map[string]bool{"noexec": true, "nodev": true, "nosuid": true, "suid": false, "rw": false, "bind": false, "": false, "noexec,suid": false} {
		m := &cri.Mount{ContainerPath: "/v", HostPath: t.TempDir(), MountOptions: []string{"nodev", option}}
		v := guestVolumes{}
		err := v.addHostVolume(store.Container{Config: store.ContainerConfig{ContainerConfig: &cri.ContainerConfig{Mounts: []*cri.Mount{m}}}}, "uid", 0, m)
		closeVolumes(v.shared)
		if ok && (err != nil || len(v.mounts[0].GetOptions()) != 2) || !ok && !errdefs.IsNotImplemented(err) {
			t.Errorf("%q: %v, %v", option, v.mounts, err)
		}
	}
}
