package server

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/encoding/proto"
	"google.golang.org/grpc/mem"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crivm/crivm/server/store"
)

// records writes as many sandboxes, with a container each, as kubelet would have made them, and with an annotation
// of so many bytes besides. None has a VM.
func (r *rig) records(n, annotation int) (containers []string) {
	r.t.Helper()
	for range n {
		id := newID()
		pod := fmt.Sprintf("pod-%d", len(r.store.SandboxEntries()))
		labels := map[string]string{"app": "web", "pod-template-hash": "5d4f8c7b9d", "io.kubernetes.pod.name": pod, "io.kubernetes.pod.namespace": "default", "io.kubernetes.pod.uid": newID()[:32]}
		large := strings.Repeat("x", annotation)
		annotations := map[string]string{"kubernetes.io/config.seen": "2026-01-01T00:00:00Z", "kubernetes.io/config.source": "api", "example.org/large": large}
		sb, err := r.store.CreateSandbox(store.Sandbox{
			ID: newID(), Name: pod + id, State: store.SandboxNotReady, Driver: r.opts.Handlers[""].Driver.Name(), Dir: filepath.Join(r.dir, "none", pod), VMDir: filepath.Join(r.dir, "novm", pod),
			Config: store.SandboxConfig{PodSandboxConfig: &cri.PodSandboxConfig{
				Metadata: &cri.PodSandboxMetadata{Name: pod, Namespace: "default", Uid: labels["io.kubernetes.pod.uid"]}, Labels: labels, Annotations: annotations,
			}},
		})
		if err != nil {
			r.t.Fatal(err)
		}
		c, err := r.store.CreateContainer(store.Container{
			ID: id, Name: pod + id, SandboxID: sb.ID, State: store.ContainerExited, ImageRef: "docker.io/library/image@" + imageID, ImageID: imageID,
			Config: store.ContainerConfig{ContainerConfig: &cri.ContainerConfig{
				Metadata: &cri.ContainerMetadata{Name: "web"}, Image: &cri.ImageSpec{Image: imageID, UserSpecifiedImage: "image"}, Labels: labels, Annotations: map[string]string{
					"io.kubernetes.container.hash": "a1b2c3d4", "io.kubernetes.container.restartCount": "0", "io.kubernetes.container.terminationMessagePath": "/dev/termination-log",
					"io.kubernetes.container.terminationMessagePolicy": "File", "io.kubernetes.pod.terminationGracePeriod": "30", "example.org/large": large,
				},
			}},
		})
		if err != nil {
			r.t.Fatal(err)
		}
		containers = append(containers, c.ID)
		r.t.Cleanup(func() {
			if err := errors.Join(r.store.DeleteContainer(c.ID), r.store.DeleteSandbox(sb.ID)); err != nil {
				r.t.Error(err)
			}
		})
	}
	return containers
}

// serve serves the CRI on a unix socket, as the daemon does.
func (r *rig) serve() (socket string) {
	r.t.Helper()
	socket = filepath.Join(r.dir, "cri.sock")
	listener, err := net.Listen("unix", socket)
	if err != nil {
		r.t.Fatal(err)
	}
	g := grpc.NewServer(grpc.MaxSendMsgSize(80<<20), grpc.UnaryInterceptor(UnaryInterceptor), grpc.StreamInterceptor(StreamInterceptor))
	cri.RegisterRuntimeServiceServer(g, &Service{Server: r.Server})
	served := make(chan struct{})
	go func() { defer close(served); g.Serve(listener) }()
	r.t.Cleanup(func() { g.Stop(); <-served })
	return socket
}

// client calls the server as kubelet does, over a unix socket.
func (r *rig) client() cri.RuntimeServiceClient {
	r.t.Helper()
	conn, err := dial(r.serve())
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { conn.Close() })
	return cri.NewRuntimeServiceClient(conn)
}

func dial(socket string) (*grpc.ClientConn, error) {
	return grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(kubeletTakes)))
}

// benchClientName is what the test binary is called when it is the client of a benchmark: a process of its own, as
// kubelet is, so that the CPU time of the server can be told from the client's.
const benchClientName = "crivm-bench-client"

// benchPlan is what such a client is told.
type benchPlan struct {
	Socket string
	Call   string // ListPodSandbox, ListContainers or ContainerStatus
	Calls  int
	IDs    []string // of containers, asked for in turn
	Raw    bool     // read the answers without decoding them
}

func benchClientMain() {
	if filepath.Base(os.Args[0]) != benchClientName {
		return
	}
	var plan benchPlan
	err := json.NewDecoder(os.Stdin).Decode(&plan)
	if err == nil {
		var took []time.Duration
		if took, err = plan.run(); err == nil {
			err = json.NewEncoder(os.Stdout).Encode(took)
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "client:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

// run makes the calls one after the other. The first ones, in which the connection is made, do not count.
func (p benchPlan) run() ([]time.Duration, error) {
	conn, err := dial(p.Socket)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	client := cri.NewRuntimeServiceClient(conn)
	var options []grpc.CallOption
	if p.Raw {
		options = append(options, grpc.ForceCodecV2(undecoded{encoding.GetCodecV2(proto.Name)}))
	}
	var took []time.Duration
	for i := range p.Calls + 3 {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		start := time.Now()
		switch p.Call {
		case "ListPodSandbox":
			_, err = client.ListPodSandbox(ctx, &cri.ListPodSandboxRequest{}, options...)
		case "ListContainers":
			_, err = client.ListContainers(ctx, &cri.ListContainersRequest{}, options...)
		default:
			_, err = client.ContainerStatus(ctx, &cri.ContainerStatusRequest{ContainerId: p.IDs[i%len(p.IDs)]}, options...)
		}
		took = append(took, time.Since(start))
		cancel()
		if err != nil {
			return nil, err
		}
	}
	return took[3:], nil
}

// undecoded takes answers and looks at none.
type undecoded struct{ encoding.CodecV2 }

func (undecoded) Unmarshal(mem.BufferSlice, any) error { return nil }

// benchmarkCall has another process make the calls. It reports the median and the 99th percentile as that sees
// them, and the CPU time that a call takes here, in milliseconds.
func benchmarkCall(b *testing.B, plan benchPlan) {
	b.Helper()
	plan.Calls = b.N
	in, err := json.Marshal(plan)
	if err != nil {
		b.Fatal(err)
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Args = []string{benchClientName}
	cmd.Stdin, cmd.Stderr = strings.NewReader(string(in)), os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: unix.SIGKILL}
	before := cpuTime(b)
	out, err := cmd.Output()
	cpu := cpuTime(b) - before
	if err != nil {
		b.Fatal(err)
	}
	var took []time.Duration
	if err := json.Unmarshal(out, &took); err != nil {
		b.Fatal(err)
	}
	slices.Sort(took)
	ms := func(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }
	b.ReportMetric(ms(took[len(took)*50/100]), "p50-ms")
	b.ReportMetric(ms(took[len(took)*99/100]), "p99-ms")
	b.ReportMetric(ms(cpu)/float64(b.N), "server-cpu-ms")
	b.ReportMetric(0, "ns/op") // the client's start is in it
}

// cpuTime is what this process has used, without its children.
func cpuTime(t testing.TB) time.Duration {
	t.Helper()
	var use unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &use); err != nil {
		t.Fatal(err)
	}
	return time.Duration(use.Utime.Nano() + use.Stime.Nano())
}

// BenchmarkCalls are those that kubelet makes every second, on a node with 1,000 pods of one container each, as
// another process sees them on the socket: until the answer is read, and until it is decoded, which is the
// client's own work. The last ones run while twenty VMs boot, again and again; what these cost, fakes of the VMM
// and the agents included, is spent in the server's process.
func BenchmarkCalls(b *testing.B) {
	logger := slog.Default()
	slog.SetDefault(slog.New(slog.DiscardHandler)) // its lines would stand among the figures
	defer slog.SetDefault(logger)
	r := newRig(b)
	handler := r.opts.Handlers[""]
	handler.BootTimeout = 5 * time.Minute // of twenty at once, on a machine with other work
	r.opts.Handlers[""] = handler
	ids := r.records(1000, 0)
	socket := r.serve()
	load, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		b.Fatal(err)
	}
	fmt.Printf("load averages: %s", load)
	for _, call := range []string{"ListPodSandbox", "ListContainers", "ContainerStatus"} {
		b.Run(call+"/read", func(b *testing.B) { benchmarkCall(b, benchPlan{Socket: socket, Call: call, IDs: ids, Raw: true}) })
		b.Run(call+"/decoded", func(b *testing.B) { benchmarkCall(b, benchPlan{Socket: socket, Call: call, IDs: ids}) })
	}
	end := make(chan struct{})
	var booting sync.WaitGroup
	defer booting.Wait()
	defer close(end)
	for i := range 20 {
		booting.Go(func() { r.bootAgain(fmt.Sprintf("boot-%d", i), end) })
	}
	for _, call := range []string{"ContainerStatus", "ListContainers"} {
		b.Run(call+"/read, 20 VMs boot", func(b *testing.B) { benchmarkCall(b, benchPlan{Socket: socket, Call: call, IDs: ids, Raw: true}) })
	}
}

// bootAgain runs and removes a pod until it is told to end.
func (r *rig) bootAgain(name string, end <-chan struct{}) {
	for {
		resp, err := r.RunPodSandbox(context.Background(), &cri.RunPodSandboxRequest{Config: r.podConfig(name)})
		if err != nil {
			r.t.Error(err)
			return
		}
		if _, err := r.RemovePodSandbox(context.Background(), &cri.RemovePodSandboxRequest{PodSandboxId: resp.GetPodSandboxId()}); err != nil {
			r.t.Error(err)
			return
		}
		select {
		case <-end:
			return
		default:
		}
	}
}
