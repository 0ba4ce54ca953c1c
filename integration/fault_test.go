//go:build integration

package integration

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crivm/crivm/integration/node"
)

// faults is where integration/cmd/faulty, which stands before programs, reads what to do.
type faults struct {
	t   *testing.T
	dir string
}

func newFaults(t *testing.T) *faults {
	t.Helper()
	return &faults{t, publicDir(t)}
}

// stand makes the faulty program that stands for real.
func (f *faults) stand(real string) string {
	f.t.Helper()
	program := filepath.Join(f.dir, "faulty")
	if _, err := os.Stat(program); err != nil {
		build := exec.CommandContext(f.t.Context(), "go", "build", "-ldflags", "-X main.control="+f.dir, "-o", program, "./cmd/faulty")
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			f.t.Fatalf("%v: %s", err, out)
		}
	}
	name := filepath.Base(real)
	if err := errors.Join(os.Symlink(real, filepath.Join(f.dir, name+".real")), os.Link(program, filepath.Join(f.dir, name))); err != nil {
		f.t.Fatal(err)
	}
	return filepath.Join(f.dir, name)
}

// set makes a program misbehave from its next run on; "" makes it well.
func (f *faults) set(name, mode string) {
	f.t.Helper()
	path := filepath.Join(f.dir, name+".fault")
	if err := os.WriteFile(path+".new", []byte(mode), 0o644); err != nil {
		f.t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		f.t.Fatal(err)
	}
}

// fileServer is the installed virtiofsd.
func fileServer(t *testing.T) string {
	t.Helper()
	for _, path := range []string{"/usr/libexec/virtiofsd", "/usr/lib/virtiofsd", "/usr/lib/qemu/virtiofsd", "/usr/local/libexec/virtiofsd", "/usr/local/bin/virtiofsd"} {
		if exec.Command(path, "--version").Run() == nil {
			return path
		}
	}
	t.Skip("no virtiofsd is installed")
	return ""
}

// TestFaults lets the VMM, the CNI plugin and the file server fail, hang, die half-way and talk nonsense in the verbs that
// need them: each call fails with a class that fits, in its time; what it had made is gone; and a pod beside it works.
// Those of the registry are in imageservice.
func TestFaults(t *testing.T) {
	f := newFaults(t)
	plugins := filepath.Join(*buildDir, "bin/cni")
	f.stand(filepath.Join(plugins, "bridge"))
	server := fileServer(t)
	// Where the product looks for it, in this test's mount namespace only; its own file stays reachable as a mount.
	kept := filepath.Join(publicDir(t), "virtiofsd")
	if err := errors.Join(os.WriteFile(kept, nil, 0o755), unix.Mount(server, kept, "", unix.MS_BIND, "")); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount(f.stand(kept), server, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(unix.Unmount(server, unix.MNT_DETACH), unix.Unmount(kept, unix.MNT_DETACH)); err != nil {
			t.Error(err)
		}
	})
	const health = 10 * time.Second // three times that in software emulation
	ctx := testContext(t, 9*time.Minute)
	n := startNode(t, node.Options{Config: fmt.Sprintf(
		"[qemu]\nbinary = %q\n[cni]\nbin_dirs = [%q, %q]\nadd_timeout = \"3s\"\ndel_timeout = \"3s\"\n[vm]\nhealth_timeout = %q\n", f.stand("/usr/bin/qemu-system-x86_64"), f.dir, plugins, health)})
	if _, err := n.Images.PullImage(ctx, &cri.ImageSpec{Image: busybox}, nil, nil); err != nil {
		t.Fatal(err)
	}
	const modes = 2 // of the file server: each ends its pod
	other := runPod(t, n)
	well := other.start("sleep 1000")
	victims := make([]string, modes+1)
	configs := make([]*cri.PodSandboxConfig, modes+1)
	for i := range victims {
		configs[i] = newConfig(t)
		id, err := n.Runtime.RunPodSandbox(ctx, configs[i], "")
		if err != nil {
			t.Fatal(err)
		}
		victims[i] = id
	}
	dir := publicDir(t)
	run := func(ctx context.Context, _ int) error {
		_, err := n.Runtime.RunPodSandbox(ctx, newConfig(t), "")
		return err
	}
	stop := func(ctx context.Context, _ int) error { return n.Runtime.StopPodSandbox(ctx, victims[modes]) }
	create := func(ctx context.Context, row int) error {
		_, err := n.Runtime.CreateContainer(ctx, victims[row], &cri.ContainerConfig{
			Metadata: &cri.ContainerMetadata{Name: "c"}, Image: &cri.ImageSpec{Image: busybox}, Command: []string{"true"}, LogPath: "c.log",
			Mounts: []*cri.Mount{{ContainerPath: "/v", HostPath: dir}},
			Linux:  &cri.LinuxContainerConfig{SecurityContext: &cri.LinuxContainerSecurityContext{NamespaceOptions: &cri.NamespaceOption{Pid: cri.NamespaceMode_CONTAINER}}},
		}, configs[row])
		return err
	}
	victim := 0
	for _, test := range []struct {
		program, mode, verb string
		call                func(context.Context, int) error
		limit               time.Duration // of the client
		code                codes.Code
	}{
		{"qemu-system-x86_64", "fail", "RunPodSandbox", run, time.Minute, codes.Unavailable},
		{"qemu-system-x86_64", "die", "RunPodSandbox", run, time.Minute, codes.Unavailable},
		{"qemu-system-x86_64", "garbage", "RunPodSandbox", run, time.Minute, codes.Unavailable},
		{"qemu-system-x86_64", "hang", "RunPodSandbox", run, 3 * time.Second, codes.DeadlineExceeded},
		{"bridge", "ADD fail", "RunPodSandbox", run, time.Minute, codes.Internal},
		{"bridge", "ADD die", "RunPodSandbox", run, time.Minute, codes.Internal},
		{"bridge", "ADD garbage", "RunPodSandbox", run, time.Minute, codes.Internal},
		{"bridge", "ADD hang", "RunPodSandbox", run, time.Minute, codes.DeadlineExceeded},
		{"bridge", "DEL fail", "StopPodSandbox", stop, time.Minute, codes.Internal},
		{"bridge", "DEL die", "StopPodSandbox", stop, time.Minute, codes.Internal},
		{"bridge", "DEL hang", "StopPodSandbox", stop, time.Minute, codes.DeadlineExceeded},
		{"virtiofsd", "fail", "CreateContainer", create, time.Minute, codes.Unavailable},
		{"virtiofsd", "hang", "CreateContainer", create, time.Minute, codes.Unavailable},
	} {
		t.Run(test.program+"/"+test.mode, func(t *testing.T) {
			f.set(test.program, test.mode)
			defer f.set(test.program, "")
			beside := make(chan error, 1)
			go func() {
				_, _, err := n.Runtime.ExecSync(ctx, well, []string{"true"}, 30*time.Second)
				beside <- err
			}()
			call, cancel := context.WithTimeout(ctx, test.limit)
			defer cancel()
			start := time.Now()
			err := test.call(call, victim)
			took := time.Since(start)
			t.Logf("%s after %s: %v", test.verb, took.Round(10*time.Millisecond), err)
			if code := status.Code(err); code != test.code {
				t.Errorf("code is %s, want %s", code, test.code)
			}
			if took > 50*time.Second {
				t.Errorf("took %s", took)
			}
			if err := <-beside; err != nil {
				t.Errorf("exec in another pod: %v", err)
			}
			if test.program == "virtiofsd" { // a pod whose volumes nobody serves is ended; others are not
				eventually(t, 2*time.Minute, "the pod is NOTREADY", func() error {
					resp, err := n.Runtime.PodSandboxStatus(ctx, victims[victim], false)
					if err == nil && resp.Status.State == cri.PodSandboxState_SANDBOX_READY {
						err = errors.New("READY")
					}
					return err
				})
				if err := errors.Join(n.Runtime.StopPodSandbox(ctx, victims[victim]), n.Runtime.RemovePodSandbox(ctx, victims[victim])); err != nil {
					t.Error(err)
				}
				victim++
			}
			eventually(t, time.Minute, "nothing of it is left", func() error {
				pods, err := n.Runtime.ListPodSandbox(ctx, nil)
				if want := modes + 2 - victim; err == nil && len(pods) != want {
					err = fmt.Errorf("%d pods are listed, want %d", len(pods), want)
				}
				return err
			})
		})
	}
	if err := errors.Join(stop(ctx, 0), n.Runtime.RemovePodSandbox(ctx, victims[modes])); err != nil {
		t.Errorf("with a plugin that works: %v", err)
	}
	if s, out := other.run("echo fine"); s.ExitCode != 0 || out != "fine\n" {
		t.Errorf("the other pod: %v %q", s, out)
	}
}

// TestScratchCannotBeMounted: the guest mounts its scratch disk while RunPodSandbox returns. When it cannot, creating a
// container says so, and the pod can be removed.
func TestScratchCannotBeMounted(t *testing.T) {
	ctx := testContext(t, 4*time.Minute)
	n := startNode(t, node.Options{Config: "[vm]\nscratch_size = \"64MiB\"\n"})
	if _, err := n.Images.PullImage(ctx, &cri.ImageSpec{Image: busybox}, nil, nil); err != nil {
		t.Fatal(err)
	}
	// What disks are copied from: here without a file system.
	template, err := os.Create(filepath.Join(n.Dir, "state", fmt.Sprintf("scratch-%d.ext4", 64<<20)))
	if err == nil {
		err = errors.Join(template.Truncate(64<<20), template.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
	p := runPod(t, n)
	start := time.Now()
	_, err = p.create("true")
	if err == nil || time.Since(start) > time.Minute {
		t.Errorf("CreateContainer: %v after %s", err, time.Since(start))
	}
	// A reason with a class, from the guest or, when that has ended for it, from the host.
	if code := status.Code(err); code != codes.Internal && code != codes.FailedPrecondition && code != codes.Unavailable {
		t.Errorf("CreateContainer: code %s", code)
	}
	t.Log(err)
	if containers, err := n.Runtime.ListContainers(ctx, nil); err != nil || len(containers) > 0 {
		t.Errorf("containers are %v (%v)", containers, err)
	}
}
