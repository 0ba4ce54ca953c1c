package headroom

import (
	"math"
	"os"
	"path/filepath"
	"runtime/debug"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/tap"
)

func TestRoom(t *testing.T) {
	const v1Memory = "inactive_file 1\ntotal_inactive_file 1000000000\ntotal_active_file 24\n"
	for _, test := range []struct {
		name, proc string
		files      map[string]string
		want       string // in the error; "": there is room
		limit      int64  // that Go gets
	}{
		{name: "nothing known", proc: "0::/a\n", limit: math.MaxInt64 / 10 * 9},
		{name: "no limits, v2", proc: "0::/a\n", limit: math.MaxInt64 / 10 * 9, files: map[string]string{
			"a/pids.max": "max\n", "a/pids.current": "7\n", "a/memory.max": "max\n", "a/memory.current": "7\n"}},
		{name: "no limits, v1", proc: "8:pids:/a\n4:memory:/a\n0::/\n", limit: math.MaxInt64 / 10 * 9, files: map[string]string{
			"pids/a/pids.max": "max\n", "pids/a/pids.current": "7\n", "memory/a/memory.limit_in_bytes": "9223372036854771712\n", "memory/a/memory.usage_in_bytes": "7\n"}},
		{name: "enough", proc: "0::/a\n", limit: 900000000, files: map[string]string{
			"a/pids.max": "100\n", "a/pids.current": "50\n", "a/memory.max": "1000000000\n", "a/memory.current": "900000000\n"}},
		{name: "no processes", proc: "0::/a\n", limit: math.MaxInt64 / 10 * 9, want: "47 more processes and threads, by DIR/a/pids.max", files: map[string]string{
			"a/pids.max": "100\n", "a/pids.current": "53\n"}},
		{name: "more than the limit", proc: "0::/a\n", limit: math.MaxInt64 / 10 * 9, want: "may have 0 more", files: map[string]string{
			"a/pids.max": "10\n", "a/pids.current": "53\n"}},
		{name: "no processes above", proc: "8:pids:/a/b\n", limit: math.MaxInt64 / 10 * 9, want: "by DIR/pids/a/pids.max", files: map[string]string{
			"pids/a/pids.max": "100\n", "pids/a/pids.current": "100\n", "pids/a/b/pids.max": "1000\n", "pids/a/b/pids.current": "3\n"}},
		{name: "no memory", proc: "0::/a\n", limit: 90000000, want: "9765 KiB more memory, by the limit of DIR/a", files: map[string]string{
			"a/memory.max": "100000000\n", "a/memory.current": "90000000\n", "a/memory.stat": "anon 90000000\nfile 0\n"}},
		{name: "page cache", proc: "0::/a\n", limit: 90000000, files: map[string]string{
			"a/memory.max": "100000000\n", "a/memory.current": "90000000\n", "a/memory.stat": "inactive_file 20000000\nactive_file 10000000\n"}},
		{name: "v1", proc: "4:memory:/a\n", limit: 900000000, want: "DIR/memory/a", files: map[string]string{
			"memory/a/memory.limit_in_bytes": "1000000000\n", "memory/a/memory.usage_in_bytes": "990000000\n"}},
		{name: "v1 page cache", proc: "4:memory:/a\n", limit: 900000000, files: map[string]string{
			"memory/a/memory.limit_in_bytes": "1000000000\n", "memory/a/memory.usage_in_bytes": "990000000\n", "memory/a/memory.stat": v1Memory}},
	} {
		t.Run(test.name, func(t *testing.T) {
			before := debug.SetMemoryLimit(-1)
			defer debug.SetMemoryLimit(before)
			dir := t.TempDir()
			for name, text := range test.files {
				path := filepath.Join(dir, name)
				if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			proc := filepath.Join(dir, "proc")
			if err := os.WriteFile(proc, []byte(test.proc), 0o644); err != nil {
				t.Fatal(err)
			}
			r := &Room{proc: proc, mount: dir}
			err := r.Check()
			if want := strings.ReplaceAll(test.want, "DIR", dir); want == "" && err != nil || want != "" && (!errdefs.IsResourceExhausted(err) || !strings.Contains(err.Error(), want)) {
				t.Errorf("error is %v, want %q", err, want)
			}
			r.memory()
			if limit := debug.SetMemoryLimit(-1); limit != test.limit {
				t.Errorf("Go's limit is %d, want %d", limit, test.limit)
			}
			for call, refused := range map[string]bool{"/runtime.v1.RuntimeService/RunPodSandbox": true, "/runtime.v1.ImageService/PullImage": true,
				"/runtime.v1.RuntimeService/StopPodSandbox": false, "/runtime.v1.RuntimeService/Status": false} {
				_, err := r.Tap(t.Context(), &tap.Info{FullMethodName: call})
				if got := status.Code(err) == codes.ResourceExhausted; got != (refused && test.want != "") {
					t.Errorf("%s: %v", call, err)
				}
			}
		})
	}
}
