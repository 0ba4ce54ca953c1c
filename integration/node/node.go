package node

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"go.opentelemetry.io/otel/trace/noop"
	cri "k8s.io/cri-api/pkg/apis"
	criclient "k8s.io/cri-client/pkg"
)

// Options of a node. Zero values choose what a checkout has built.
type Options struct {
	Build  string    // the checkout's build directory: bin/, bin/cni, guest/
	Guest  string    // directory of the guest image; "" is Build/guest
	Dir    string    // private directory of the node, made; state and logs
	Config string    // TOML of a file in conf.d, which goes before the node's own settings
	CNI    string    // network configuration list; "" is a dual stack bridge with port mappings
	Output io.Writer // log of crivm; nil keeps it in Dir/crivm.log only
	// Registry is host:port of a registry on loopback that answers for docker.io and registry.k8s.io; "" for none.
	Registry string
	// Wrapper is put before the command line of crivm, for tests that need it.
	Wrapper []string
	Env     []string
}

// Node is a running crivm with all that belongs to it.
type Node struct {
	Options
	RunDir  string // short: sockets live below it
	Socket  string // CRI endpoint, "unix://..."
	Runtime cri.RuntimeService
	Images  cri.ImageManagerService

	baseline map[string]bool // what was there before the first pod

	mu     sync.Mutex
	daemon *exec.Cmd
	exited chan error
}

const (
	startLimit = 60 * time.Second
	stopLimit  = 30 * time.Second
)

// CgroupParent is where the node's VMs are accounted: this process's own, since several may run on a machine.
var CgroupParent = fmt.Sprintf("/crivm-test-%d", os.Getpid())

// Start writes the node's configuration, starts crivm and waits until it answers.
func Start(ctx context.Context, o Options) (_ *Node, retErr error) {
	if o.Guest == "" {
		o.Guest = filepath.Join(o.Build, "guest")
	}
	n := &Node{Options: o}
	if err := os.MkdirAll(o.Dir, 0o711); err != nil {
		return nil, err
	}
	var err error
	if n.RunDir, err = os.MkdirTemp("/run", "crivm-"); err != nil {
		return nil, err
	}
	defer func() {
		if retErr != nil {
			os.RemoveAll(n.RunDir)
		}
	}()
	if err := os.Chmod(n.RunDir, 0o711); err != nil { // VMM processes of other uids pass through
		return nil, err
	}
	n.Socket = "unix://" + filepath.Join(n.RunDir, "crivm.sock")
	if err := n.writeConfig(); err != nil {
		return nil, fmt.Errorf("configuration of the node: %w", err)
	}
	if err := n.StartDaemon(ctx); err != nil {
		return nil, err
	}
	if n.Runtime, err = runtimeClient(ctx, n.Socket, 5*time.Minute); err != nil {
		return nil, errors.Join(fmt.Errorf("CRI client: %w", err), n.Stop())
	}
	if n.Images, err = criclient.NewRemoteImageServiceBuilder().WithEndpoint(n.Socket).WithConnectionTimeout(5 * time.Minute).
		WithTracerProvider(noop.NewTracerProvider()).Build(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("CRI client: %w", err), n.Stop())
	}
	if n.baseline, err = n.snapshot(); err != nil {
		return nil, errors.Join(err, n.Stop())
	}
	return n, nil
}

func runtimeClient(ctx context.Context, socket string, timeout time.Duration) (cri.RuntimeService, error) {
	return criclient.NewRemoteRuntimeServiceBuilder().WithEndpoint(socket).WithConnectionTimeout(timeout).
		WithTracerProvider(noop.NewTracerProvider()).Build(ctx)
}

// StartDaemon starts crivm, again after StopDaemon or KillDaemon.
func (n *Node) StartDaemon(ctx context.Context) error {
	log, err := os.OpenFile(n.LogPath(), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return err
	}
	defer log.Close()
	line := append(append([]string{}, n.Wrapper...), filepath.Join(n.Build, "bin/crivm"), "serve", "--config", n.configPath())
	cmd := exec.Command(line[0], line[1:]...)
	cmd.Stdout, cmd.Stderr = log, log
	if n.Output != nil {
		cmd.Stdout = io.MultiWriter(log, n.Output)
		cmd.Stderr = cmd.Stdout
	}
	cmd.Env = append(append(os.Environ(), "PATH="+os.Getenv("PATH")+":/usr/sbin:/sbin"), n.Env...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("starting crivm: %w", err)
	}
	exited := make(chan error, 1)
	go func() { exited <- cmd.Wait() }()
	n.mu.Lock()
	n.daemon, n.exited = cmd, exited
	n.mu.Unlock()
	return n.awaitReady(ctx)
}

// awaitReady waits until crivm answers, the node's clients too: theirs still fail for a while after the daemon before has
// gone, in the pauses between tries to connect.
func (n *Node) awaitReady(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startLimit)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		err := n.answers(ctx)
		if err == nil {
			return nil
		}
		select {
		case exit := <-n.exited:
			n.exited <- exit
			return fmt.Errorf("crivm ended (%v): %s", exit, n.LogTail())
		case <-ctx.Done():
			return fmt.Errorf("crivm does not answer: %v: %s", err, n.LogTail())
		case <-tick.C:
		}
	}
}

func (n *Node) answers(ctx context.Context) error {
	client := n.Runtime
	if client == nil { // the node's are made when it has answered for the first time
		var err error
		if client, err = runtimeClient(ctx, n.Socket, 2*time.Second); err != nil {
			return err
		}
		defer client.Close(ctx)
	}
	if _, err := client.Version(ctx, ""); err != nil || n.Images == nil {
		return err
	}
	_, err := n.Images.ImageFsInfo(ctx)
	return err
}

// PID of the daemon.
func (n *Node) PID() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.daemon.Process.Pid
}

// StopDaemon ends crivm with SIGTERM; its pods go on.
func (n *Node) StopDaemon() error { return n.endDaemon(syscall.SIGTERM) }

// KillDaemon ends crivm with SIGKILL; its pods go on.
func (n *Node) KillDaemon() error { return n.endDaemon(syscall.SIGKILL) }

func (n *Node) endDaemon(s syscall.Signal) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.daemon == nil {
		return nil
	}
	n.daemon.Process.Signal(s)
	timer := time.NewTimer(stopLimit)
	defer timer.Stop()
	select {
	case err := <-n.exited:
		n.daemon = nil
		if s == syscall.SIGKILL {
			return nil
		}
		return err
	case <-timer.C:
		n.daemon.Process.Kill()
		<-n.exited
		n.daemon = nil
		return fmt.Errorf("crivm did not end within %s of %s", stopLimit, s)
	}
}

// RemoveAllPods removes every sandbox that crivm lists.
func (n *Node) RemoveAllPods(ctx context.Context) error {
	pods, err := n.Runtime.ListPodSandbox(ctx, nil)
	if err != nil {
		return err
	}
	var errs []error
	for _, p := range pods {
		errs = append(errs, n.Runtime.StopPodSandbox(ctx, p.Id), n.Runtime.RemovePodSandbox(ctx, p.Id))
	}
	return errors.Join(errs...)
}

// Stop ends the daemon and deletes the node's directories. Pods must have been removed.
func (n *Node) Stop() error {
	err := n.StopDaemon()
	if n.Runtime != nil {
		err = errors.Join(err, n.Runtime.Close(context.Background()))
	}
	if n.Images != nil {
		err = errors.Join(err, n.Images.Close(context.Background()))
	}
	return errors.Join(err, os.RemoveAll(n.RunDir), os.RemoveAll(n.Dir))
}

// Crictl runs the real crictl on the node and returns what it prints.
func (n *Node) Crictl(ctx context.Context, args ...string) (string, error) {
	cmd := n.CrictlCommand(ctx, args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return stdout.String(), fmt.Errorf("crictl %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(stderr.String()))
	}
	return stdout.String(), nil
}

// Crivm runs a command of the node's crivm with the node's configuration, and returns what it prints.
func (n *Node) Crivm(ctx context.Context, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, filepath.Join(n.Build, "bin/crivm"), append(args, "--config", n.configPath())...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		return string(out), fmt.Errorf("crivm %s: %w: %s", strings.Join(args, " "), err, out)
	}
	return string(out), nil
}

// CrictlCommand is crictl, ready to run against the node.
func (n *Node) CrictlCommand(ctx context.Context, args ...string) *exec.Cmd {
	flags := []string{"--config", os.DevNull, "--runtime-endpoint", n.Socket, "--image-endpoint", n.Socket, "--timeout", "300s"}
	return exec.CommandContext(ctx, filepath.Join(n.Build, "bin/crictl"), append(flags, args...)...)
}

// LogPath is crivm's log.
func (n *Node) LogPath() string { return filepath.Join(n.Dir, "crivm.log") }

// LogTail is the end of crivm's log, for messages of a test that failed.
func (n *Node) LogTail() string {
	text, err := os.ReadFile(n.LogPath())
	if err != nil {
		return err.Error()
	}
	if len(text) > 4096 {
		text = text[len(text)-4096:]
	}
	return string(text)
}
