package virtiofsd

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

// isolated marks the process that TestMain has started in a mount namespace of its own.
const isolated = "VIRTIOFSD_TEST_ISOLATED"

func TestMain(m *testing.M) {
	if os.Geteuid() == 0 && os.Getenv(isolated) == "" {
		cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
		cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
		cmd.Env = append(os.Environ(), isolated+"=1")
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS, Pdeathsig: unix.SIGKILL}
		if err := cmd.Run(); err != nil {
			fmt.Fprintln(os.Stderr, "tests in a mount namespace:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	if os.Getenv(isolated) != "" {
		if err := unix.Mount("", "/", "", unix.MS_PRIVATE|unix.MS_REC, ""); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	goleak.VerifyTestMain(m)
}

// start starts a server; what the guest would see is in view.
func start(t *testing.T) (s *Server, view string) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("mount namespaces need root")
	}
	program, err := Find(t.Context())
	if err != nil {
		t.Skip(err)
	}
	dir, err := os.MkdirTemp("", "fs") // short, for the socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	s, err = Start(t.Context(), program, Spec{Dir: filepath.Join(dir, "d"), Client: 12345})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Kill(context.Background()); err != nil {
			t.Error(err)
		}
		if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
			t.Errorf("left are %v (%v)", left, err)
		}
	})
	return s, filepath.Join("/proc", fmt.Sprint(s.PID()), "root", s.root())
}

func open(t *testing.T, path string) *os.File {
	t.Helper()
	f, err := os.OpenFile(path, unix.O_PATH, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

func mountTmpfs(t *testing.T, path string) {
	t.Helper()
	if err := errors.Join(os.MkdirAll(path, 0o755), unix.Mount("tmpfs", path, "tmpfs", 0, "")); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(path, unix.MNT_DETACH) })
}

func writable(path string) bool {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE, 0o644)
	if err == nil {
		f.Close()
	}
	return err == nil
}

func TestAccess(t *testing.T) {
	s, view := start(t)
	host := t.TempDir()
	mountTmpfs(t, host)
	mountTmpfs(t, filepath.Join(host, "sub"))
	if err := os.WriteFile(filepath.Join(host, "file"), []byte("content"), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name     string
		access   Access
		top, sub bool // writable
	}{
		{"rw", Access{}, true, true},
		{"ro", Access{ReadOnly: true}, false, true},
		{"rro", Access{ReadOnly: true, Recursive: true}, false, false},
	} {
		for range 2 {
			if err := s.Add(c.name, open(t, host), c.access); err != nil {
				t.Fatal(err)
			}
		}
		if top, sub := writable(filepath.Join(view, c.name, "new")), writable(filepath.Join(view, c.name, "sub/new")); top != c.top || sub != c.sub {
			t.Errorf("%s: writable %v, below %v; want %v, %v", c.name, top, sub, c.top, c.sub)
		}
		if b, err := os.ReadFile(filepath.Join(view, c.name, "file")); string(b) != "content" {
			t.Errorf("%s: %q (%v)", c.name, b, err)
		}
	}
	if err := s.Add("file", open(t, filepath.Join(host, "file")), Access{ReadOnly: true}); err != nil {
		t.Fatal(err)
	}
	if writable(filepath.Join(view, "file")) {
		t.Error("a read-only file is writable")
	}
	if writable(filepath.Join(view, "intruder")) {
		t.Error("the root of the share is writable")
	}
	if err := unix.Mknod(filepath.Join(host, "null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))); err != nil {
		t.Fatal(err)
	}
	if !writable(filepath.Join(host, "null")) || writable(filepath.Join(view, "rw/null")) {
		t.Error("a device node of the host opens in the share")
	}
	for _, name := range []string{"../x", ".", "..", "a/b", ""} {
		if err := s.Add(name, open(t, host), Access{}); err == nil {
			t.Errorf("entry %q was made", name)
		}
	}
	if err := s.Add("null", open(t, "/dev/null"), Access{}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("adding a device: %v", err)
	}
	for range 2 {
		if err := s.Remove("rw"); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := os.Stat(filepath.Join(view, "rw")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a removed volume is still there (%v)", err)
	}
	if b, _ := os.ReadFile(filepath.Join(host, "file")); string(b) != "content" {
		t.Error("removing a volume removed what was in it")
	}
	if table, _ := os.ReadFile("/proc/self/mountinfo"); strings.Contains(string(table), s.dir) {
		t.Errorf("mounts of the share in the daemon's namespace: %s", table)
	}
}

func TestPropagation(t *testing.T) {
	s, view := start(t)
	host := t.TempDir()
	mountTmpfs(t, host)
	if err := unix.Mount("", host, "", unix.MS_SHARED, ""); err != nil {
		t.Fatal(err)
	}
	for name, access := range map[string]Access{"private": {}, "follow": {Follow: true}} {
		if err := s.Add(name, open(t, host), access); err != nil {
			t.Fatal(err)
		}
	}
	mountTmpfs(t, filepath.Join(host, "later"))
	if err := os.WriteFile(filepath.Join(host, "later/file"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(view, "follow/later/file")); err != nil {
		t.Errorf("a later mount does not appear: %v", err)
	}
	if _, err := os.Stat(filepath.Join(view, "private/later/file")); err == nil {
		t.Error("a later mount appears in a private volume")
	}
	// What is unmounted in the share stays on the host.
	if err := s.Remove("follow"); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(host, "later/file")); err != nil {
		t.Errorf("removing a volume unmounted on the host: %v", err)
	}
}

func TestAdopt(t *testing.T) {
	s, view := start(t)
	host := t.TempDir()
	if err := s.Add("v", open(t, host), Access{}); err != nil {
		t.Fatal(err)
	}
	for _, lose := range []bool{false, true} {
		if lose { // the daemon died between the start and the record
			if err := os.Remove(filepath.Join(s.root(), "vmm.json")); err != nil {
				t.Fatal(err)
			}
		}
		again, err := Adopt(s.dir)
		if err != nil || again.PID() != s.PID() {
			t.Fatalf("adopted %v (%v), want process %d", again, err, s.PID())
		}
		if err := again.Add("v", open(t, host), Access{}); err != nil {
			t.Error(err)
		}
		if err := again.Add("w", open(t, host), Access{ReadOnly: true}); err != nil || !writable(filepath.Join(view, "v/x")) || writable(filepath.Join(view, "w/x")) {
			t.Errorf("after adoption: %v", err)
		}
	}
	for range 2 {
		if err := Sweep(t.Context(), s.dir); err != nil {
			t.Fatal(err)
		}
	}
	select {
	case <-s.Done():
	case <-time.After(5 * time.Second):
		t.Fatal("a swept server runs on")
	}
	if s.Exit() != "killed by signal 9" {
		t.Errorf("exit is %q", s.Exit())
	}
	if _, err := Adopt(s.dir); !errdefs.IsNotFound(err) {
		t.Errorf("adopting a server that does not run: %v", err)
	}
	if _, err := os.Stat(filepath.Join(host, "x")); err != nil {
		t.Errorf("the volume's content went with the server: %v", err)
	}
}

func TestSocketIsTheClients(t *testing.T) {
	s, _ := start(t)
	var st unix.Stat_t
	if err := unix.Stat(s.Socket(), &st); err != nil || st.Uid != 12345 || st.Mode&0o777 != 0o600 {
		t.Errorf("socket is of %d, mode %o (%v)", st.Uid, st.Mode, err)
	}
	c, err := net.Dial("unix", s.Socket())
	if err != nil {
		t.Fatal(err)
	}
	c.Close() // a client that leaves ends the server, as a VMM does
	select {
	case <-s.Done():
	case <-time.After(10 * time.Second):
		t.Error("the server outlives its client")
	}
}

func TestFailedStart(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("mount namespaces need root")
	}
	dir := filepath.Join(t.TempDir(), "d")
	if _, err := Start(t.Context(), Program{Path: "/no/such/program"}, Spec{Dir: dir}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("error is %v", err)
	}
	if _, err := os.Stat(dir); err == nil {
		t.Error("a server that did not start left its directory")
	}
}
