package server

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// writeVolume changes a volume as kubelet does: a new directory, one rename of the link to it, new names, and
// then what is no more goes.
func writeVolume(t testing.TB, volume string, files map[string]string) {
	t.Helper()
	if err := os.MkdirAll(volume, 0o755); err != nil {
		t.Fatal(err)
	}
	old, _ := os.Readlink(filepath.Join(volume, dataLink))
	os.Remove(filepath.Join(volume, "..data_tmp"))
	stamped, err := os.MkdirTemp(volume, "..2026_11_21_")
	if err != nil {
		t.Fatal(err)
	}
	errs := []error{os.Chmod(stamped, 0o755)}
	for name, content := range files {
		path := filepath.Join(stamped, name)
		errs = append(errs, os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(content), 0o644))
	}
	tmp := filepath.Join(volume, "..data_tmp")
	errs = append(errs, os.Symlink(filepath.Base(stamped), tmp), os.Rename(tmp, filepath.Join(volume, dataLink)))
	keep := map[string]bool{}
	for name := range files {
		first, _, _ := strings.Cut(name, "/")
		keep[first] = true
		if err := os.Symlink(filepath.Join(dataLink, first), filepath.Join(volume, first)); !errors.Is(err, fs.ErrExist) {
			errs = append(errs, err)
		}
	}
	names, err := os.ReadDir(volume)
	errs = append(errs, err)
	for _, e := range names {
		if !keep[e.Name()] && e.Type() == fs.ModeSymlink && e.Name() != dataLink {
			errs = append(errs, os.Remove(filepath.Join(volume, e.Name())))
		}
	}
	if old != "" {
		errs = append(errs, os.RemoveAll(filepath.Join(volume, old)))
	}
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
}

// kubeletVolume is where kubelet has a volume of the rig's pods.
func (r *rig) kubeletVolume(plugin, name string) string {
	return filepath.Join(r.dir, "pods/u/volumes/kubernetes.io~"+plugin, name)
}

// inGuest is where the agent of a pod's fake guest has the copy of a host path.
func (r *rig) inGuest(pod, host string) string {
	r.t.Helper()
	rec, err := r.store.Sandbox(pod)
	if err != nil {
		r.t.Fatal(err)
	}
	return filepath.Join(rec.VMDir, "run/guest/agent/volumes/copies", copyName(host), "content")
}

func (r *rig) createMounting(pod, name string, ms ...*cri.Mount) string {
	r.t.Helper()
	req := r.createRequest(pod, name, "exec sleep 1000")
	req.Config.Mounts = ms
	resp, err := r.CreateContainer(r.t.Context(), req)
	if err != nil {
		r.t.Fatal(err)
	}
	return resp.GetContainerId()
}

// becomes waits until a file has the content.
func becomes(t testing.TB, path, content string) {
	t.Helper()
	deadline := time.Now().Add(30 * time.Second)
	for {
		b, err := os.ReadFile(path)
		if string(b) == content && err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s is %.100q (%v), want %.100q", path, b, err, content)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func TestCopiesFollowTheHost(t *testing.T) {
	r := newRig(t)
	pod := r.runPod("a")
	cm, hosts := r.kubeletVolume("configmap", "cm"), filepath.Join(r.dir, "pods/u/etc-hosts")
	writeVolume(t, cm, map[string]string{"key": "one", "dir/key": "deep", "large": strings.Repeat("0123456789abcdef", 3<<16)})
	if err := os.WriteFile(hosts, []byte("127.0.0.1 localhost\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	ms := []*cri.Mount{
		{ContainerPath: "/cm", HostPath: cm, Readonly: true}, {ContainerPath: "/again", HostPath: cm, Readonly: true}, {ContainerPath: "/etc/hosts", HostPath: hosts},
	}
	first := r.createMounting(pod, "first", ms...)
	guest := r.inGuest(pod, cm)
	becomes(t, filepath.Join(guest, "key"), "one")
	becomes(t, filepath.Join(guest, "dir/key"), "deep")
	becomes(t, r.inGuest(pod, hosts), "127.0.0.1 localhost\n")
	if b, err := os.ReadFile(filepath.Join(guest, "large")); string(b) != strings.Repeat("0123456789abcdef", 3<<16) {
		t.Errorf("a large file has %d bytes (%v)", len(b), err)
	}
	for i := range 20 {
		content := fmt.Sprint("change ", i)
		writeVolume(t, cm, map[string]string{"key": content, fmt.Sprint("new", i): ""})
		becomes(t, filepath.Join(guest, "key"), content)
		becomes(t, filepath.Join(guest, fmt.Sprint("new", i)), "")
	}
	eventuallyGone(t, filepath.Join(guest, "new18"))
	if err := os.WriteFile(hosts, []byte("10.0.0.1 other\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	becomes(t, r.inGuest(pod, hosts), "10.0.0.1 other\n")
	if err := os.Chmod(filepath.Join(cm, "key"), 0o400); err != nil { // through the link
		t.Fatal(err)
	}
	within(t, "mode of a file", func() bool {
		info, err := os.Stat(filepath.Join(guest, "key"))
		return err == nil && info.Mode().Perm() == 0o400
	})

	// A second container has the same copy, and it stays until both are gone, over restarts with changes.
	second := r.createMounting(pod, "second", ms[:1]...)
	if entries, err := os.ReadDir(filepath.Dir(filepath.Dir(guest))); len(entries) != 2 {
		t.Errorf("there are copies %v (%v), want 2", entries, err)
	}
	r.stop()
	writeVolume(t, cm, map[string]string{"key": "while it was down"})
	r.start()
	becomes(t, filepath.Join(guest, "key"), "while it was down")
	r.restart()
	writeVolume(t, cm, map[string]string{"key": "after a restart"})
	becomes(t, filepath.Join(guest, "key"), "after a restart")
	r.remove(first)
	if _, err := os.Stat(guest); err != nil {
		t.Errorf("a copy that is mounted: %v", err)
	}
	if _, err := os.Stat(r.inGuest(pod, hosts)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a copy that nobody mounts: %v", err)
	}
	writeVolume(t, cm, map[string]string{"key": "for the second"})
	becomes(t, filepath.Join(guest, "key"), "for the second")
	r.remove(second)
	if _, err := os.Stat(guest); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a copy that nobody mounts: %v", err)
	}
	r.watches.mu.Lock()
	defer r.watches.mu.Unlock()
	if len(r.watches.dirs)+len(r.watches.copies) > 0 {
		t.Errorf("still watched are %v", r.watches.dirs)
	}
}

func (r *rig) remove(id string) {
	r.t.Helper()
	if _, err := r.RemoveContainer(r.t.Context(), &cri.RemoveContainerRequest{ContainerId: id}); err != nil {
		r.t.Error(err)
	}
}

func within(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not in time", what)
		}
	}
}

func eventuallyGone(t testing.TB, path string) {
	t.Helper()
	within(t, path+" goes", func() bool {
		_, err := os.Lstat(path)
		return errors.Is(err, fs.ErrNotExist)
	})
}

// Where the kernel has no watches left, volumes follow the host all the same, later.
func TestCopiesWithoutWatches(t *testing.T) {
	r := newRig(t)
	r.watches.close()
	r.watches = newHostWatchEvery(r.Server.log, 20*time.Millisecond)
	r.watches.add = func(string) error { return unix.ENOSPC }
	pod := r.runPod("a")
	secret := r.kubeletVolume("secret", "s")
	writeVolume(t, secret, map[string]string{"key": "one"})
	r.createMounting(pod, "c", &cri.Mount{ContainerPath: "/s", HostPath: secret, Readonly: true})
	writeVolume(t, secret, map[string]string{"key": "two"})
	becomes(t, filepath.Join(r.inGuest(pod, secret), "key"), "two")
}

// A subPath of such a volume is a copy that stays as it was; the mount of it is traced to its volume.
func TestSubPathOfCopiedVolume(t *testing.T) {
	r := newRig(t)
	pod := r.runPod("a")
	cm := r.kubeletVolume("projected", "p")
	writeVolume(t, cm, map[string]string{"key": "one"})
	bound, other := filepath.Join(r.dir, "pods/u/volume-subpaths/p/c/0"), filepath.Join(r.dir, "pods/u/volume-subpaths/e/c/1")
	empty := r.kubeletVolume("empty-dir", "e")
	writeVolume(t, empty, map[string]string{"key": "one"})
	for target, source := range map[string]string{bound: filepath.Join(cm, "key"), other: filepath.Join(empty, "key")} {
		if err := errors.Join(os.MkdirAll(filepath.Dir(target), 0o755), os.WriteFile(target, nil, 0o644)); err != nil {
			t.Fatal(err)
		}
		if err := unix.Mount(source, target, "", unix.MS_BIND, ""); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := unix.Unmount(target, unix.MNT_DETACH); err != nil {
				t.Error(err)
			}
		})
	}
	if !subPathOfCopied(bound, "u") || subPathOfCopied(bound, "other") || subPathOfCopied(other, "u") || subPathOfCopied(filepath.Join(cm, "key"), "u") {
		t.Errorf("of a copied volume: %v, another pod's %v, an emptyDir's %v", subPathOfCopied(bound, "u"), subPathOfCopied(bound, "other"), subPathOfCopied(other, "u"))
	}
	id := r.createMounting(pod, "c", &cri.Mount{ContainerPath: "/key", HostPath: bound, Readonly: true})
	rec, err := r.store.Container(id)
	if err != nil || len(rec.Copies) != 1 || !rec.Copies[0].Fixed {
		t.Fatalf("record has %v (%v)", rec.Copies, err)
	}
	copied := filepath.Join(filepath.Dir(filepath.Dir(r.inGuest(pod, bound))), rec.Copies[0].Name, "content")
	becomes(t, copied, "one")
	if err := os.WriteFile(bound, []byte("two"), 0o644); err != nil {
		t.Fatal(err)
	}
	r.restart()
	r.createMounting(pod, "later", &cri.Mount{ContainerPath: "/key", HostPath: bound, Readonly: true})
	becomes(t, copied, "one")
	writeVolume(t, cm, map[string]string{"key": "three"}) // the file that is bound is deleted
	if !subPathOfCopied(bound, "u") {
		t.Error("after a change the subPath is no more one of the volume")
	}
}

// A guest that does not take changes keeps its copy old and holds up nothing else; when it answers again it has
// the last one.
func TestCopyOfSilentGuest(t *testing.T) {
	r := newRig(t)
	pods := []string{r.runPod("a"), r.runPod("b")}
	cm := r.kubeletVolume("configmap", "cm")
	writeVolume(t, cm, map[string]string{"key": "one"})
	for _, pod := range pods {
		r.createMounting(pod, "c"+pod[:8], &cri.Mount{ContainerPath: "/cm", HostPath: cm, Readonly: true})
	}
	vm := r.frozen(pods[0])
	for i := range 5 {
		writeVolume(t, cm, map[string]string{"key": fmt.Sprint("change ", i)})
		becomes(t, filepath.Join(r.inGuest(pods[1], cm), "key"), fmt.Sprint("change ", i))
	}
	becomes(t, filepath.Join(r.inGuest(pods[0], cm), "key"), "one")
	if err := vm.Resume(t.Context()); err != nil {
		t.Fatal(err)
	}
	becomes(t, filepath.Join(r.inGuest(pods[0], cm), "key"), "change 4")
}

func TestScanVolume(t *testing.T) {
	dir := t.TempDir()
	writeVolume(t, dir, map[string]string{"key": "one"})
	scanned := func() (string, []string) {
		t.Helper()
		var names []string
		found, err := scanVolume(dir, visitor{file: func(_ *os.Root, f hostFile) error { names = append(names, f.path); return nil }})
		if err != nil {
			t.Fatal(err)
		}
		return found.generation, names
	}
	if err := errors.Join(os.Mkdir(filepath.Join(dir, "..half-written"), 0o755), os.Symlink("x", filepath.Join(dir, "..data_tmp"))); err != nil {
		t.Fatal(err)
	}
	fresh, names := scanned()
	if len(names) != 5 { // the volume, ..data, its target, key, key
		t.Errorf("scanned are %q", names)
	}
	if again, _ := scanned(); fresh == again {
		t.Error("what has just changed counts as known")
	}
	within(t, "the generation is certain", func() bool {
		a, _ := scanned()
		b, _ := scanned()
		return a == b
	})
	known, _ := scanned()
	if err := os.Chmod(filepath.Join(dir, "key"), 0o600); err != nil {
		t.Fatal(err)
	}
	if now, _ := scanned(); now == known {
		t.Error("another mode is the same generation")
	}
	torn := 0
	_, err := scanVolume(dir, visitor{file: func(*os.Root, hostFile) error {
		if torn++; torn == 1 {
			writeVolume(t, dir, map[string]string{"key": "two"})
		}
		return nil
	}})
	if !errors.Is(err, errTorn) {
		t.Errorf("a scan amid a change: %v", err)
	}
	if err := unix.Mkfifo(filepath.Join(dir, "fifo"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := scanVolume(dir, visitor{}); err == nil {
		t.Error("a FIFO is copied")
	}
}

func TestTerminationLogReachesTheHost(t *testing.T) {
	r := newRig(t)
	pod := r.runPod("a")
	rec, err := r.store.Sandbox(pod)
	if err != nil {
		t.Fatal(err)
	}
	release := filepath.Join(r.dir, "release")
	run := func(name, script string) (id, log string) {
		t.Helper()
		log = filepath.Join(r.dir, "pods/u/containers", name, "0123abcd")
		if err := errors.Join(os.MkdirAll(filepath.Dir(log), 0o755), os.WriteFile(log, nil, 0o666)); err != nil {
			t.Fatal(err)
		}
		// The fake guest mounts nothing: its containers see the agent's files.
		req := r.createRequest(pod, name, "log=$(ls -td "+rec.VMDir+"/run/guest/agent/containers/*/termination-log | head -1); "+script)
		req.Config.Mounts = []*cri.Mount{{ContainerPath: "/dev/termination-log", HostPath: log}}
		req.Config.Annotations = map[string]string{terminationPath: "/dev/termination-log"}
		resp, err := r.CreateContainer(t.Context(), req)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := r.StartContainer(t.Context(), &cri.StartContainerRequest{ContainerId: resp.GetContainerId()}); err != nil {
			t.Fatal(err)
		}
		return resp.GetContainerId(), log
	}
	id, log := run("words", "echo last words > $log; exit 3")
	r.exit(id)
	if b, err := os.ReadFile(log); string(b) != "last words\n" {
		t.Errorf("log is %q (%v)", b, err)
	}
	id, log = run("large", "head -c 1000000 /dev/zero | tr '\\0' x > $log; echo end >> $log")
	r.exit(id)
	if b, err := os.ReadFile(log); len(b) != maxTerminationLog || !strings.HasSuffix(string(b), "xend\n") {
		t.Errorf("of a long log there are %d bytes (%v)", len(b), err)
	}
	id, log = run("restarted", "echo kept > $log; while [ ! -e "+release+" ]; do sleep 0.05; done")
	r.stop()
	if err := os.WriteFile(release, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	r.start()
	r.exit(id)
	if b, err := os.ReadFile(log); string(b) != "kept\n" {
		t.Errorf("log after a restart is %q (%v)", b, err)
	}
	os.Remove(release)
	id, log = run("replaced", "echo caught > $log; while [ ! -e "+release+" ]; do sleep 0.05; done")
	victim := filepath.Join(r.dir, "victim")
	if err := errors.Join(os.WriteFile(victim, []byte("kept"), 0o644), os.Remove(log), os.Symlink(victim, log), os.WriteFile(release, nil, 0o644)); err != nil {
		t.Fatal(err)
	}
	if s := r.exit(id); s.GetExitCode() != 0 {
		t.Errorf("exit of a container whose log is not to be written: %v", s)
	}
	if b, err := os.ReadFile(victim); string(b) != "kept" {
		t.Errorf("what a symlink points to is %q (%v)", b, err)
	}
}
