//go:build integration

package integration

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cavaliergopher/cpio"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crivm/crivm/integration/node"
)

// wantError checks that an error has one of the codes of CRI and names what it is about.
func wantError(t *testing.T, err error, code codes.Code, words ...string) {
	t.Helper()
	if err == nil {
		t.Fatalf("succeeds, want an error with %q", words)
	}
	if got := status.Code(err); got != code {
		t.Errorf("code is %s, want %s: %v", got, code, err)
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("error does not name %q: %v", w, err)
		}
	}
}

func TestRefusedSandboxes(t *testing.T) {
	for _, test := range []struct {
		name, handler string
		change        func(*cri.PodSandboxConfig)
		code          codes.Code
		words         []string
	}{
		{"unknown handler", "nonsense", nil, codes.InvalidArgument, []string{"nonsense"}},
		{"host network", "", func(c *cri.PodSandboxConfig) {
			c.Linux.SecurityContext.NamespaceOptions.Network = cri.NamespaceMode_NODE
		}, codes.Unimplemented, []string{"network", "NODE"}},
		{"host PIDs", "", func(c *cri.PodSandboxConfig) { c.Linux.SecurityContext.NamespaceOptions.Pid = cri.NamespaceMode_NODE }, codes.Unimplemented, []string{"pid", "NODE"}},
		{"host IPC", "", func(c *cri.PodSandboxConfig) { c.Linux.SecurityContext.NamespaceOptions.Ipc = cri.NamespaceMode_NODE }, codes.Unimplemented, []string{"ipc", "NODE"}},
		{"no name", "", func(c *cri.PodSandboxConfig) { c.Metadata.Name = "" }, codes.InvalidArgument, []string{"metadata.name"}},
		{"name with a slash", "", func(c *cri.PodSandboxConfig) { c.Metadata.Name = "../x" }, codes.InvalidArgument, []string{"metadata.name", "../x"}},
		{"no metadata", "", func(c *cri.PodSandboxConfig) { c.Metadata = nil }, codes.InvalidArgument, []string{"metadata"}},
		{"bad sysctl", "", func(c *cri.PodSandboxConfig) { c.Linux.Sysctls = map[string]string{"kernel/../x": "1"} }, codes.InvalidArgument, []string{"sysctls"}},
		{"unknown sysctl", "", func(c *cri.PodSandboxConfig) { c.Linux.Sysctls = map[string]string{"kernel.no_such_thing": "1"} }, codes.Unknown, nil},
	} {
		t.Run(test.name, func(t *testing.T) {
			config := newConfig(t)
			if test.change != nil {
				test.change(config)
			}
			_, err := shared.Runtime.RunPodSandbox(testContext(t, 3*time.Minute), config, test.handler)
			if test.words == nil {
				if err == nil {
					t.Error("succeeds")
				}
			} else {
				wantError(t, err, test.code, test.words...)
			}
			if err := shared.CheckLeaks(t.Context()); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestRefusedContainers(t *testing.T) {
	p := runPod(t, shared)
	for _, test := range []struct {
		name   string
		change func(*cri.ContainerConfig)
		code   codes.Code
		words  []string
	}{
		{"missing image", func(c *cri.ContainerConfig) { c.Image.Image = "docker.io/library/never-pulled:1" }, codes.NotFound, []string{"never-pulled"}},
		{"unknown user", func(c *cri.ContainerConfig) { c.Linux.SecurityContext.RunAsUsername = "nosuchuser" }, codes.InvalidArgument, []string{"nosuchuser"}},
		{"group without user", func(c *cri.ContainerConfig) { c.Linux.SecurityContext.RunAsGroup = &cri.Int64Value{Value: 1} }, codes.InvalidArgument, []string{"run_as_group"}},
		{"missing seccomp profile", func(c *cri.ContainerConfig) {
			c.Linux.SecurityContext.Seccomp = &cri.SecurityProfile{ProfileType: cri.SecurityProfile_Localhost, LocalhostRef: "/no/such/profile"}
		}, codes.InvalidArgument, []string{"localhost_ref", "/no/such/profile"}},
		{"missing volume", func(c *cri.ContainerConfig) {
			c.Mounts = []*cri.Mount{{ContainerPath: "/v", HostPath: "/no/such/volume", Readonly: true}}
		}, codes.InvalidArgument, []string{"host_path", "/no/such/volume"}},
		{"bidirectional mount", func(c *cri.ContainerConfig) {
			c.Mounts = []*cri.Mount{{ContainerPath: "/v", HostPath: "/tmp", Propagation: cri.MountPropagation_PROPAGATION_BIDIRECTIONAL}}
		}, codes.Unimplemented, []string{"propagation"}},
		{"device", func(c *cri.ContainerConfig) {
			c.Devices = []*cri.Device{{HostPath: "/dev/null", ContainerPath: "/dev/x"}}
		}, codes.InvalidArgument, []string{"devices[0].permissions"}},
		{"character device", func(c *cri.ContainerConfig) {
			c.Devices = []*cri.Device{{HostPath: "/dev/null", ContainerPath: "/dev/x", Permissions: "rwm"}}
		}, codes.Unimplemented, []string{"devices[0]", "host_path", "/dev/null", "character device"}},
		{"regular file as a device", func(c *cri.ContainerConfig) {
			c.Devices = []*cri.Device{{HostPath: "/proc/self/cmdline", ContainerPath: "/dev/x", Permissions: "rwm"}}
		}, codes.Unimplemented, []string{"devices[0]", "host_path", "regular file"}},
		{"missing device", func(c *cri.ContainerConfig) {
			c.Devices = []*cri.Device{{HostPath: "/dev/no-such-device", ContainerPath: "/dev/x", Permissions: "rwm"}}
		}, codes.InvalidArgument, []string{"devices[0]", "host_path", "/dev/no-such-device"}},
		{"huge pages of 1 GB", func(c *cri.ContainerConfig) {
			c.Linux.Resources.HugepageLimits = []*cri.HugepageLimit{{PageSize: "1GB", Limit: 1 << 30}}
		}, codes.Unimplemented, []string{"hugepage_limits", "1GB"}},
		{"huge pages beyond the pod's memory", func(c *cri.ContainerConfig) {
			c.Linux.Resources.HugepageLimits = []*cri.HugepageLimit{{PageSize: "2MB", Limit: 1 << 40}}
		}, codes.OutOfRange, []string{"hugepage_limits", "memory"}},
		{"AppArmor profile", func(c *cri.ContainerConfig) {
			c.Linux.SecurityContext.Apparmor = &cri.SecurityProfile{ProfileType: cri.SecurityProfile_Localhost, LocalhostRef: "mine"}
		}, codes.Unimplemented, []string{"apparmor", "mine"}},
		{"unknown capability", func(c *cri.ContainerConfig) {
			c.Linux.SecurityContext.Capabilities = &cri.Capability{AddCapabilities: []string{"CAP_NONSENSE"}}
		}, codes.InvalidArgument, []string{"CAP_NONSENSE"}},
		{"privileged in an unprivileged sandbox", func(c *cri.ContainerConfig) { c.Linux.SecurityContext.Privileged = true }, codes.InvalidArgument, []string{"privileged"}},
		{"log path that escapes", func(c *cri.ContainerConfig) { c.LogPath = "../../x.log" }, codes.InvalidArgument, []string{"log_path"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			_, err := p.create("true", test.change)
			wantError(t, err, test.code, test.words...)
			if list, err := shared.Runtime.ListContainers(t.Context(), &cri.ContainerFilter{PodSandboxId: p.id}); err != nil || len(list) != 0 {
				t.Errorf("%d containers are listed (%v)", len(list), err)
			}
		})
	}
	if s, out := p.run("echo still well"); s.ExitCode != 0 || out != "still well\n" {
		t.Errorf("a container after all that: %v %q", s, out)
	}
}

func TestRefusedImages(t *testing.T) {
	for _, test := range []struct {
		name, ref string
		words     []string
	}{
		{"no such image", "docker.io/library/no-such-image:1", []string{"no-such-image"}},
		{"not a reference", "Not A Reference", []string{"Not A Reference"}},
		{"registry is down", "127.0.0.1:1/library/x:1", []string{"127.0.0.1:1"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			_, err := shared.Images.PullImage(testContext(t, time.Minute), &cri.ImageSpec{Image: test.ref}, nil, nil)
			if err == nil {
				t.Fatal("succeeds")
			}
			for _, w := range test.words {
				if !strings.Contains(err.Error(), w) {
					t.Errorf("error does not name %q: %v", w, err)
				}
			}
		})
	}
}

// TestFailingParts starts nodes of which one part does not work, and wants a clear error and nothing left.
func TestFailingParts(t *testing.T) {
	script := func(name, text string) string {
		path := filepath.Join(publicDir(t), name)
		if err := os.WriteFile(path, []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
		return path
	}
	garbage := filepath.Join(publicDir(t), "vmlinux")
	if err := os.WriteFile(garbage, []byte("this is no kernel"), 0o644); err != nil {
		t.Fatal(err)
	}
	plugins := t.TempDir()
	for _, name := range []string{"fails", "hangs"} {
		if err := os.WriteFile(filepath.Join(plugins, name), []byte("#!/bin/sh\n"+map[string]string{
			"fails": `if [ "$CNI_COMMAND" = ADD ]; then echo '{"cniVersion": "1.0.0", "code": 7, "msg": "the plugin is out of luck"}'; exit 1; fi`,
			"hangs": `if [ "$CNI_COMMAND" = ADD ]; then exec sleep 600; fi`,
		}[name]+"\n"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	network := func(plugin string) string {
		return `{"cniVersion": "1.0.0", "name": "test", "plugins": [{"type": "` + plugin + `"}]}`
	}
	for _, test := range []struct {
		name    string
		options node.Options
		words   []string
	}{
		{"kernel is garbage", node.Options{Config: "[vm]\nkernel = \"" + garbage + "\"\n"}, []string{"VM"}},
		{"kernel panics", node.Options{Config: "[vm]\ncmdline = \"rdinit=/no/such/init\"\n"}, []string{"panic"}},
		{"guest never says hello", node.Options{Config: "[vm]\ninitramfs = \"" + silentInitramfs(t) + "\"\nboot_timeout = \"25s\"\n"}, []string{"agent"}},
		{"VMM ends at once", node.Options{Config: "[qemu]\nbinary = \"" + script("qemu", "#!/bin/sh\ncase $1 in --version) echo QEMU emulator version 7.2.0;; *) echo no luck today >&2; exit 1;; esac\n") + "\"\n"}, []string{"no luck today"}},
		{"CNI plugin fails", node.Options{CNI: network("fails"), Config: "[cni]\nbin_dirs = [\"" + plugins + "\"]\n"}, []string{"the plugin is out of luck"}},
		{"CNI plugin hangs", node.Options{CNI: network("hangs"), Config: "[cni]\nbin_dirs = [\"" + plugins + "\"]\nadd_timeout = \"3s\"\n"}, []string{"hangs"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			ctx := testContext(t, 4*time.Minute)
			n := startNode(t, test.options)
			_, err := n.Runtime.RunPodSandbox(ctx, newConfig(t), "")
			if err == nil {
				t.Fatal("succeeds")
			}
			t.Log(err)
			for _, w := range append(test.words, "sandbox ") {
				if !strings.Contains(err.Error(), w) {
					t.Errorf("error does not name %q: %v", w, err)
				}
			}
		})
	}
}

// publicDir is a directory into which processes of other uids can look.
func publicDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp(baseDir, "public-")
	if err == nil {
		err = os.Chmod(dir, 0o755)
	}
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

// silentInitramfs is the guest's initramfs with an /init that does nothing but live.
func silentInitramfs(t *testing.T) string {
	t.Helper()
	dir := publicDir(t)
	build := exec.CommandContext(t.Context(), "go", "build", "-o", filepath.Join(dir, "init"), "./cmd/silent")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	program, err := os.ReadFile(filepath.Join(dir, "init"))
	if err != nil {
		t.Fatal(err)
	}
	archive, err := os.ReadFile(filepath.Join(*buildDir, "guest/initramfs"))
	if err != nil {
		t.Fatal(err)
	}
	// The kernel unpacks archives that follow each other; what comes later replaces what was before.
	out := bytes.NewBuffer(append(archive, make([]byte, -len(archive)&3)...))
	w := cpio.NewWriter(out)
	if err := w.WriteHeader(&cpio.Header{Name: "init", Mode: cpio.TypeReg | 0o755, Size: int64(len(program))}); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(program); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "initramfs")
	if err := os.WriteFile(path, out.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

// startNode starts a node of a test's own; leaks are looked for when the test ends.
func startNode(t *testing.T, o node.Options) *node.Node {
	t.Helper()
	o.Build, o.Dir = *buildDir, filepath.Join(baseDir, fmt.Sprintf("node%d", podCount.Add(1)))
	if o.Registry == "" {
		o.Registry = images.Addr()
	}
	n, err := node.Start(testContext(t, 2*time.Minute), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
		defer cancel()
		for _, err := range []error{n.RemoveAllPods(ctx), n.CheckLeaks(ctx), n.Stop()} {
			if err != nil {
				t.Error(err)
			}
		}
	})
	return n
}

func TestCancelledRunPodSandbox(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 1500*time.Millisecond)
	defer cancel()
	config := newConfig(t)
	if _, err := shared.Runtime.RunPodSandbox(ctx, config, ""); err == nil {
		t.Skip("the VM booted within 1.5 s: too fast to be cut off")
	}
	eventually(t, time.Minute, "nothing is left of it", func() error { return shared.CheckLeaks(t.Context()) })
	// The same name again, as kubelet does.
	id, err := shared.Runtime.RunPodSandbox(testContext(t, 4*time.Minute), config, "")
	if err != nil {
		t.Fatal(err)
	}
	newPod(t, shared, id, config).remove()
}
