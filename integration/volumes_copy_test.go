//go:build integration

package integration

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/client-go/tools/remotecommand"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// writeVolume changes a volume as kubelet's atomic writer does: a new directory, owners and modes in it, one rename of
// the link to it, links to new names; then names that are no more and the old directory go.
func writeVolume(t *testing.T, volume string, files map[string]string) (renamed time.Time) {
	t.Helper()
	if err := os.MkdirAll(volume, 0o755); err != nil {
		t.Fatal(err)
	}
	old, _ := os.Readlink(filepath.Join(volume, "..data"))
	stamped, err := os.MkdirTemp(volume, "..2026_11_21_21_00_00.")
	if err != nil {
		t.Fatal(err)
	}
	errs := []error{os.Chmod(stamped, 0o755)}
	for name, content := range files {
		path := filepath.Join(stamped, name)
		errs = append(errs, os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(content), 0o644), os.Chown(path, 0, 2000), os.Chmod(path, 0o640))
	}
	link := filepath.Join(volume, "..data_tmp")
	errs = append(errs, os.Symlink(filepath.Base(stamped), link))
	renamed = time.Now()
	errs = append(errs, os.Rename(link, filepath.Join(volume, "..data")))
	keep := map[string]bool{"..data": true}
	for name := range files {
		first, _, _ := strings.Cut(name, "/")
		keep[first] = true
		if err := os.Symlink(filepath.Join("..data", first), filepath.Join(volume, first)); !errors.Is(err, fs.ErrExist) {
			errs = append(errs, err)
		}
	}
	names, err := os.ReadDir(volume)
	errs = append(errs, err)
	for _, e := range names {
		if e.Type() == fs.ModeSymlink && !keep[e.Name()] {
			errs = append(errs, os.Remove(filepath.Join(volume, e.Name())))
		}
	}
	if old != "" {
		errs = append(errs, os.RemoveAll(filepath.Join(volume, old)))
	}
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
	return renamed
}

// kubelet lays out what kubelet does for a pod, below a directory of the test's.
type kubelet struct {
	t    *testing.T
	p    *pod
	dir  string // pods/UID
	logs int
}

func newKubelet(t *testing.T, p *pod) *kubelet {
	return &kubelet{t: t, p: p, dir: filepath.Join(t.TempDir(), "pods", p.config.Metadata.Uid)}
}

func (k *kubelet) volume(plugin, name string) string {
	return filepath.Join(k.dir, "volumes", "kubernetes.io~"+plugin, name)
}

// ordinary is what every container of every pod gets: a token, a hosts file and a termination log.
func (k *kubelet) ordinary(log *string) func(*cri.ContainerConfig) {
	k.t.Helper()
	token, hosts := k.volume("projected", "kube-api-access-x"), filepath.Join(k.dir, "etc-hosts")
	if _, err := os.Stat(token); errors.Is(err, fs.ErrNotExist) {
		mountTmpfs(k.t, token)
		if err := os.Chmod(token, 0o777|os.ModeSetgid|os.ModeSticky); err != nil {
			k.t.Fatal(err)
		}
		writeVolume(k.t, token, map[string]string{"token": "first", "ca.crt": "ca", "namespace": "test"})
	}
	writeFile(k.t, hosts, "# Kubernetes-managed hosts file.\n127.0.0.1\tlocalhost\n")
	k.logs++
	*log = filepath.Join(k.dir, "containers", "c", fmt.Sprintf("%08x", k.logs))
	writeFile(k.t, *log, "")
	if err := os.Chmod(*log, 0o666); err != nil {
		k.t.Fatal(err)
	}
	return func(c *cri.ContainerConfig) {
		c.Annotations = map[string]string{"io.kubernetes.container.terminationMessagePath": "/dev/termination-log"}
		c.Mounts = append(c.Mounts,
			&cri.Mount{ContainerPath: "/var/run/secrets/kubernetes.io/serviceaccount", HostPath: token, Readonly: true},
			&cri.Mount{ContainerPath: "/etc/hosts", HostPath: hosts}, &cri.Mount{ContainerPath: "/dev/termination-log", HostPath: *log})
	}
}

func standinImage(args ...string) func(*cri.ContainerConfig) {
	return func(c *cri.ContainerConfig) {
		c.Image, c.Command = &cri.ImageSpec{Image: standin}, append([]string{"/usr/sbin/nginx"}, args...)
	}
}

// says waits until a container has logged a line.
func (p *pod) says(id, line string) {
	p.t.Helper()
	eventually(p.t, 60*time.Second, "container says "+line, func() error {
		if log := p.logText(id); !strings.Contains(log, line+"\n") {
			return fmt.Errorf("log is %.2000q", log)
		}
		return nil
	})
}

// What kubelet writes for an ordinary pod is in the guest as it is on the host, follows it with events, needs no file
// server, and comes back as a termination message.
func TestKubeletVolumes(t *testing.T) {
	p := runPod(t, shared)
	k := newKubelet(t, p)
	cm, secret, optional := k.volume("configmap", "cm"), k.volume("secret", "s"), k.volume("configmap", "optional")
	large := strings.Repeat("0123456789abcdef", 1<<16)
	writeVolume(t, cm, map[string]string{"key": "one", "dir/key": "deep", "a": large, "b": large, "c": large})
	writeVolume(t, optional, nil)
	mountTmpfs(t, secret)
	writeVolume(t, secret, map[string]string{"password": "secret"})
	if err := os.MkdirAll(filepath.Join(cm, "nested"), 0o755); err != nil { // kubelet makes the places for mounts
		t.Fatal(err)
	}
	bound, boundSecret := filepath.Join(k.dir, "volume-subpaths/cm/c/0"), filepath.Join(k.dir, "volume-subpaths/s/c/1")
	for to, from := range map[string]string{bound: filepath.Join(cm, "key"), boundSecret: filepath.Join(secret, "password")} {
		writeFile(t, to, "")
		if err := unix.Mount(from, to, "", unix.MS_BIND, ""); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := unix.Unmount(to, unix.MNT_DETACH); err != nil {
				t.Error(err)
			}
		})
	}
	var log, watcherLog string
	ms := mounts(
		&cri.Mount{ContainerPath: "/cm", HostPath: cm, Readonly: true}, &cri.Mount{ContainerPath: "/cm/nested", HostPath: secret, Readonly: true},
		&cri.Mount{ContainerPath: "/again", HostPath: cm, Readonly: true}, &cri.Mount{ContainerPath: "/optional", HostPath: optional, Readonly: true},
		&cri.Mount{ContainerPath: "/sub/key", HostPath: bound, Readonly: true},
		&cri.Mount{ContainerPath: "/sub/password", HostPath: boundSecret, Readonly: true},
	)
	watcher := p.start("", standinImage("events", "/cm"), ms, k.ordinary(&watcherLog))
	p.says(watcher, "watching")
	const token = "/var/run/secrets/kubernetes.io/serviceaccount/"
	id := p.start(`
want() { [ "$2" = "$3" ] || echo "FAIL $1: $2, not $3"; }
want content "$(cat /cm/key /cm/dir/key /again/key /cm/nested/password /sub/key /sub/password `+token+`token)" "onedeeponesecretonesecretfirst"
want "memory and no disk" "$(grep -c -E '^tmpfs (/cm|/cm/nested|/again|/optional|/sub/key|/sub/password|/var/run/secrets/kubernetes.io/serviceaccount|/etc/hosts) tmpfs ' /proc/self/mounts)" 8
want size "$(cat /cm/a /cm/b /cm/c | wc -c)" 3145728
want mode "$(stat -L -c %u:%g:%a /cm/key)" 0:2000:640
want "mode of the volume" "$(stat -c %a `+token+`)" 3777
want link "$(readlink /cm/key)" ..data/key
want empty "$(ls /optional)" ""
want hosts "$(grep -c Kubernetes-managed /etc/hosts)" 1
echo mine >> /etc/hosts
(echo x > /cm/new) 2>/dev/null && echo FAIL writable
(echo x > /cm/key) 2>/dev/null && echo FAIL file writable
grep -q virtiofs /proc/self/mountinfo && echo FAIL virtiofs
while [ "$(cat /cm/key)" = one ]; do sleep 0.05; done
want all "$(cat /cm/key /again/key /sub/key)" twotwoone
ls /cm/c 2>/dev/null && echo FAIL not removed
while [ "$(cat `+token+`token)" = first ]; do sleep 0.05; done
want token "$(cat `+token+`token)" second
while ! grep -q rewritten /etc/hosts; do sleep 0.05; done
want message "$(cat /dev/termination-log)" ""
head -c 100000 /dev/zero | tr '\0' x > /dev/termination-log
echo last words >> /dev/termination-log
echo done
exit 3`, ms, k.ordinary(&log))
	eventually(t, time.Minute, "the container has looked", func() error {
		if out := p.exec(id, "cat", "/etc/hosts"); !strings.Contains(out, "mine\n") {
			return fmt.Errorf("hosts file is %q", out)
		}
		return nil
	})
	writeVolume(t, cm, map[string]string{"key": "two", "dir/key": "deeper", "a": large, "b": large, "new": "new"})
	p.says(watcher, "event ..data two")
	p.says(watcher, "event new two")
	writeVolume(t, k.volume("projected", "kube-api-access-x"), map[string]string{"token": "second", "ca.crt": "ca", "namespace": "test"})
	writeFile(t, filepath.Join(k.dir, "etc-hosts"), "# rewritten\n")
	s := p.wait(id)
	// The content is there as soon as the container is EXITED.
	message, err := os.ReadFile(log)
	if err != nil || len(message) > 16<<10 || !strings.HasSuffix(string(message), "xlast words\n") {
		t.Errorf("termination log has %d bytes and ends with %q (%v)", len(message), message[max(0, len(message)-20):], err)
	}
	if out := p.logText(id); s.ExitCode != 3 || out != "done\n" {
		t.Errorf("container says %q, exit code %d", out, s.ExitCode)
	}
	events := strings.Split(strings.TrimSpace(p.logText(watcher)), "\n")
	if n := len(slices.DeleteFunc(slices.Clone(events), func(e string) bool { return e != "event ..data two" })); n != 1 {
		t.Errorf("%d swaps; events are %q", n, events)
	}
	for _, path := range []string{cm, filepath.Join(k.dir, "etc-hosts")} {
		if b, _ := os.ReadFile(path); strings.Contains(string(b), "mine") {
			t.Errorf("%s has what the container wrote", path)
		}
	}

	// A daemon that comes back brings what it has missed, and hears of what comes.
	if err := shared.KillDaemon(); err != nil {
		t.Fatal(err)
	}
	writeVolume(t, cm, map[string]string{"key": "while it was down"})
	if err := shared.StartDaemon(testContext(t, 2*time.Minute)); err != nil {
		t.Fatal(err)
	}
	p.says(watcher, "event ..data while it was down")
	writeVolume(t, cm, map[string]string{"key": "after the restart"})
	p.says(watcher, "event ..data after the restart")
	if pids := fileServers(t, p); len(pids) > 0 {
		t.Errorf("an ordinary pod has file servers %v", pids)
	}
}

// A termination log is on the host when its container is EXITED, however that comes about.
func TestTerminationLog(t *testing.T) {
	p := runPod(t, shared)
	k := newKubelet(t, p)
	var killed, stopped, down, failed, silent string
	a := p.start("echo killed > /dev/termination-log; exec sleep 1000", k.ordinary(&killed))
	b := p.start("trap 'echo stopped > /dev/termination-log; exit 0' TERM; echo set; while :; do sleep 0.1; done", k.ordinary(&stopped))
	c := p.start("echo down > /dev/termination-log; sleep 6; exit 4", k.ordinary(&down))
	d := p.start("echo failed > /dev/termination-log; exit 1", k.ordinary(&failed))
	e := p.start("echo why it failed >&2; exit 5", k.ordinary(&silent))
	ready := func(id string) {
		t.Helper()
		eventually(t, time.Minute, "the container runs", func() error {
			_, _, err := shared.Runtime.ExecSync(t.Context(), id, []string{"true"}, 30*time.Second)
			return err
		})
	}
	if s := p.wait(d); s.ExitCode != 1 {
		t.Errorf("exit code %d", s.ExitCode)
	}
	wantFile(t, failed, "failed\n")
	// FallbackToLogsOnError is kubelet's: it finds the file by the status, and when nobody has written to it, it shows the log's end.
	s := p.wait(e)
	wantFile(t, silent, "")
	if out := p.logText(e); s.ExitCode != 5 || s.Message != "" || out != "why it failed\n" || !slices.ContainsFunc(s.Mounts, func(m *cri.Mount) bool {
		return m.ContainerPath == "/dev/termination-log" && m.HostPath == silent
	}) {
		t.Errorf("a container without a last message: log %q, status %v", out, s)
	}
	ready(a)
	eventually(t, time.Minute, "the log is written", func() error {
		if out := p.exec(a, "cat", "/dev/termination-log"); out != "killed\n" {
			return fmt.Errorf("log is %q", out)
		}
		return nil
	})
	wantFile(t, killed, "") // a file of the guest until then
	if err := shared.Runtime.StopContainer(testContext(t, time.Minute), a, 0); err != nil {
		t.Error(err)
	}
	p.wait(a)
	wantFile(t, killed, "killed\n")
	p.says(b, "set")
	if err := shared.Runtime.StopContainer(testContext(t, time.Minute), b, 20); err != nil {
		t.Error(err)
	}
	p.wait(b)
	wantFile(t, stopped, "stopped\n")
	// This one ends by itself, while no daemon is there or soon after.
	if err := shared.KillDaemon(); err != nil {
		t.Fatal(err)
	}
	if err := shared.StartDaemon(testContext(t, 2*time.Minute)); err != nil {
		t.Fatal(err)
	}
	if s := p.wait(c); s.ExitCode != 4 {
		t.Errorf("exit code %d", s.ExitCode)
	}
	wantFile(t, down, "down\n")
	if pids := fileServers(t, p); len(pids) > 0 {
		t.Errorf("file servers %v", pids)
	}
}

// A hundred volumes in one container, all of them followed.
func TestManyCopies(t *testing.T) {
	parallel(t)
	p := runPod(t, shared)
	k := newKubelet(t, p)
	var ms []*cri.Mount
	for i := range 100 {
		volume := k.volume("configmap", fmt.Sprint("cm", i))
		writeVolume(t, volume, map[string]string{"key": "old", fmt.Sprint("file", i): strings.Repeat("x", 1000*i)})
		ms = append(ms, &cri.Mount{ContainerPath: fmt.Sprint("/v/", i), HostPath: volume, Readonly: true})
	}
	start := time.Now()
	id := p.start("sleep 1000", mounts(ms...))
	t.Logf("container with 100 volumes: %s", time.Since(start))
	if out := p.exec(id, "sh", "-c", "cat /v/*/file* | wc -c"); out != "4950000\n" {
		t.Errorf("all files have %q bytes", out)
	}
	start = time.Now()
	for i := range 20 {
		writeVolume(t, k.volume("configmap", fmt.Sprint("cm", 5*i)), map[string]string{"key": "new"})
	}
	eventually(t, time.Minute, "all are new", func() error {
		out, _, err := shared.Runtime.ExecSync(t.Context(), id, []string{"sh", "-c", "cat /v/*/key"}, 30*time.Second)
		if strings.Count(string(out), "new") != 20 {
			return fmt.Errorf("keys are %q (%w)", out, err)
		}
		return nil
	})
	t.Logf("20 of them changed and seen: %s", time.Since(start))
}

// From kubelet's rename of ..data to the event in a container, beside one round trip to the same program. Both ends
// are times of the host: those of the log are when a line arrived.
func TestCopyLatency(t *testing.T) {
	p := runPod(t, shared)
	k := newKubelet(t, p)
	cm := k.volume("configmap", "cm")
	writeVolume(t, cm, map[string]string{"key": "start"})
	id := p.start("", standinImage("events", "/cm"), mounts(&cri.Mount{ContainerPath: "/cm", HostPath: cm, Readonly: true}), func(c *cri.ContainerConfig) { c.Stdin = true })
	p.says(id, "watching")
	resp, err := shared.Runtime.Attach(t.Context(), &cri.AttachRequest{ContainerId: id, Stdin: true, Stdout: true, Stderr: true})
	if err != nil {
		t.Fatal(err)
	}
	input, typed := io.Pipe()
	done := make(chan error, 1)
	ctx, detach := context.WithCancel(testContext(t, 5*time.Minute))
	defer detach()
	go func() {
		done <- executors(t, resp.Url)["SPDY"].StreamWithContext(ctx, remotecommand.StreamOptions{Stdin: input, Stdout: io.Discard, Stderr: io.Discard})
	}()
	const rounds = 60
	var trips, changes []time.Duration
	arrived := func(line string) time.Time {
		t.Helper()
		var at time.Time
		eventually(t, time.Minute, line, func() error {
			text, err := os.ReadFile(p.logPath(id))
			if err != nil {
				return err
			}
			for entry := range strings.Lines(string(text)) {
				if fields := strings.SplitN(strings.TrimSuffix(entry, "\n"), " ", 4); len(fields) == 4 && fields[3] == line {
					at, err = time.Parse(time.RFC3339Nano, fields[0])
					return err
				}
			}
			return errors.New("no such line")
		})
		return at
	}
	trip := func(line string) time.Duration {
		start := time.Now()
		fmt.Fprintln(typed, line)
		return arrived("echo " + line).Sub(start)
	}
	// Some seconds after a pod's first volume the agent rehearses a change; until then trips that do not count are made.
	for i, settled := 0, time.Now().Add(4*time.Second); time.Now().Before(settled); i++ {
		trip(fmt.Sprint("warm-up ", i))
	}
	for i := range rounds {
		trips = append(trips, trip(fmt.Sprint(i)))
		start := writeVolume(t, cm, map[string]string{"key": fmt.Sprint("change", i)})
		changes = append(changes, arrived(fmt.Sprint("event ..data change", i)).Sub(start))
	}
	detach()
	<-done
	quantile := func(d []time.Duration, q float64) time.Duration {
		slices.Sort(d)
		return d[min(len(d)-1, int(q*float64(len(d))))].Round(100 * time.Microsecond)
	}
	above := quantile(changes, 0.99) - quantile(trips, 0.99)
	verdict := "met"
	if above > 50*time.Millisecond {
		verdict = "missed"
	}
	t.Logf("%d changes of a ConfigMap, from the rename to the event: p50 %s, p99 %s; round trips: p50 %s, p99 %s; bar: p99 at most 50ms above a round trip's: %s above, %s", rounds,
		quantile(changes, 0.5), quantile(changes, 0.99), quantile(trips, 0.5), quantile(trips, 0.99), above, verdict)
	if p50 := quantile(changes, 0.5) - quantile(trips, 0.5); p50 > 5*time.Second {
		t.Errorf("half of all changes take %s above a round trip", p50)
	}
}
