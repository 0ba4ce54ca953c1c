package guest

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

func testReaper(t *testing.T, all bool) *Reaper {
	t.Helper()
	r, err := NewReaper(all)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.Close)
	return r
}

// orphan runs a shell that leaves a process behind, which exits with code as soon as the shell is gone.
func orphan(t *testing.T, r *Reaper, code int) (pid int) {
	t.Helper()
	pids, out, err := outputPipe("pids")
	if err != nil {
		t.Fatal(err)
	}
	defer pids.Close()
	gate, open, err := inputPipe()
	if err != nil {
		t.Fatal(err)
	}
	defer open.Close()
	script := fmt.Sprintf("{ read x <&3; exit %d; } >/dev/null & echo $!", code)
	shell, err := r.Start(Command{Path: "/bin/sh", Args: []string{"-c", script}, Files: []*os.File{nil, out, nil, gate}})
	out.Close()
	gate.Close()
	if err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(pids).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	<-shell.Done()
	pid, err = strconv.Atoi(strings.TrimSpace(line))
	if err != nil {
		t.Fatal(err)
	}
	return pid
}

// Exits are handed over whether they come before or after a process is adopted.
func TestReaperAdopts(t *testing.T) {
	for _, all := range []bool{true, false} {
		t.Run(fmt.Sprint("all=", all), func(t *testing.T) {
			r := testReaper(t, all)
			var wg sync.WaitGroup
			for i := range 40 {
				wg.Go(func() {
					pid := orphan(t, r, i)
					if i%2 == 0 && all { // surely too late
						eventually(t, func() bool { return errors.Is(unix.Kill(pid, 0), unix.ESRCH) })
					}
					child, err := r.Adopt(pid)
					if err != nil {
						t.Errorf("adopt: %v", err)
						return
					}
					<-child.Done()
					if !child.Status().Exited() || child.Status().ExitStatus() != i {
						t.Errorf("status %v, want exit %d", child.Status(), i)
					}
				})
			}
			wg.Wait()
			if _, err := r.Adopt(1 << 22); !errdefs.IsNotFound(err) {
				t.Errorf("process that never was: %v", err)
			}
		})
	}
}

func TestReaperKeepsFewExits(t *testing.T) {
	r := testReaper(t, true)
	r.mu.Lock()
	for pid := range 3 * keptExits {
		r.keepLocked(1<<23+pid, 0)
	}
	kept, order := len(r.exits), len(r.order)
	r.mu.Unlock()
	if kept != keptExits || order != keptExits {
		t.Errorf("keeps %d exits in order of %d", kept, order)
	}
}

func TestReaperRun(t *testing.T) {
	r := testReaper(t, false)
	if status, err := r.Run(t.Context(), Command{Path: "/bin/sh", Args: []string{"-c", "exit 6"}}); err != nil || status.ExitStatus() != 6 {
		t.Errorf("status %v, %v", status, err)
	}
	if _, err := r.Run(t.Context(), Command{Path: "/no/such"}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("program that is not there: %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	status, err := r.Run(ctx, Command{Path: "/bin/sleep", Args: []string{"1000"}})
	if !errors.Is(err, context.DeadlineExceeded) || status.Signal() != unix.SIGKILL {
		t.Errorf("program that takes too long: %v, %v", status, err)
	}
	child, err := r.Start(Command{Path: "/bin/true"})
	if err != nil {
		t.Fatal(err)
	}
	<-child.Done()
	if r.Signal(child, unix.SIGKILL) {
		t.Error("signalled a process that is gone")
	}
}
