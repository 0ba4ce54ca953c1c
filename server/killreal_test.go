//go:build integration

package server

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/vishvananda/netlink"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crivm/crivm/cni"
	"github.com/crivm/crivm/imageservice/rootdisk"
	"github.com/crivm/crivm/vmruntime/qemu"
)

func init() { realParts = qemuParts }

// qemuParts are the product's QEMU driver, guest image and cni with the real plugins.
func qemuParts(plan killPlan) (killParts, error) {
	net, err := cni.New(cni.Config{
		ConfDir: filepath.Join(plan.Dir, "net.d"), BinDirs: []string{filepath.Join(plan.Build, "bin/cni")}, CacheDir: filepath.Join(plan.Dir, "cni"), NetnsDir: filepath.Join(plan.Dir, "n"),
	})
	if err != nil {
		return killParts{}, err
	}
	return killParts{handler: Handler{
		Driver: qemu.New(qemu.Config{}), Kernel: filepath.Join(plan.Build, "guest/vmlinux"), Initrd: filepath.Join(plan.Build, "guest/initramfs"),
		VCPUs: 1, MaxVCPUs: 2, Memory: 256 << 20, MaxMemory: 512 << 20, ScratchBytes: 256 << 20, EmptyDirBytes: 256 << 20, BootTimeout: 2 * time.Minute,
	}, network: net, disk: plan.Disk}, nil
}

// realKillPoints are where the daemons of one life of a pod die, one after the other, with a real VM, virtiofsd and CNI
// plugins. Numbers count from the start of each daemon, its restoring included.
var realKillPoints = []string{
	// RunPodSandbox: up to READY each death undoes the sandbox, and kubelet makes it again.
	"after Network.Prepare#1", "after Driver.Start#1", "after Network.Add#1", "answer of agent Hello#1", "after sending agent SetupSandbox#1", "sandbox record READY#1",
	// CreateContainer of the first container, which has an image disk and a host directory.
	"before VM.AddDisk#1", "after VM.AddDisk#1", "before VM.AddShare#1", "after VM.AddShare#1", "after sending agent CreateContainer#1", "answer of agent CreateContainer#1",
	"container record CREATED#1",
	// StartContainer, and the following of its output.
	"before sending agent StartContainer#1", "container record RUNNING#1", "answer of agent stream#2", "after sending agent stream#4",
	// Restarts.
	"after Driver.Reattach#1", "answer of agent ListContainers#1", "before Network.GC#1",
	// ExecSync and UpdateContainerResources, which resizes the VM.
	"after sending agent Exec#1", "before VM.Resize#1", "after VM.Resize#1", "after sending agent UpdateContainer#1",
	// A container that ends by itself; StopContainer, RemoveContainer, with the last user of the image disk.
	"after sending agent StartContainer#1", "answer of agent Wait#1", "after sending agent Signal#1", "after sending agent DeleteContainer#1", "before VM.RemoveDisk#1", "after VM.RemoveDisk#1", "container record deleted#1",
	// StopPodSandbox and RemovePodSandbox.
	"sandbox record STOPPING#1", "before VM.Kill#1", "after VM.Kill#1", "before Network.Del#1", "after Network.Del#1", "sandbox record NOTREADY#1", "sandbox record deleted#1",
}

// realStory is a pod as kubelet runs it.
func realStory(n *killNode) {
	pod := n.runPod()
	steady := n.create(pod, "steady", `trap 'echo bye; exit 7' TERM; echo >`+n.startsPath("steady.trap")+`; i=0; while :; do i=$((i+1)); echo line $i; sleep 0.05; done`)
	n.startContainer(steady)
	n.begun("steady.trap")
	n.awaitDeath("before Network.GC#1")
	n.must("ExecSync", func(ctx context.Context) error {
		resp, err := n.cri.ExecSync(ctx, &cri.ExecSyncRequest{ContainerId: steady, Cmd: []string{"echo", "alive"}, Timeout: 60})
		if err == nil && string(resp.GetStdout()) != "alive\n" {
			n.t.Errorf("exec: %v", resp)
		}
		return err
	})
	n.must("UpdateContainerResources", func(ctx context.Context) error {
		_, err := n.cri.UpdateContainerResources(ctx, &cri.UpdateContainerResourcesRequest{
			ContainerId: steady, Linux: &cri.LinuxContainerResources{MemoryLimitInBytes: 300 << 20, CpuPeriod: 100000, CpuQuota: 200000},
		})
		return err
	})
	job := n.create(pod, "job", jobScript)
	n.startContainer(job)
	if s := n.exit(job); s.GetExitCode() != 3 {
		n.t.Errorf("job is %v", s)
	}
	n.once("job")
	n.logged("stdout", jobOutput("out")+"unfinished\n", n.logPath("job"))
	n.logged("stderr", jobOutput("err"), n.logPath("job"))
	n.stopContainer(steady)
	if s := n.exit(steady); s.GetExitCode() != 7 {
		n.t.Errorf("steady is %v", s)
	}
	n.once("steady")
	text, err := os.ReadFile(n.logPath("steady"))
	if err != nil {
		n.t.Error(err)
	}
	var want strings.Builder
	for i := range strings.Count(string(text), " line ") {
		fmt.Fprintf(&want, "line %d\n", i+1)
	}
	n.logged("stdout", want.String()+"bye\n", n.logPath("steady"))
	n.removeContainer(job)
	n.removeContainer(steady)
	last := n.create(pod, "last", "exec sleep 1000")
	n.startContainer(last)
	n.begun("last")
	n.stays(pod)
	n.stopPod(pod)
	if s := n.exit(last); s.GetExitCode() != 137 {
		n.t.Errorf("last is %v", s)
	}
	n.once("last")
	n.removePod(pod)
}

// awaitDeath waits, with calls as kubelet makes them, until a daemon has died at a point that nothing asks for.
func (n *killNode) awaitDeath(point string) {
	n.t.Helper()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	want := slices.Index(n.points, point) + 1
	for limit := time.Now().Add(2 * time.Minute); n.deaths < want; <-tick.C {
		n.must("Version", func(ctx context.Context) error {
			_, err := n.cri.Version(ctx, &cri.VersionRequest{})
			return err
		})
		if time.Now().After(limit) {
			n.t.Fatalf("%q is not passed", n.points[n.deaths])
		}
	}
}

// TestKillMatrixReal is TestKillMatrix with real VMs at the points that differ for them. One pod lives through as many
// daemons as there are points; only what is killed before it is READY is booted again.
func TestKillMatrixReal(t *testing.T) {
	start := time.Now()
	n := newRealNode(t, realKillPoints...)
	realStory(n)
	n.clean()
	n.cleanReal()
	if n.deaths < len(realKillPoints) {
		t.Errorf("%d daemons died; the point that was never passed is %q", n.deaths, realKillPoints[n.deaths])
	}
	t.Logf("%d daemons died within %s", n.deaths, time.Since(start).Round(time.Second))
}

// newRealNode is a node with real VMs, whose containers have the directory of the logs at the same place.
func newRealNode(t *testing.T, points ...string) *killNode {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("VMs, taps and mounts need root")
	}
	loopback(t)
	build, err := filepath.Abs("../build")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range []string{"guest/vmlinux", "guest/initramfs", "bin/cni/bridge", "images/index.json"} {
		if _, err := os.Stat(filepath.Join(build, file)); err != nil {
			t.Skipf("not built (make guest): %v", err)
		}
	}
	n := newKillNode(t, "", points...)
	n.plan.Build, n.plan.Disk = build, filepath.Join(n.plan.Dir, "busybox.erofs")
	n.plan.Trace = filepath.Join(t.TempDir(), "trace")
	if err := os.Chmod(n.plan.Dir, 0o711); err != nil {
		t.Fatal(err)
	}
	if err := buildBusybox(t.Context(), filepath.Join(build, "images"), n.plan.Disk); err != nil {
		t.Fatal(err)
	}
	logs := filepath.Join(n.plan.Dir, "logs")
	n.mounts = []*cri.Mount{{HostPath: logs, ContainerPath: logs}}
	conf := fmt.Sprintf(`{"cniVersion": "1.1.0", "name": "kill", "plugins": [{"type": "bridge", "bridge": "kill0", "isGateway": true, "ipMasq": false,
  "ipam": {"type": "host-local", "dataDir": %q, "ranges": [[{"subnet": "10.99.0.0/24"}]]}}]}`, filepath.Join(n.plan.Dir, "ipam"))
	err = errors.Join(os.MkdirAll(logs, 0o755), os.MkdirAll(filepath.Join(n.plan.Dir, "net.d"), 0o755), os.WriteFile(filepath.Join(n.plan.Dir, "net.d/10-kill.conflist"), []byte(conf), 0o644))
	if err != nil {
		t.Fatal(err)
	}
	n.start()
	return n
}

// buildBusybox makes the root disk of the test images' busybox.
func buildBusybox(ctx context.Context, images, path string) error {
	l, err := layout.FromPath(images)
	if err != nil {
		return err
	}
	index, err := l.ImageIndex()
	if err != nil {
		return err
	}
	manifest, err := index.IndexManifest()
	if err != nil {
		return err
	}
	for _, m := range manifest.Manifests {
		if m.Annotations["org.opencontainers.image.ref.name"] != "docker.io/library/busybox:latest" {
			continue
		}
		img, err := index.Image(m.Digest)
		if err != nil {
			return err
		}
		return buildDisk(ctx, img, path)
	}
	return errors.New("no busybox among the test images")
}

func buildDisk(ctx context.Context, img v1.Image, path string) error {
	layers, err := img.Layers()
	if err != nil {
		return err
	}
	var open []rootdisk.Layer
	for _, l := range layers {
		open = append(open, func() (io.ReadCloser, error) { return l.Uncompressed() })
	}
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	return errors.Join(rootdisk.Build(ctx, f, [16]byte{1}, open), f.Chmod(0o644), f.Close())
}

// cleanReal looks for what real plugins leave.
func (n *killNode) cleanReal() {
	n.t.Helper()
	links, err := netlink.LinkList()
	if err != nil {
		n.t.Fatal(err)
	}
	for _, l := range links {
		if name := l.Attrs().Name; l.Type() == "veth" || l.Type() == "tuntap" {
			n.t.Errorf("link %s is left", name)
		}
	}
	leases, err := os.ReadDir(filepath.Join(n.plan.Dir, "ipam/kill"))
	if err != nil {
		n.t.Error(err)
	}
	for _, e := range leases {
		if strings.HasPrefix(e.Name(), "10.") {
			n.t.Errorf("address %s is left", e.Name())
		}
	}
	if left, err := os.ReadDir(filepath.Join(n.plan.Dir, "r/fs")); len(left) > 0 {
		n.t.Errorf("file servers are left: %v (%v)", left, err)
	}
}
