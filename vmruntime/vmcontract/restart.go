package vmcontract

import (
	"bufio"
	"context"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/crivm/crivm/agentproto"
	"github.com/crivm/crivm/vmruntime"
)

// daemonReady is what the child says when its VM is as the tests want it.
const daemonReady = "VMCONTRACT READY"

// daemon is the process that starts a VM, plugs a disk, has streams open, and is then killed.
func (s *suite) daemon(t *testing.T, dir string) {
	driver, spec := s.New(t)
	spec.ID, spec.Dir = "daemon", dir
	spec.Process.Cgroup = cgroup("daemon")
	ctx, cancel := context.WithTimeout(t.Context(), s.Boot)
	defer cancel()
	vm, err := driver.Start(ctx, spec)
	if err != nil {
		t.Fatal(err)
	}
	agent, err := agentproto.Connect(ctx, vm)
	if err != nil {
		t.Fatal(err)
	}
	if err := vm.AddDisk(ctx, plainDisk(t, dir, "kept")); err != nil {
		t.Fatal(err)
	}
	// Die in the middle of traffic.
	go func() {
		for {
			if _, err := agent.Ping(context.Background(), &agentproto.PingRequest{}); err != nil {
				return
			}
		}
	}()
	os.Stdout.WriteString("\n" + daemonReady + "\n")
	time.Sleep(10 * time.Minute) // until killed
}

// deadDaemon runs the child until it has its VM, and kills it.
func (s *suite) deadDaemon(t *testing.T, spec *vmruntime.Spec) {
	t.Helper()
	spec.ID = "daemon"
	spec.Process.Cgroup = cgroup("daemon")
	cmd := exec.Command(os.Args[0], "-test.run=^"+s.top+"$", "-test.v", "-test.timeout=10m")
	cmd.Env = append(os.Environ(), childEnv+"="+spec.Dir)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	timer := time.AfterFunc(s.Boot, func() { _ = cmd.Process.Kill() })
	var said strings.Builder
	ready := false
	for sc := bufio.NewScanner(out); !ready && sc.Scan(); {
		ready = sc.Text() == daemonReady
		said.WriteString(sc.Text() + "\n")
	}
	timer.Stop()
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait() // killed
	if !ready {
		t.Fatalf("the daemon got no VM: %s", said.String())
	}
}

func (s *suite) testDaemonDies(t *testing.T) {
	driver, spec := s.spec(t)
	s.deadDaemon(t, &spec)
	vm, err := driver.Reattach(t.Context(), spec.ID, spec.Dir)
	if err != nil {
		t.Fatal(err)
	}
	defer kill(t, vm)
	begin := time.Now()
	agent := s.connect(t, vm)
	t.Logf("agent answers a new daemon after %v", time.Since(begin).Round(time.Millisecond))
	boot := agent.Info().GetBootId()
	if boot == "" {
		t.Error("no boot id")
	}
	// What is plugged is known.
	disk := plainDisk(t, spec.Dir, "kept")
	if err := vm.AddDisk(t.Context(), disk); err != nil {
		t.Errorf("same disk again: %v", err)
	}
	other := disk
	other.ReadOnly = !other.ReadOnly
	if err := vm.AddDisk(t.Context(), other); !errdefs.IsAlreadyExists(err) {
		t.Errorf("another disk with its serial: %v", err)
	}
	for range 2 {
		if err := vm.RemoveDisk(t.Context(), disk.Serial); err != nil {
			t.Errorf("remove: %v", err)
		}
	}
	if err := vm.AddDisk(t.Context(), plainDisk(t, spec.Dir, "new")); err != nil {
		t.Errorf("new disk: %v", err)
	}
	// The end of an adopted VM is seen as well.
	if err := unix.Kill(vm.PID(), unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if e := within(t, vm, endSeen); e.Reason == "" {
		t.Errorf("exit %+v", e)
	}
	s.checkDead(t, vm)
	kill(t, vm)
	nothingLeft(t, spec)
}

func (s *suite) testDaemonAndVMDie(t *testing.T) {
	driver, spec := s.spec(t)
	s.deadDaemon(t, &spec)
	vm, err := driver.Reattach(t.Context(), spec.ID, spec.Dir)
	if err != nil {
		t.Fatal(err)
	}
	pid := vm.PID()
	if err := unix.Kill(pid, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	within(t, vm, endSeen)
	for range 2 {
		if again, err := driver.Reattach(t.Context(), spec.ID, spec.Dir); !errdefs.IsNotFound(err) {
			t.Errorf("reattach to a dead VM: %v, %v", again, err)
		}
		nothingLeft(t, spec)
	}
}
