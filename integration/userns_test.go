//go:build integration

package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// userMapping is as kubelet makes them: 65,536 IDs, from a multiple of that on.
var userMapping = []*cri.IDMapping{{HostId: 196608, Length: 65536}}

func inUserNamespace(c *cri.PodSandboxConfig) {
	c.Linux.SecurityContext.NamespaceOptions.UsernsOptions = &cri.UserNamespace{Mode: cri.NamespaceMode_POD, Uids: userMapping, Gids: userMapping}
}

// mapped makes a container what kubelet makes it in such a pod: options as the pod's, and mappings for each mount.
func mapped(m ...*cri.Mount) func(*cri.ContainerConfig) {
	return func(c *cri.ContainerConfig) {
		c.Linux.SecurityContext.NamespaceOptions.UsernsOptions = &cri.UserNamespace{Mode: cri.NamespaceMode_POD, Uids: userMapping, Gids: userMapping}
		for _, m := range m {
			m.UidMappings, m.GidMappings = userMapping, userMapping
			c.Mounts = append(c.Mounts, m)
		}
	}
}

const userNamespaceScript = `
grep -q '^ *0 *196608 *65536$' /proc/self/uid_map && grep -q '^ *0 *196608 *65536$' /proc/self/gid_map || echo "FAIL map: $(cat /proc/self/uid_map)"
[ "$(id -u):$(id -g)" = 0:0 ] || echo "FAIL id: $(id)"
for f in / /bin /bin/busybox /etc /dev /dev/pts /dev/shm; do [ "$(stat -c %u:%g $f)" = 0:0 ] || echo "FAIL owner of $f: $(stat -c %u:%g $f)"; done
echo x > /new && chown 1000:2000 /new && [ "$(stat -c %u:%g /new)" = 1000:2000 ] || echo FAIL chown
chown 70000 /new 2>/dev/null && echo FAIL chown to an ID that is not mapped
echo x >> /etc/group && rm /bin/wget || echo FAIL copy up
echo x > /dev/null && echo x > /dev/shm/x && rm /dev/shm/x && : < /dev/zero && head -c 1 /dev/urandom > /dev/null || echo FAIL dev
mount | grep -q 'on /sys type sysfs' || echo FAIL sysfs
ls /dev/mqueue > /dev/null && [ -d /sys/class/net/eth0 ] || echo FAIL mqueue or eth0
echo to stdout > /dev/stdout && echo to stderr > /dev/stderr || echo FAIL stdio by name
(echo 1 > /proc/sys/kernel/panic) 2>/dev/null && echo FAIL writes sysctls of the guest
mount -t tmpfs none /mnt 2>/dev/null && echo FAIL mounts without CAP_SYS_ADMIN
mknod /node b 7 0 2>/dev/null && echo FAIL makes devices
ping -c 1 -W 5 127.0.0.1 > /dev/null || echo FAIL ping
hostname | grep -q ^pod || echo "FAIL hostname $(hostname)"
(httpd -p 127.0.0.1:80 -h / && wget --help > /dev/null 2>&1; nc 127.0.0.1 80 < /dev/null) || echo FAIL port 80
echo done`

// A pod with a user namespace (hostUsers: false): what a container sees and may do, with every kind of volume.
func TestUserNamespace(t *testing.T) {
	parallel(t)
	loop, _ := loopDevice(t, 8<<20)
	k := newKubeletPod(t)
	p := k.run(0, inUserNamespace)
	if got := p.status().GetLinux().GetNamespaces().GetOptions().GetUsernsOptions(); !proto.Equal(got, p.config.Linux.SecurityContext.NamespaceOptions.UsernsOptions) {
		t.Errorf("the sandbox's status has %v", got)
	}
	st, log := p.run(userNamespaceScript, mapped())
	lines := strings.Split(strings.TrimSpace(log), "\n")
	slices.Sort(lines) // two streams, so in any order
	if want := []string{"done", "to stderr", "to stdout"}; st.ExitCode != 0 || !slices.Equal(lines, want) {
		t.Errorf("exit code %d, log:\n%s", st.ExitCode, log)
	}

	server := p.start("exec /usr/sbin/nginx echo 127.0.0.1:7000", mapped(), func(c *cri.ContainerConfig) { c.Image.Image = standin })
	eventually(t, 30*time.Second, "the server listens", func() error {
		if out := p.exec(server, "netstat", "-ltn"); !strings.Contains(out, "127.0.0.1:7000") {
			return fmt.Errorf("listening are %s", out)
		}
		return nil
	})
	echo(t, forwardPort(t, p, 7000), 64<<10)

	host := t.TempDir()
	hosts, message := filepath.Join(k.dir, "etc-hosts"), filepath.Join(k.dir, "containers/c/0123abcd")
	for path, content := range map[string]string{host + "/file": "content", host + "/owned": "owned", host + "/secret": "secret", hosts: "127.0.0.1 localhost\n", message: ""} {
		writeFile(t, path, content)
	}
	for path, owner := range map[string]int{"owned": 42, "secret": 70000} {
		path = filepath.Join(host, path)
		if err := os.Chown(path, owner, owner); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chmod(message, 0o666); err != nil {
		t.Fatal(err)
	}
	config := k.volume("configmap", "config")
	writeVolume(t, config, map[string]string{"key": "value"})
	empty, memory := k.empty("cache", 0), k.memory("memory", "size=1m,mode=1777")
	part := k.subPath(empty, "cache", "a/b")
	volumes := func() []*cri.Mount {
		return []*cri.Mount{
			{ContainerPath: "/host", HostPath: host}, {ContainerPath: "/file", HostPath: host + "/file"}, {ContainerPath: "/etc/hosts", HostPath: hosts},
			{ContainerPath: "/message", HostPath: message}, {ContainerPath: "/config", HostPath: config, Readonly: true},
			{ContainerPath: "/empty", HostPath: empty}, {ContainerPath: "/group", HostPath: k.empty("group", 3000)},
			{ContainerPath: "/memory", HostPath: memory}, {ContainerPath: "/part", HostPath: part},
			{ContainerPath: "/image", Image: &cri.ImageSpec{Image: busybox}, Readonly: true},
		}
	}
	st, log = p.run(`
owner() { [ "$(stat -L -c %u:%g $1)" = $2 ] || echo "FAIL owner of $1: $(stat -c %u:%g:%a $1)"; }
owner /host 0:0; owner /host/file 0:0; owner /host/owned 42:42; owner /host/secret 65534:65534; owner /file 0:0
[ "$(cat /host/file)" = content ] && [ "$(cat /host/owned)" = owned ] || echo FAIL reads host path
(cat /host/secret) 2>/dev/null && echo FAIL reads what belongs to nobody in the namespace
echo written > /host/new && mkdir /host/dir && chown 7:8 /host/new && echo more >> /file || echo FAIL writes host path
owner /etc/hosts 0:0; echo "10.0.0.1 x" >> /etc/hosts || echo FAIL writes hosts
owner /message 0:0; echo last words > /message || echo FAIL writes termination message
owner /config/key 0:2000; [ "$(cat /config/key)" = value ] || echo FAIL config
owner /empty 0:0; owner /group 0:3000
echo x > /empty/x && chown 5:6 /empty/x && mkdir /empty/dir && echo y > /group/y || echo FAIL writes empty
owner /empty/x 5:6; owner /group/y 0:3000
owner /memory 0:0; echo x > /memory/x || echo FAIL memory
echo x > /part/x && [ -e /empty/a/b/x ] && owner /part/x 0:0 || echo FAIL sub path
echo block > /dev/xvda && owner /dev/xvda 0:0 || echo "FAIL device: $(ls -ln /dev/xvda)"
owner /image/bin 0:0; touch /image/x 2>/dev/null && echo FAIL writes image volume
echo done`, mapped(volumes()...), device(loop.Name(), "rw"), func(c *cri.ContainerConfig) {
		c.Annotations = map[string]string{"io.kubernetes.container.terminationMessagePath": "/message"}
	})
	if st.ExitCode != 0 || log != "done\n" {
		t.Errorf("volumes: exit code %d, log:\n%s", st.ExitCode, log)
	}
	wantFile(t, host+"/file", "contentmore\n")
	wantFile(t, message, "last words\n")
	wantOwner(t, host+"/new", 7, 8)
	wantOwner(t, host+"/dir", 0, 0)
	if len(st.Mounts) != 10 || len(st.Mounts[0].UidMappings) != 1 || st.Mounts[0].UidMappings[0].HostId != 196608 {
		t.Errorf("mounts in the status: %v", st.Mounts)
	}

	// Another container, another user; exec, also with a terminal; what the first has left; changes of a ConfigMap.
	id := p.start("trap exit TERM; while :; do sleep 1 & wait; done", mapped(volumes()...), func(c *cri.ContainerConfig) {
		c.Linux.SecurityContext.RunAsUser, c.Linux.SecurityContext.SupplementalGroups = &cri.Int64Value{Value: 1000}, []int64{3000}
	})
	if got := p.exec(id, "sh", "-c", "id -u; cat /proc/self/uid_map; stat -c %u:%g /empty/x; echo z > /group/z; echo by name > /dev/stdout"); strings.Join(strings.Fields(got), " ") != "1000 0 196608 65536 5:6 by name" {
		t.Errorf("exec says %q", got)
	}
	writeVolume(t, config, map[string]string{"key": "changed"})
	eventually(t, 30*time.Second, "the change of the ConfigMap", func() error {
		if got := strings.TrimSpace(p.exec(id, "stat", "-c", "%u:%g:%s", "-L", "/config/key")); got != "0:2000:7" {
			return fmt.Errorf("owner and size are %q", got)
		}
		return nil
	})
	if _, stderr, err := p.n.Runtime.ExecSync(t.Context(), id, []string{"cat", "/config/key"}, 20*time.Second); err == nil || !strings.Contains(string(stderr), "denied") {
		t.Errorf("user 1000 reads a file of 0:2000 with mode 0640: %q, %v", stderr, err)
	}

	for what, c := range map[string]struct {
		change func(*cri.ContainerConfig)
		says   string
	}{
		"other mapping": {func(c *cri.ContainerConfig) {
			c.Linux.SecurityContext.NamespaceOptions.UsernsOptions = &cri.UserNamespace{Mode: cri.NamespaceMode_NODE}
		}, "userns_options"},
		"mount without":        {mounts(&cri.Mount{ContainerPath: "/v", HostPath: host}), "uidMappings"},
		"user not mapped":      {func(c *cri.ContainerConfig) { c.Linux.SecurityContext.RunAsUser = &cri.Int64Value{Value: 65536} }, "user 65536 is not mapped"},
		"another mount's maps": {mounts(&cri.Mount{ContainerPath: "/v", HostPath: host, UidMappings: userMapping, GidMappings: []*cri.IDMapping{{HostId: 1, Length: 1}}}), "gidMappings"},
	} {
		if _, err := p.create("true", c.change); err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: error is %v, want one with %q", what, err, c.says)
		}
	}
	if _, err := p.create("true", func(c *cri.ContainerConfig) { c.Linux.SecurityContext.RunAsUser = &cri.Int64Value{Value: 65536} }); status.Code(err) != codes.InvalidArgument {
		t.Errorf("user that is not mapped: %v", err)
	}
}

func wantOwner(t *testing.T, path string, uid, gid uint32) {
	t.Helper()
	info, err := os.Stat(path)
	if err != nil {
		t.Error(err)
		return
	}
	if st := info.Sys().(*syscall.Stat_t); st.Uid != uid || st.Gid != gid {
		t.Errorf("%s is %d:%d's, want %d:%d", path, st.Uid, st.Gid, uid, gid)
	}
}
