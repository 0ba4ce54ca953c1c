package main

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

func sortByName(lines []string) {
	slices.SortFunc(lines, func(a, b string) int { return strings.Compare(a[7:], b[7:]) })
}

// kill ends a random part every few seconds until the workers are done; the last minute's lives are left alone.
func (s *soaking) kill(ctx context.Context, over <-chan struct{}) {
	random := s.random(1000)
	for {
		wait := time.NewTimer(time.Duration(random.Int64N(int64(2 * s.pause))))
		select {
		case <-over:
			wait.Stop()
			return
		case <-ctx.Done():
			wait.Stop()
			return
		case <-wait.C:
		}
		if time.Now().After(s.end) {
			continue
		}
		switch pick := random.IntN(10); {
		case pick < 6 && !s.moves():
		case pick < 4:
			s.restart(ctx, "crivm SIGKILL", s.n.KillDaemon, random)
		case pick < 6:
			s.restart(ctx, "crivm SIGTERM", s.n.StopDaemon, random)
		case pick < 7:
			s.hit(ctx, random, "VMM SIGKILL", func(l *life) error { return s.signal("vm/"+l.short(), syscall.SIGKILL) })
		case pick < 8:
			s.hit(ctx, random, "virtiofsd SIGKILL", func(l *life) error { return s.signal("fs/"+l.short(), syscall.SIGKILL) })
		case pick < 9: // the guest's agent cannot be killed but with its kernel
			s.hit(ctx, random, "guest panic", func(l *life) error { return s.sysrq(ctx, l, "c") })
		default:
			s.hit(ctx, random, "guest hangs", func(l *life) error { return s.signal("vm/"+l.short(), syscall.SIGSTOP) })
		}
	}
}

// moves tells whether anything has come of a life since crivm was last ended: a crivm that never lives long enough for a
// boot, as on a busy machine, is not what is tried here. Once in between it is ended all the same.
func (s *soaking) moves() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.progress == 0 && s.barren {
		return false
	}
	s.barren, s.progress = s.progress == 0, 0
	return true
}

// restart ends crivm and starts it again, sometimes after a while.
func (s *soaking) restart(ctx context.Context, what string, end func() error, random *rand.Rand) {
	s.setUp(false)
	defer s.setUp(true)
	if err := end(); err != nil {
		s.fail(fmt.Errorf("%s: %w", what, err))
	}
	s.count("kills: " + what)
	if random.IntN(4) == 0 {
		time.Sleep(time.Duration(random.IntN(3000)) * time.Millisecond)
	}
	if err := s.n.StartDaemon(ctx); err != nil && ctx.Err() == nil {
		s.fail(fmt.Errorf("crivm does not start again: %w", err))
	}
}

// hit kills a part of a random pod, which is told before.
func (s *soaking) hit(_ context.Context, random *rand.Rand, what string, kill func(*life) error) {
	s.mu.Lock()
	var ids []string
	for id, l := range s.pods {
		if l.hit == "" {
			ids = append(ids, id)
		}
	}
	if len(ids) == 0 {
		s.mu.Unlock()
		return
	}
	slices.Sort(ids)
	l := s.pods[ids[random.IntN(len(ids))]]
	l.hit = what
	s.mu.Unlock()
	if err := kill(l); err != nil {
		s.count("kills that missed")
		s.mu.Lock()
		l.hit = ""
		s.mu.Unlock()
		return
	}
	s.count("kills: " + what)
}

// signal finds the session leader that works for a directory of this node, and signals it.
func (s *soaking) signal(dir string, sig syscall.Signal) error {
	path := filepath.Join(s.n.RunDir, dir)
	procs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return err
	}
	for _, proc := range procs {
		line, err := os.ReadFile(filepath.Join(proc, "cmdline"))
		cwd, _ := os.Readlink(filepath.Join(proc, "cwd"))
		if err != nil || !bytes.Contains(line, []byte(path)) || !strings.HasPrefix(cwd, path) {
			continue
		}
		pid, err := strconv.Atoi(filepath.Base(proc))
		if err != nil {
			continue
		}
		return syscall.Kill(pid, sig)
	}
	return fmt.Errorf("nothing runs for %s", path)
}

// sysrq has a privileged container of the pod press a key. An error when it could not, as when the container has just been
// stopped: crivm then says that nothing was run.
func (s *soaking) sysrq(ctx context.Context, l *life, key string) error {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	s.mu.Lock()
	id := l.writer
	s.mu.Unlock()
	_, _, err := s.n.Runtime.ExecSync(ctx, id, []string{"sh", "-c", "echo " + key + " >/proc/sysrq-trigger"}, 10*time.Second)
	switch status.Code(err) {
	case codes.OK, codes.FailedPrecondition, codes.NotFound:
		return fmt.Errorf("the guest survived: %v", err)
	}
	return nil
}
