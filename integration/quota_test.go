//go:build integration

package integration

import (
	"fmt"
	"io/fs"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crivm/crivm/integration/node"
)

// The scratch disk is a hard limit of a pod's containers together, and so is an emptyDir's disk: the container that is beyond
// it is told, other pods are not, and what is deleted can be used again and comes back to the host.
func TestDiskQuota(t *testing.T) {
	ctx := testContext(t, 6*time.Minute)
	n := startNode(t, node.Options{Config: "[vm]\nscratch_size = \"96MiB\"\nempty_dir_size = \"32MiB\"\n"})
	if _, err := n.Images.PullImage(ctx, &cri.ImageSpec{Image: busybox}, nil, nil); err != nil {
		t.Fatal(err)
	}
	k := newKubeletPod(t)
	p := runPod(t, n, func(c *cri.PodSandboxConfig) { c.Metadata.Uid = k.uid })
	other := runPod(t, n)
	id := p.start("sleep 1000", mounts(&cri.Mount{ContainerPath: "/empty", HostPath: k.empty("data", 0)}))
	for dir, limit := range map[string]int{"/var": 96, "/empty": 32} {
		out := p.exec(id, "sh", "-c", fmt.Sprintf("dd if=/dev/zero of=%s/big bs=1M count=200 2>&1; sync; wc -c < %s/big", dir, dir))
		size := 0
		lines := strings.Split(strings.TrimSpace(out), "\n")
		if _, err := fmt.Sscan(lines[len(lines)-1], &size); err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(out, "No space left on device") || size > limit<<20 || size < limit<<19 {
			t.Errorf("%s: %q", dir, out)
		}
	}
	if st, _ := other.run("dd if=/dev/zero of=/big bs=1M count=20 2>/dev/null && sync"); st.ExitCode != 0 {
		t.Errorf("another pod cannot write: exit code %d", st.ExitCode)
	}
	allocated := func() (most int64) { // of the larger of the pods' scratch disks
		filepath.WalkDir(n.Dir, func(path string, d fs.DirEntry, err error) error {
			if err == nil && d.Name() == "scratch.img" {
				if info, err := d.Info(); err == nil {
					most = max(most, info.Sys().(*syscall.Stat_t).Blocks*512)
				}
			}
			return nil
		})
		return most
	}
	full := allocated()
	if full < 60<<20 {
		t.Errorf("the largest scratch disk takes %d bytes of the host", full)
	}
	p.exec(id, "sh", "-c", "rm /var/big /empty/big; sync")
	eventually(t, 2*time.Minute, "space comes back to the host", func() error {
		if now := allocated(); now > full/2 {
			return fmt.Errorf("the largest scratch disk takes %d bytes of the host, took %d", now, full)
		}
		return nil
	})
	for _, dir := range []string{"/var", "/empty"} {
		p.exec(id, "sh", "-c", fmt.Sprintf("dd if=/dev/zero of=%s/again bs=1M count=10 2>/dev/null && sync", dir))
	}
}
