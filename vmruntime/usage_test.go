package vmruntime

import (
	"os"
	"path/filepath"
	"reflect"
	"testing"
	"time"
)

// tree writes files, as the kernel shows them, into a directory.
func tree(t *testing.T, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, text := range files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func TestUsageOfCgroups(t *testing.T) {
	dir := tree(t, map[string]string{
		"v2/pod/crivm-1/cpu.stat":                  "usage_usec 30\nuser_usec 20\nsystem_usec 10\n",
		"v2/pod/crivm-1/memory.current":            "1000\n",
		"v2/pod/crivm-1/memory.stat":               "anon 600\nfile 400\ninactive_file 300\n",
		"v2/pod/crivm-1/memory.swap.current":       "7\n",
		"v2/other/memory.current":                  "9999\n",
		"cpuacct/pod/crivm-1/cpuacct.usage":        "31000\n",
		"cpuacct/pod/crivm-1/cpuacct.stat":         "user 2\nsystem 1\n",
		"memory/pod/crivm-1/memory.usage_in_bytes": "2000\n",
		"memory/pod/crivm-1/memory.stat":           "cache 1\ntotal_cache 800\ntotal_inactive_file 2500\ntotal_swap 8\n",
	})
	trees := []hierarchy{
		{mount: filepath.Join(dir, "cpuacct"), options: "rw,cpu,cpuacct"}, {mount: filepath.Join(dir, "memory"), options: "rw,memory"},
		{mount: filepath.Join(dir, "v2"), v2: true},
	}
	process := Usage{CPUNanos: 1, MemoryBytes: 2, WorkingSetBytes: 3, CacheBytes: 4, SwapBytes: 5, RSSBytes: 6}
	tests := []struct {
		name, membership string
		want             Usage
	}{
		{"version 2", "0::/pod/crivm-1\n", Usage{CPUNanos: 30000, UserNanos: 20000, SystemNanos: 10000, MemoryBytes: 1000, WorkingSetBytes: 700, CacheBytes: 400, SwapBytes: 7, RSSBytes: 6, leaf: true}},
		{"version 1, more inactive than used", "4:memory:/pod/crivm-1\n2:cpu,cpuacct:/pod/crivm-1\n0::/\n",
			Usage{CPUNanos: 31000, UserNanos: 20e6, SystemNanos: 10e6, MemoryBytes: 2000, CacheBytes: 800, SwapBytes: 8, RSSBytes: 6, leaf: true}},
		{"shared with others", "0::/other\n4:memory:/\n", process},
		{"gone meanwhile", "0::/pod/crivm-2\n4:memory:/pod/crivm-2\n2:cpuacct:/pod/crivm-2", process},
		{"nonsense", "\nx\n0:\n", process},
	}
	for _, tt := range tests {
		u := process
		u.readCgroups(trees, tt.membership)
		if !reflect.DeepEqual(u, tt.want) {
			t.Errorf("%s: %+v, want %+v", tt.name, u, tt.want)
		}
	}
}

func TestUsageOfAServer(t *testing.T) {
	vmm := Usage{CPUNanos: 1, MemoryBytes: 1000, WorkingSetBytes: 900, RSSBytes: 800, shared: 700}
	tests := []struct {
		name         string
		server, want Usage
	}{
		{"its own cgroup", Usage{CPUNanos: 2, MemoryBytes: 50, WorkingSetBytes: 40, RSSBytes: 730, shared: 700, leaf: true},
			Usage{CPUNanos: 3, MemoryBytes: 1050, WorkingSetBytes: 940, RSSBytes: 830, shared: 700}},
		{"the process's figures", Usage{CPUNanos: 2, MemoryBytes: 750, WorkingSetBytes: 750, RSSBytes: 730, shared: 700},
			Usage{CPUNanos: 3, MemoryBytes: 1050, WorkingSetBytes: 950, RSSBytes: 830, shared: 700}},
	}
	for _, tt := range tests {
		got := vmm
		got.AddServer(tt.server)
		if !reflect.DeepEqual(got, tt.want) {
			t.Errorf("%s: %+v, want %+v", tt.name, got, tt.want)
		}
	}
}

func TestUsageOfThisProcess(t *testing.T) {
	memory := make([]byte, 64<<20)
	for i := range memory {
		memory[i] = 1
	}
	before, err := ReadUsage(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	// CPU time counts in ticks of 10 ms.
	for end := time.Now().Add(20 * time.Second); ; {
		after, err := ReadUsage(os.Getpid())
		if err != nil {
			t.Fatal(err)
		}
		if after.CPUNanos >= before.CPUNanos+50e6 {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("CPU time stands at %d ns", after.CPUNanos)
		}
	}
	if before.RSSBytes < uint64(len(memory)) || before.MemoryBytes < before.RSSBytes || before.Threads < 2 || before.PageFaults == 0 || memory[0] == 0 {
		t.Errorf("usage is %+v", before)
	}
	names := []string{}
	for _, i := range before.Interfaces {
		names = append(names, i.Name)
	}
	if len(names) == 0 || names[0] != "lo" {
		t.Errorf("interfaces are %v", names)
	}
	if _, err := ReadUsage(1 << 30); err == nil {
		t.Error("a process that cannot be has figures")
	}
}

func TestParseInterfaces(t *testing.T) {
	const text = "Inter-|   Receive                                                |  Transmit\n" +
		" face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed\n" +
		"  eth0: 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16\nbad: 1 2\n"
	want := []InterfaceUsage{{Name: "eth0", RxBytes: 1, RxPackets: 2, RxErrors: 3, RxDropped: 4, TxBytes: 9, TxPackets: 10, TxErrors: 11, TxDropped: 12}}
	if got := parseInterfaces([]byte(text)); !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v", got)
	}
}
