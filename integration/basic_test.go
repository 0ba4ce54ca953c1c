//go:build integration

package integration

import (
	"encoding/json"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestVersionAndStatus(t *testing.T) {
	v, err := shared.Runtime.Version(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	if v.Version != "0.1.0" || v.RuntimeName != "crivm" || v.RuntimeApiVersion != "v1" || v.RuntimeVersion == "" {
		t.Errorf("version is %v", v)
	}
	s, err := shared.Runtime.Status(t.Context(), true)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range s.Status.Conditions {
		if !c.Status {
			t.Errorf("condition %s is false: %s", c.Type, c.Message)
		}
	}
	handlers := map[string]bool{}
	for _, h := range s.RuntimeHandlers {
		handlers[h.Name] = true
	}
	if !handlers[""] || !handlers["crivm"] {
		t.Errorf("handlers are %v; want the default and crivm", s.RuntimeHandlers)
	}
}

func TestPodHasItsOwnKernel(t *testing.T) {
	p := runPod(t, shared)
	status := p.status()
	if status.State != cri.PodSandboxState_SANDBOX_READY || status.Network.Ip == "" || status.CreatedAt == 0 {
		t.Errorf("status is %v", status)
	}
	if status.Annotations["note"] != "kept as it is" || status.Labels["test"] != "yes" || status.Metadata.Name != p.config.Metadata.Name {
		t.Errorf("identity has changed: %v", status)
	}
	c := p.start("sleep 1000")
	var uts unix.Utsname
	if err := unix.Uname(&uts); err != nil {
		t.Fatal(err)
	}
	host := unix.ByteSliceToString(uts.Release[:])
	if guest := strings.TrimSpace(p.exec(c, "uname", "-r")); guest == host || guest == "" {
		t.Errorf("kernel of the pod is %q, of the host %q", guest, host)
	}
	if got := strings.TrimSpace(p.exec(c, "hostname")); got != p.config.Hostname {
		t.Errorf("hostname is %q", got)
	}
}

func TestContainerLifecycle(t *testing.T) {
	p := runPod(t, shared)
	id, err := p.create("echo out; echo err >&2; printf unfinished; exit 3")
	if err != nil {
		t.Fatal(err)
	}
	resp, err := shared.Runtime.ContainerStatus(t.Context(), id, false)
	if err != nil {
		t.Fatal(err)
	}
	if s := resp.Status; s.State != cri.ContainerState_CONTAINER_CREATED || s.CreatedAt == 0 || s.StartedAt != 0 || s.ImageRef == "" || s.ImageId == "" || s.Image.Image == "" {
		t.Errorf("status of a created container is %v", s)
	}
	if err := shared.Runtime.StartContainer(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	if err := shared.Runtime.StartContainer(t.Context(), id); err == nil {
		t.Error("a container can be started twice")
	}
	s := p.wait(id)
	if s.ExitCode != 3 || s.Reason != "Error" || s.StartedAt < s.CreatedAt || s.FinishedAt < s.StartedAt {
		t.Errorf("status of an exited container is %v", s)
	}
	raw, err := os.ReadFile(s.LogPath)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{" stdout F out\n", " stderr F err\n", " stdout P unfinished\n"} {
		if !strings.Contains(string(raw), want) {
			t.Errorf("log has no %q:\n%s", want, raw)
		}
	}
	for range 2 { // idempotent
		if err := shared.Runtime.StopContainer(t.Context(), id, 1); err != nil {
			t.Error(err)
		}
	}
	for range 2 {
		if err := shared.Runtime.RemoveContainer(t.Context(), id); err != nil {
			t.Error(err)
		}
	}
	if _, err := shared.Runtime.ContainerStatus(t.Context(), id, false); err == nil {
		t.Error("a removed container still has a status")
	}
}

func TestStopSignalAndGrace(t *testing.T) {
	p := runPod(t, shared)
	willing := p.start("trap 'echo told; exit 7' TERM; echo set; while :; do sleep 0.1; done")
	p.says(willing, "set")
	if err := shared.Runtime.StopContainer(testContext(t, time.Minute), willing, 30); err != nil {
		t.Fatal(err)
	}
	if s := p.wait(willing); s.ExitCode != 7 {
		t.Errorf("exit code after SIGTERM is %d, want 7", s.ExitCode)
	}
	if !strings.Contains(p.logText(willing), "told") {
		t.Error("the last line of a stopped container is missing in the log")
	}
	deaf := p.start("trap '' TERM; while :; do sleep 0.1; done")
	start := time.Now()
	if err := shared.Runtime.StopContainer(testContext(t, time.Minute), deaf, 2); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(start); took < 2*time.Second {
		t.Errorf("killed after %s, before its grace of 2 s was over", took)
	}
	if s := p.wait(deaf); s.ExitCode != 137 {
		t.Errorf("exit code after SIGKILL is %d, want 137", s.ExitCode)
	}
}

func TestOOMKilled(t *testing.T) {
	p := runPod(t, shared)
	s, _ := p.run("x=a; while :; do x=$x$x; done", func(c *cri.ContainerConfig) {
		c.Linux.Resources.MemoryLimitInBytes = 24 << 20
	})
	if s.ExitCode != 137 || s.Reason != "OOMKilled" {
		t.Errorf("exit is %d %s, want 137 OOMKilled", s.ExitCode, s.Reason)
	}
}

func TestMissingCommand(t *testing.T) {
	p := runPod(t, shared)
	id, err := p.create("", func(c *cri.ContainerConfig) { c.Command = []string{"/no/such/program"} })
	if err != nil {
		t.Fatalf("CreateContainer: %v; only StartContainer may find that out", err)
	}
	err = shared.Runtime.StartContainer(t.Context(), id)
	if err == nil || !strings.Contains(err.Error(), "/no/such/program") {
		t.Errorf("StartContainer says %v; want an error that names the program", err)
	}
	if s := p.wait(id); s.ExitCode != 128 || s.Reason != "StartError" {
		t.Errorf("exit is %d %s, want 128 StartError", s.ExitCode, s.Reason)
	}
}

func TestTwoContainersShareNetworkAndPIDs(t *testing.T) {
	p := runPod(t, shared, func(c *cri.PodSandboxConfig) { c.Linux.SecurityContext.NamespaceOptions.Pid = cri.NamespaceMode_POD })
	share := func(c *cri.ContainerConfig) { c.Linux.SecurityContext.NamespaceOptions.Pid = cri.NamespaceMode_POD }
	p.start("mkdir /www; echo shared > /www/index.html; exec httpd -f -p 127.0.0.1:8080 -h /www", share)
	other := p.start("sleep 1000", share)
	eventually(t, 20*time.Second, "the other container's server answers on localhost", func() error {
		_, _, err := shared.Runtime.ExecSync(t.Context(), other, []string{"wget", "-q", "-O", "-", "http://127.0.0.1:8080/"}, 10*time.Second)
		return err
	})
	if ps := p.exec(other, "ps"); !strings.Contains(ps, "httpd -f") {
		t.Errorf("processes of the other container are not visible:\n%s", ps)
	}
	alone := p.start("sleep 1001")
	if ps := p.exec(alone, "ps"); strings.Contains(ps, "httpd -f") {
		t.Errorf("processes of the pod are visible in a container with its own PID namespace:\n%s", ps)
	}
}

func TestDualStack(t *testing.T) {
	p := runPod(t, shared)
	status := p.status()
	ips := []string{status.Network.Ip}
	for _, a := range status.Network.AdditionalIps {
		ips = append(ips, a.Ip)
	}
	if len(ips) != 2 || net.ParseIP(ips[0]).To4() == nil || net.ParseIP(ips[1]).To4() != nil {
		t.Fatalf("addresses are %v; want one of IPv4 and one of IPv6", ips)
	}
	p.start("mkdir /www; echo hello > /www/index.html; exec httpd -f -p '[::]:80' -h /www")
	for _, ip := range ips {
		eventually(t, 20*time.Second, "the pod answers at "+ip, func() error {
			conn, err := net.DialTimeout("tcp", net.JoinHostPort(ip, "80"), 2*time.Second)
			if err == nil {
				conn.Close()
			}
			return err
		})
	}
}

func TestCrictlSeesThePod(t *testing.T) {
	p := runPod(t, shared)
	c := p.start("echo by crictl; sleep 1000")
	ctx := testContext(t, time.Minute)
	out, err := shared.Crictl(ctx, "ps", "-o", "json")
	if err != nil || !strings.Contains(out, c) {
		t.Errorf("crictl ps: %v: %s", err, out)
	}
	eventually(t, 20*time.Second, "crictl logs", func() error {
		out, err := shared.Crictl(ctx, "logs", c)
		if err == nil && out != "by crictl\n" {
			t.Logf("log is %q", out)
			return os.ErrNotExist
		}
		return err
	})
	for _, transport := range []string{"spdy", "websocket"} {
		if out, err := shared.Crictl(ctx, "exec", "--transport", transport, c[:13], "cat", "/etc/hostname"); err != nil || strings.TrimSpace(out) != p.config.Hostname {
			t.Errorf("crictl exec by a short ID over %s: %v: %q", transport, err, out)
		}
	}
	out, err = shared.Crictl(ctx, "inspectp", p.id)
	if err != nil || !json.Valid([]byte(out)) {
		t.Errorf("crictl inspectp: %v: %s", err, out)
	}
	if _, err := os.Stat(filepath.Join(shared.RunDir, "vm")); err != nil {
		t.Error(err)
	}
}
