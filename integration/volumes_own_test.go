//go:build integration

package integration

import (
	"testing"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// A VOLUME of an image is a directory of the container's own with the image's content, writable also where the root
// file system is not, and gone with the container.
func TestVolumesOfAnImage(t *testing.T) {
	const image = "docker.io/crivm/layers:latest"
	pull(t, image)
	p := runPod(t, shared)
	script := `
touch /x 2>/dev/null && echo FAIL: the root file system is writable
touch /data/x 2>/dev/null && echo FAIL: /data is writable
[ "$(ls -A /volume)" = "" ] || echo FAIL: $(ls -lA /volume)
touch /volume/x || echo FAIL: /volume is not writable
[ "$(stat -c '%a %u %g' /seeded /seeded/file | tr '\n' ,)" = "2750 1234 5678,640 1234 5678," ] || echo FAIL: $(stat -c '%n %a %u %g' /seeded /seeded/file)
[ "$(cat /seeded/link)" = "of the image" ] || echo FAIL: $(ls -lA /seeded)
echo changed > /seeded/file || echo FAIL: /seeded is not writable
[ "$(cat /seeded/file)" = changed ] || echo FAIL: $(cat /seeded/file)
grep -q ' /seeded ext4 rw.*nobarrier' /proc/mounts || echo FAIL: $(grep seeded /proc/mounts)
echo done`
	change := func(readonly bool) func(*cri.ContainerConfig) {
		return func(c *cri.ContainerConfig) {
			c.Image.Image = image
			c.Linux.SecurityContext.ReadonlyRootfs = readonly
		}
	}
	for range 2 { // what the first has changed, the second does not see
		if st, log := p.run(script, change(true)); st.ExitCode != 0 || log != "done\n" {
			t.Errorf("container says %q, exit code %d", log, st.ExitCode)
		}
	}
	own := t.TempDir()
	st, log := p.run(`[ "$(ls -A /seeded)" = "" ] || echo FAIL: $(ls -lA /seeded); touch /seeded/mine && echo done`, change(false), mounts(&cri.Mount{ContainerPath: "/seeded", HostPath: own}))
	if st.ExitCode != 0 || log != "done\n" {
		t.Errorf("with a mount of the pod's at a VOLUME the container says %q, exit code %d", log, st.ExitCode)
	}
}
