package server

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crivm/crivm/cni"
	"github.com/crivm/crivm/imageservice"
	"github.com/crivm/crivm/vmruntime/cloudhypervisor"
	"github.com/crivm/crivm/vmruntime/vmtest"
)

// isolated marks the process that TestMain has started in namespaces of its own.
const isolated = "SERVER_TEST_ISOLATED"

// As root the tests run in network and mount namespaces of their own: their taps and namespaces never reach
// the machine.
func TestMain(m *testing.M) {
	vmtest.Main()
	killDaemonMain()
	benchClientMain()
	if os.Geteuid() == 0 && os.Getenv(isolated) == "" {
		os.Exit(runIsolated())
	}
	if os.Getenv(isolated) != "" {
		if err := errors.Join(unix.Mount("", "/", "", unix.MS_PRIVATE|unix.MS_REC, ""), unix.Mount("tmpfs", "/run", "tmpfs", 0, "mode=755")); err != nil {
			fmt.Fprintln(os.Stderr, "namespaces for the tests:", err)
			os.Exit(1)
		}
	}
	goleak.VerifyTestMain(m)
}

func runIsolated() int {
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Env = append(os.Environ(), isolated+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNET | unix.CLONE_NEWNS, Pdeathsig: unix.SIGKILL}
	if err := cmd.Run(); err != nil {
		fmt.Fprintln(os.Stderr, "tests in own namespaces:", err)
		return 1
	}
	return 0
}

// network is package cni's, with real namespaces and taps, but for the plugins.
type network struct {
	*cni.Network
	fail  error         // of Add
	block chan struct{} // Add waits for it, if there is one
}

func (n *network) Add(ctx context.Context, p cni.Pod) (cni.Attachment, error) {
	if n.block != nil {
		select {
		case <-n.block:
		case <-ctx.Done():
			return cni.Attachment{}, ctx.Err()
		}
	}
	if n.fail != nil {
		return cni.Attachment{}, n.fail
	}
	return cni.Attachment{
		Interfaces: []cni.Interface{{Name: "eth0", Tap: "tap0", MAC: "02:00:00:00:00:01", MTU: 1500, Addresses: []netip.Prefix{netip.MustParsePrefix("10.0.0.2/24")}}},
		IPs:        []netip.Addr{netip.MustParseAddr("10.0.0.2"), netip.MustParseAddr("fd00::2")},
	}, nil
}

func (n *network) Status() error { return nil }

// oneImage stands for package imageservice: one image, whose disk is an empty file.
type oneImage struct{ disk string }

const imageID = "sha256:00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff"

func (i oneImage) Resolve(_ context.Context, ref string) (imageservice.Image, error) {
	if ref != "image" {
		return imageservice.Image{}, fmt.Errorf("no %s: %w", ref, errdefs.ErrNotFound)
	}
	return imageservice.Image{ID: imageID, RepoTags: []string{"docker.io/library/image:latest"}, Config: ocispec.ImageConfig{Cmd: []string{"true"}}}, nil
}

func (i oneImage) Disk(context.Context, string) (string, error) { return i.disk, nil }

// rig is a server with real records and a real driver, whose VMM is the fake with the real agent.
type rig struct {
	*Server
	t    testing.TB
	dir  string
	opts Options
	net  *network
	img  oneImage
	// early starts the server as the product does: it may serve before everything is settled.
	early bool
}

func newRig(t testing.TB) *rig {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("starting a VMM needs root: it gets a mount namespace of its own")
	}
	dir, err := os.MkdirTemp("", "crivm") // short: unix sockets
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	driver, err := cloudhypervisor.New(cloudhypervisor.Config{Binary: vmtest.Binary(t), Landlock: "off"})
	if err != nil {
		t.Fatal(err)
	}
	files := map[string]string{}
	for _, name := range []string{"kernel", "initrd", "disk"} {
		files[name] = filepath.Join(dir, name)
		if err := os.WriteFile(files[name], make([]byte, 4096), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	handler := Handler{
		Driver: driver, Kernel: files["kernel"], Initrd: files["initrd"], VCPUs: 1, MaxVCPUs: 2, Memory: 128 << 20, MaxMemory: 256 << 20,
		ScratchBytes: 64 << 20, EmptyDirBytes: 64 << 20, BootTimeout: 20 * time.Second,
	}
	r := &rig{t: t, dir: dir, net: &network{}, img: oneImage{files["disk"]}, opts: Options{
		Version: "0.0.0", StateDir: filepath.Join(dir, "s"), RunDir: filepath.Join(dir, "r"), Handlers: map[string]Handler{"": handler},
		MaxLogLine: 16 << 10, StreamAddress: "127.0.0.1:0", StreamIdleTimeout: time.Hour,
	}}
	r.start()
	t.Cleanup(func() {
		r.removeAll()
		r.stop()
		for _, dir := range []string{filepath.Join(r.dir, "s/pods"), filepath.Join(r.dir, "s/positions"), filepath.Join(r.dir, "r/vm"), "/run/netns"} {
			if left, err := os.ReadDir(dir); len(left) > 0 {
				t.Errorf("left in %s: %v (%v)", dir, left, err)
			}
		}
	})
	return r
}

func (r *rig) start() {
	r.t.Helper()
	r.openNetwork()
	var err error
	if r.Server, err = New(r.t.Context(), r.opts, r.net, r.img); err != nil {
		r.t.Fatal(err)
	}
	if !r.early {
		<-r.restored
	}
}

func (r *rig) openNetwork() {
	r.t.Helper()
	var err error
	r.net.Network, err = cni.New(cni.Config{
		ConfDir: filepath.Join(r.dir, "net.d"), BinDirs: []string{r.dir}, CacheDir: filepath.Join(r.dir, "cni"), NetnsDir: "/run/netns",
	})
	if err != nil {
		r.t.Fatal(err)
	}
}

// restart is what a new daemon does after the old one was killed, as far as one process can play it.
func (r *rig) restart() {
	r.t.Helper()
	r.stop()
	r.start()
}

func (r *rig) stop() {
	r.t.Helper()
	if err := errors.Join(r.Close(), r.net.Close()); err != nil {
		r.t.Error(err)
	}
}

func (r *rig) removeAll() {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	list, err := r.ListPodSandbox(ctx, &cri.ListPodSandboxRequest{})
	if err != nil {
		r.t.Error(err)
	}
	for _, sb := range list.GetItems() {
		if _, err := r.RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{PodSandboxId: sb.Id}); err != nil {
			r.t.Error(err)
		}
	}
}

func (r *rig) podConfig(name string) *cri.PodSandboxConfig {
	return &cri.PodSandboxConfig{Metadata: &cri.PodSandboxMetadata{Name: name, Namespace: "ns", Uid: "u"}, LogDirectory: filepath.Join(r.dir, "logs"), Hostname: name}
}

func (r *rig) runPod(name string) string {
	r.t.Helper()
	resp, err := r.RunPodSandbox(r.t.Context(), &cri.RunPodSandboxRequest{Config: r.podConfig(name)})
	if err != nil {
		r.t.Fatal(err)
	}
	return resp.GetPodSandboxId()
}

func (r *rig) createRequest(pod, name, script string) *cri.CreateContainerRequest {
	return &cri.CreateContainerRequest{PodSandboxId: pod, Config: &cri.ContainerConfig{
		Metadata: &cri.ContainerMetadata{Name: name}, Image: &cri.ImageSpec{Image: "image"}, Command: []string{"sh", "-c", script}, LogPath: name + ".log",
	}}
}

func (r *rig) create(pod, name, script string) string {
	r.t.Helper()
	resp, err := r.CreateContainer(r.t.Context(), r.createRequest(pod, name, script))
	if err != nil {
		r.t.Fatal(err)
	}
	return resp.GetContainerId()
}

func (r *rig) run(pod, name, script string) string {
	r.t.Helper()
	id := r.create(pod, name, script)
	if _, err := r.StartContainer(r.t.Context(), &cri.StartContainerRequest{ContainerId: id}); err != nil {
		r.t.Fatal(err)
	}
	return id
}

func (r *rig) exit(id string) *cri.ContainerStatus {
	r.t.Helper()
	select {
	case <-r.container(id).exited:
	case <-time.After(30 * time.Second):
		r.t.Fatalf("container %s does not exit", id)
	}
	resp, err := r.ContainerStatus(r.t.Context(), &cri.ContainerStatusRequest{ContainerId: id})
	if err != nil {
		r.t.Fatal(err)
	}
	return resp.GetStatus()
}

func (r *rig) log(status *cri.ContainerStatus) string {
	r.t.Helper()
	text, err := os.ReadFile(status.GetLogPath())
	if err != nil {
		r.t.Fatal(err)
	}
	var out strings.Builder
	for line := range strings.Lines(string(text)) {
		out.WriteString(strings.SplitN(line, " ", 4)[3])
	}
	return out.String()
}

func TestLifecycle(t *testing.T) {
	r := newRig(t)
	pod := r.runPod("a")
	status, err := r.PodSandboxStatus(t.Context(), &cri.PodSandboxStatusRequest{PodSandboxId: pod, Verbose: true})
	if err != nil || status.GetStatus().GetState() != cri.PodSandboxState_SANDBOX_READY || status.GetStatus().GetNetwork().GetIp() != "10.0.0.2" ||
		status.GetStatus().GetNetwork().GetAdditionalIps()[0].GetIp() != "fd00::2" {
		t.Errorf("status is %v (%v)", status, err)
	}
	id := r.run(pod, "c", "echo one; echo two >&2; exit 3")
	if s := r.exit(id); s.GetExitCode() != 3 || s.GetReason() != reasonError || !strings.Contains(r.log(s), "one\n") || !strings.Contains(r.log(s), "two\n") {
		t.Errorf("container is %v, its log %q", s, r.log(s))
	}
	if _, err := r.RunPodSandbox(t.Context(), &cri.RunPodSandboxRequest{Config: r.podConfig("a")}); !errdefs.IsAlreadyExists(err) {
		t.Errorf("a second sandbox of the same name: %v", err)
	}
	sleeper := r.run(pod, "s", "exec sleep 1000")
	exec, err := r.ExecSync(t.Context(), &cri.ExecSyncRequest{ContainerId: sleeper, Cmd: []string{"sh", "-c", "echo out; exit 4"}, Timeout: 20})
	if err != nil || string(exec.GetStdout()) != "out\n" || exec.GetExitCode() != 4 {
		t.Errorf("exec: %v (%v)", exec, err)
	}
	if _, err := r.ExecSync(t.Context(), &cri.ExecSyncRequest{ContainerId: sleeper, Cmd: []string{"sleep", "1000"}, Timeout: 1}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("exec over its timeout: %v", err)
	}
	if _, err := r.StopPodSandbox(t.Context(), &cri.StopPodSandboxRequest{PodSandboxId: pod}); err != nil {
		t.Fatal(err)
	}
	if s := r.exit(sleeper); s.GetExitCode() != 137 {
		t.Errorf("container of a stopped sandbox is %v", s)
	}
	for range 2 {
		if _, err := r.StopPodSandbox(t.Context(), &cri.StopPodSandboxRequest{PodSandboxId: pod}); err != nil {
			t.Error(err)
		}
		if _, err := r.RemovePodSandbox(t.Context(), &cri.RemovePodSandboxRequest{PodSandboxId: pod}); err != nil {
			t.Error(err)
		}
	}
	if _, err := r.PodSandboxStatus(t.Context(), &cri.PodSandboxStatusRequest{PodSandboxId: pod}); !errdefs.IsNotFound(err) {
		t.Errorf("a removed sandbox has a status (%v)", err)
	}
}

func TestRestartAdopts(t *testing.T) {
	r := newRig(t)
	pod := r.runPod("a")
	release := filepath.Join(r.dir, "release")
	id := r.run(pod, "c", "i=0; while [ $i -lt 2000 ]; do i=$((i+1)); echo line $i; done; while [ ! -e "+release+" ]; do sleep 0.05; done; echo end; exit 6")
	created := r.create(pod, "later", "exit 0")
	for range 3 {
		r.restart()
	}
	status, err := r.PodSandboxStatus(t.Context(), &cri.PodSandboxStatusRequest{PodSandboxId: pod})
	if err != nil || status.GetStatus().GetState() != cri.PodSandboxState_SANDBOX_READY {
		t.Fatalf("sandbox after restarts is %v (%v)", status, err)
	}
	if err := os.WriteFile(release, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	s := r.exit(id)
	var want strings.Builder
	for i := range 2000 {
		fmt.Fprintf(&want, "line %d\n", i+1)
	}
	want.WriteString("end\n")
	if got := r.log(s); s.GetExitCode() != 6 || got != want.String() {
		t.Errorf("exit code %d; log has %d bytes, want %d", s.GetExitCode(), len(got), want.Len())
	}
	if _, err := r.StartContainer(t.Context(), &cri.StartContainerRequest{ContainerId: created}); err != nil {
		t.Error(err)
	}
	if s := r.exit(created); s.GetExitCode() != 0 || s.GetReason() != reasonCompleted {
		t.Errorf("container made before the restarts is %v", s)
	}
}

// TestLostDatabase: a daemon whose records are gone ends the VMs that nobody owns any more.
func TestLostDatabase(t *testing.T) {
	r := newRig(t)
	pod := r.runPod("a")
	vm, err := r.sandbox(pod).machine()
	if err != nil {
		t.Fatal(err)
	}
	r.stop()
	if err := os.Remove(filepath.Join(r.opts.StateDir, "crivm.db")); err != nil {
		t.Fatal(err)
	}
	r.start()
	select {
	case <-vm.Done():
	case <-time.After(10 * time.Second):
		t.Error("the VM still runs")
	}
}

func TestVMDies(t *testing.T) {
	r := newRig(t)
	pod := r.runPod("a")
	id := r.run(pod, "c", "exec sleep 1000")
	vm, err := r.sandbox(pod).machine()
	if err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	if err := vm.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	if s := r.exit(id); s.GetExitCode() != 137 || s.GetReason() != reasonError || s.GetMessage() == "" {
		t.Errorf("container of a dead VM is %v", s)
	}
	if took := time.Since(start); took > 2*time.Second {
		t.Errorf("noticed after %s", took)
	}
	status, err := r.PodSandboxStatus(t.Context(), &cri.PodSandboxStatusRequest{PodSandboxId: pod})
	if err != nil || status.GetStatus().GetState() != cri.PodSandboxState_SANDBOX_NOTREADY {
		t.Errorf("sandbox of a dead VM is %v (%v)", status, err)
	}
	r.restart()
	if s := r.exit(id); s.GetExitCode() != 137 {
		t.Errorf("after a restart the container is %v", s)
	}
}

func TestFailedRunLeavesNothing(t *testing.T) {
	r := newRig(t)
	r.net.fail = fmt.Errorf("no luck: %w", errdefs.ErrUnavailable)
	if _, err := r.RunPodSandbox(t.Context(), &cri.RunPodSandboxRequest{Config: r.podConfig("a")}); !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "no luck") {
		t.Errorf("error is %v", err)
	}
	r.net.fail = nil
	if list, err := r.ListPodSandbox(t.Context(), &cri.ListPodSandboxRequest{}); err != nil || len(list.GetItems()) > 0 {
		t.Errorf("listed are %v (%v)", list, err)
	}
	r.net.block = make(chan struct{})
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if _, err := r.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: r.podConfig("a")}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("error of a request that ended is %v", err)
	}
	close(r.net.block)
	r.runPod("a") // the name is free again
}

func TestSecondRunWaitsForTheFirst(t *testing.T) {
	r := newRig(t)
	r.net.block = make(chan struct{})
	type result struct {
		id  string
		err error
	}
	results := make(chan result, 2)
	for range 2 {
		go func() {
			resp, err := r.RunPodSandbox(t.Context(), &cri.RunPodSandboxRequest{Config: r.podConfig("a")})
			results <- result{resp.GetPodSandboxId(), err}
		}()
	}
	close(r.net.block)
	a, b := <-results, <-results
	// Either the second found the first under way and has its result, or it came after it.
	if a.err != nil && b.err != nil || a.err == nil && b.err == nil && a.id != b.id {
		t.Errorf("two calls give %v and %v", a, b)
	}
}

func TestManyPods(t *testing.T) {
	r := newRig(t)
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() {
			name := fmt.Sprintf("p%d", i)
			resp, err := r.RunPodSandbox(t.Context(), &cri.RunPodSandboxRequest{Config: r.podConfig(name)})
			if err != nil {
				t.Error(err)
				return
			}
			id := r.run(resp.GetPodSandboxId(), name, "echo "+name)
			if s := r.exit(id); r.log(s) != name+"\n" {
				t.Errorf("log of %s is %q", name, r.log(s))
			}
			for _, f := range []func() error{
				func() error {
					_, err := r.RemoveContainer(t.Context(), &cri.RemoveContainerRequest{ContainerId: id})
					return err
				},
				func() error {
					_, err := r.StopPodSandbox(t.Context(), &cri.StopPodSandboxRequest{PodSandboxId: resp.GetPodSandboxId()})
					return err
				},
				func() error {
					_, err := r.RemovePodSandbox(t.Context(), &cri.RemovePodSandboxRequest{PodSandboxId: resp.GetPodSandboxId()})
					return err
				},
			} {
				if err := f(); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
}

func TestRacingVerbs(t *testing.T) {
	r := newRig(t)
	pod := r.runPod("a")
	id := r.run(pod, "c", "trap '' TERM; sleep 1000")
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			if _, err := r.StopContainer(t.Context(), &cri.StopContainerRequest{ContainerId: id, Timeout: 1}); err != nil {
				t.Error(err)
			}
		})
		wg.Go(func() {
			if _, err := r.RemoveContainer(t.Context(), &cri.RemoveContainerRequest{ContainerId: id}); err != nil {
				t.Error(err)
			}
		})
		wg.Go(func() {
			if _, err := r.StopPodSandbox(t.Context(), &cri.StopPodSandboxRequest{PodSandboxId: pod}); err != nil {
				t.Error(err)
			}
		})
		wg.Go(func() {
			if _, err := r.RemovePodSandbox(t.Context(), &cri.RemovePodSandboxRequest{PodSandboxId: pod}); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if list, err := r.ListContainers(t.Context(), &cri.ListContainersRequest{}); err != nil || len(list.GetContainers()) > 0 {
		t.Errorf("containers left are %v (%v)", list, err)
	}
}
