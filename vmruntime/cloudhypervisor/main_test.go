package cloudhypervisor

import (
	"context"
	"os"
	"path/filepath"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/crivm/crivm/vmruntime"
	"github.com/crivm/crivm/vmruntime/vmtest"
)

func TestMain(m *testing.M) {
	vmtest.Main()
	goleak.VerifyTestMain(m)
}

// fixture is a driver of fake VMMs and a VM to start.
type fixture struct {
	t      *testing.T
	driver *Driver
	binary string
	spec   vmruntime.Spec
}

func newFixture(t *testing.T) *fixture {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("starting a VMM needs root (mount namespace)")
	}
	f := &fixture{t: t, binary: vmtest.Binary(t)}
	f.driver = f.newDriver(Config{HotplugDirs: []string{os.TempDir()}})
	f.spec = newSpec(t)
	return f
}

// newDriver is what a further daemon would have.
func (f *fixture) newDriver(c Config) *Driver {
	f.t.Helper()
	c.Binary = f.binary
	d, err := New(c)
	if err != nil {
		f.t.Fatal(err)
	}
	return d
}

// newSpec is a VM in a short directory of its own, with a kernel and a scratch disk that are files.
func newSpec(t *testing.T) vmruntime.Spec {
	t.Helper()
	dir, err := os.MkdirTemp("", "vm")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	s := vmruntime.Spec{
		ID: filepath.Base(dir), Dir: dir, Kernel: filepath.Join(t.TempDir(), "vmlinux"),
		VCPUs: 1, MaxVCPUs: 4, MemoryBytes: 128 << 20, MaxMemoryBytes: 512 << 20,
		Disks: []vmruntime.Disk{{Serial: "scratch", Path: file(t, "scratch")}},
	}
	if err := os.WriteFile(s.Kernel, []byte("\x7fELF"), 0o644); err != nil {
		t.Fatal(err)
	}
	return s
}

// file makes a disk image.
func file(t *testing.T, name string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, make([]byte, 1<<20), 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

func (f *fixture) ctx() context.Context {
	f.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	f.t.Cleanup(cancel)
	return ctx
}

// start starts the VM and kills it with the test.
func (f *fixture) start() *vm {
	f.t.Helper()
	v, err := f.driver.Start(f.ctx(), f.spec)
	if err != nil {
		f.t.Fatal(err)
	}
	f.killLater(v)
	return v.(*vm)
}

func (f *fixture) killLater(v vmruntime.VM) {
	f.t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		defer cancel()
		if err := v.Kill(ctx); err != nil {
			f.t.Errorf("kill: %v", err)
		}
	})
}

// died waits for the end of a VM.
func (f *fixture) died(v vmruntime.VM) vmruntime.Exit {
	f.t.Helper()
	select {
	case <-v.Done():
		return v.Exit()
	case <-time.After(20 * time.Second):
		f.t.Fatal("VM lives on")
		panic("unreachable")
	}
}
