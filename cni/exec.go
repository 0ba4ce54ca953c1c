package cni

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containernetworking/cni/pkg/invoke"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/version"
	"golang.org/x/sys/unix"
)

const (
	maxPluginOutput = 4 << 20 // bytes of a plugin's result; real ones have a few KiB
	maxPluginErrors = 8 << 10 // bytes of a plugin's standard error kept for the error message
	pipeGrace       = time.Second
	busyTries       = 5
)

// pluginExec runs plugins. Unlike libcni's own it ends a plugin together with the processes the plugin
// has started (IPAM plugins, iptables), which would otherwise keep its pipes open and its caller waiting,
// and bounds what it reads.
type pluginExec struct {
	version.PluginDecoder
}

func (*pluginExec) FindInPath(plugin string, paths []string) (string, error) {
	return invoke.FindInPath(plugin, paths)
}

func (*pluginExec) ExecPlugin(ctx context.Context, path string, stdin []byte, environ []string) ([]byte, error) {
	defer span(ctx, filepath.Base(path), environ)()
	for try := 1; ; try++ {
		stdout, err := runPlugin(ctx, path, stdin, environ)
		if !errors.Is(err, unix.ETXTBSY) || try == busyTries {
			return stdout, err
		}
		// An installer is still writing the file.
		select {
		case <-time.After(200 * time.Millisecond):
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

func runPlugin(ctx context.Context, path string, stdin []byte, environ []string) ([]byte, error) {
	name := filepath.Base(path)
	stdout, stderr := &boundedBuffer{limit: maxPluginOutput}, &boundedBuffer{limit: maxPluginErrors}
	cmd := exec.CommandContext(ctx, path)
	cmd.Env = environ
	cmd.Stdin = bytes.NewReader(stdin)
	cmd.Stdout, cmd.Stderr = stdout, stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return unix.Kill(-cmd.Process.Pid, unix.SIGKILL) }
	cmd.WaitDelay = pipeGrace
	err := cmd.Run()
	switch {
	case ctx.Err() != nil:
		return nil, fmt.Errorf("plugin %s killed: %w%s", name, context.Cause(ctx), quoted(stderr))
	case stdout.overflow:
		return nil, fmt.Errorf("plugin %s printed more than %d bytes: %w", name, maxPluginOutput, errdefs.ErrOutOfRange)
	case err == nil, errors.Is(err, exec.ErrWaitDelay): // a process left behind holds the pipe; the plugin itself is done
		return stdout.kept, nil
	case errors.As(err, new(*exec.ExitError)):
		return nil, pluginError(name, err, stdout, stderr)
	}
	return nil, fmt.Errorf("plugin %s: %w", name, err)
}

// pluginError reads the error that CNI has plugins print on standard output.
func pluginError(name string, err error, stdout, stderr *boundedBuffer) error {
	said := &types.Error{}
	if json.Unmarshal(stdout.kept, said) != nil || said.Msg == "" && said.Code == 0 {
		said = &types.Error{Code: types.ErrInternal, Msg: "no CNI error on standard output"}
		if text := strings.TrimSpace(string(stdout.kept)); text != "" {
			said.Details = text[:min(len(text), maxPluginErrors)]
		}
	}
	return fmt.Errorf("plugin %s: %w (%s%s)", name, said, err.Error(), quoted(stderr))
}

func quoted(stderr *boundedBuffer) string {
	text := strings.TrimSpace(string(stderr.kept))
	if text == "" {
		return ""
	}
	return fmt.Sprintf("; stderr: %q", text)
}

// noAddresses is what the host-local plugin says; CNI has no code for it.
const noAddresses = "no IP addresses available"

// classify gives an error of libcni its errdefs class.
func classify(ctx context.Context, err error) error {
	var said *types.Error
	switch {
	case err == nil, ctx.Err() != nil, isClassified(err):
		return err // the context's errors are classes themselves
	case errors.As(err, &said):
		switch said.Code {
		case types.ErrTryAgainLater, types.ErrPluginNotAvailable, types.ErrLimitedConnectivity:
			return fmt.Errorf("%w: %w", errdefs.ErrUnavailable, err)
		case types.ErrIncompatibleCNIVersion, types.ErrUnsupportedField, types.ErrInvalidNetworkConfig:
			return fmt.Errorf("%w: %w", errdefs.ErrFailedPrecondition, err)
		}
		if strings.Contains(err.Error(), noAddresses) {
			return fmt.Errorf("%w: %w", errdefs.ErrResourceExhausted, err)
		}
		return fmt.Errorf("%w: %w", errdefs.ErrInternal, err)
	case strings.Contains(err.Error(), "failed to find plugin"): // libcni has no type for it
		return fmt.Errorf("%w: %w", errdefs.ErrFailedPrecondition, err)
	}
	return fmt.Errorf("%w: %w", errdefs.ErrInternal, err)
}

func isClassified(err error) bool {
	return errdefs.IsOutOfRange(err) || errdefs.IsFailedPrecondition(err) || errdefs.IsUnavailable(err) ||
		errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded)
}

// verbUnknown tells that a plugin does not know GC or STATUS, verbs that came with CNI 1.1.
func verbUnknown(err error) bool {
	var said *types.Error
	return errors.As(err, &said) &&
		(said.Code == types.ErrIncompatibleCNIVersion || said.Code == types.ErrInvalidEnvironmentVariables)
}

// boundedBuffer keeps the first limit bytes and takes, but forgets, the rest. It does not embed its buffer:
// io.Copy would find ReadFrom and pass by the limit.
type boundedBuffer struct {
	kept     []byte
	limit    int
	overflow bool
}

func (b *boundedBuffer) Write(p []byte) (int, error) {
	take := min(len(p), b.limit-len(b.kept))
	b.kept = append(b.kept, p[:take]...)
	b.overflow = b.overflow || take < len(p)
	return len(p), nil
}
