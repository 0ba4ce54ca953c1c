package vmcontract

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/crivm/crivm/agentproto"
	"github.com/crivm/crivm/vmruntime"
)

// plainDisk is a small disk of zeros in the VM's directory.
func plainDisk(t *testing.T, dir, serial string) vmruntime.Disk {
	t.Helper()
	path := filepath.Join(dir, "test-"+serial)
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o666)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(16 << 20); err != nil {
		t.Fatal(err)
	}
	return vmruntime.Disk{Serial: serial, Path: path, ReadOnly: true}
}

// testRunning goes through what a running VM offers, on one VM.
func (s *suite) testRunning(t *testing.T) {
	driver, spec := s.spec(t)
	spec.Disks = []vmruntime.Disk{plainDisk(t, spec.Dir, "boot")}
	vm := s.start(t, driver, spec)
	if vm.ID() != spec.ID || vm.PID() <= 0 || s.over(vm) || vm.Exit() != (vmruntime.Exit{}) {
		t.Errorf("ID %q, PID %d, exit %+v", vm.ID(), vm.PID(), vm.Exit())
	}
	// A caller that gives up during the boot hinders nobody.
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	if c, err := vm.Dial(ctx); err == nil {
		c.Close() // a fake boots at once
	} else if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("dial without patience: %v", err)
	}
	cancel()
	agent := s.connect(t, vm)
	if agent.Info().GetKernel() == "" {
		t.Errorf("hello: %v", agent.Info())
	}
	t.Run("Streams", func(t *testing.T) { s.checkStreams(t, vm) })
	t.Run("Disks", func(t *testing.T) { s.checkDisks(t, vm, spec.Dir) })
	if s.RealGuest {
		t.Run("GuestSeesDisk", func(t *testing.T) { s.checkGuestSeesDisk(t, vm, agent, spec.Dir) })
	}
	t.Run("BlockDevice", func(t *testing.T) { s.checkBlockDevice(t, vm, s.RealGuest) })
	t.Run("PauseResume", func(t *testing.T) { s.checkPause(t, vm, agent) })
	if _, err := agent.Ping(t.Context(), &agentproto.PingRequest{}); err != nil {
		t.Errorf("agent after all that: %v", err)
	}
	if spec.SharedMemory {
		return
	}
	err := vm.AddShare(t.Context(), vmruntime.Share{Tag: "share", Socket: "/nonexistent"})
	if !errdefs.IsFailedPrecondition(err) {
		t.Errorf("share without shared memory: %v", err)
	}
}

func (s *suite) checkStreams(t *testing.T, vm vmruntime.VM) {
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			c, err := agentproto.Connect(t.Context(), vm)
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			for range 20 {
				if _, err := c.Ping(t.Context(), &agentproto.PingRequest{}); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	// Garbage on one stream hurts no other.
	c, err := vm.Dial(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Write([]byte(strings.Repeat("\xff garbage ", 100))); err != nil {
		t.Errorf("write: %v", err)
	}
	if err := c.SetReadDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(io.Discard, c); errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error("the agent does not end a stream of garbage")
	}
}

func (s *suite) checkDisks(t *testing.T, vm vmruntime.VM, dir string) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	disk := plainDisk(t, dir, "one")
	for range 2 { // idempotent
		if err := vm.AddDisk(ctx, disk); err != nil {
			t.Fatal(err)
		}
	}
	other := plainDisk(t, dir, "two")
	other.Serial = disk.Serial
	if err := vm.AddDisk(ctx, other); !errdefs.IsAlreadyExists(err) {
		t.Errorf("serial in use: %v", err)
	}
	if err := vm.AddDisk(ctx, vmruntime.Disk{Serial: "none", Path: filepath.Join(dir, "no-such-disk")}); err == nil {
		t.Error("a disk that does not exist was added")
	}
	if err := vm.AddDisk(ctx, plainDisk(t, dir, "none")); err != nil {
		t.Errorf("the failed addition left something: %v", err)
	}
	if err := vm.AddDisk(ctx, vmruntime.Disk{Serial: "a b", Path: disk.Path}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("bad serial: %v", err)
	}
	for _, serial := range []string{"one", "one", "none", "boot", "never-was"} {
		if err := vm.RemoveDisk(ctx, serial); err != nil {
			t.Errorf("remove %s: %v", serial, err)
		}
	}
	// The host's file is let go of: a writer may have it.
	again := disk
	again.ReadOnly = false
	if err := vm.AddDisk(ctx, again); err != nil {
		t.Errorf("add again, for writing: %v", err)
	}
	if err := vm.RemoveDisk(ctx, again.Serial); err != nil {
		t.Error(err)
	}

	// Many at once: all succeed, and when the slots are full the error says so.
	var (
		wg      sync.WaitGroup
		mu      sync.Mutex
		serials []string
	)
	begin := time.Now()
	for i := range 10 {
		d := plainDisk(t, dir, fmt.Sprintf("many-%d", i))
		wg.Go(func() {
			if err := vm.AddDisk(ctx, d); err != nil {
				t.Error(err)
				return
			}
			mu.Lock()
			defer mu.Unlock()
			serials = append(serials, d.Serial)
		})
	}
	wg.Wait()
	t.Logf("10 disks at once in %v", time.Since(begin).Round(time.Millisecond))
	full := false
	for i := 10; i < 200 && !full; i++ {
		d := plainDisk(t, dir, fmt.Sprintf("many-%d", i))
		err := vm.AddDisk(ctx, d)
		full = errdefs.IsResourceExhausted(err)
		if err != nil && !full {
			t.Fatal(err)
		}
		if err == nil {
			serials = append(serials, d.Serial)
		}
	}
	if !full {
		t.Error("200 disks do not exhaust the slots")
	}
	if len(serials) < 25 {
		t.Errorf("only %d disks fit", len(serials))
	}
	begin = time.Now()
	for _, serial := range serials {
		wg.Go(func() {
			if err := vm.RemoveDisk(ctx, serial); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	t.Logf("%d disks removed in %v", len(serials), time.Since(begin).Round(time.Millisecond))
}

// checkGuestSeesDisk lets the agent find and mount a hot-plugged disk by its serial.
func (s *suite) checkGuestSeesDisk(t *testing.T, vm vmruntime.VM, agent *agentproto.Client, dir string) {
	d := plainDisk(t, dir, "scratch")
	d.ReadOnly = false
	if out, err := exec.Command("mkfs.ext4", "-q", "-F", d.Path).CombinedOutput(); err != nil {
		t.Skipf("mkfs.ext4: %v: %s", err, out)
	}
	if err := vm.AddDisk(t.Context(), d); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	_, err := agent.SetupSandbox(ctx, &agentproto.SetupSandboxRequest{
		SandboxId: "contract", Hostname: "contract", UnixNanos: time.Now().UnixNano(),
		Entropy: make([]byte, 32), ScratchSerial: d.Serial, MachineId: strings.Repeat("0", 32),
		Interfaces: []*agentproto.Interface{{Name: "lo", Addresses: []string{"127.0.0.1/8"}}},
	})
	if err != nil {
		t.Errorf("the agent does not mount the disk: %v", err)
	}
}

func (s *suite) checkPause(t *testing.T, vm vmruntime.VM, agent *agentproto.Client) {
	if !s.RealGuest {
		for _, f := range []func(context.Context) error{vm.Pause, vm.Resume} {
			if err := f(t.Context()); err != nil {
				t.Error(err)
			}
		}
		return
	}
	if err := vm.Pause(t.Context()); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if _, err := agent.Ping(ctx, &agentproto.PingRequest{}); err == nil {
		t.Error("a paused guest answers")
	}
	if err := vm.Resume(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := agent.Ping(t.Context(), &agentproto.PingRequest{}); err != nil {
		t.Errorf("a resumed guest does not answer: %v", err)
	}
}

func (s *suite) testResize(t *testing.T) {
	driver, spec := s.spec(t)
	const mib = 1 << 20
	spec.VCPUs, spec.MaxVCPUs = 1, 2
	spec.MaxMemoryBytes = spec.MemoryBytes + 256*mib
	vm := s.start(t, driver, spec)
	agent := s.connect(t, vm)
	before, err := agent.Online(t.Context(), &agentproto.OnlineRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for name, size := range map[string]vmruntime.Size{
		"vCPUs":  {VCPUs: 3, MemoryBytes: spec.MemoryBytes},
		"memory": {VCPUs: 1, MemoryBytes: spec.MaxMemoryBytes + 2*mib},
	} {
		if _, err := vm.Resize(t.Context(), size); !errdefs.IsOutOfRange(err) {
			t.Errorf("%s beyond the ceiling: %v", name, err)
		}
	}
	want := vmruntime.Size{VCPUs: 2, MemoryBytes: spec.MemoryBytes + 128*mib}
	for range 2 { // idempotent
		got, err := vm.Resize(t.Context(), want)
		if err != nil || got != want {
			t.Fatalf("resize to %+v: %+v, %v", want, got, err)
		}
	}
	// The guest notices a little later than the VMM: whoever resizes asks it until it has.
	for limit := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
		after, err := agent.Online(t.Context(), &agentproto.OnlineRequest{})
		if err != nil {
			t.Fatal(err)
		}
		if after.Cpus == 2 && after.MemoryTotalBytes >= before.MemoryTotalBytes+100*mib {
			break
		}
		if time.Now().After(limit) || s.over(vm) {
			t.Fatalf("guest had %v, has %v", before, after)
		}
	}
	if got, err := vm.Resize(t.Context(), vmruntime.Size{}); err != nil || got != want {
		t.Errorf("size as it is: %+v, %v", got, err)
	}
	// Down again: memory as far as the guest lets go, vCPUs only where the VMM can.
	got, err := vm.Resize(t.Context(), vmruntime.Size{VCPUs: 1, MemoryBytes: spec.MemoryBytes})
	if err != nil || got.VCPUs < 1 || got.VCPUs > 2 || got.MemoryBytes < spec.MemoryBytes || got.MemoryBytes > want.MemoryBytes {
		t.Errorf("shrunk to %+v, %v", got, err)
	}
	if _, err := agent.Ping(t.Context(), &agentproto.PingRequest{}); err != nil {
		t.Error(err)
	}
}
