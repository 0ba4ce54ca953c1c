package server

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crivm/crivm/imageservice"
	"github.com/crivm/crivm/vmruntime/cloudhypervisor"
	"github.com/crivm/crivm/vmruntime/vmtest"
)

// exhausted wants the class that tells kubelet, and people, that something is used up.
func exhausted(t *testing.T, what string, err error) {
	t.Helper()
	if code := status.Code(grpcError(err)); code != codes.ResourceExhausted {
		t.Errorf("%s: %s: %v", what, code, err)
	}
}

// heldJob is a container that runs until finish, which checks its exit code and that all it wrote then is in its log.
func (n *killNode) heldJob(pod string) (id string, finish func()) {
	n.t.Helper()
	release := filepath.Join(n.plan.Dir, "release")
	id = n.create(pod, "job", "while [ ! -e "+release+" ]; do sleep 0.02; done; "+jobScript)
	n.startContainer(id)
	n.begun("job")
	return id, func() {
		n.t.Helper()
		if err := os.WriteFile(release, nil, 0o644); err != nil {
			n.t.Fatal(err)
		}
		if s := n.exit(id); s.GetExitCode() != 3 {
			n.t.Errorf("job is %v", s)
		}
		n.logged("stdout", jobOutput("out")+"unfinished\n", n.logPath("job"))
	}
}

// TestNoDescriptors: a daemon that may open no file more answers with ResourceExhausted, loses nothing that runs, and
// needs no restart when it may again.
func TestNoDescriptors(t *testing.T) {
	t.Parallel()
	n := newKillNode(t, killVMM(t))
	n.start()
	pod := n.runPod()
	_, finish := n.heldJob(pod)
	idle := n.create(pod, "idle", "echo ran")

	// The limit is one of numbers, not of how many are open: at the first of them that is free nothing can be opened,
	// whatever the test itself was given. Low ones belong to what the daemon never closes.
	var old unix.Rlimit
	limit := uint64(0)
	for ; limit < 8; limit++ {
		if _, err := os.Lstat(fmt.Sprintf("/proc/%d/fd/%d", n.daemon.Process.Pid, limit)); err != nil {
			break
		}
	}
	if err := unix.Prlimit(n.daemon.Process.Pid, unix.RLIMIT_NOFILE, nil, &old); err != nil {
		t.Fatal(err)
	}
	if err := unix.Prlimit(n.daemon.Process.Pid, unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: limit, Max: old.Max}, nil); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	other := n.podConfig()
	other.Metadata.Name = "other"
	_, err := n.cri.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: other})
	exhausted(t, "RunPodSandbox", err)
	_, err = n.cri.CreateContainer(ctx, &cri.CreateContainerRequest{PodSandboxId: pod, Config: &cri.ContainerConfig{
		Metadata: &cri.ContainerMetadata{Name: "more"}, Image: &cri.ImageSpec{Image: "image"}, Command: []string{"true"}, LogPath: "logs/deep/more.log",
		Mounts: []*cri.Mount{{ContainerPath: "/etc/hosts", HostPath: filepath.Join(n.plan.Dir, "file")}},
	}})
	exhausted(t, "CreateContainer", err)
	_, err = n.cri.StartContainer(ctx, &cri.StartContainerRequest{ContainerId: idle})
	exhausted(t, "StartContainer", err)
	if list, err := n.cri.ListContainers(ctx, &cri.ListContainersRequest{}); err != nil || len(list.GetContainers()) != 2 {
		t.Errorf("containers are %v (%v)", list, err)
	}
	if err := unix.Prlimit(n.daemon.Process.Pid, unix.RLIMIT_NOFILE, &old, nil); err != nil {
		t.Fatal(err)
	}
	for _, p := range n.listedPods() { // what could not be undone without descriptors waits for kubelet
		if p.GetId() != pod {
			n.removePod(p.GetId())
		}
	}
	n.stays(pod)
	finish()
	n.startContainer(idle)
	if s := n.exit(idle); s.GetExitCode() != 0 {
		t.Errorf("idle is %v", s)
	}
	n.removePod(pod)
	if n.starts != 1 {
		t.Errorf("%d daemons were needed", n.starts)
	}
	n.clean()
}

// pidsController is where cgroups that limit processes can be made.
func pidsController(t *testing.T) string {
	t.Helper()
	for _, dir := range []string{"/sys/fs/cgroup/pids", "/sys/fs/cgroup"} {
		if _, err := os.Stat(filepath.Join(dir, "cgroup.procs")); err != nil {
			continue
		}
		if text, err := os.ReadFile(filepath.Join(dir, "cgroup.controllers")); err == nil && !strings.Contains(string(text), "pids") {
			continue
		}
		return dir
	}
	t.Skip("no cgroup hierarchy with the pids controller here")
	return ""
}

// TestNoProcesses: a pod whose cgroup, as kubelet's podPidsLimit makes it, has no room for its VMM.
func TestNoProcesses(t *testing.T) {
	r := newRig(t)
	name := filepath.Base(r.dir)
	parent := filepath.Join(pidsController(t), name)
	if err := os.Mkdir(parent, 0o755); err != nil {
		t.Skipf("cgroups cannot be made here: %v", err)
	}
	t.Cleanup(func() {
		if err := os.Remove(parent); err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Error(err)
		}
	})
	limit := func(value string) {
		if err := os.WriteFile(filepath.Join(parent, "pids.max"), []byte(value), 0); err != nil {
			t.Fatal(err)
		}
	}
	config := r.podConfig("a")
	config.Linux = &cri.LinuxPodSandboxConfig{CgroupParent: "/" + name}
	limit("1")
	_, err := r.RunPodSandbox(t.Context(), &cri.RunPodSandboxRequest{Config: config})
	exhausted(t, "RunPodSandbox", err)
	if left := r.store.Sandboxes(); len(left) > 0 {
		t.Errorf("left are %v", left)
	}
	limit("max")
	resp, err := r.RunPodSandbox(t.Context(), &cri.RunPodSandboxRequest{Config: config})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := r.RemovePodSandbox(t.Context(), &cri.RemovePodSandboxRequest{PodSandboxId: resp.GetPodSandboxId()}); err != nil {
		t.Error(err)
	}
}

// TestNoProcessesForTheDaemon: a daemon whose own cgroup gives it no process and no thread more begins nothing and goes on
// with what it has.
func TestNoProcessesForTheDaemon(t *testing.T) {
	t.Parallel()
	n := newKillNode(t, killVMM(t))
	group := filepath.Join(pidsController(t), "daemon-"+filepath.Base(n.plan.Dir))
	if err := os.Mkdir(group, 0o755); err != nil {
		t.Skipf("cgroups cannot be made here: %v", err)
	}
	t.Cleanup(func() { // after the daemon's end
		n.kill()
		if err := os.Remove(group); err != nil {
			t.Error(err)
		}
	})
	set := func(file, value string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(group, file), []byte(value), 0); err != nil {
			t.Fatal(err)
		}
	}
	n.start()
	pod := n.runPod()
	job, finish := n.heldJob(pod)
	idle := n.create(pod, "idle", "echo ran")
	set("pids.max", "1") // fewer than it has
	set("cgroup.procs", strconv.Itoa(n.daemon.Process.Pid))

	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	other := n.podConfig()
	other.Metadata.Name = "other"
	_, err := n.cri.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: other})
	exhausted(t, "RunPodSandbox", err)
	_, err = n.cri.CreateContainer(ctx, &cri.CreateContainerRequest{PodSandboxId: pod, Config: &cri.ContainerConfig{
		Metadata: &cri.ContainerMetadata{Name: "more"}, Image: &cri.ImageSpec{Image: "image"}, Command: []string{"true"}, LogPath: "more.log",
	}})
	exhausted(t, "CreateContainer", err)
	var calls sync.WaitGroup // more at once than there are CPUs
	for range 20 {
		calls.Go(func() {
			if out, err := n.cri.ExecSync(ctx, &cri.ExecSyncRequest{ContainerId: job, Cmd: []string{"echo", "on"}, Timeout: 30}); err != nil || string(out.GetStdout()) != "on\n" {
				t.Errorf("exec: %v (%v)", out, err)
			}
		})
	}
	calls.Wait()
	n.startContainer(idle)
	if s := n.exit(idle); s.GetExitCode() != 0 {
		t.Errorf("idle is %v", s)
	}
	finish()
	n.stays(pod)
	set("pids.max", "max")
	more := n.create(pod, "more", "exit 0")
	n.startContainer(more)
	if s := n.exit(more); s.GetExitCode() != 0 {
		t.Errorf("with room again: %v", s)
	}
	n.removePod(pod)
	if n.starts != 1 {
		t.Errorf("%d daemons were needed", n.starts)
	}
	n.clean()
}

// manyImages is any number of images, named by numbers.
type manyImages struct{ oneImage }

func (i manyImages) Resolve(_ context.Context, ref string) (imageservice.Image, error) {
	return imageservice.Image{ID: fmt.Sprintf("sha256:%064s", ref), Config: ocispec.ImageConfig{Cmd: []string{"true"}}}, nil
}

// TestNoSlots: each image is a disk on a PCI slot of the VM, of which there are only so many.
func TestNoSlots(t *testing.T) {
	r := newRig(t)
	driver, err := cloudhypervisor.New(cloudhypervisor.Config{Binary: vmtest.Binary(t), Landlock: "off", PCISegments: 1})
	if err != nil {
		t.Fatal(err)
	}
	handler := r.opts.Handlers[""]
	handler.Driver = driver
	r.opts.Handlers[""] = handler
	r.restart()
	r.images = manyImages{r.img}
	pod := r.runPod("a")
	// The first 16 digits name the disk.
	create := func(n int) (string, error) {
		req := r.createRequest(pod, fmt.Sprint("c", n), "exec sleep 1000")
		req.Config.Image.Image = fmt.Sprintf("%016x%048x", n, n)
		resp, err := r.CreateContainer(t.Context(), req)
		return resp.GetContainerId(), err
	}
	var made []string
	for n := 0; ; n++ {
		id, err := create(n)
		if err != nil {
			exhausted(t, "CreateContainer", err)
			break
		}
		if made = append(made, id); n > 40 {
			t.Fatal("no end of slots")
		}
	}
	if len(made) < 16 {
		t.Errorf("%d disks are too few", len(made))
	}
	if all := r.store.Containers(""); len(all) != len(made) {
		t.Errorf("%d containers after %d were made", len(all), len(made))
	}
	if _, err := r.StartContainer(t.Context(), &cri.StartContainerRequest{ContainerId: made[0]}); err != nil {
		t.Error(err)
	}
	if _, err := r.RemoveContainer(t.Context(), &cri.RemoveContainerRequest{ContainerId: made[1]}); err != nil {
		t.Fatal(err)
	}
	if _, err := create(1000); err != nil {
		t.Errorf("with a slot free again: %v", err)
	}
}

// small mounts a file system of so many KiB and returns a function that fills it, whose result frees it again.
func small(t *testing.T, dir string, kib int) (fill func() (free func())) {
	t.Helper()
	if err := os.MkdirAll(dir, 0o711); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, fmt.Sprintf("size=%dk,mode=711", kib)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	return func() func() {
		f, err := os.Create(filepath.Join(dir, "filler"))
		if err != nil {
			t.Fatal(err)
		}
		for block := make([]byte, 4096); err == nil; {
			_, err = f.Write(block)
		}
		if !errors.Is(err, unix.ENOSPC) {
			t.Fatal(err)
		}
		return func() {
			if err := errors.Join(f.Truncate(0), f.Close()); err != nil {
				t.Error(err)
			}
		}
	}
}

// TestFullDisks: with the disks of records and of logs full, calls fail with ResourceExhausted or wait, nothing is left
// half made, and all that happened meanwhile comes out when there is space: output, exit codes, states.
func TestFullDisks(t *testing.T) {
	r := newRig(t)
	r.stop()
	fillState := small(t, r.opts.StateDir, 8<<10)
	fillLogs := small(t, filepath.Join(r.dir, "logs"), 4<<10)
	t.Cleanup(func() { // before the rig looks for what is left
		r.removeAll()
		r.stop()
		unix.Unmount(r.opts.StateDir, unix.MNT_DETACH)
		r.start()
	})
	r.start()
	pod := r.runPod("a")
	release := filepath.Join(r.dir, "release")
	id := r.run(pod, "c", "while [ ! -e "+release+" ]; do sleep 0.02; done; seq 1 20000; exit 5")
	freeState, freeLogs := fillState(), fillLogs()

	_, err := r.RunPodSandbox(t.Context(), &cri.RunPodSandboxRequest{Config: r.podConfig("b")})
	exhausted(t, "RunPodSandbox", err)
	if err := os.WriteFile(release, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	eventually(t, "Status tells that a log cannot be written", func() error {
		resp, err := r.Status(t.Context(), &cri.StatusRequest{})
		if err != nil {
			return err
		}
		for _, c := range resp.GetStatus().GetConditions() {
			if c.GetType() == conditionStorage && !c.GetStatus() && strings.Contains(c.GetMessage(), "no space left") {
				return nil
			}
		}
		return fmt.Errorf("conditions are %v", resp.GetStatus().GetConditions())
	})
	if s, err := r.ContainerStatus(t.Context(), &cri.ContainerStatusRequest{ContainerId: id}); err != nil || s.GetStatus().GetState() != cri.ContainerState_CONTAINER_RUNNING {
		t.Errorf("container is %v (%v)", s, err)
	}
	freeLogs()
	// Without the log's disk the output would end here; the records' disk is still full.
	freeState()
	if s := r.exit(id); s.GetExitCode() != 5 {
		t.Errorf("container is %v", s)
	} else if out := r.log(s); !strings.HasPrefix(out, "1\n2\n") || !strings.HasSuffix(out, "19999\n20000\n") || strings.Count(out, "\n") != 20000 {
		t.Errorf("log has %d lines: %s", strings.Count(out, "\n"), shorten(out))
	}
	resp, err := r.Status(t.Context(), &cri.StatusRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range resp.GetStatus().GetConditions() {
		if !c.GetStatus() {
			t.Errorf("condition %v after all", c)
		}
	}
	r.run(r.runPod("b"), "d", "exit 0")
}

// TestErrorClasses: what the kernel says when something is used up.
func TestErrorClasses(t *testing.T) {
	for _, err := range []error{
		unix.ENOSPC, unix.EDQUOT, unix.EMFILE, unix.ENFILE, unix.ENOMEM, &os.PathError{Op: "fork/exec", Path: "/vmm", Err: syscall.EAGAIN},
		fmt.Errorf("network: %w", errdefs.ErrResourceExhausted),
	} {
		exhausted(t, "wrapped", fmt.Errorf("sandbox x: %w", err))
	}
	if code := status.Code(grpcError(fmt.Errorf("read: %w", unix.EAGAIN))); code == codes.ResourceExhausted {
		t.Error("not everything to try again is exhaustion")
	}
}
