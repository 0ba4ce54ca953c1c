//go:build integration

package integration

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Volumes of different kinds in each other, named in any order, over files and directories of the image, by subPath, and
// at /dev/shm.
func TestNestedVolumes(t *testing.T) {
	parallel(t)
	k := newKubeletPod(t)
	p := k.run(0)
	empty, memory := k.empty("data", 0), k.memory("shm", "size=5m,mode=1777")
	cm, host := k.volume("configmap", "cm"), t.TempDir()
	writeVolume(t, cm, map[string]string{"key": "from the ConfigMap"})
	writeFile(t, filepath.Join(host, "file"), "from the host")
	writeFile(t, filepath.Join(host, "part/file"), "from a part")
	for _, place := range []string{filepath.Join(host, "in/cm"), filepath.Join(empty, "host")} { // kubelet makes none of these
		if err := os.MkdirAll(place, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	// A file system PVC is mounted by its CSI driver. A subPathExpr reaches the runtime as a subPath: kubelet puts the values of
	// variables into "$(POD_NAME)/logs", makes the directory and binds it.
	pvc := filepath.Join(k.volume("csi", "pvc-1"), "mount")
	mountTmpfs(t, pvc)
	writeFile(t, filepath.Join(pvc, "file"), "from a PVC")
	part, expression, pvcPart := k.subPath(host, "host", "part"), k.subPath(empty, "data", "web-0/logs"), k.subPath(pvc, "pvc", "web-0/logs")
	const script = `
want() { [ "$2" = "$3" ] || echo "FAIL $1: $2, not $3"; }
want "ConfigMap in hostPath in emptyDir" "$(cat /a/host/in/cm/key)" "from the ConfigMap"
want "hostPath in emptyDir" "$(cat /a/host/file)" "from the host"
want "subPath of a hostPath" "$(cat /part/file)" "from a part"
echo x > /expression/own && echo y > /pvc-expression/own || echo FAIL subPathExpr is not writable
want "subPathExpr of an emptyDir and of a PVC" "$(cat /a/web-0/logs/own /pvc/web-0/logs/own /pvc/file)" "x
y
from a PVC"
want "a file over a file of the image" "$(cat /bin/busybox.txt /etc/passwd)" "from the hostfrom the host"
want "below a file's place that was not there" "$(cat /new/deep/file)" "from the host"
want "shared memory" "$(df -k /dev/shm | tail -n 1 | awk '{print $2}')" 5120
echo x > /a/own && echo x > /a/host/own || echo FAIL writable
(echo x > /a/host/in/cm/new) 2>/dev/null && echo FAIL ConfigMap writable
echo done`
	for name, reverse := range map[string]bool{"outer first": false, "inner first": true} {
		ms := []*cri.Mount{
			{ContainerPath: "/a", HostPath: empty}, {ContainerPath: "/a/host", HostPath: host}, {ContainerPath: "/a/host/in/cm", HostPath: cm, Readonly: true},
			{ContainerPath: "/expression", HostPath: expression}, {ContainerPath: "/pvc", HostPath: pvc}, {ContainerPath: "/pvc-expression", HostPath: pvcPart},
			{ContainerPath: "/part", HostPath: part}, {ContainerPath: "/etc/passwd", HostPath: filepath.Join(host, "file")}, {ContainerPath: "/bin/busybox.txt", HostPath: filepath.Join(host, "file")},
			{ContainerPath: "/new/deep/file", HostPath: filepath.Join(host, "file"), Readonly: true}, {ContainerPath: "/dev/shm", HostPath: memory},
		}
		if reverse {
			for i, j := 0, len(ms)-1; i < j; i, j = i+1, j-1 {
				ms[i], ms[j] = ms[j], ms[i]
			}
		}
		if st, log := p.run(script, mounts(ms...), func(c *cri.ContainerConfig) { c.Linux.SecurityContext.RunAsUser = &cri.Int64Value{} }); st.ExitCode != 0 || log != "done\n" {
			t.Errorf("%s: container says %q, exit code %d", name, log, st.ExitCode)
		}
	}
	wantFile(t, filepath.Join(host, "own"), "x\n")
	wantFile(t, filepath.Join(pvc, "web-0/logs/own"), "y\n")
	if _, err := p.create("true", mounts(&cri.Mount{ContainerPath: "/", HostPath: host})); status.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), "/") {
		t.Errorf("a volume at / : %v", err)
	}
}
