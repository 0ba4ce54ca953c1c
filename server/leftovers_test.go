package server

import (
	"context"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crivm/crivm/imageservice"
)

// imageLeftovers plays the image service.
type imageLeftovers struct {
	overview imageservice.Overview
	removed  bool
	err      error
}

func (i *imageLeftovers) Leftovers(_ context.Context, remove bool) ([]imageservice.Leftover, error) {
	if i.err != nil {
		return nil, i.err
	}
	i.removed = i.removed || remove
	return []imageservice.Leftover{{Kind: "layer", Name: "0123", Why: "of no image"}}, nil
}

func (i *imageLeftovers) Overview(context.Context) (imageservice.Overview, error) {
	return i.overview, i.err
}

// planted are things that a crivm which lost its records leaves, and things of others that look like them.
type planted struct {
	dirs, foreign []string
	process       *exec.Cmd // a VMM's like, its directory deleted
	stranger      *exec.Cmd // works in a VM's directory, and was not started for it
	cgroup, alien string
	network       string
}

// plant makes them beside a running pod.
func plant(t *testing.T, r *rig) planted {
	t.Helper()
	id := strings.Repeat("ab", 32)
	vm, gone := filepath.Join(r.opts.RunDir, "vm", id[:16]), filepath.Join(r.opts.RunDir, "vm", "feedfeedfeedfeed")
	p := planted{
		dirs: []string{
			vm, filepath.Join(r.opts.RunDir, shareDirs, id[:16]), filepath.Join(r.opts.StateDir, "pods", id),
			filepath.Join(r.opts.StateDir, "positions", id),
		},
		foreign: []string{filepath.Join(r.opts.StateDir, "notes"), filepath.Join(r.opts.RunDir, "crivm-"+id), filepath.Join(r.dir, "vm", id[:16]), "/run/netns/other-" + id},
		network: id,
	}
	for _, path := range append(append([]string{gone}, p.dirs[:3]...), p.foreign...) {
		if err := os.MkdirAll(path, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.MkdirAll(filepath.Dir(p.dirs[3]), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.WriteFile(p.dirs[3], []byte("0 0"), 0o600), os.WriteFile(filepath.Join(p.dirs[2], "scratch.img"), make([]byte, 4096), 0o600)); err != nil {
		t.Fatal(err)
	}
	if _, err := r.net.Prepare(t.Context(), id, 0, 0); err != nil {
		t.Fatal(err)
	}
	start := func(leader bool, dir string) *exec.Cmd {
		cmd := exec.Command("sh", "-c", "sleep 1000; exit $?", dir+"/qmp")
		cmd.Dir, cmd.SysProcAttr = dir, &syscall.SysProcAttr{Setsid: leader, Setpgid: !leader}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		return cmd
	}
	p.process, p.stranger = start(true, gone), start(false, vm)
	reaped := make(chan struct{})
	go func() { p.process.Wait(); close(reaped) }()
	t.Cleanup(func() {
		syscall.Kill(-p.stranger.Process.Pid, syscall.SIGKILL)
		p.stranger.Wait()
		syscall.Kill(-p.process.Process.Pid, syscall.SIGKILL) // its sleep, and itself if it was left
		<-reaped
		for _, path := range p.foreign {
			os.RemoveAll(path)
		}
	})
	if err := os.RemoveAll(gone); err != nil {
		t.Fatal(err)
	}
	p.cgroup, p.alien = plantCgroup(t, filepath.Join(r.opts.RunDir, "vm", id[:16])), plantCgroup(t, "/elsewhere/vm/"+id[:16])
	return p
}

// plantCgroup makes an empty cgroup with the mark of a VM's directory.
func plantCgroup(t *testing.T, dir string) string {
	t.Helper()
	for _, root := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified", "/sys/fs/cgroup/pids"} {
		var fs unix.Statfs_t
		if err := unix.Statfs(root, &fs); err != nil || fs.Type != unix.CGROUP_SUPER_MAGIC && fs.Type != unix.CGROUP2_SUPER_MAGIC {
			continue
		}
		path, err := os.MkdirTemp(root, "crivm-test-")
		if err != nil {
			continue
		}
		t.Cleanup(func() { os.Remove(path) })
		if err := unix.Setxattr(path, "trusted.crivm", []byte(dir), 0); err == nil {
			return path
		}
	}
	t.Fatal("no cgroup can be made and marked")
	return ""
}

// leftByKind are the names of leftovers.
func leftByKind(all []Leftover) map[string][]string {
	found := map[string][]string{}
	for _, l := range all {
		found[l.Kind] = append(found[l.Kind], l.Name)
	}
	return found
}

// TestCollect: what nobody owns is listed, with its reason, and removed; what runs, and what is somebody else's, stays.
// By the running daemon, over its socket, and without one.
func TestCollect(t *testing.T) {
	for _, running := range []bool{true, false} {
		t.Run(map[bool]string{true: "running", false: "stopped"}[running], func(t *testing.T) {
			r := newRig(t)
			pod := r.runPod("a")
			id := r.run(pod, "c", "echo on; exec sleep 1000")
			p := plant(t, r)
			r.restartNetwork(running)
			images := &imageLeftovers{}
			collect := func(dryRun bool) Collected {
				t.Helper()
				var c Collected
				var err error
				if running {
					c, err = CollectFrom(t.Context(), serveNode(t, r, images), dryRun)
				} else {
					c, err = CollectStopped(t.Context(), r.opts, r.net, images, dryRun)
				}
				if err != nil {
					t.Fatal(err)
				}
				return c
			}
			want := map[string][]string{
				"process": {strconv.Itoa(p.process.Process.Pid) + " (sh)"}, "directory": slices.Sorted(slices.Values(p.dirs[:3])), "log position": {p.dirs[3]},
				"cgroup": {p.cgroup}, "network": {p.network}, "layer": {"0123"},
			}
			for _, dryRun := range []bool{true, true, false} {
				c := collect(dryRun)
				got := leftByKind(c.Leftovers)
				for kind := range want {
					if !slices.Equal(got[kind], want[kind]) {
						t.Errorf("dry run %t: %s found are %q, want %q", dryRun, kind, got[kind], want[kind])
					}
				}
				for _, l := range c.Leftovers {
					if l.Why == "" || l.Error != "" || want[l.Kind] == nil {
						t.Errorf("dry run %t: %+v", dryRun, l)
					}
				}
				if len(c.Skipped) > 0 || images.removed == dryRun {
					t.Errorf("dry run %t: skipped are %q, images removed: %t", dryRun, c.Skipped, images.removed)
				}
				for _, path := range append([]string{p.cgroup, "/run/netns/crivm-" + p.network}, p.dirs...) {
					if _, err := os.Lstat(path); dryRun && err != nil || !dryRun && !os.IsNotExist(err) {
						t.Errorf("after dry run %t: %s: %v", dryRun, path, err)
					}
				}
				if dryRun && ended(p.process.Process.Pid) {
					t.Error("a dry run has ended a process")
				}
			}
			if !gone(p.process.Process.Pid) {
				t.Error("the process without a record still runs")
			}
			if ended(p.stranger.Process.Pid) {
				t.Error("a process that only works in a VM's directory was ended")
			}
			for _, path := range append([]string{p.alien}, p.foreign...) {
				if _, err := os.Lstat(path); err != nil {
					t.Errorf("of somebody else: %v", err)
				}
			}
			images.err = errdefs.ErrUnavailable // a pull is under way
			if c := collect(false); len(c.Leftovers) > 0 || len(c.Skipped) != 1 {
				t.Errorf("afterwards: %+v", c)
			}
			if !running {
				if err := r.net.Close(); err != nil {
					t.Error(err)
				}
				r.start()
			}
			status, err := r.ContainerStatus(t.Context(), &cri.ContainerStatusRequest{ContainerId: id})
			if err != nil || status.GetStatus().GetState() != cri.ContainerState_CONTAINER_RUNNING {
				t.Errorf("the pod's container has become %v (%v)", status, err)
			}
			if out, err := r.ExecSync(t.Context(), &cri.ExecSyncRequest{ContainerId: id, Cmd: []string{"echo", "alive"}, Timeout: 20}); err != nil || string(out.GetStdout()) != "alive\n" {
				t.Errorf("exec in the pod: %v (%v)", out, err)
			}
		})
	}
}

// restartNetwork forgets what this process has prepared; a server goes on only if it is wanted.
func (r *rig) restartNetwork(running bool) {
	r.t.Helper()
	if !running {
		r.stop()
		r.openNetwork()
		return
	}
	old := r.net.Network
	r.openNetwork()
	if err := old.Close(); err != nil {
		r.t.Error(err)
	}
}

func serveNode(t *testing.T, r *rig, images NodeImages) *grpc.ClientConn {
	t.Helper()
	path := filepath.Join(t.TempDir(), "sock")
	listener, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	g := grpc.NewServer(grpc.UnaryInterceptor(UnaryInterceptor))
	RegisterNode(g, r.Server, images)
	go g.Serve(listener)
	t.Cleanup(g.Stop)
	conn, err := grpc.NewClient("unix://"+path, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

// TestCollectLeavesMounts: what somebody has mounted below a leftover is not deleted through it.
func TestCollectLeavesMounts(t *testing.T) {
	r := newRig(t)
	dir := filepath.Join(r.opts.StateDir, "pods", strings.Repeat("0", 64))
	inside := filepath.Join(dir, "mnt")
	if err := os.MkdirAll(inside, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", inside, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	mounted := true
	unmount := func() {
		if mounted {
			mounted = false
			if err := unix.Unmount(inside, 0); err != nil {
				t.Error(err)
			}
		}
	}
	defer unmount()
	if err := os.WriteFile(filepath.Join(inside, "precious"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := r.Collect(t.Context(), &imageLeftovers{err: errdefs.ErrUnavailable}, false)
	if err != nil || len(c.Leftovers) != 1 || !strings.Contains(c.Leftovers[0].Error, "is mounted there") {
		t.Errorf("collected: %+v (%v)", c, err)
	}
	if _, err := os.Stat(filepath.Join(inside, "precious")); err != nil {
		t.Error(err)
	}
	unmount()
	if c, err = r.Collect(t.Context(), &imageLeftovers{err: errdefs.ErrUnavailable}, false); err != nil || len(c.Leftovers) != 1 || c.Leftovers[0].Error != "" {
		t.Errorf("collected: %+v (%v)", c, err)
	}
	if _, err := os.Stat(dir); !os.IsNotExist(err) {
		t.Errorf("directory is left: %v", err)
	}
}

// TestCollectNeedsRecords: without a database, or while a daemon has it, nothing is touched.
func TestCollectNeedsRecords(t *testing.T) {
	r := newRig(t)
	opts := r.opts
	opts.StateDir = t.TempDir()
	if _, err := CollectStopped(t.Context(), opts, r.net, &imageLeftovers{}, false); !errdefs.IsNotFound(err) {
		t.Errorf("without a database: %v", err)
	}
	pod := r.runPod("a")
	if _, err := CollectStopped(t.Context(), r.opts, r.net, &imageLeftovers{}, false); !errdefs.IsUnavailable(err) {
		t.Errorf("while a daemon has the records: %v", err)
	}
	if status, err := r.PodSandboxStatus(t.Context(), &cri.PodSandboxStatusRequest{PodSandboxId: pod}); err != nil || status.GetStatus().GetState() != cri.PodSandboxState_SANDBOX_READY {
		t.Errorf("the pod has become %v (%v)", status, err)
	}
}
