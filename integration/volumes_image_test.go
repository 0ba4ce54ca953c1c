//go:build integration

package integration

import (
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestImageVolumes(t *testing.T) {
	parallel(t)
	p := runPod(t, shared)
	image := func(path, ref, sub string) *cri.Mount {
		return &cri.Mount{ContainerPath: path, Image: &cri.ImageSpec{Image: ref}, ImageSubPath: sub, Readonly: true}
	}
	own := image("/own", busybox, "bin")
	st, log := p.run(`
[ -x /all/bin/sh ] || echo FAIL: $(ls /all)
[ -x /own/sh ] || echo FAIL: $(ls /own)
/opt/busybox true || echo FAIL file
touch /all/x 2>/dev/null && echo FAIL writable
mount -o remount,rw /all 2>/dev/null && touch /all/x 2>/dev/null && echo FAIL writable
echo done`, mounts(image("/all", standin, ""), own, image("/opt/busybox", busybox, "/bin/busybox")))
	if st.ExitCode != 0 || log != "done\n" {
		t.Errorf("container says %q, exit code %d", log, st.ExitCode)
	}
	if len(st.Mounts) != 3 || st.Mounts[0].GetImage().GetImage() != standin || st.Mounts[1].GetImageSubPath() != "bin" {
		t.Errorf("mounts in the status: %v", st.Mounts)
	}
	for what, c := range map[string]struct {
		mount *cri.Mount
		code  codes.Code
		says  string
	}{
		"missing image":    {image("/v", "docker.io/library/no-such:1", ""), codes.NotFound, "ImageVolumeMountFailed"},
		"missing sub path": {image("/v", busybox, "no/such"), codes.NotFound, "ImageVolumeMountFailed"},
		"escape":           {image("/v", busybox, "../../run/crivm"), codes.NotFound, "sub path"},
		"writable":         {&cri.Mount{ContainerPath: "/v", Image: &cri.ImageSpec{Image: busybox}}, codes.InvalidArgument, "read-only"},
		"host path too":    {&cri.Mount{ContainerPath: "/v", Image: &cri.ImageSpec{Image: busybox}, HostPath: "/tmp", Readonly: true}, codes.InvalidArgument, "host_path"},
	} {
		if _, err := p.create("true", mounts(c.mount)); status.Code(err) != c.code || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: error is %v, want %s and %q", what, err, c.code, c.says)
		}
	}
	// The disk of the volume goes with its last user, and comes back.
	for range 2 {
		id := p.start("sleep 1000", mounts(image("/v", standin, "")))
		if err := p.n.Runtime.RemoveContainer(t.Context(), id); err != nil {
			t.Error(err)
		}
	}
}
