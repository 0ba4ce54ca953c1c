package qemu

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// fakeMonitor accepts one QMP client, greets, and answers each command by serve, which returns raw lines.
func fakeMonitor(t *testing.T, greeting string, serve func(command string, id uint64, fds []int) string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "qmp.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		c, err := l.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		if _, err := fmt.Fprint(c, greeting); err != nil {
			return
		}
		buf, oob := make([]byte, 1<<16), make([]byte, 256)
		for {
			n, oobn, _, _, err := c.(*net.UnixConn).ReadMsgUnix(buf, oob)
			if err != nil || n == 0 {
				return
			}
			var fds []int
			if msgs, _ := unix.ParseSocketControlMessage(oob[:oobn]); len(msgs) > 0 {
				fds, _ = unix.ParseUnixRights(&msgs[0])
			}
			for sc := bufio.NewScanner(strings.NewReader(string(buf[:n]))); sc.Scan(); {
				var req struct {
					Execute string
					ID      uint64
				}
				if err := json.Unmarshal(sc.Bytes(), &req); err != nil {
					t.Errorf("client sent %q: %v", sc.Text(), err)
					return
				}
				answer := fmt.Sprintf(`{"return":{},"id":%d}`+"\n", req.ID)
				if req.Execute != "qmp_capabilities" {
					answer = serve(req.Execute, req.ID, fds)
				}
				if answer == "close" {
					return
				}
				if _, err := fmt.Fprint(c, answer); err != nil {
					return
				}
			}
		}
	}()
	t.Cleanup(func() { l.Close(); <-ended })
	return path
}

const hello = `{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}}, "capabilities": ["oob"]}}` + "\n"

func TestQMP(t *testing.T) {
	events := make(chan event, 10)
	path := fakeMonitor(t, hello, func(command string, id uint64, fds []int) string {
		switch command {
		case "query-status":
			return fmt.Sprintf(`{"event":"STOP","timestamp":{"seconds":1,"microseconds":2}}`+"\n"+`{"return":{"status":"paused"},"id":%d}`+"\n", id)
		case "device_del":
			return fmt.Sprintf(`{"error":{"class":"DeviceNotFound","desc":"Device 'x' not found"},"id":%d}`+"\n", id)
		case "getfd":
			defer func() {
				for _, fd := range fds {
					unix.Close(fd)
				}
			}()
			return fmt.Sprintf(`{"return":%d,"id":%d}`+"\n", len(fds), id)
		case "silence":
			return fmt.Sprintf(`{"return":{},"id":%d}`+"\n", id+1000)
		case "wrong-type":
			return fmt.Sprintf(`{"return":[1],"id":%d}`+"\n", id)
		}
		return "close"
	})
	q, err := dialQMP(t.Context(), path, func(e event) { events <- e })
	if err != nil {
		t.Fatal(err)
	}
	defer q.Close()
	var status struct{ Status string }
	if err := q.execute(t.Context(), "query-status", nil, &status); err != nil || status.Status != "paused" {
		t.Errorf("status %+v, %v", status, err)
	}
	if e := <-events; e.Name != "STOP" {
		t.Errorf("event %+v", e)
	}
	if err := q.execute(t.Context(), "device_del", nil, nil); !errdefs.IsNotFound(err) || !isRefusal(err) {
		t.Errorf("device_del: %v", err)
	}
	zero, err := os.Open("/dev/zero")
	if err != nil {
		t.Fatal(err)
	}
	defer zero.Close()
	var n int
	if err := q.execute(t.Context(), "getfd", nil, &n, zero); err != nil || n != 1 {
		t.Errorf("%d descriptors arrived, %v", n, err)
	}
	if err := q.execute(t.Context(), "wrong-type", nil, &status); err == nil {
		t.Error("an answer of the wrong type was accepted")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if err := q.execute(ctx, "silence", nil, nil); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("unanswered command: %v", err)
	}
	if err := q.execute(t.Context(), "quit", nil, nil); !errdefs.IsUnavailable(err) || isRefusal(err) {
		t.Errorf("connection lost in a command: %v", err)
	}
	if err := q.execute(t.Context(), "query-status", nil, nil); !errdefs.IsUnavailable(err) {
		t.Errorf("command on a lost connection: %v", err)
	}
}

func TestQMPHostile(t *testing.T) {
	for name, greeting := range map[string]string{
		"closed at once": "",
		"not JSON":       "hello\n",
		"endless line":   strings.Repeat("x", qmpLine+10),
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "s")
			l, err := net.Listen("unix", path)
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			go func() {
				if c, err := l.Accept(); err == nil {
					fmt.Fprint(c, greeting)
					c.Close()
				}
			}()
			if _, err := dialQMP(t.Context(), path, func(event) {}); err == nil {
				t.Error("no error")
			}
		})
	}
	t.Run("silent", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "s")
		l, err := net.Listen("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
		defer cancel()
		if _, err := dialQMP(ctx, path, func(event) {}); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v", err)
		}
	})
}
