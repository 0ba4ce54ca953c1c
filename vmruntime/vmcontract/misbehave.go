package vmcontract

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cavaliergopher/cpio"
	"github.com/containerd/errdefs"

	"github.com/crivm/crivm/vmruntime"
)

// misbehaving returns a Spec whose guest runs testinit instead of an agent.
func (s *suite) misbehaving(t *testing.T, how string) (vmruntime.Driver, vmruntime.Spec) {
	t.Helper()
	driver, spec := s.spec(t)
	program := filepath.Join(spec.Dir, "test-init")
	build := exec.Command("go", "build", "-o", program, "github.com/crivm/crivm/vmruntime/vmcontract/testinit")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build testinit: %v: %s", err, out)
	}
	body, err := os.ReadFile(program)
	if err != nil {
		t.Fatal(err)
	}
	var image bytes.Buffer
	w := cpio.NewWriter(&image)
	for _, h := range []*cpio.Header{
		{Name: "dev", Mode: cpio.TypeDir | 0o755},
		{Name: "init", Mode: cpio.TypeReg | 0o755, Size: int64(len(body))},
	} {
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if h.Size > 0 {
			if _, err := w.Write(body); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	spec.Initrd = filepath.Join(spec.Dir, "test-initrd")
	if err := os.WriteFile(spec.Initrd, image.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}
	spec.Cmdline += " contract=" + how
	return driver, spec
}

func (s *suite) testGuestPanics(t *testing.T) {
	driver, spec := s.misbehaving(t, "panic")
	vm := s.start(t, driver, spec)
	// A Dial that waits for the boot learns of its end.
	ctx, cancel := context.WithTimeout(t.Context(), s.Boot)
	defer cancel()
	if _, err := vm.Dial(ctx); !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "panic") {
		t.Errorf("dial a guest that panics: %v", err)
	}
	e := within(t, vm, endSeen)
	if !strings.Contains(e.Reason, "panic") {
		t.Errorf("reason %q does not speak of a panic", e.Reason)
	}
	if c := vm.Console(); !strings.Contains(c, "Kernel panic") || len(c) > 4096 {
		t.Errorf("console of %d bytes without the panic: %s", len(c), c)
	}
	s.checkDead(t, vm)
	// The console outlives the VM.
	kill(t, vm)
	if !strings.Contains(vm.Console(), "Kernel panic") {
		t.Error("the console went with the VM")
	}
	nothingLeft(t, spec)
}

func (s *suite) testGuestReboots(t *testing.T) {
	driver, spec := s.misbehaving(t, "reboot")
	vm := s.start(t, driver, spec)
	if e := within(t, vm, s.Boot); !strings.Contains(e.Reason, "reboot") {
		t.Errorf("exit %+v, want a reboot", e)
	}
	if n := strings.Count(vm.Console(), "testinit runs"); n != 1 {
		t.Errorf("the guest booted %d times", n)
	}
}

// A guest without an agent: Dial waits as long as its caller does, and the VM can be killed meanwhile.
func (s *suite) testNoAgent(t *testing.T) {
	driver, spec := s.misbehaving(t, "silent")
	vm := s.start(t, driver, spec)
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	begin := time.Now()
	if _, err := vm.Dial(ctx); !errors.Is(err, context.DeadlineExceeded) || time.Since(begin) > 2*time.Second {
		t.Errorf("dial a guest without agent: %v after %v", err, time.Since(begin))
	}
	result := make(chan error, 1)
	go func() {
		_, err := vm.Dial(t.Context())
		result <- err
	}()
	kill(t, vm)
	select {
	case err := <-result:
		if !errdefs.IsUnavailable(err) {
			t.Errorf("dial while the VM is killed: %v", err)
		}
	case <-time.After(endSeen):
		t.Error("dial still waits for a dead VM")
	}
	nothingLeft(t, spec)
}

// A guest that writes to its console without end fills no disk and is still under control.
func (s *suite) testConsoleFlood(t *testing.T) {
	driver, spec := s.misbehaving(t, "flood")
	vm := s.start(t, driver, spec)
	const lines = 5000 // of 95 bytes
	deadline := time.Now().Add(s.Boot)
	for {
		console := vm.Console()
		if i := strings.LastIndex(console, "flood 0000"); i >= 0 && len(console) >= i+15 && console[i+6:i+15] > "000005000" {
			break
		}
		if s.over(vm) || time.Now().After(deadline) {
			t.Fatalf("the flood of %d lines has not come: %s", lines, console)
		}
		time.Sleep(50 * time.Millisecond)
	}
	c := vm.Console()
	if len(c) > 4096 || strings.ContainsAny(c, "\x1b\r") || !strings.Contains(c, `\x1b[31m`) {
		t.Errorf("console of %d bytes is not fit for a terminal: %q", len(c), c)
	}
	files, err := filepath.Glob(filepath.Join(spec.Dir, "*.log"))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		fi, err := os.Stat(f)
		if err != nil {
			t.Fatal(err)
		}
		if used := fi.Sys().(*syscall.Stat_t).Blocks * 512; used > 4*vmruntime.ConsoleBytes {
			t.Errorf("%s uses %d bytes", f, used)
		}
	}
	kill(t, vm)
	nothingLeft(t, spec)
}
