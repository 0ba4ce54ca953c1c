package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crivm/crivm/cni"
	"github.com/crivm/crivm/server/headroom"
	"github.com/crivm/crivm/server/store"
	"github.com/crivm/crivm/vmruntime"
	"github.com/crivm/crivm/vmruntime/cloudhypervisor"
)

// killDaemonName is what the test binary is called when it is a daemon that kills itself.
const killDaemonName = "crivm-kill-daemon"

// killPlan is what such a daemon is told.
type killPlan struct {
	Dir   string // everything of the daemon lies below it
	VMM   string // fake cloud-hypervisor
	Point string // where to die by SIGKILL, as "name#occurrence"; "" nowhere
	Trace string // file for the names of the points that are passed; "" for none
	// FailAdd makes CNI ADD fail, for the roll-back.
	FailAdd bool
	Pool    int // size of the warm pool
	// Build is the checkout's build directory, for real VMs and CNI plugins; "" for the fakes.
	Build string
	Disk  string // image disk for real VMs
}

// killParts are what a daemon is made of.
type killParts struct {
	handler Handler
	network Network
	disk    string
}

// realParts are those of a daemon with real VMs; nil in a test binary without them.
var realParts func(killPlan) (killParts, error)

// fakeParts are the product's driver with the fake VMM, and the product's cni without plugins.
func fakeParts(plan killPlan) (killParts, error) {
	driver, err := cloudhypervisor.New(cloudhypervisor.Config{Binary: plan.VMM, Landlock: "off"})
	if err != nil {
		return killParts{}, err
	}
	net, err := cni.New(cni.Config{
		ConfDir: filepath.Join(plan.Dir, "net.d"), BinDirs: []string{plan.Dir}, CacheDir: filepath.Join(plan.Dir, "cni"), NetnsDir: filepath.Join(plan.Dir, "n"),
	})
	if err != nil {
		return killParts{}, err
	}
	plain := &network{Network: net}
	if plan.FailAdd {
		plain.fail = errors.New("no luck")
	}
	file := filepath.Join(plan.Dir, "file") // stands for kernel, initrd and image disk
	return killParts{handler: Handler{
		Driver: driver, Kernel: file, Initrd: file, VCPUs: 1, MaxVCPUs: 2, Memory: 128 << 20, MaxMemory: 256 << 20,
		ScratchBytes: 16 << 20, EmptyDirBytes: 16 << 20, BootTimeout: 20 * time.Second, PoolSize: plan.Pool,
	}, network: plain, disk: file}, nil
}

func (p killPlan) socket() string { return filepath.Join(p.Dir, "sock") }

// cgroup is the parent of the VMMs' cgroups, made and removed with them.
func (p killPlan) cgroup() string { return "/" + filepath.Base(p.Dir) }

// killDaemonMain is the daemon: the product's Server on the product's cni and driver with the fake VMM; only the
// plugins and images are the tests' own. It serves CRI on a unix socket until it is killed.
func killDaemonMain() {
	if filepath.Base(os.Args[0]) != killDaemonName {
		return
	}
	slog.SetDefault(slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelInfo})))
	if err := killDaemon(); err != nil {
		fmt.Fprintln(os.Stderr, "daemon:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

func killDaemon() error {
	var plan killPlan
	if err := json.Unmarshal([]byte(os.Args[1]), &plan); err != nil {
		return err
	}
	points := &points{plan: plan, passed: map[string]int{}}
	make := fakeParts
	if plan.Build != "" {
		make = realParts
	}
	parts, err := make(plan)
	if err != nil {
		return err
	}
	parts.handler.Driver = killDriver{parts.handler.Driver, points}
	s, err := New(context.Background(), Options{
		Version: "0.0.0", StateDir: filepath.Join(plan.Dir, "s"), RunDir: filepath.Join(plan.Dir, "r"),
		Handlers:     map[string]Handler{"": parts.handler},
		CgroupParent: plan.cgroup(), MaxLogLine: 16 << 10, StreamAddress: "127.0.0.1:0", StreamIdleTimeout: time.Hour,
	}, killNetwork{parts.network, points}, oneImage{parts.disk})
	if err != nil {
		return err
	}
	points.observe(s)
	<-s.restored
	points.pass("restored")
	os.Remove(plan.socket())
	return serveCRI(s, plan.socket())
}

func serveCRI(s *Server, socket string) error {
	os.Remove(socket + ".new") // of a daemon that died right here
	listener, err := net.Listen("unix", socket+".new")
	if err != nil {
		return err
	}
	listener.(*net.UnixListener).SetUnlinkOnClose(false)
	if err := os.Rename(socket+".new", socket); err != nil { // it can be dialled as soon as it is there
		return err
	}
	g := grpc.NewServer(grpc.InTapHandle(headroom.New().Tap), grpc.UnaryInterceptor(UnaryInterceptor))
	cri.RegisterRuntimeServiceServer(g, &Service{Server: s})
	return g.Serve(listener)
}

// points are the places at which a daemon can be killed: around each call of what the Server depends on, at each
// message to and from an agent, and after each commit of a record. What lies before a commit is the same world as
// that after the call which came before it.
type points struct {
	plan killPlan

	mu     sync.Mutex
	passed map[string]int
}

func (p *points) pass(name string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.passed[name]++
	key := fmt.Sprintf("%s#%d", name, p.passed[name])
	if p.plan.Trace != "" {
		f, err := os.OpenFile(p.plan.Trace, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o644)
		if err != nil {
			panic(err)
		}
		fmt.Fprintln(f, key)
		f.Close()
	}
	if key == p.plan.Point {
		syscall.Kill(os.Getpid(), syscall.SIGKILL)
		select {} // with the lock held: nothing passes any more
	}
}

// around passes a point before a call and, by the function it returns, one after it.
func (p *points) around(call string) func() {
	p.pass("before " + call)
	return func() { p.pass("after " + call) }
}

// observe makes points of the commits of records.
func (p *points) observe(s *Server) {
	o := s.observers()
	s.store.Observe(store.Observers{
		Sandbox: func(before, after *store.Sandbox) {
			state := "deleted"
			if after != nil {
				state = string(after.State)
			}
			p.pass("sandbox record " + state)
			if o.Sandbox != nil {
				o.Sandbox(before, after)
			}
		},
		Container: func(before, after *store.Container) {
			state := "deleted"
			if after != nil {
				state = string(after.State)
			}
			p.pass("container record " + state)
			if o.Container != nil {
				o.Container(before, after)
			}
		},
	})
}

type killNetwork struct {
	Network
	points *points
}

func (n killNetwork) Prepare(ctx context.Context, id string, uid, gid int) (cni.Slot, error) {
	defer n.points.around("Network.Prepare")()
	return n.Network.Prepare(ctx, id, uid, gid)
}

func (n killNetwork) Add(ctx context.Context, p cni.Pod) (cni.Attachment, error) {
	defer n.points.around("Network.Add")()
	return n.Network.Add(ctx, p)
}

func (n killNetwork) Del(ctx context.Context, p cni.Pod) error {
	defer n.points.around("Network.Del")()
	return n.Network.Del(ctx, p)
}

func (n killNetwork) GC(ctx context.Context, keep []string) error {
	defer n.points.around("Network.GC")()
	return n.Network.GC(ctx, keep)
}

type killDriver struct {
	vmruntime.Driver
	points *points
}

func (d killDriver) Start(ctx context.Context, s vmruntime.Spec) (vmruntime.VM, error) {
	defer d.points.around("Driver.Start")()
	vm, err := d.Driver.Start(ctx, s)
	if err != nil {
		return nil, err
	}
	return killVM{vm, d.points}, nil
}

func (d killDriver) Reattach(ctx context.Context, id, dir string) (vmruntime.VM, error) {
	defer d.points.around("Driver.Reattach")()
	vm, err := d.Driver.Reattach(ctx, id, dir)
	if err != nil {
		return nil, err
	}
	return killVM{vm, d.points}, nil
}

func (d killDriver) Sweep(ctx context.Context, id, dir string) error {
	defer d.points.around("Driver.Sweep")()
	return d.Driver.Sweep(ctx, id, dir)
}

type killVM struct {
	vmruntime.VM
	points *points
}

func (v killVM) AddDisk(ctx context.Context, d vmruntime.Disk) error {
	defer v.points.around("VM.AddDisk")()
	return v.VM.AddDisk(ctx, d)
}

func (v killVM) ShowFile(source *os.File, path string) error {
	defer v.points.around("VM.ShowFile")()
	return v.VM.ShowFile(source, path)
}

func (v killVM) RemoveDisk(ctx context.Context, serial string) error {
	defer v.points.around("VM.RemoveDisk")()
	return v.VM.RemoveDisk(ctx, serial)
}

func (v killVM) Move(ctx context.Context, to vmruntime.Cgroup, oomScoreAdj int) error {
	defer v.points.around("VM.Move")()
	return v.VM.Move(ctx, to, oomScoreAdj)
}

func (v killVM) AddShare(ctx context.Context, share vmruntime.Share) error {
	defer v.points.around("VM.AddShare")()
	return v.VM.AddShare(ctx, share)
}

func (v killVM) Resize(ctx context.Context, size vmruntime.Size) (vmruntime.Size, error) {
	defer v.points.around("VM.Resize")()
	return v.VM.Resize(ctx, size)
}

func (v killVM) Kill(ctx context.Context) error {
	defer v.points.around("VM.Kill")()
	return v.VM.Kill(ctx)
}

func (v killVM) Dial(ctx context.Context) (net.Conn, error) {
	conn, err := v.VM.Dial(ctx)
	if err != nil {
		return nil, err
	}
	return &killConn{Conn: conn, points: v.points}, nil
}

// killConn is a stream to an agent. Its points bear the name of the last call, or "stream" on one that is not the
// control stream: before a message is sent, after it was, after an answer came.
type killConn struct {
	net.Conn
	points *points

	mu   sync.Mutex
	call string
}

var agentCall = regexp.MustCompile(`Agent\x12[\x00-\x20]([A-Z][A-Za-z]+)`)

func (c *killConn) Write(p []byte) (int, error) {
	c.mu.Lock()
	if found := agentCall.FindSubmatch(p); found != nil {
		c.call = string(found[1])
	} else if c.call == "" {
		c.call = "stream"
	}
	call := c.call
	c.mu.Unlock()
	defer c.points.around("sending agent " + call)()
	return c.Conn.Write(p)
}

func (c *killConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if n > 0 {
		c.mu.Lock()
		call := c.call
		c.mu.Unlock()
		c.points.pass("answer of agent " + call)
	}
	return n, err
}

// processesBelow lists the processes whose command line or working directory names a path below dir.
func processesBelow(dir string) []string {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return []string{err.Error()}
	}
	var found []string
	for _, e := range entries {
		line, err := os.ReadFile(filepath.Join("/proc", e.Name(), "cmdline"))
		if err != nil || len(line) == 0 {
			continue
		}
		cwd, _ := os.Readlink(filepath.Join("/proc", e.Name(), "cwd"))
		if regexp.MustCompile(regexp.QuoteMeta(dir) + `(/|$|")`).MatchString(cwd + "\n" + string(line)) {
			found = append(found, e.Name()+": "+string(line))
		}
	}
	return found
}

// mountsBelow lists the mounts below dir.
func mountsBelow(dir string) []string {
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return []string{err.Error()}
	}
	return regexp.MustCompile(`(?m)^.* `+regexp.QuoteMeta(dir)+`/.*$`).FindAllString(string(text), -1)
}

func unmountBelow(dir string) {
	for range mountsBelow(dir) {
		unix.Unmount(filepath.Join(dir, "n"), unix.MNT_DETACH)
	}
}

// ended tells whether a process is no more, or waits to be reaped.
func ended(pid int) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return err != nil || regexp.MustCompile(`\) [ZX] `).Match(stat)
}
