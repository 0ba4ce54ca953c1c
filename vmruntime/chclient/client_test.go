package chclient

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
)

// exchange is what a scripted server saw of one request.
type exchange struct {
	request *http.Request
	body    string
	fds     []int
	first   int // bytes of the first message
}

// serve answers every connection with what reply returns and hands the requests over.
func serve(t *testing.T, reply func(exchange) string) *Client {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "s")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			conn, err := l.AcceptUnix()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer conn.Close()
				buf, oob := make([]byte, 1<<20), make([]byte, 4096)
				n, oobn, _, _, err := conn.ReadMsgUnix(buf, oob)
				if err != nil {
					return
				}
				x := exchange{first: n}
				if msgs, err := syscall.ParseSocketControlMessage(oob[:oobn]); err == nil {
					for _, m := range msgs {
						fds, _ := syscall.ParseUnixRights(&m)
						x.fds = append(x.fds, fds...)
					}
				}
				x.request, err = http.ReadRequest(bufio.NewReader(io.MultiReader(strings.NewReader(string(buf[:n])), conn)))
				if err != nil {
					t.Errorf("request: %v", err)
					return
				}
				b, _ := io.ReadAll(x.request.Body)
				x.body = string(b)
				io.WriteString(conn, reply(x))
			})
		}
	})
	t.Cleanup(func() { l.Close(); wg.Wait() })
	return New(socket)
}

func answer(status int, body string) string {
	if status == 204 {
		return "HTTP/1.1 204 \r\nServer: Cloud Hypervisor API\r\nConnection: keep-alive\r\n\r\n"
	}
	return fmt.Sprintf("HTTP/1.1 %d \r\nServer: Cloud Hypervisor API\r\nConnection: keep-alive\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", status, len(body), body)
}

func TestRequests(t *testing.T) {
	ctx := t.Context()
	two, ram := 2, int64(1<<30)
	for _, tc := range []struct {
		name, method, path, body string
		call                     func(*Client) error
	}{
		{"boot", "PUT", "/api/v1/vm.boot", "", func(c *Client) error { return c.Boot(ctx) }},
		{"shutdown VMM", "PUT", "/api/v1/vmm.shutdown", "", func(c *Client) error { return c.ShutdownVMM(ctx) }},
		{"delete", "PUT", "/api/v1/vm.delete", "", func(c *Client) error { return c.Delete(ctx) }},
		{"stop", "PUT", "/api/v1/vm.shutdown", "", func(c *Client) error { return c.Shutdown(ctx) }},
		{"reboot", "PUT", "/api/v1/vm.reboot", "", func(c *Client) error { return c.Reboot(ctx) }},
		{"power", "PUT", "/api/v1/vm.power-button", "", func(c *Client) error { return c.PowerButton(ctx) }},
		{"nmi", "PUT", "/api/v1/vm.nmi", "", func(c *Client) error { return c.NMI(ctx) }},
		{"pause", "PUT", "/api/v1/vm.pause", "", func(c *Client) error { return c.Pause(ctx) }},
		{"resume", "PUT", "/api/v1/vm.resume", "", func(c *Client) error { return c.Resume(ctx) }},
		{"remove", "PUT", "/api/v1/vm.remove-device", `{"id":"d"}`, func(c *Client) error { return c.RemoveDevice(ctx, "d") }},
		{"snapshot", "PUT", "/api/v1/vm.snapshot", `{"destination_url":"file:///d"}`, func(c *Client) error { return c.Snapshot(ctx, "/d") }},
		{"restore", "PUT", "/api/v1/vm.restore", `{"source_url":"file:///d"}`, func(c *Client) error { return c.Restore(ctx, RestoreConfig{SourceURL: "file:///d"}) }},
		{"resize", "PUT", "/api/v1/vm.resize", `{"desired_vcpus":2,"desired_ram":1073741824}`, func(c *Client) error { return c.Resize(ctx, Resize{VCPUs: &two, RAM: &ram}) }},
		{"zone", "PUT", "/api/v1/vm.resize-zone", `{"id":"z","desired_ram":1}`, func(c *Client) error { return c.ResizeZone(ctx, ResizeZone{"z", 1}) }},
		{"disk size", "PUT", "/api/v1/vm.resize-disk", `{"id":"d","desired_size":512}`, func(c *Client) error { return c.ResizeDisk(ctx, ResizeDisk{"d", 512}) }},
		{"vsock", "PUT", "/api/v1/vm.add-vsock", `{"cid":3,"socket":"/s"}`, func(c *Client) error { _, err := c.AddVsock(ctx, VsockConfig{CID: 3, Socket: "/s"}); return err }},
		{"pmem", "PUT", "/api/v1/vm.add-pmem", `{"file":"/f"}`, func(c *Client) error { _, err := c.AddPmem(ctx, PmemConfig{File: "/f"}); return err }},
		{"vfio", "PUT", "/api/v1/vm.add-device", `{"path":"/sys/x"}`, func(c *Client) error { _, err := c.AddDevice(ctx, DeviceConfig{Path: "/sys/x"}); return err }},
		{"fs", "PUT", "/api/v1/vm.add-fs", `{"tag":"t","socket":"/s","num_queues":1,"queue_size":1024}`, func(c *Client) error {
			_, err := c.AddFS(ctx, FSConfig{Tag: "t", Socket: "/s", NumQueues: 1, QueueSize: 1024})
			return err
		}},
		// What must never be left to the VMM's defaults is always sent.
		{"add disk", "PUT", "/api/v1/vm.add-disk", `{"id":"d","path":"/p","readonly":false,"serial":"s","backing_files":false,"image_type":"Raw"}`, func(c *Client) error {
			_, err := c.AddDisk(ctx, DiskConfig{ID: "d", Path: "/p", Serial: "s", ImageType: ImageRaw})
			return err
		}},
		{"create", "PUT", "/api/v1/vm.create", `{"cpus":{"boot_vcpus":1,"max_vcpus":2,"nested":false},"console":{"mode":"Off"},"platform":{"uuid":"u"}}`, func(c *Client) error {
			return c.Create(ctx, VMConfig{CPUs: &CPUsConfig{Boot: 1, Max: 2}, Console: &ConsoleConfig{Mode: ConsoleOff}, Platform: &PlatformConfig{UUID: "u"}})
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var got exchange
			c := serve(t, func(x exchange) string { got = x; return answer(204, "") })
			if err := tc.call(c); err != nil {
				t.Fatal(err)
			}
			if got.request.Method != tc.method || got.request.URL.Path != tc.path || got.body != tc.body {
				t.Errorf("got %s %s %q, want %s %s %q", got.request.Method, got.request.URL.Path, got.body, tc.method, tc.path, tc.body)
			}
			if got.request.Header.Get("Content-Length") == "" && got.request.ContentLength != int64(len(tc.body)) {
				t.Errorf("Content-Length %d", got.request.ContentLength)
			}
		})
	}
}

func TestReplies(t *testing.T) {
	const info = `{"config":{"cpus":{"boot_vcpus":2,"max_vcpus":4},"memory":{"size":536870912,"hotplug_size":null},
		"disks":null,"payload":{"kernel":"/k"},"platform":{"system_uuid":"u","num_pci_segments":2}},
		"state":"Running","memory_actual_size":536870912,"new_field":{},
		"device_tree":{"d":{"id":"d","resources":[{"x":1}],"parent":"_virtio-pci-d","children":[],"pci_bdf":null}}}`
	c := serve(t, func(x exchange) string {
		switch filepath.Base(x.request.URL.Path) {
		case "vmm.ping":
			return answer(200, `{"build_version":"v53.0-dirty","version":"53.0.0","pid":7,"features":["kvm"]}`)
		case "vm.info":
			return answer(200, info)
		case "vm.counters":
			return answer(200, `{"_disk0":{"read_bytes":18446744073709551615}}`)
		default:
			return answer(200, `{"id":"d","bdf":"0000:00:05.0"}`)
		}
	})
	ctx := t.Context()
	if p, err := c.Ping(ctx); err != nil || p.PID != 7 || p.BuildVersion != "v53.0-dirty" {
		t.Errorf("ping: %+v, %v", p, err)
	}
	i, err := c.Info(ctx)
	if err != nil || i.State != StateRunning || i.Config.CPUs.Max != 4 || i.Config.Platform.UUID != "u" ||
		i.Config.Platform.NumPCISegments != 2 || i.DeviceTree["d"].Parent != "_virtio-pci-d" {
		t.Errorf("info: %+v, %v", i, err)
	}
	if m, err := c.Counters(ctx); err != nil || m["_disk0"]["read_bytes"] != 1<<64-1 {
		t.Errorf("counters: %v, %v", m, err)
	}
	if d, err := c.AddDisk(ctx, DiskConfig{}); err != nil || d.BDF != "0000:00:05.0" {
		t.Errorf("add disk: %+v, %v", d, err)
	}
}

func TestErrors(t *testing.T) {
	long := `["` + strings.Repeat("x", 200<<10) + `"]`
	for _, tc := range []struct {
		name, reply string
		class       func(error) bool
		text        string
	}{
		{"array", answer(500, `["Error from API","The VM could not boot","no\u001b[31m\nkernel"]`), errdefs.IsUnknown, "vm.boot: Error from API: The VM could not boot: no [31m kernel (status 500)"},
		{"text before v47", answer(400, "VM is not running"), errdefs.IsInvalidArgument, "vm.boot: VM is not running (status 400)"},
		{"HTTP parser", answer(400, "{ \"error\": \"Invalid HTTP Method: Unsupported HTTP method.\nAll previous unanswered requests will be dropped.\" }"), errdefs.IsInvalidArgument, "requests will be dropped"},
		{"not found", answer(404, `["Not Found"]`), errdefs.IsNotFound, "Not Found"},
		{"conflict", answer(409, `[]`), errdefs.IsAlreadyExists, "status 409"},
		{"pending", answer(429, `["Too Many Requests"]`), errdefs.IsUnavailable, "Too Many Requests"},
		{"too many connections", "HTTP/1.1 503\r\nServer: Firecracker API\r\nConnection: close\r\nContent-Length: 40\r\n\r\n{ \"error\": \"Too many open connections\" }", errdefs.IsUnavailable, "Too many open connections"},
		{"no body", "HTTP/1.1 500 \r\nContent-Length: 0\r\n\r\n", errdefs.IsUnknown, "status 500"},
		{"closed", "", errdefs.IsUnavailable, "without a reply"},
		{"closed amid", "HTTP/1.1 200 \r\nContent-", errdefs.IsUnavailable, "reply: "},
		{"garbage", "hello\r\n\r\n", errdefs.IsUnavailable, "reply"},
		{"endless", answer(500, long), errdefs.IsUnknown, "xxx"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c := serve(t, func(exchange) string { return tc.reply })
			err := c.Boot(t.Context())
			if !tc.class(err) || !strings.Contains(fmt.Sprint(err), tc.text) {
				t.Errorf("got %v", err)
			}
			if len(fmt.Sprint(err)) > 4096 {
				t.Errorf("message of %d bytes", len(fmt.Sprint(err)))
			}
		})
	}
	err := New(filepath.Join(t.TempDir(), "none")).Boot(t.Context())
	if !errdefs.IsUnavailable(err) || !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no socket: %v", err)
	}
}

func TestReplyIsBounded(t *testing.T) {
	c := serve(t, func(exchange) string { return answer(200, `{"state":"`+strings.Repeat("x", 2*replyLimit)+`"}`) })
	if _, err := c.Info(t.Context()); err == nil {
		t.Error("a reply of 8 MiB was accepted")
	}
}

func TestBodyLimit(t *testing.T) {
	var requests atomic.Int32
	var build atomic.Value
	build.Store("v53.0")
	c := serve(t, func(x exchange) string {
		requests.Add(1)
		return answer(200, `{"build_version":"`+build.Load().(string)+`"}`)
	})
	long := VMConfig{Payload: &PayloadConfig{Cmdline: strings.Repeat("x", 60000)}}
	if err := c.Create(t.Context(), long); !errdefs.IsResourceExhausted(err) || requests.Load() != 0 {
		t.Errorf("%d requests, %v", requests.Load(), err)
	}
	build.Store("v54.0")
	if _, err := c.Ping(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := c.Create(t.Context(), long); err != nil {
		t.Errorf("v54: %v", err)
	}
}

func TestFilesTravelWithTheRequest(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	c := serve(t, func(x exchange) string {
		if len(x.fds) != 2 || x.first < 100 {
			t.Errorf("%d files with the first %d bytes", len(x.fds), x.first)
		}
		for i, fd := range x.fds {
			f := os.NewFile(uintptr(fd), "received")
			if i == 0 {
				f.WriteString("hi")
			}
			f.Close()
		}
		return answer(204, "")
	})
	_, err = c.AddNet(t.Context(), NetConfig{ID: "n", NumQueues: 4}, w, w)
	w.Close()
	if err != nil {
		t.Fatal(err)
	}
	if b, _ := io.ReadAll(r); string(b) != "hi" {
		t.Errorf("pipe got %q", b)
	}
	if _, err := c.AddNet(t.Context(), NetConfig{NumQueues: 2}, r, r); !errdefs.IsInvalidArgument(err) {
		t.Errorf("2 queues for 2 taps: %v", err)
	}
	if err := c.Restore(t.Context(), RestoreConfig{NetFDs: []RestoredNet{{"n", 2}}}, r); !errdefs.IsInvalidArgument(err) {
		t.Errorf("1 file for 2: %v", err)
	}
}

func TestFieldsOfNewReleasesAreGated(t *testing.T) {
	var build atomic.Value
	build.Store("v51.2")
	paths := make(chan string, 10)
	c := serve(t, func(x exchange) string {
		paths <- filepath.Base(x.request.URL.Path)
		return answer(200, `{"build_version":"`+build.Load().(string)+`"}`)
	})
	err := c.Restore(t.Context(), RestoreConfig{SourceURL: "file:///d", Resume: true})
	if !errdefs.IsNotImplemented(err) || <-paths != "vmm.ping" || len(paths) != 0 {
		t.Errorf("restore with resume on v51.2: %v", err)
	}
	if _, err := c.AddDevice(t.Context(), DeviceConfig{}, os.Stdin); !errdefs.IsNotImplemented(err) || len(paths) != 0 {
		t.Errorf("device by file on v51.2: %v", err)
	}
	build.Store("v53.0")
	c.Ping(t.Context())
	<-paths
	if err := c.Restore(t.Context(), RestoreConfig{Resume: true}); err != nil || <-paths != "vm.restore" {
		t.Errorf("restore with resume on v53.0: %v", err)
	}
}

func TestOneRequestAtATimeAndDeadlines(t *testing.T) {
	var running, most atomic.Int32
	release := make(chan struct{}) // one receive for each boot
	c := serve(t, func(x exchange) string {
		most.Store(max(most.Load(), running.Add(1)))
		defer running.Add(-1)
		if filepath.Base(x.request.URL.Path) == "vm.boot" {
			<-release
		}
		return answer(204, "")
	})
	boot := make(chan error, 1)
	go func() { boot <- c.Boot(t.Context()) }()
	for running.Load() == 0 { // until the boot has arrived; the test's own deadline bounds it
		time.Sleep(time.Millisecond)
	}
	short, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if err := c.Pause(short); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("pause behind boot: %v", err)
	}
	release <- struct{}{}
	if err := <-boot; err != nil || most.Load() != 1 {
		t.Errorf("boot %v, %d at once", err, most.Load())
	}
	short, cancel = context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if err := c.Boot(short); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("hanging boot: %v", err)
	}
	release <- struct{}{}
	if err := c.Pause(t.Context()); err != nil {
		t.Errorf("the client is unusable after a deadline: %v", err)
	}
}

func FuzzErrorBody(f *testing.F) {
	f.Add([]byte(`["a","b"]`))
	f.Add([]byte("plain \x1b[31m"))
	f.Add([]byte("{ \"error\": \"x\n\" }"))
	f.Fuzz(func(t *testing.T, b []byte) {
		e := &Error{Status: 500, Messages: parseMessages(b)}
		if s := e.Error(); len(s) > maxMessages*(maxMessageLength+8)*3 || strings.ContainsAny(s, "\x1b\n\r\x00") {
			t.Errorf("%q", s)
		}
	})
}
