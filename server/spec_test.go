package server

import (
	"math"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestCommandLine(t *testing.T) {
	image := ocispec.ImageConfig{Entrypoint: []string{"entry"}, Cmd: []string{"cmd"}}
	for _, test := range []struct {
		command, args []string
		want          string
	}{
		{nil, nil, "entry cmd"},
		{nil, []string{"a"}, "entry a"},
		{[]string{"c"}, nil, "c"},
		{[]string{"c"}, []string{"a"}, "c a"},
	} {
		got := commandLine(&cri.ContainerConfig{Command: test.command, Args: test.args}, image)
		if strings.Join(got, " ") != test.want {
			t.Errorf("command %q and args %q give %q, want %q", test.command, test.args, got, test.want)
		}
	}
	if _, err := ociSpec(&cri.ContainerConfig{}, &cri.PodSandboxConfig{}, ocispec.ImageConfig{}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("no command at all: %v", err)
	}
}

func TestCapabilities(t *testing.T) {
	caps := func(add, drop, ambient []string) *cri.LinuxContainerSecurityContext {
		return &cri.LinuxContainerSecurityContext{Capabilities: &cri.Capability{AddCapabilities: add, DropCapabilities: drop, AddAmbientCapabilities: ambient}}
	}
	for _, test := range []struct {
		name    string
		sec     *cri.LinuxContainerSecurityContext
		has     []string
		hasNot  []string
		ambient int
	}{
		{"default", caps(nil, nil, nil), []string{"CAP_CHOWN"}, []string{"CAP_SYS_ADMIN"}, 0},
		{"add", caps([]string{"sys_admin"}, nil, nil), []string{"CAP_SYS_ADMIN", "CAP_CHOWN"}, nil, 0},
		{"drop", caps(nil, []string{"CHOWN"}, nil), []string{"CAP_KILL"}, []string{"CAP_CHOWN"}, 0},
		{"drop all but one", caps([]string{"CAP_KILL"}, []string{"ALL"}, nil), []string{"CAP_KILL"}, []string{"CAP_CHOWN"}, 0},
		{"add all but one", caps([]string{"all"}, []string{"CHOWN"}, nil), []string{"CAP_SYS_ADMIN"}, []string{"CAP_CHOWN"}, 0},
		{"ambient", caps(nil, nil, []string{"NET_BIND_SERVICE"}), []string{"CAP_NET_BIND_SERVICE"}, nil, 1},
		{"privileged", &cri.LinuxContainerSecurityContext{Privileged: true}, []string{"CAP_SYS_ADMIN"}, nil, 0},
	} {
		t.Run(test.name, func(t *testing.T) {
			got, err := capabilities(test.sec)
			if err != nil {
				t.Fatal(err)
			}
			for _, c := range test.has {
				if !slices.Contains(got.Bounding, c) || !slices.Contains(got.Effective, c) || !slices.Contains(got.Permitted, c) {
					t.Errorf("%s is missing in %v", c, got)
				}
			}
			for _, c := range test.hasNot {
				if slices.Contains(got.Bounding, c) {
					t.Errorf("%s is there", c)
				}
			}
			if len(got.Ambient) != test.ambient || len(got.Inheritable) != test.ambient {
				t.Errorf("ambient %v, inheritable %v, want %d", got.Ambient, got.Inheritable, test.ambient)
			}
		})
	}
	if _, err := capabilities(caps([]string{"NONSENSE"}, nil, nil)); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a capability that does not exist: %v", err)
	}
}

func TestStopSignal(t *testing.T) {
	for _, test := range []struct {
		asked cri.Signal
		image string
		want  int
	}{
		{cri.Signal_SIGNAL_RUNTIME_DEFAULT, "", 15},
		{cri.Signal_SIGNAL_RUNTIME_DEFAULT, "SIGINT", 2},
		{cri.Signal_SIGNAL_RUNTIME_DEFAULT, "quit", 3},
		{cri.Signal_SIGNAL_RUNTIME_DEFAULT, "9", 9},
		{cri.Signal_SIGNAL_RUNTIME_DEFAULT, "SIGRTMIN+3", 37},
		{cri.Signal_SIGNAL_SIGUSR1, "SIGINT", 10},
		{cri.Signal_SIGNAL_SIGRTMAXMINUS2, "", 62},
		{cri.Signal_SIGNAL_RUNTIME_DEFAULT, "SIGNONSENSE", 0},
		{cri.Signal_SIGNAL_RUNTIME_DEFAULT, "65", 0},
		{cri.Signal_SIGNAL_RUNTIME_DEFAULT, "SIGRTMIN+99", 0},
	} {
		got, err := stopSignal(test.asked, test.image)
		if int(got) != test.want || (err != nil) != (test.want == 0) {
			t.Errorf("%s and %q give %d (%v), want %d", test.asked, test.image, got, err, test.want)
		}
	}
	for value := range cri.Signal_name { // every signal that CRI can name goes there and back
		if s := cri.Signal(value); s != cri.Signal_SIGNAL_RUNTIME_DEFAULT {
			n, err := parseSignal(s.String())
			if err != nil {
				t.Errorf("%s: %v", s, err)
			}
			if back, err := parseSignal(criSignal(int32(n)).String()); err != nil || back != n {
				t.Errorf("%s is %d, and back %s", s, n, criSignal(int32(n)))
			}
		}
	}
}

func TestVMSize(t *testing.T) {
	h := Handler{VCPUs: 1, Memory: 256 << 20}
	for _, test := range []struct {
		name          string
		quota, period int64
		memory        int64
		vcpus         int
		bytes         int64
	}{
		{"no limits", 0, 0, 0, 1, 256 << 20},
		{"kubelet's words for unlimited", -1001, 100_000, 9223372036837994496, 1, 256 << 20},
		{"a fraction of a CPU", 50_000, 100_000, 0, 1, 256 << 20},
		{"memory limit", 0, 0, 100<<20 + 1, 1, 262 << 20},
		{"nearly unlimited", 0, 0, math.MaxInt64, 1, 256 << 20},
	} {
		config := &cri.PodSandboxConfig{Linux: &cri.LinuxPodSandboxConfig{Resources: &cri.LinuxContainerResources{
			CpuQuota: test.quota, CpuPeriod: test.period, MemoryLimitInBytes: test.memory,
		}}}
		if got := vmSize(h, config); got.VCPUs != test.vcpus || got.MemoryBytes != test.bytes {
			t.Errorf("%s: %+v, want %d and %d", test.name, got, test.vcpus, test.bytes)
		}
	}
}

func TestBandwidth(t *testing.T) {
	for text, want := range map[string]int64{"": 0, "1000": 1000, "10M": 10_000_000, "2k": 2000, "1G": 1_000_000_000, "x": -1, "1": -1, "-5M": -1, "9999999G": -1} {
		got, err := bandwidth(&cri.PodSandboxConfig{Annotations: map[string]string{"k": text}}, "k")
		if want == -1 && err == nil || want >= 0 && (err != nil || got != want) {
			t.Errorf("%q is %d (%v), want %d", text, got, err, want)
		}
	}
}
