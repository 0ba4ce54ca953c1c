package vmtest

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// vmm is a running VMM, fake or real.
type vmm struct {
	t    *testing.T
	dir  string
	real bool
	cmd  *exec.Cmd
}

// startVMM starts one in a short directory of its own.
func startVMM(t *testing.T, binary string, real bool) *vmm {
	t.Helper()
	dir, err := os.MkdirTemp("", "fk")
	if err != nil {
		t.Fatal(err)
	}
	v := &vmm{t: t, dir: dir, real: real}
	v.cmd = exec.Command(binary, "--api-socket", "path="+v.path("api"), "--event-monitor", "path="+v.path("events"))
	v.cmd.Dir = dir
	log, err := os.Create(v.path("log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	v.cmd.Stdout, v.cmd.Stderr = log, log
	if err := v.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		v.cmd.Process.Kill()
		v.cmd.Wait()
		if t.Failed() {
			b, _ := os.ReadFile(v.path("log"))
			t.Logf("log: %s", b)
		}
		os.RemoveAll(dir)
	})
	v.until("API socket", func() bool {
		conn, err := net.Dial("unix", v.path("api"))
		if err == nil {
			conn.Close()
		}
		return err == nil
	})
	return v
}

func (v *vmm) path(name string) string { return filepath.Join(v.dir, name) }

func (v *vmm) until(what string, f func() bool) {
	v.t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !f(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			v.t.Fatalf("%s: not within 10 s", what)
		}
	}
}

// send sends bytes as they are and returns the whole answer; half closes the sending side first.
func (v *vmm) send(text string, half bool) (*http.Response, string, error) {
	v.t.Helper()
	conn, err := net.Dial("unix", v.path("api"))
	if err != nil {
		v.t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(20 * time.Second))
	if _, err := io.WriteString(conn, text); err != nil && !errors.Is(err, syscall.EPIPE) { // refused before it was read
		v.t.Fatal(err)
	}
	if half {
		conn.(*net.UnixConn).CloseWrite()
	}
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		return nil, "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	return resp, string(body), err
}

func (v *vmm) put(action, body string) (int, string) {
	v.t.Helper()
	method := "PUT"
	if strings.HasPrefix(action, "GET ") {
		method, action = "GET", strings.TrimPrefix(action, "GET ")
	}
	text := fmt.Sprintf("%s /api/v1/%s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s", method, action, len(body), body)
	resp, answer, err := v.send(text, false)
	if err != nil {
		v.t.Fatalf("%s: %v", action, err)
	}
	return resp.StatusCode, answer
}

// step is a request and what both VMMs answer. DIR in the body is the VM's directory.
type step struct {
	action, body string
	status       int
	text         string // part of the answer
}

const goodVM = `{"cpus":{"boot_vcpus":1,"max_vcpus":2},"memory":{"size":134217728,"hotplug_method":"VirtioMem","hotplug_size":134217728},` +
	`"payload":{"kernel":"DIR/kernel"},"console":{"mode":"Off"},"serial":{"mode":"Socket","socket":"DIR/serial"},` +
	`"vsock":{"id":"vsock","cid":3,"socket":"DIR/vsock"},"platform":{"num_pci_segments":2},"pvpanic":true,` +
	`"disks":[{"id":"a","path":"DIR/d1","image_type":"Raw"}]}`

// script goes once through the API. It was written against the real v53.0.
var script = []step{
	{"GET vmm.ping", "", 200, `"build_version"`},
	{"GET vm.info", "", 404, "VM is not created"},
	{"vm.boot", "", 404, "VM config is missing"},
	{"vm.shutdown", "", 500, ""},
	{"vm.delete", "", 204, ""},
	{"vm.nothing", "", 404, `["Not Found"]`},
	{"vmm.ping", "", 400, `["Bad Request"]`},
	{"GET vm.boot", "", 400, `["Bad Request"]`},
	{"vm.boot", `{}`, 400, `["Bad Request"]`},
	{"vm.create", `{"payload":`, 400, "Failed to deserialize JSON"},
	{"vm.create", `{"payload":{},"payload":{}}`, 400, "duplicate field `payload`"},
	{"vm.create", `{"payload":{},"memory":{"size":1,"hotplug_method":"acpi"}}`, 400, "unknown variant `acpi`"},
	{"vm.create", `{"payload":{},"cpus":{"boot_vcpus":"1","max_vcpus":1}}`, 400, "invalid type"},
	{"vm.create", `{"payload":{},"cpus":{"max_vcpus":1}}`, 400, "missing field `boot_vcpus`"},
	{"vm.add-disk", `{"id":"b","path":"DIR/d2","image_type":"Raw"}`, 404, "VM is not created"},
	{"vm.create", goodVM, 204, ""},
	{"vm.create", goodVM, 500, "VM is already created"},
	{"GET vm.info", "", 200, `"state":"Created"`},
	{"vm.pause", "", 500, "VM is not running"},
	{"vm.resume", "", 500, "VM is not running"},
	{"vm.power-button", "", 500, "VM is not running"},
	{"GET vm.counters", "", 500, "VM is not running"},
	{"vm.snapshot", `{"destination_url":"file://DIR/snap"}`, 500, "VM is not running"},
	{"vm.add-disk", `{"id":"cold","path":"DIR/none","image_type":"Raw"}`, 204, ""},
	{"vm.add-disk", `{"id":"a","path":"DIR/d2","image_type":"Raw"}`, 500, "Identifier a is not unique"},
	{"vm.add-disk", `{"id":"b","path":"DIR/d2","image_type":"raw"}`, 400, "unknown variant `raw`"},
	{"vm.add-disk", `{"id":"b","path":"DIR/d2","image_type":"Raw","serial":"123456789012345678901"}`, 500, "exceeds maximum allowed length (20)"},
	{"vm.remove-device", `{"id":"cold"}`, 204, ""},
	{"vm.remove-device", `{"id":"cold"}`, 500, `No device with id \"cold\" to remove`},
	{"vm.boot", "", 204, ""},
	{"vm.boot", "", 500, "VM is already created"},
	{"GET vm.info", "", 200, `"state":"Running"`},
	{"GET vm.info", "", 200, `"_virtio-pci-a"`},
	{"GET vm.counters", "", 200, `"a":{`},
	{"vm.power-button", "", 204, ""},
	{"vm.resize", `{"desired_vcpus":2}`, 204, ""},
	{"vm.resize", `{"desired_vcpus":3}`, 500, "Requested vCPUs exceed maximum"},
	{"vm.resize", `{"desired_vcpus":0}`, 500, "Requested zero vCPUs"},
	{"vm.resize", `{"desired_ram":134217728}`, 500, "are identical"},
	{"vm.resize", `{"desired_ram":167772160}`, 204, ""},
	{"vm.resize", `{"desired_ram":167772160}`, 500, "are identical"},
	{"vm.resize", `{"desired_ram":167772161}`, 500, "is not aligned"},
	{"vm.resize", `{"desired_ram":16777216}`, 500, "below boot size"},
	{"vm.resize", `{"desired_ram":16777216000}`, 500, "is bigger than region_size"},
	{"vm.resize", `{"desired_balloon":1048576}`, 500, ""},
	{"vm.add-disk", `{"id":"a","path":"DIR/d2","image_type":"Raw"}`, 500, "Identifier a is not unique"},
	{"vm.add-disk", `{"id":"b","path":"DIR/none","image_type":"Raw"}`, 500, "DIR/none"},
	{"vm.add-disk", `{"id":"b","path":"DIR/d1","image_type":"Raw"}`, 500, "The file is already locked"},
	{"vm.add-disk", `{"id":"b","path":"DIR/d2","image_type":"Raw","pci_segment":2}`, 500, "Invalid PCI segment id: 2"},
	{"vm.add-disk", `{"id":"b","path":"DIR/d2","image_type":"Raw","pci_segment":1}`, 200, `{"id":"b","bdf":"0001:00:01.0"}`},
	{"vm.add-fs", `{"id":"f","tag":"t","socket":"DIR/fs","num_queues":1,"queue_size":1024}`, 500, "requires using shared memory"},
	{"vm.add-vsock", `{"id":"v","cid":3,"socket":"DIR/v"}`, 500, "Too many virtio-vsock devices"},
	{"vm.remove-device", `{"id":"none"}`, 500, "Failed to find device"},
	{"vm.remove-device", `{"id":"__rng"}`, 500, ""},
	{"vm.pause", "", 204, ""},
	{"GET vm.info", "", 200, `"state":"Paused"`},
	{"vm.pause", "", 500, "InvalidStateTransition(Paused, Paused)"},
	{"vm.resume", "", 204, ""},
	{"vm.resume", "", 500, "InvalidStateTransition(Running, Running)"},
	{"vm.restore", `{"source_url":"file://DIR/snap"}`, 500, ""},
	{"vm.restore", `{"source_url":"file://DIR/snap","net_fds":[{"id":"n","num_fds":1}]}`, 400, ""},
	{"vm.remove-device", `{"id":"b"}`, 204, ""},
	{"vm.remove-device", `{"id":"b"}`, 500, "Failed to find device"},
	{"vm.reboot", "", 204, ""},
	{"vm.shutdown", "", 204, ""},
	{"vm.shutdown", "", 500, ""},
	{"GET vm.info", "", 200, `"state":"Created"`},
	{"vm.delete", "", 204, ""},
	{"vmm.shutdown", "", 200, ""},
}

func TestAPI(t *testing.T) {
	t.Run("fake", func(t *testing.T) { testAPI(t, Binary(t), false) })
	t.Run("real", func(t *testing.T) { testAPI(t, realBinary(t), true) })
}

// realBinary finds a real Cloud Hypervisor that can make VMs, and says it why there is none.
func realBinary(t *testing.T) string {
	t.Helper()
	name := os.Getenv("CRIVM_TEST_CLOUD_HYPERVISOR")
	if name == "" {
		name = vmmName
	}
	path, err := exec.LookPath(name)
	if err != nil {
		t.Skipf("no real Cloud Hypervisor (CRIVM_TEST_CLOUD_HYPERVISOR or PATH): %v", err)
	}
	f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err != nil {
		t.Skipf("the real VMM needs /dev/kvm: %v", err)
	}
	f.Close()
	return path
}

func testAPI(t *testing.T, binary string, real bool) {
	v := startVMM(t, binary, real)
	for _, name := range []string{"d1", "d2"} {
		if err := os.WriteFile(v.path(name), make([]byte, 1<<20), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(v.path("snap"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(v.path("kernel"), TinyKernel(0xf4), 0o600); err != nil {
		t.Fatal(err)
	}
	for i, s := range script {
		status, answer := v.put(s.action, strings.ReplaceAll(s.body, "DIR", v.dir))
		if text := strings.ReplaceAll(s.text, "DIR", v.dir); status != s.status || !strings.Contains(answer, text) {
			t.Errorf("%d: %s %s: status %d, %s\nwant %d, ...%s...", i, s.action, s.body, status, answer, s.status, text)
		}
		if status == 204 && answer != "" {
			t.Errorf("%d: body with status 204", i)
		}
	}
	if err := v.cmd.Wait(); err != nil {
		t.Errorf("exit: %v", err)
	}
	for _, name := range []string{"api", "serial", "vsock"} {
		if _, err := os.Lstat(v.path(name)); err == nil {
			t.Errorf("%s is left", name)
		}
	}
	events, err := os.ReadFile(v.path("events"))
	if err != nil {
		t.Fatal(err)
	}
	at := 0
	for _, e := range []string{"starting", "booting", "booted", "resizing", "resized", "pausing", "paused", "resuming", "resumed", "rebooting", "rebooted", "shutdown", "deleted", "shutdown"} {
		i := strings.Index(string(events)[at:], "\n  \"event\": \""+e+"\",\n  \"properties\": ")
		if i < 0 {
			t.Fatalf("no %s after byte %d of %s", e, at, events)
		}
		at += i + 1
	}
}

func TestHTTP(t *testing.T) {
	t.Run("fake", func(t *testing.T) { testHTTP(t, Binary(t), false) })
	t.Run("real", func(t *testing.T) { testHTTP(t, realBinary(t), true) })
}

func testHTTP(t *testing.T, binary string, real bool) {
	v := startVMM(t, binary, real)
	long := `{"payload":{"cmdline":"` + strings.Repeat("x", maxBody) + `"}}`
	for _, tc := range []struct {
		name, text string
		status     int
	}{
		{"method", "POST /api/v1/vmm.ping HTTP/1.1\r\n\r\n", 400},
		{"no version", "GET /api/v1/vmm.ping\r\n\r\n", 400},
		{"no length", "PUT /api/v1/vm.create HTTP/1.1\r\n\r\n", 400},
		{"chunked", "PUT /api/v1/vm.create HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", 400},
		{"long body", fmt.Sprintf("PUT /api/v1/vm.create HTTP/1.1\r\nContent-Length: %d\r\n\r\n%s", len(long), long), 400},
		{"long request line", "GET /" + strings.Repeat("x", 2000) + " HTTP/1.1\r\n\r\n", 400},
		{"other root", "GET /vmm.ping HTTP/1.1\r\n\r\n", 404},
		{"trailing slash", "GET /api/v1/vmm.ping/ HTTP/1.1\r\n\r\n", 404},
		{"fine", "GET /api/v1/vmm.ping HTTP/1.1\r\n\r\n", 200},
	} {
		resp, body, err := v.send(tc.text, false)
		if err != nil || resp.StatusCode != tc.status {
			t.Errorf("%s: %v, %v %s", tc.name, err, resp, body)
		}
	}
	// The real one answers a half-closed connection if it has read the request before it sees the end.
	if resp, body, err := v.send("GET /api/v1/vmm.ping HTTP/1.1\r\n\r\n", true); err == nil && !real {
		t.Errorf("half-closed connection: %v %s", resp, body)
	}

	var conns []net.Conn
	for range maxConnections {
		conn, err := net.Dial("unix", v.path("api"))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		conns = append(conns, conn)
		// Each is known to be open when it has been answered.
		io.WriteString(conn, "GET /api/v1/vmm.ping HTTP/1.1\r\n\r\n")
		if _, err := http.ReadResponse(bufio.NewReader(conn), nil); err != nil {
			t.Fatal(err)
		}
	}
	if resp, body, err := v.send("", false); err != nil || resp.StatusCode != 503 {
		t.Errorf("connection %d: %v, %v %s", len(conns)+1, err, resp, body)
	}
}

func TestCommandLine(t *testing.T) {
	for _, real := range []bool{false, true} {
		t.Run(map[bool]string{false: "fake", true: "real"}[real], func(t *testing.T) {
			binary := ""
			if real {
				binary = realBinary(t)
			} else {
				binary = Binary(t)
			}
			dir := t.TempDir()
			for _, tc := range []struct {
				args   []string
				status int
			}{
				{[]string{"--version"}, 0},
				{[]string{"--no-such-option"}, 2},
				{[]string{"--api-socket", "path=" + dir + "/api", "--seccomp", "maybe"}, 2},
				{[]string{"--api-socket", "path=/nonexistent/api"}, 1},
				{[]string{"--api-socket", "path=" + dir + "/api", "--event-monitor", "path=/nonexistent/events"}, 1},
			} {
				cmd := exec.Command(binary, tc.args...)
				cmd.WaitDelay = 10 * time.Second
				out, err := cmd.CombinedOutput()
				if cmd.ProcessState == nil || cmd.ProcessState.ExitCode() != tc.status {
					t.Errorf("%v: %v, want status %d: %s", tc.args, err, tc.status, out)
				}
			}
			v := startVMM(t, binary, real)
			second := exec.Command(binary, "--api-socket", "path="+v.path("api"))
			if out, err := second.CombinedOutput(); second.ProcessState.ExitCode() != 1 {
				t.Errorf("socket in use: %v %s", err, out)
			}
			if err := v.cmd.Process.Signal(syscall.SIGTERM); err != nil {
				t.Fatal(err)
			}
			if err := v.cmd.Wait(); err != nil {
				t.Errorf("SIGTERM: %v", err)
			}
		})
	}
}
