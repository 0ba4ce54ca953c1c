//go:build integration

package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func hugepageLimit(bytes uint64) func(*cri.ContainerConfig) { // as kubelet sends it: every size of the host
	return func(c *cri.ContainerConfig) {
		c.Linux.Resources.HugepageLimits = []*cri.HugepageLimit{{PageSize: "1GB"}, {PageSize: "2MB", Limit: bytes}}
	}
}

// Huge pages of a pod: an emptyDir as kubelet mounts it, limits, their changes, figures, and memory that comes back.
func TestHugepages(t *testing.T) {
	parallel(t)
	p := runPod(t, shared)
	host := filepath.Join(t.TempDir(), "pods", p.config.Metadata.Uid, "volumes/kubernetes.io~empty-dir/huge")
	if err := os.MkdirAll(host, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("nodev", host, "hugetlbfs", 0, "pagesize=2M"); err != nil {
		t.Skipf("this machine's kernel mounts no hugetlbfs: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(host, unix.MNT_DETACH); err != nil {
			t.Errorf("unmount %s: %v", host, err)
		}
	})
	if err := os.Chmod(host, os.ModeSetgid|0o777); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(host, "sub"), 0o700); err != nil {
		t.Fatal(err)
	}
	a := p.start("exec sleep 1000", hugepageLimit(8*mib), mounts(&cri.Mount{ContainerPath: "/huge", HostPath: host}))
	b := p.start("exec sleep 1000", hugepageLimit(4*mib), mounts(&cri.Mount{ContainerPath: "/huge", HostPath: host, Readonly: true}, &cri.Mount{ContainerPath: "/sub", HostPath: filepath.Join(host, "sub")}))
	shell := func(id, script, want string) {
		t.Helper()
		if got := strings.TrimSpace(p.exec(id, "sh", "-c", script)); got != want {
			t.Errorf("%s: %q, want %q", script, got, want)
		}
	}
	const total = `grep HugePages_Total /proc/meminfo | tr -dc 0-9; echo " $(cat /sys/fs/cgroup/hugetlb.2MB.max)"`
	shell(a, total, fmt.Sprint("6 ", 8*mib))
	shell(b, total, fmt.Sprint("6 ", 4*mib))
	shell(a, `stat -f -c %s /huge; stat -c %a /huge; fallocate -l 4M /huge/a && stat -c %s /huge/a`, "2097152\n2777\n4194304")
	shell(a, `fallocate -l 12M /huge/more 2>/dev/null && echo beyond the limit; rm -f /huge/more`, "")
	shell(b, `stat -c %s /huge/a; fallocate -l 2M /huge/b 2>/dev/null && echo written; stat -c %a /sub; fallocate -l 2M /sub/c; ls /huge/sub`, "4194304\n2700\nc")

	usage := map[string]uint64{}
	eventually(t, time.Minute, "figures of huge pages", func() error {
		all, err := shared.Runtime.ListPodSandboxMetrics(t.Context())
		if err != nil {
			return err
		}
		for _, pod := range all {
			for _, c := range pod.GetContainerMetrics() {
				for _, m := range c.GetMetrics() {
					if m.GetName() == "container_hugetlb_usage_bytes" && strings.Contains(strings.Join(m.GetLabelValues(), " "), "2MB") {
						usage[c.GetContainerId()] = m.GetValue().GetValue()
					}
				}
			}
		}
		if usage[a] != 4*mib || usage[b] != 2*mib {
			return fmt.Errorf("they are %v", usage)
		}
		return nil
	})

	limit := func(bytes uint64) error {
		return p.update(a, &cri.LinuxContainerResources{HugepageLimits: []*cri.HugepageLimit{{PageSize: "2MB", Limit: bytes}}})
	}
	if err := limit(16 * mib); err != nil {
		t.Fatal(err)
	}
	shell(a, total, fmt.Sprint("10 ", 16*mib))
	shell(a, `fallocate -l 12M /huge/more && echo within the limit`, "within the limit")
	if err := limit(2 * mib); err == nil {
		t.Error("a limit below what is in use is taken")
	}
	shell(a, total, fmt.Sprint("10 ", 16*mib))
	if err := limit(1 << 40); err == nil {
		t.Error("more huge pages than the pod has memory are promised")
	}
	shell(a, `rm /huge/more /huge/a`, "")
	if err := limit(2 * mib); err != nil {
		t.Error(err)
	}
	shell(a, total, fmt.Sprint("3 ", 2*mib))
	if err := p.updatePod(&cri.LinuxContainerResources{HugepageLimits: []*cri.HugepageLimit{{PageSize: "2MB", Limit: 32 * mib}}}); err != nil {
		t.Error(err)
	}
	shell(a, total, fmt.Sprint("16 ", 2*mib))
	if err := p.updatePod(&cri.LinuxContainerResources{HugepageLimits: []*cri.HugepageLimit{{PageSize: "2MB"}}}); err != nil {
		t.Error(err)
	}
	if err := shared.Runtime.RemoveContainer(testContext(t, time.Minute), a); err != nil {
		t.Fatal(err)
	}
	shell(b, total, fmt.Sprint("2 ", 4*mib))
}
