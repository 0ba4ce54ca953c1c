//go:build integration

package guest

import (
	"errors"
	"io"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/moby/profiles/seccomp"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/crivm/crivm/agentproto"
)

// TestVM boots one real guest and tries everything that plain processes cannot show.
func TestVM(t *testing.T) {
	vm := bootVM(t)
	t.Logf("boot to hello: %v; kernel start to serving: %v", vm.booted, time.Duration(vm.Info().GetBootNanos()))
	setup := &agentproto.SetupSandboxRequest{
		SandboxId: "pod", Hostname: "pod-1", UnixNanos: time.Now().UnixNano(), Entropy: make([]byte, 32),
		ScratchSerial: "scratch", ShmBytes: 8 << 20, SharePidNamespace: true, MachineId: strings.Repeat("0123", 8),
		Interfaces: []*agentproto.Interface{{
			MatchMac: vm.mac, Mac: "0a:58:0a:01:02:03", Name: "eth0", Mtu: 1400, Addresses: []string{"10.1.2.3/24", "fd00::3/64"},
		}},
		Routes: []*agentproto.Route{
			{Destination: "0.0.0.0/0", Gateway: "10.1.2.1", Interface: "eth0"},
			{Destination: "10.9.0.0/16", Interface: "eth0", Scope: 253},
			{Destination: "::/0", Gateway: "fd00::1", Interface: "eth0"},
		},
		Neighbours: []*agentproto.Neighbour{{Address: "10.1.2.1", Mac: "0a:58:0a:01:02:01", Interface: "eth0"}},
		Sysctls:    map[string]string{"net.ipv4.ip_unprivileged_port_start": "0"},
	}
	for range 2 {
		begin := time.Now()
		if _, err := vm.SetupSandbox(testContext(t), setup); err != nil {
			t.Fatal(err)
		}
		t.Logf("set up: %v", time.Since(begin))
	}
	setup.Hostname = "other"
	if _, err := vm.SetupSandbox(testContext(t), setup); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("set up as another sandbox: %v", err)
	}
	for name, test := range map[string]func(*testing.T, *testVM){
		"pod": testVMPod, "users": testVMUsers, "limits": testVMLimits, "execs": testVMExecs, "terminal": testVMTerminal,
		"commands": testVMCommands, "volumes": testVMVolumes, "pid namespaces": testVMPIDNamespaces, "disks": testVMDisks,
		"modules": testVMModules, "read-only": testVMReadOnly, "flood": testVMFlood, "memory": testVMMemory, "seccomp": testVMSeccomp,
	} {
		t.Run(name, func(t *testing.T) { test(t, vm) })
	}
	if t.Failed() {
		return
	}
	t.Run("shutdown", func(t *testing.T) { testVMShutdown(t, vm) })
}

// vmCreate makes a container of the image disk.
func vmCreate(t *testing.T, vm *testVM, r *agentproto.CreateContainerRequest, change func(*specs.Spec), args ...string) *agentproto.ResolvedUser {
	t.Helper()
	r.OciSpec = vmSpec(t, change, args...)
	if r.Rootfs == nil {
		r.Rootfs = &agentproto.Rootfs{ImageSerial: "img-busybox"}
	}
	begin := time.Now()
	resp, err := vm.CreateContainer(testContext(t), r)
	if err != nil {
		t.Fatalf("create %s: %v", r.GetContainerId(), err)
	}
	t.Logf("create %s: %v", r.GetContainerId(), time.Since(begin))
	t.Cleanup(func() {
		if _, err := vm.DeleteContainer(testContext(t), &agentproto.DeleteContainerRequest{ContainerId: r.GetContainerId()}); err != nil {
			t.Errorf("delete: %v", err)
		}
	})
	return resp.GetUser()
}

// vmRun runs a container to its end and returns its stdout.
func vmRun(t *testing.T, vm *testVM, r *agentproto.CreateContainerRequest, change func(*specs.Spec), args ...string) (string, *agentproto.Exit) {
	t.Helper()
	vmCreate(t, vm, r, change, args...)
	begin := time.Now()
	start(t, vm.Client, r.GetContainerId())
	t.Logf("start %s: %v", r.GetContainerId(), time.Since(begin))
	b, err := io.ReadAll(openOutput(t, vm.Client, &agentproto.Output{ContainerId: r.GetContainerId()}))
	if err != nil {
		t.Fatal(err)
	}
	e, err := io.ReadAll(openOutput(t, vm.Client, &agentproto.Output{ContainerId: r.GetContainerId(), Stderr: true}))
	if err != nil || len(e) > 0 {
		t.Logf("stderr: %s, %v", e, err)
	}
	return string(b), wait(t, vm.Client, r.GetContainerId(), "")
}

func testVMPod(t *testing.T, vm *testVM) {
	out, exit := vmRun(t, vm, &agentproto.CreateContainerRequest{ContainerId: "pod"}, nil, "sh", "-c",
		"hostname; ip -o addr show eth0; ip route; ip -6 route; cat /proc/self/oom_score_adj; ip neigh; grep . /sys/class/net/eth0/mtu /sys/class/net/eth0/address; ulimit -n; ls /sys/fs/cgroup/cgroup.procs")
	if exit.GetCode() != 0 {
		t.Errorf("exit: %v", exit)
	}
	for _, want := range []string{"pod-1\n", "inet 10.1.2.3/24", "inet6 fd00::3/64", "default via 10.1.2.1 dev eth0", "10.9.0.0/16 dev eth0",
		"default via fd00::1", "\n0\n", "10.1.2.1 dev eth0 lladdr 0a:58:0a:01:02:01", "mtu:1400", "address:0a:58:0a:01:02:03", "65536\n"} {
		if !strings.Contains(out, want) {
			t.Errorf("%q is not in\n%s", want, out)
		}
	}
	if strings.Contains(out, "tentative") {
		t.Error("address waits for duplicate detection")
	}
	resp, err := vm.Ping(testContext(t), &agentproto.PingRequest{})
	if err != nil || time.Since(time.Unix(0, resp.GetUnixNanos())).Abs() > 5*time.Second {
		t.Errorf("clock: %v, %v", resp, err)
	}
	var hello *agentproto.HelloResponse
	ctx := testContext(t)
	for { // the runtime is asked for its version when the pod has had time to start
		hello, err = vm.Hello(ctx, &agentproto.HelloRequest{Version: agentproto.Version})
		if err != nil || hello.GetOciRuntime() != "" {
			break
		}
		time.Sleep(100 * time.Millisecond)
	}
	if err != nil || !hello.GetSandboxReady() || !strings.Contains(hello.GetOciRuntime(), "crun") {
		t.Errorf("hello: %v, %v", hello, err)
	}
	stats, err := vm.Stats(testContext(t), &agentproto.StatsRequest{})
	if err != nil || stats.GetMemoryTotalBytes() == 0 || stats.GetScratch().GetTotalBytes() == 0 || stats.GetCpuPressure().GetSome() == nil {
		t.Errorf("stats: %v, %v", stats, err)
	}
	t.Logf("guest memory: %d of %d MiB available", stats.GetMemoryAvailableBytes()>>20, stats.GetMemoryTotalBytes()>>20)
	online, err := vm.Online(testContext(t), &agentproto.OnlineRequest{})
	if err != nil || online.GetCpus() != 1 {
		t.Errorf("online: %v, %v", online, err)
	}
}

func testVMUsers(t *testing.T, vm *testVM) {
	for id, tc := range map[string]struct {
		user *agentproto.User
		want string
	}{
		"root":   {nil, "0 0 0 HOME=/root"},
		"name":   {&agentproto.User{Name: "app", SupplementalGroups: []uint32{7}}, "1000 1001 7 1001 50000 HOME=/home/app"},
		"strict": {&agentproto.User{Name: "app", SupplementalGroups: []uint32{7}, StrictGroups: true}, "1000 1001 7 1001 HOME=/home/app"},
		"number": {&agentproto.User{HasUid: true, Uid: 12345, HasGid: true, Gid: 99}, "12345 99 99 HOME=/"},
	} {
		out, _ := vmRun(t, vm, &agentproto.CreateContainerRequest{ContainerId: id, User: tc.user}, func(s *specs.Spec) { s.Process.Cwd = "/made/up" },
			"sh", "-c", "echo $(id -u) $(id -g) $(grep Groups: /proc/self/status | cut -f2) HOME=$HOME; test $PWD = /made/up || echo wrong directory")
		if out != tc.want+"\n" {
			t.Errorf("%s: %q, want %q", id, out, tc.want)
		}
	}
	_, err := vm.CreateContainer(testContext(t), &agentproto.CreateContainerRequest{
		ContainerId: "nobody", OciSpec: vmSpec(t, nil, "true"), Rootfs: &agentproto.Rootfs{ImageSerial: "img-busybox"}, User: &agentproto.User{Name: "nobody-there"},
	})
	if !errdefs.IsInvalidArgument(err) {
		t.Errorf("unknown user: %v", err)
	}
}

func testVMLimits(t *testing.T, vm *testVM) {
	limit := int64(32 << 20)
	_, exit := vmRun(t, vm, &agentproto.CreateContainerRequest{ContainerId: "oom"},
		func(s *specs.Spec) { s.Linux.Resources.Memory = &specs.LinuxMemory{Limit: &limit} },
		"awk", "BEGIN { s = \"x\"; while (1) s = s s }")
	if !exit.GetOomKilled() || exit.GetCode() != 137 {
		t.Errorf("exit of one that took too much memory: %v", exit)
	}
	vmCreate(t, vm, &agentproto.CreateContainerRequest{ContainerId: "limits"}, func(s *specs.Spec) {
		quota, period, shares, pids := int64(50000), uint64(100000), uint64(1024), int64(50)
		s.Linux.Resources = &specs.LinuxResources{Devices: denyDevices,
			Memory: &specs.LinuxMemory{Limit: &limit, Swap: &limit}, HugepageLimits: []specs.LinuxHugepageLimit{{Pagesize: "2MB"}, {Pagesize: "7GB"}}, Pids: &specs.LinuxPids{Limit: &pids},
			CPU: &specs.LinuxCPU{Quota: &quota, Period: &period, Shares: &shares, Cpus: "7-9"},
		}
	}, "sleep", "1000")
	start(t, vm.Client, "limits")
	read := func() string {
		return vmExec(t, vm, "limits", "cat", "/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/cpu.max", "/sys/fs/cgroup/pids.max")
	}
	if got := read(); got != "33554432\n50000 100000\n50\n" {
		t.Errorf("limits: %q", got)
	}
	_, err := vm.UpdateContainer(testContext(t), &agentproto.UpdateContainerRequest{ContainerId: "limits",
		Resources: []byte(`{"memory":{"limit":67108864},"cpu":{"quota":20000,"period":100000,"shares":512,"cpus":"3"},"unified":{"memory.high":"50000000"}}`)})
	if err != nil {
		t.Fatal(err)
	}
	if got := read(); got != "67108864\n20000 100000\n50\n" {
		t.Errorf("limits after update: %q", got)
	}
	vmExec(t, vm, "limits", "sh", "-c", "dd if=/dev/zero of=/file bs=1M count=3; sync")
	stats, err := vm.Stats(testContext(t), &agentproto.StatsRequest{ContainerIds: []string{"limits"}})
	if err != nil || len(stats.GetContainers()) != 1 {
		t.Fatalf("stats: %v, %v", stats, err)
	}
	s := stats.GetContainers()[0]
	if s.GetCpuUsageNanos() == 0 || s.GetMemoryUsageBytes() == 0 || s.GetPids() != 1 || s.GetMemoryLimitBytes() != 67108864 || s.GetWritableLayerBytes() < 3<<20 {
		t.Errorf("stats: %v", s)
	}
}

// vmExec runs a command in a container and returns its output, both kinds.
func vmExec(t *testing.T, vm *testVM, id string, args ...string) string {
	t.Helper()
	execID := "x" + strings.ReplaceAll(time.Now().Format("150405.000000"), ".", "")
	begin := time.Now()
	if _, err := vm.Exec(testContext(t), &agentproto.ExecRequest{ContainerId: id, ExecId: execID, Args: args}); err != nil {
		t.Fatal(err)
	}
	t.Logf("exec %s: %v", args[0], time.Since(begin))
	b, err := io.ReadAll(openOutput(t, vm.Client, &agentproto.Output{ContainerId: id, ExecId: execID}))
	if err != nil {
		t.Fatal(err)
	}
	e, err := io.ReadAll(openOutput(t, vm.Client, &agentproto.Output{ContainerId: id, ExecId: execID, Stderr: true}))
	if err != nil {
		t.Fatal(err)
	}
	wait(t, vm.Client, id, execID)
	if _, err := vm.DeleteExec(testContext(t), &agentproto.DeleteExecRequest{ContainerId: id, ExecId: execID}); err != nil {
		t.Fatal(err)
	}
	return string(b) + string(e)
}

func testVMExecs(t *testing.T, vm *testVM) {
	vmCreate(t, vm, &agentproto.CreateContainerRequest{ContainerId: "execs"}, nil, "sleep", "1000")
	start(t, vm.Client, "execs")
	for range 5 {
		if got := vmExec(t, vm, "execs", "echo", "hello"); got != "hello\n" {
			t.Errorf("exec: %q", got)
		}
	}
	// What an exec left in the background goes with it; what the container runs stays.
	_, err := vm.Exec(testContext(t), &agentproto.ExecRequest{ContainerId: "execs", ExecId: "tree",
		Args: []string{"sh", "-c", "sh -c 'sleep 2000 & sleep 2000' & setsid sleep 2000 & echo ready; wait"}})
	if err != nil {
		t.Fatal(err)
	}
	expectLine(t, openOutput(t, vm.Client, &agentproto.Output{ContainerId: "execs", ExecId: "tree"}), "ready")
	eventually(t, func() bool { return strings.Count(vmExec(t, vm, "execs", "ps"), "sleep 2000") >= 3 })
	if _, err := vm.DeleteExec(testContext(t), &agentproto.DeleteExecRequest{ContainerId: "execs", ExecId: "tree"}); err != nil {
		t.Fatal(err)
	}
	eventually(t, func() bool { return !strings.Contains(vmExec(t, vm, "execs", "ps"), "sleep 2000") })
	if ps := vmExec(t, vm, "execs", "ps"); !strings.Contains(ps, "sleep 1000") {
		t.Errorf("the container's own process is gone:\n%s", ps)
	}
	for command, is := range map[string]func(error) bool{
		"no-such-command": errdefs.IsNotFound, "/no/such/file": errdefs.IsNotFound, "/bin/notexec": errdefs.IsPermissionDenied, "/tmp": errdefs.IsPermissionDenied,
	} {
		_, err := vm.Exec(testContext(t), &agentproto.ExecRequest{ContainerId: "execs", ExecId: "bad", Args: []string{command}})
		if !is(err) {
			t.Errorf("exec %s: %v", command, err)
		}
	}
}

func testVMTerminal(t *testing.T, vm *testVM) {
	tty := &agentproto.Stdio{Tty: true, Stdin: true, Rows: 24, Columns: 80}
	vmCreate(t, vm, &agentproto.CreateContainerRequest{ContainerId: "tty", Stdio: tty}, nil, "sh", "-c", "stty size; read line; stty size; echo got $line; exit 9")
	start(t, vm.Client, "tty")
	dialog := func(execID string) {
		t.Helper()
		out := openOutput(t, vm.Client, &agentproto.Output{ContainerId: "tty", ExecId: execID})
		expectLine(t, out, "24 80")
		if _, err := vm.ResizeTTY(testContext(t), &agentproto.ResizeTTYRequest{ContainerId: "tty", ExecId: execID, Rows: 50, Columns: 132}); err != nil {
			t.Fatal(err)
		}
		in, err := vm.Input(testContext(t), &agentproto.Input{ContainerId: "tty", ExecId: execID})
		if err != nil {
			t.Fatal(err)
		}
		defer in.Close()
		if _, err := in.Write([]byte("hello\r")); err != nil {
			t.Fatal(err)
		}
		for _, line := range []string{"hello", "50 132", "got hello"} {
			expectLine(t, out, line)
		}
		if rest, err := io.ReadAll(out); err != nil || len(rest) > 0 {
			t.Errorf("rest: %q, %v", rest, err)
		}
		if exit := wait(t, vm.Client, "tty", execID); exit.GetCode() != 9 {
			t.Errorf("exit: %v", exit)
		}
	}
	if _, err := vm.Exec(testContext(t), &agentproto.ExecRequest{ContainerId: "tty", ExecId: "e", Stdio: tty,
		Args: []string{"sh", "-c", "stty size; read line; stty size; echo got $line; exit 9"}}); err != nil {
		t.Fatal(err)
	}
	dialog("e")
	dialog("")
}

func testVMCommands(t *testing.T, vm *testVM) {
	for command, tc := range map[string]struct {
		is   func(error) bool
		text string
	}{
		"no-such-command": {errdefs.IsNotFound, `exec: "no-such-command": executable file not found in $PATH`},
		"/no/such/file":   {errdefs.IsNotFound, "no such file or directory"},
		"/bin/notexec":    {errdefs.IsPermissionDenied, "permission denied"},
	} {
		id := "cmd" + strings.ReplaceAll(command, "/", "-")
		vmCreate(t, vm, &agentproto.CreateContainerRequest{ContainerId: id}, nil, command)
		_, err := vm.StartContainer(testContext(t), &agentproto.StartContainerRequest{ContainerId: id})
		if !tc.is(err) || !strings.Contains(err.Error(), tc.text) {
			t.Errorf("start %s: %v", command, err)
		}
		if exit := wait(t, vm.Client, id, ""); exit.GetCode() != exitNotStarted {
			t.Errorf("exit of %s: %v", command, exit)
		}
	}
}

func testVMVolumes(t *testing.T, vm *testVM) {
	files := func() *agentproto.Mount {
		return &agentproto.Mount{Destination: "/etc/config", Readonly: true, Source: &agentproto.Mount_Files{Files: &agentproto.Files{
			Volume: "config", Entries: []*agentproto.File{
				{Path: "", Mode: 0o040750, Gid: 1001}, {Path: "..data", Mode: 0o120777, LinkTarget: "..1"}, {Path: "..1", Mode: 0o040755},
				{Path: "..1/key", Mode: 0o100440, Uid: 1000, Content: []byte("value")}, {Path: "key", Mode: 0o120777, LinkTarget: "..data/key"},
			}}}}
	}
	mounts := []*agentproto.Mount{
		files(),
		{Destination: "/etc/hosts", Source: &agentproto.Mount_Files{Files: &agentproto.Files{Volume: "hosts", Entries: []*agentproto.File{{Mode: 0o100644, Content: []byte("127.0.0.1 me\n")}}}}},
		{Destination: "/data", Source: &agentproto.Mount_EmptyDir{EmptyDir: &agentproto.EmptyDir{Volume: "data"}}},
		{Destination: "/memory", Source: &agentproto.Mount_EmptyDir{EmptyDir: &agentproto.EmptyDir{Volume: "memory", Memory: true, SizeBytes: 1 << 20}}},
		{Destination: "/dev/shm", Source: &agentproto.Mount_Shm{Shm: &agentproto.SharedMemory{}}},
	}
	out, exit := vmRun(t, vm, &agentproto.CreateContainerRequest{ContainerId: "volumes", Mounts: mounts}, nil, "sh", "-c",
		`cat /etc/config/key; stat -c ' %a %u %g' /etc/config/key/ /etc/config/..1/key 2>/dev/null; stat -c '%a %u %g' /etc/config; cat /etc/hosts; echo x 2>/dev/null > /etc/config/new && echo BAD
		echo kept > /data/f; echo kept > /dev/shm/f; dd if=/dev/zero of=/memory/f bs=1M count=2 2>/dev/null || echo full; stat -c %a /data; df -k /dev/shm | tail -1 | awk '{print $2}'`)
	if want := "value 440 1000 0\n750 0 1001\n127.0.0.1 me\nfull\n777\n8192\n"; out != want || exit.GetCode() != 0 {
		t.Errorf("got %q, want %q; %v", out, want, exit)
	}
	out, _ = vmRun(t, vm, &agentproto.CreateContainerRequest{ContainerId: "volumes2", Mounts: mounts}, nil, "cat", "/data/f", "/dev/shm/f", "/etc/config/key")
	if out != "kept\nkept\nvalue" {
		t.Errorf("second container: %q", out)
	}
	for _, path := range []string{"../x", "/x", "a/../../x"} {
		m := files()
		m.GetFiles().Volume, m.GetFiles().Entries = "evil", []*agentproto.File{{Path: path, Mode: 0o100644}}
		_, err := vm.CreateContainer(testContext(t), &agentproto.CreateContainerRequest{ContainerId: "evil", OciSpec: vmSpec(t, nil, "true"),
			Rootfs: &agentproto.Rootfs{ImageSerial: "img-busybox"}, Mounts: []*agentproto.Mount{m}})
		if !errdefs.IsInvalidArgument(err) {
			t.Errorf("file %q: %v", path, err)
		}
	}
}

func testVMPIDNamespaces(t *testing.T, vm *testVM) {
	count := func(r *agentproto.CreateContainerRequest) string {
		out, _ := vmRun(t, vm, r, nil, "sh", "-c", "test -e /proc/1/exe; tr '\\0' ' ' < /proc/1/cmdline; ps | grep -c 'sleep 100[0]'")
		return out
	}
	vmCreate(t, vm, &agentproto.CreateContainerRequest{ContainerId: "member", PidPod: true}, nil, "sleep", "1000")
	start(t, vm.Client, "member")
	if out := count(&agentproto.CreateContainerRequest{ContainerId: "shared", PidPod: true}); !strings.Contains(out, "pause") || !strings.HasSuffix(out, "1\n") {
		t.Errorf("pod's namespace: %q", out)
	}
	out, _ := vmRun(t, vm, &agentproto.CreateContainerRequest{ContainerId: "curious", PidPod: true}, func(s *specs.Spec) {
		all := s.Process.Capabilities.Bounding
		all = append(all, "CAP_SYS_PTRACE")
		s.Process.Capabilities = &specs.LinuxCapabilities{Bounding: all, Effective: all, Permitted: all}
	}, "sh", "-c", "ls /proc/1/root/ | wc -l; ls /proc/1/cwd/ | wc -l; grep Cap /proc/1/status | cut -f2 | sort -u")
	if out != "0\n0\n0000000000000000\n000001ffffffffff\n" {
		t.Errorf("what a container sees of the pod's first process: %q", out)
	}
	if out := count(&agentproto.CreateContainerRequest{ContainerId: "private"}); !strings.HasPrefix(out, "sh ") || !strings.HasSuffix(out, "0\n") {
		t.Errorf("own namespace: %q", out)
	}
	vmCreate(t, vm, &agentproto.CreateContainerRequest{ContainerId: "target"}, nil, "sleep", "1000")
	start(t, vm.Client, "target")
	if out := count(&agentproto.CreateContainerRequest{ContainerId: "debugger", PidTarget: "target"}); !strings.HasPrefix(out, "sleep 1000") {
		t.Errorf("target's namespace: %q", out)
	}
	_, err := vm.CreateContainer(testContext(t), &agentproto.CreateContainerRequest{ContainerId: "lost", PidTarget: "nobody",
		OciSpec: vmSpec(t, nil, "true"), Rootfs: &agentproto.Rootfs{ImageSerial: "img-busybox"}})
	if !errdefs.IsNotFound(err) {
		t.Errorf("target that is not there: %v", err)
	}
	// The end of one container's process ends its children, also where it is not the namespace's init.
	if _, exit := vmRun(t, vm, &agentproto.CreateContainerRequest{ContainerId: "parent", PidPod: true}, nil, "sh", "-c", "sleep 3000 & exit 4"); exit.GetCode() != 4 {
		t.Errorf("exit: %v", exit)
	}
}

func testVMDisks(t *testing.T, vm *testVM) {
	vmCreate(t, vm, &agentproto.CreateContainerRequest{ContainerId: "disk"}, nil, "true")
	for _, serial := range []string{"img-busybox", "scratch"} {
		if _, err := vm.DetachDisk(testContext(t), &agentproto.DetachDiskRequest{Serial: serial}); !errdefs.IsFailedPrecondition(err) {
			t.Errorf("detach %s in use: %v", serial, err)
		}
	}
	if _, err := vm.DeleteContainer(testContext(t), &agentproto.DeleteContainerRequest{ContainerId: "disk"}); err != nil {
		t.Fatal(err)
	}
	if _, err := vm.DetachDisk(testContext(t), &agentproto.DetachDiskRequest{Serial: "img-busybox"}); err != nil {
		t.Errorf("detach: %v", err)
	}
}

func testVMReadOnly(t *testing.T, vm *testVM) {
	out, _ := vmRun(t, vm, &agentproto.CreateContainerRequest{ContainerId: "ro", Rootfs: &agentproto.Rootfs{ImageSerial: "img-busybox", Readonly: true},
		Mounts: []*agentproto.Mount{{Destination: "/made/for/this", Source: &agentproto.Mount_EmptyDir{EmptyDir: &agentproto.EmptyDir{Volume: "ro"}}}},
	}, nil, "sh", "-c", "touch /x 2>/dev/null || echo refused; touch /made/for/this/x && echo allowed")
	if out != "refused\nallowed\n" {
		t.Errorf("read-only: %q", out)
	}
}

// testVMModules asks the kernel for something that it has to load a module for.
func testVMModules(t *testing.T, vm *testVM) {
	out, exit := vmRun(t, vm, &agentproto.CreateContainerRequest{ContainerId: "modules"}, func(s *specs.Spec) {
		caps := []string{"CAP_NET_ADMIN"}
		s.Process.Capabilities = &specs.LinuxCapabilities{Bounding: caps, Effective: caps, Permitted: caps}
	}, "sh", "-c", "brctl addbr br7 || ip link add br7 type bridge; ls -d /sys/class/net/br7; ip link del br7")
	if out != "/sys/class/net/br7\n" || exit.GetCode() != 0 {
		t.Errorf("bridge: %q, %v", out, exit)
	}
}

// testVMSeccomp measures what the usual system call filter costs, and that it filters.
func testVMSeccomp(t *testing.T, vm *testVM) {
	for _, id := range []string{"filter1", "filter2", "filter3"} {
		out, _ := vmRun(t, vm, &agentproto.CreateContainerRequest{ContainerId: id}, func(s *specs.Spec) {
			profile, err := seccomp.GetDefaultProfile(s)
			if err != nil {
				t.Fatal(err)
			}
			s.Linux.Seccomp = profile
		}, "sh", "-c", "grep Seccomp: /proc/self/status; unshare -U true 2>/dev/null || echo refused")
		if out != "Seccomp:\t2\nrefused\n" {
			t.Errorf("filter: %q", out)
		}
	}
}

// testVMMemory looks at the agent itself.
func testVMMemory(t *testing.T, vm *testVM) {
	out, _ := vmRun(t, vm, &agentproto.CreateContainerRequest{ContainerId: "memory"}, func(s *specs.Spec) {
		s.Mounts = append(s.Mounts, specs.Mount{Destination: "/agent", Type: "bind", Source: "/proc/1", Options: []string{"rbind", "ro"}})
	}, "sh", "-c", "grep -E '^(VmHWM|VmRSS|RssAnon|Threads)' /agent/status; cat /agent/oom_score_adj; ls /agent/fd | wc -l")
	t.Logf("agent: %s", strings.ReplaceAll(out, "\n", " "))
	if !strings.Contains(out, "\n-1000\n") {
		t.Error("the kernel may kill the agent")
	}
	for line := range strings.Lines(out) {
		if kib, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			n, err := strconv.Atoi(strings.Fields(kib)[0])
			if err != nil || n > 20<<10 {
				t.Errorf("resident memory %d KiB, %v", n, err)
			}
		}
	}
}

// testVMFlood takes more output than any buffer holds.
func testVMFlood(t *testing.T, vm *testVM) {
	const size = 16 << 20
	vmCreate(t, vm, &agentproto.CreateContainerRequest{ContainerId: "flood"}, nil, "sh", "-c", "dd if=/dev/zero bs=64k count=256 2>/dev/null")
	start(t, vm.Client, "flood")
	r := openOutput(t, vm.Client, &agentproto.Output{ContainerId: "flood"})
	begin, buf, read := time.Now(), make([]byte, 64<<10), 0
	for {
		n, err := r.Read(buf)
		read += n
		if n > 0 {
			if err := r.Ack(r.Offset()); err != nil {
				t.Fatal(err)
			}
		}
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if read != size {
		t.Errorf("read %d of %d bytes", read, size)
	}
	t.Logf("%.0f MB/s", float64(size)/1e6/time.Since(begin).Seconds())
}

func testVMShutdown(t *testing.T, vm *testVM) {
	vmSpec(t, nil, "sleep")
	if _, err := vm.CreateContainer(testContext(t), &agentproto.CreateContainerRequest{ContainerId: "last", OciSpec: vmSpec(t, nil, "sleep", "1000"),
		Rootfs: &agentproto.Rootfs{ImageSerial: "img-busybox"}}); err != nil {
		t.Fatal(err)
	}
	start(t, vm.Client, "last")
	begin := time.Now()
	if _, err := vm.Shutdown(testContext(t), &agentproto.ShutdownRequest{}); err != nil {
		t.Fatal(err)
	}
	select {
	case <-vm.exited:
		t.Logf("power off: %v", time.Since(begin))
	case <-time.After(testTimeout):
		t.Error("guest does not power off")
	}
	b, err := os.ReadFile(vm.console)
	if err != nil || strings.Contains(string(b), "panic") || strings.Contains(string(b), "level=ERROR") || strings.Contains(string(b), "level=WARN") {
		t.Errorf("console, %v:\n%s", err, b)
	}
}
