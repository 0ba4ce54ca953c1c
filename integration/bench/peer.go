package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"go.opentelemetry.io/otel/trace/noop"
	"golang.org/x/sys/unix"
	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"
	criclient "k8s.io/cri-client/pkg"

	"github.com/crivm/crivm/integration/registry"
)

const (
	peerStartLimit = 60 * time.Second
	peerStopLimit  = 30 * time.Second
)

// peer is containerd with runc: its own directories, bridge and subnets; crivm's CNI plugins, registry and images.
type peer struct {
	system
	dir, runDir string
	metrics     string // host:port
	daemon      *exec.Cmd
	exited      chan error
}

// peerBuilt tells whether `provision containerd runc pause` has been done.
func peerBuilt(build string) error {
	for _, name := range []string{"containerd", "containerd-shim-runc-v2", "runc", "pause"} {
		if _, err := os.Stat(filepath.Join(build, "bin/peer", name)); err != nil {
			return fmt.Errorf("containerd to compare with: %w (make bench builds it; -peer=false measures without)", err)
		}
	}
	return nil
}

// startPeer starts containerd and waits until it answers.
func startPeer(ctx context.Context, build, dir string, images *registry.Registry) (_ *peer, retErr error) {
	p := &peer{dir: dir, exited: make(chan error, 1)}
	p.name, p.parent = "containerd", fmt.Sprintf("/crivm-bench-peer-%d", os.Getpid())
	if err := pushPause(images, filepath.Join(build, "bin/peer/pause")); err != nil {
		return nil, fmt.Errorf("sandbox image: %w", err)
	}
	if err := os.MkdirAll(dir, 0o711); err != nil {
		return nil, err
	}
	var err error
	if p.runDir, err = os.MkdirTemp("/run", "containerd-"); err != nil {
		return nil, err
	}
	if p.metrics, err = freeAddress(); err != nil {
		return nil, err
	}
	if err := p.configure(build, images.Addr()); err != nil {
		return nil, err
	}
	log, err := os.Create(p.logPath())
	if err != nil {
		return nil, err
	}
	defer log.Close()
	bin := filepath.Join(build, "bin/peer")
	p.daemon = exec.Command(filepath.Join(bin, "containerd"), "--config", filepath.Join(dir, "config.toml"))
	p.daemon.Stdout, p.daemon.Stderr = log, log
	p.daemon.Env = append(os.Environ(), "PATH="+bin+":"+os.Getenv("PATH")+":/usr/sbin:/sbin")
	p.daemon.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := p.daemon.Start(); err != nil {
		return nil, fmt.Errorf("starting containerd: %w", err)
	}
	p.pid = p.daemon.Process.Pid
	go func() { p.exited <- p.daemon.Wait() }()
	defer func() {
		if retErr != nil {
			retErr = errors.Join(retErr, p.stop(context.WithoutCancel(ctx)))
		}
	}()
	socket := "unix://" + p.socket()
	if err := p.awaitSocket(ctx); err != nil {
		return nil, err
	}
	if p.runtime, err = criclient.NewRemoteRuntimeServiceBuilder().WithEndpoint(socket).WithConnectionTimeout(callLimit).
		WithTracerProvider(noop.NewTracerProvider()).Build(ctx); err != nil {
		return nil, fmt.Errorf("CRI client of containerd: %w", err)
	}
	if p.images, err = criclient.NewRemoteImageServiceBuilder().WithEndpoint(socket).WithConnectionTimeout(callLimit).
		WithTracerProvider(noop.NewTracerProvider()).Build(ctx); err != nil {
		return nil, fmt.Errorf("CRI client of containerd: %w", err)
	}
	p.addTime = p.networkTime
	return p, p.awaitNetwork(ctx)
}

func (p *peer) socket() string  { return filepath.Join(p.runDir, "containerd.sock") }
func (p *peer) logPath() string { return filepath.Join(p.dir, "containerd.log") }

// configure writes containerd's configuration: its defaults but for places, the sandbox image, what this machine cannot do
// (lowering an OOM score), and the loopback interface, which is brought up without a plugin.
func (p *peer) configure(build, registryAddr string) error {
	network := fmt.Sprintf(`{"cniVersion": "1.0.0", "name": "peer", "plugins": [
  {"type": "bridge", "bridge": "peer0", "isGateway": true, "ipMasq": false, "hairpinMode": true,
   "ipam": {"type": "host-local", "dataDir": %q, "ranges": [[{"subnet": "10.124.0.0/16"}], [{"subnet": "fd00:c41c::/64"}]],
            "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]}},
  {"type": "portmap", "capabilities": {"portMappings": true}, "snat": true}]}
`, filepath.Join(p.dir, "ipam"))
	config := fmt.Sprintf(`version = 3
root = %[1]q
state = %[2]q
disabled_plugins = ["io.containerd.nri.v1.nri"]

[grpc]
address = %[3]q

[metrics]
address = %[4]q

[plugins.'io.containerd.internal.v1.opt']
path = %[5]q

[plugins.'io.containerd.cri.v1.images'.pinned_images]
sandbox = %[6]q

[plugins.'io.containerd.cri.v1.runtime']
restrict_oom_score_adj = true

[plugins.'io.containerd.cri.v1.runtime'.cni]
bin_dirs = [%[7]q]
conf_dir = %[8]q
use_internal_loopback = true

[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
BinaryName = %[9]q
Root = %[10]q
SystemdCgroup = false
`, filepath.Join(p.dir, "root"), filepath.Join(p.runDir, "state"), p.socket(), p.metrics, filepath.Join(p.dir, "opt"), registryAddr+"/"+pauseRepository,
		filepath.Join(build, "bin/cni"), filepath.Join(p.dir, "net.d"), filepath.Join(build, "bin/peer/runc"), filepath.Join(p.runDir, "runc"))
	if err := os.MkdirAll(filepath.Join(p.dir, "net.d"), 0o755); err != nil {
		return err
	}
	return errors.Join(os.WriteFile(filepath.Join(p.dir, "config.toml"), []byte(config), 0o644),
		os.WriteFile(filepath.Join(p.dir, "net.d/10-peer.conflist"), []byte(network), 0o644))
}

func (p *peer) awaitSocket(ctx context.Context) error {
	return p.await(ctx, func() error {
		conn, err := net.Dial("unix", p.socket())
		if err == nil {
			conn.Close()
		}
		return err
	})
}

// awaitNetwork waits until the CNI configuration has been read.
func (p *peer) awaitNetwork(ctx context.Context) error {
	return p.await(ctx, func() error {
		status, err := p.runtime.Status(ctx, false)
		if err != nil {
			return err
		}
		for _, c := range status.GetStatus().GetConditions() {
			if !c.GetStatus() && (c.GetType() == criv1.RuntimeReady || c.GetType() == criv1.NetworkReady) {
				return fmt.Errorf("%s: %s", c.GetType(), c.GetMessage())
			}
		}
		return nil
	})
}

func (p *peer) await(ctx context.Context, ready func() error) error {
	ctx, cancel := context.WithTimeout(ctx, peerStartLimit)
	defer cancel()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		err := ready()
		if err == nil {
			return nil
		}
		select {
		case exit := <-p.exited:
			p.exited <- exit
			return fmt.Errorf("containerd ended (%v): %s", exit, tail(p.logPath()))
		case <-ctx.Done():
			return fmt.Errorf("containerd is not ready: %w: %s", err, tail(p.logPath()))
		case <-tick.C:
		}
	}
}

// networkTime is what CNI ADD has taken in containerd so far, by its own account.
func (p *peer) networkTime(ctx context.Context, _ string) (time.Duration, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+p.metrics+"/v1/metrics", nil)
	if err != nil {
		return 0, err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, fmt.Errorf("metrics of containerd: %w", err)
	}
	defer resp.Body.Close()
	for lines := bufio.NewScanner(resp.Body); lines.Scan(); {
		line := lines.Text()
		if !strings.Contains(line, "network_plugin_operations_duration") || !strings.Contains(line, "_sum{") || !strings.Contains(line, `"set_up_pod"`) {
			continue
		}
		seconds, err := strconv.ParseFloat(line[strings.LastIndexByte(line, ' ')+1:], 64)
		return time.Duration(seconds * float64(time.Second)), err
	}
	return 0, nil // before the first pod
}

// stop ends containerd, which has no pods any more, and deletes what is its.
func (p *peer) stop(ctx context.Context) error {
	var errs []error
	if p.runtime != nil {
		errs = append(errs, p.removeAllPods(ctx), p.runtime.Close(ctx))
	}
	if p.images != nil {
		errs = append(errs, p.images.Close(ctx))
	}
	p.daemon.Process.Signal(unix.SIGTERM)
	timer := time.NewTimer(peerStopLimit)
	defer timer.Stop()
	select {
	case <-p.exited:
	case <-timer.C:
		p.daemon.Process.Kill()
		<-p.exited
		errs = append(errs, fmt.Errorf("containerd did not end within %s", peerStopLimit))
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	errs = append(errs, err)
	for line := range strings.Lines(string(mounts)) { // what is left of snapshots, in this mount namespace only
		if f := strings.Fields(line); len(f) > 4 && (strings.HasPrefix(f[4], p.dir) || strings.HasPrefix(f[4], p.runDir)) {
			errs = append(errs, unix.Unmount(f[4], unix.MNT_DETACH))
		}
	}
	groups, err := filepath.Glob("/sys/fs/cgroup/*" + p.parent)
	errs = append(errs, err)
	for _, g := range append(groups, "/sys/fs/cgroup"+p.parent) {
		if err := os.Remove(g); err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(append(errs, os.RemoveAll(p.runDir), os.RemoveAll(p.dir))...)
}

// freeAddress is one that nobody listens on at the moment; the namespace is this process's own.
func freeAddress() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	return l.Addr().String(), l.Close()
}

func tail(path string) string {
	text, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	return string(text[max(0, len(text)-4096):])
}

// versions names what is measured beside crivm.
func (p *peer) versions(ctx context.Context, build string) string {
	text := "containerd"
	if v, err := p.runtime.Version(ctx, ""); err == nil {
		text += " " + v.GetRuntimeVersion()
	}
	if out, err := exec.CommandContext(ctx, filepath.Join(build, "bin/peer/runc"), "--version").Output(); err == nil {
		line, _, _ := strings.Cut(string(out), "\n")
		text += ", " + strings.Replace(line, " version", "", 1)
	}
	return text + ", overlayfs snapshots, cgroupfs"
}
