package server

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crivm/crivm/server/store"
	"github.com/crivm/crivm/vmruntime/virtiofsd"
)

func TestHostVolume(t *testing.T) {
	dir := t.TempDir()
	const plugins = "pods/uid/volumes/kubernetes.io~"
	configMap := filepath.Join(dir, plugins+"configmap/c")
	secret := filepath.Join(dir, plugins+"secret/s")
	empty := filepath.Join(dir, plugins+"empty-dir/e")
	others := filepath.Join(dir, "pods/other/volumes/kubernetes.io~secret/s")
	for _, d := range []string{configMap, secret, empty, others} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	hosts, log := filepath.Join(dir, "pods/uid/etc-hosts"), filepath.Join(dir, "pods/uid/containers/c/0123abcd")
	if err := os.MkdirAll(filepath.Dir(log), 0o755); err != nil {
		t.Fatal(err)
	}
	for path, size := range map[string]int64{
		filepath.Join(configMap, "key"): 10, filepath.Join(secret, "large"): maxCopiedVolume + 1, filepath.Join(dir, "hosts"): 10, hosts: 10, log: 0,
	} {
		if err := errors.Join(os.WriteFile(path, nil, 0o666), os.Truncate(path, size)); err != nil {
			t.Fatal(err)
		}
	}
	volume := func(n int, ms ...*cri.Mount) (guestVolumes, error) {
		rec := store.Container{ID: strings.Repeat("0", 64), Config: store.ContainerConfig{ContainerConfig: &cri.ContainerConfig{
			Mounts: ms, Annotations: map[string]string{terminationPath: "/dev/log"},
		}}}
		v := guestVolumes{}
		err := v.addHostVolume(rec, "uid", n, ms[n])
		return v, err
	}
	const follow = cri.MountPropagation_PROPAGATION_HOST_TO_CONTAINER
	for name, c := range map[string]struct {
		mount    *cri.Mount
		kind     string // copy, log or share
		readonly bool   // as the guest shows it
	}{
		"configMap":          {&cri.Mount{ContainerPath: "/v", HostPath: configMap, Readonly: true}, "copy", true},
		"of another pod":     {&cri.Mount{ContainerPath: "/v", HostPath: others, Readonly: true}, "share", true},
		"part of a volume":   {&cri.Mount{ContainerPath: "/v", HostPath: filepath.Join(configMap, "key"), Readonly: true}, "share", true},
		"log":                {&cri.Mount{ContainerPath: "/dev/log", HostPath: log}, "log", false},
		"log elsewhere":      {&cri.Mount{ContainerPath: "/dev/other", HostPath: log}, "share", false},
		"read-only log":      {&cri.Mount{ContainerPath: "/dev/log", HostPath: log, Readonly: true}, "share", true},
		"log is a directory": {&cri.Mount{ContainerPath: "/dev/log", HostPath: empty}, "share", false},
		"log is large":       {&cri.Mount{ContainerPath: "/dev/log", HostPath: filepath.Join(secret, "large")}, "share", false},
		"writable configMap": {&cri.Mount{ContainerPath: "/v", HostPath: configMap}, "share", false},
		"following":          {&cri.Mount{ContainerPath: "/v", HostPath: configMap, Readonly: true, Propagation: follow}, "share", false},
		"large secret":       {&cri.Mount{ContainerPath: "/v", HostPath: secret, Readonly: true}, "share", true},
		"emptyDir":           {&cri.Mount{ContainerPath: "/v", HostPath: empty}, "share", false},
		"hosts":              {&cri.Mount{ContainerPath: "/etc/hosts", HostPath: hosts}, "copy", false},
		"hosts elsewhere":    {&cri.Mount{ContainerPath: "/hosts", HostPath: hosts}, "copy", false},
		"hosts of the node":  {&cri.Mount{ContainerPath: "/etc/hosts", HostPath: filepath.Join(dir, "hosts")}, "share", false},
		"recursive":          {&cri.Mount{ContainerPath: "/v", HostPath: empty, Readonly: true, RecursiveReadOnly: true}, "share", true},
	} {
		v, err := volume(0, c.mount)
		if err != nil || len(v.mounts) != 1 {
			t.Errorf("%s: %v (%v)", name, v.mounts, err)
			continue
		}
		mount := v.mounts[0]
		if (mount.GetHostCopy() != nil) != (c.kind == "copy") || (len(v.copies) > 0) != (c.kind == "copy") ||
			(mount.GetTerminationLog() != nil) != (c.kind == "log") || (v.terminationLog != "") != (c.kind == "log") ||
			(len(v.shared) > 0) != (c.kind == "share") || mount.GetReadonly() != c.readonly {
			t.Errorf("%s: %v, not a %s", name, v, c.kind)
		}
		again, err := volume(3, &cri.Mount{}, &cri.Mount{}, &cri.Mount{}, c.mount)
		if err != nil || again.mounts[0].GetShare().GetPath() != mount.GetShare().GetPath() || again.mounts[0].GetHostCopy().GetVolume() != mount.GetHostCopy().GetVolume() {
			t.Errorf("%s: %v and %v for the same thing (%v)", name, v, again, err)
		}
		closeVolumes(append(v.shared, again.shared...))
	}
	if v, err := volume(0, &cri.Mount{ContainerPath: "/dev/log", HostPath: log}, &cri.Mount{ContainerPath: "/dev/log/", HostPath: log}); err != nil || v.terminationLog != "" {
		t.Errorf("a file of the pod where the termination log is: %v (%v)", v, err)
	} else {
		closeVolumes(v.shared)
	}
	rw, errA := volume(0, &cri.Mount{ContainerPath: "/v", HostPath: empty})
	ro, errB := volume(0, &cri.Mount{ContainerPath: "/v", HostPath: empty, Readonly: true})
	if errA != nil || errB != nil || rw.mounts[0].GetShare().GetPath() == ro.mounts[0].GetShare().GetPath() {
		t.Errorf("writable and read-only are one entry (%v, %v)", errA, errB)
	}
	closeVolumes(append(rw.shared, ro.shared...))
	for path, class := range map[string]func(error) bool{
		"relative": errdefs.IsInvalidArgument, filepath.Join(dir, "missing"): errdefs.IsInvalidArgument,
		"/proc/sys": errdefs.IsNotImplemented, "/": errdefs.IsNotImplemented, "/dev/null": errdefs.IsNotImplemented,
	} {
		if _, err := volume(0, &cri.Mount{ContainerPath: "/v", HostPath: path}); !class(err) {
			t.Errorf("%s: error is %v", path, err)
		}
	}
}

// A file server that no record owns is ended by the next daemon.
func TestLeftoverFileServer(t *testing.T) {
	r := newRig(t)
	program, err := virtiofsd.Find(t.Context())
	if err != nil {
		t.Skip(err)
	}
	dir := filepath.Join(r.opts.RunDir, shareDirs, strings.Repeat("0", 16))
	files, err := virtiofsd.Start(t.Context(), program, virtiofsd.Spec{Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	r.restart()
	select {
	case <-files.Done():
	case <-time.After(10 * time.Second):
		t.Error("it runs on")
	}
	if _, err := os.Stat(dir); !os.IsNotExist(err) {
		t.Errorf("its directory is still there (%v)", err)
	}
}
