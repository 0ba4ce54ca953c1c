package server

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// fieldRows reads docs/fields.md: treatment by field, by message.
func fieldRows(t *testing.T) map[string]map[string]string {
	t.Helper()
	text, err := os.ReadFile("../docs/fields.md")
	if err != nil {
		t.Fatal(err)
	}
	rows := map[string]map[string]string{}
	var section map[string]string
	for line := range strings.Lines(string(text)) {
		if title, ok := strings.CutPrefix(strings.TrimSpace(line), "## "); ok {
			section = map[string]string{}
			rows[title] = section
		}
		cells := strings.Split(line, "|")
		if section == nil || len(cells) != 5 || !strings.HasPrefix(cells[1], " `") {
			continue
		}
		field, treatment := strings.Trim(cells[1], " `"), strings.TrimSpace(cells[2])
		if _, twice := section[field]; twice {
			t.Errorf("%s has two rows", field)
		}
		if !slices.Contains([]string{"honoured", "returned", "refused", "no meaning"}, treatment) {
			t.Errorf("%s: %q is not a treatment", field, treatment)
		}
		if treatment != "honoured" && treatment != "returned" && strings.TrimSpace(cells[3]) == "" {
			t.Errorf("%s is %s for no reason", field, treatment)
		}
		section[field] = treatment
	}
	return rows
}

// uncovered lists what no row speaks of; rows that speak of something are deleted from unused.
func uncovered(d protoreflect.MessageDescriptor, prefix string, rows map[string]string, unused map[string]bool) []string {
	var missing []string
	for i := range d.Fields().Len() {
		f := d.Fields().Get(i)
		name := prefix + string(f.Name())
		if _, ok := rows[name]; ok {
			delete(unused, name)
			continue
		}
		switch {
		case f.Kind() == protoreflect.MessageKind && !f.IsMap():
			missing = append(missing, uncovered(f.Message(), name+".", rows, unused)...)
		case f.Kind() == protoreflect.EnumKind:
			for j := range f.Enum().Values().Len() {
				value := fmt.Sprintf("%s=%s", name, f.Enum().Values().Get(j).Name())
				if _, ok := rows[value]; !ok {
					missing = append(missing, value)
				}
				delete(unused, value)
			}
		default:
			missing = append(missing, name)
		}
	}
	return missing
}

func TestEveryFieldIsInTheTable(t *testing.T) {
	all := fieldRows(t)
	for title, m := range map[string]proto.Message{"PodSandboxConfig": &cri.PodSandboxConfig{}, "ContainerConfig": &cri.ContainerConfig{}} {
		rows := all[title]
		unused := map[string]bool{}
		for field := range rows {
			unused[field] = true
		}
		for _, field := range uncovered(m.ProtoReflect().Descriptor(), "", rows, unused) {
			t.Errorf("%s.%s is not in docs/fields.md", title, field)
		}
		for field := range unused {
			t.Errorf("docs/fields.md speaks of %s.%s, which CRI does not have", title, field)
		}
	}
}

// TestEveryRequestIsInTheTable: what the other requests have besides configurations.
func TestEveryRequestIsInTheTable(t *testing.T) {
	rows := fieldRows(t)["Requests"]
	unused := map[string]bool{}
	for field := range rows {
		unused[field] = true
	}
	services := (&cri.RunPodSandboxRequest{}).ProtoReflect().Descriptor().ParentFile().Services()
	calls := 0
	for i := range services.Len() {
		methods := services.Get(i).Methods()
		for j := range methods.Len() {
			request := methods.Get(j).Input()
			calls++
			for _, field := range uncovered(request, string(request.Name())+".", rows, unused) {
				t.Errorf("%s is not in docs/fields.md", field)
			}
		}
	}
	for field := range unused {
		t.Errorf("docs/fields.md speaks of %s, which CRI does not have", field)
	}
	if calls != 43 {
		t.Errorf("CRI has %d calls, not the 43 of v0.37", calls)
	}
}

// TestRefusedFieldsOfRequests makes a call for every row of the requests that says "refused".
func TestRefusedFieldsOfRequests(t *testing.T) {
	r := newRig(t)
	c := r.create(r.runPod("a"), "c", "exit 0")
	cases := map[string]func() error{
		"UpdateContainerResourcesRequest.windows": func() error {
			_, err := r.UpdateContainerResources(t.Context(), &cri.UpdateContainerResourcesRequest{ContainerId: c, Windows: &cri.WindowsContainerResources{}})
			return err
		},
		"UpdateContainerResourcesRequest.annotations": func() error {
			_, err := r.UpdateContainerResources(t.Context(), &cri.UpdateContainerResourcesRequest{ContainerId: c, Annotations: map[string]string{"a": "b"}})
			return err
		},
	}
	for field, call := range cases {
		if err := refusal(call(), field); err != nil {
			t.Errorf("%s: %v", field, err)
		}
	}
	want := slices.DeleteFunc(refusedRows(fieldRows(t)["Requests"]), func(field string) bool {
		return strings.HasPrefix(field, "Checkpoint") || strings.HasPrefix(field, "Restore") // TestCheckpointsAreRefused
	})
	if got := slices.Sorted(maps.Keys(cases)); !slices.Equal(got, want) {
		t.Errorf("refused here are %q, in docs/fields.md %q", got, want)
	}
}

// refusedPods has a configuration for every row of a pod that says "refused".
var refusedPods = map[string]func(*cri.PodSandboxConfig){
	"windows":                        func(c *cri.PodSandboxConfig) { c.Windows = &cri.WindowsPodSandboxConfig{} },
	"linux.overhead.hugepage_limits": func(c *cri.PodSandboxConfig) { c.Linux.Overhead = someHugepages },
	"linux.overhead.memory_swap_limit_in_bytes":  func(c *cri.PodSandboxConfig) { c.Linux.Overhead = swap },
	"linux.resources.memory_swap_limit_in_bytes": func(c *cri.PodSandboxConfig) { c.Linux.Resources = swap },
	"linux.security_context.selinux_options": func(c *cri.PodSandboxConfig) {
		c.Linux.SecurityContext.SelinuxOptions = &cri.SELinuxOption{Level: "s0:c1"}
	},
	"linux.security_context.apparmor.profile_type=Localhost": func(c *cri.PodSandboxConfig) {
		c.Linux.SecurityContext.Apparmor = &cri.SecurityProfile{ProfileType: cri.SecurityProfile_Localhost, LocalhostRef: "mine"}
	},
}

// refusedContainers is refusedPods' like.
var refusedContainers = map[string]func(*cri.ContainerConfig){
	"windows":     func(c *cri.ContainerConfig) { c.Windows = &cri.WindowsContainerConfig{} },
	"CDI_devices": func(c *cri.ContainerConfig) { c.CDIDevices = []*cri.CDIDevice{{Name: "vendor.com/class=name"}} },
	"mounts.propagation=PROPAGATION_BIDIRECTIONAL": func(c *cri.ContainerConfig) {
		c.Mounts[0].Propagation = cri.MountPropagation_PROPAGATION_BIDIRECTIONAL
	},
	"linux.resources.memory_swap_limit_in_bytes": func(c *cri.ContainerConfig) { c.Linux.Resources = swap },
	"linux.security_context.selinux_options": func(c *cri.ContainerConfig) {
		c.Linux.SecurityContext.SelinuxOptions = &cri.SELinuxOption{Type: "t"}
	},
	"linux.security_context.apparmor.profile_type=Localhost": func(c *cri.ContainerConfig) {
		c.Linux.SecurityContext.Apparmor = &cri.SecurityProfile{ProfileType: cri.SecurityProfile_Localhost, LocalhostRef: "mine"}
	},
	//lint:ignore SA1019 a field that older kubelets fill
	"linux.security_context.apparmor_profile": func(c *cri.ContainerConfig) { c.Linux.SecurityContext.ApparmorProfile = "localhost/mine" },
}

var (
	someHugepages = &cri.LinuxContainerResources{HugepageLimits: []*cri.HugepageLimit{{PageSize: "1GB"}, {PageSize: "2MB", Limit: 2 << 20}}}
	swap          = &cri.LinuxContainerResources{MemoryLimitInBytes: 1 << 20, MemorySwapLimitInBytes: 2 << 20}
)

// refusedModes adds the modes of namespaces.
func refusedModes(pod bool) map[string]*cri.NamespaceOption {
	const field = "linux.security_context.namespace_options."
	modes := map[string]*cri.NamespaceOption{}
	for value, name := range cri.NamespaceMode_name {
		mode := cri.NamespaceMode(value)
		if mode != cri.NamespaceMode_POD {
			modes[field+"network="+name] = &cri.NamespaceOption{Network: mode}
			modes[field+"ipc="+name] = &cri.NamespaceOption{Ipc: mode}
		}
		if mode != cri.NamespaceMode_NODE && mode != cri.NamespaceMode_POD {
			modes[field+"userns_options.mode="+name] = &cri.NamespaceOption{UsernsOptions: &cri.UserNamespace{Mode: mode}}
		}
	}
	modes[field+"pid=NODE"] = &cri.NamespaceOption{Pid: cri.NamespaceMode_NODE}
	if pod {
		modes[field+"pid=TARGET"] = &cri.NamespaceOption{Pid: cri.NamespaceMode_TARGET, TargetId: "x"}
		modes[field+"target_id"] = &cri.NamespaceOption{TargetId: "x"}
	}
	return modes
}

func refusedRows(rows map[string]string) []string {
	var out []string
	for field, treatment := range rows {
		if treatment == "refused" {
			out = append(out, field)
		}
	}
	slices.Sort(out)
	return out
}

// refusal checks that an error names a row's field.
func refusal(err error, field string) error {
	field, _, _ = strings.Cut(field, "=")
	last := field[strings.LastIndex(field, ".")+1:]
	switch {
	case err == nil:
		return errors.New("accepted")
	case !errdefs.IsNotImplemented(err) && !errdefs.IsInvalidArgument(err):
		return fmt.Errorf("not a refusal: %w", err)
	// profile_type and mode belong to the field above.
	case !strings.Contains(err.Error(), last) && last != "profile_type" && last != "mode":
		return fmt.Errorf("does not name the field: %w", err)
	}
	return nil
}

func TestRefusedFieldsOfPods(t *testing.T) {
	r := newRig(t)
	cases := maps.Clone(refusedPods)
	for field, options := range refusedModes(true) {
		cases[field] = func(c *cri.PodSandboxConfig) { c.Linux.SecurityContext.NamespaceOptions = options }
	}
	for field, change := range cases {
		config := r.podConfig("a")
		config.Linux = &cri.LinuxPodSandboxConfig{SecurityContext: &cri.LinuxSandboxSecurityContext{}}
		change(config)
		_, err := r.RunPodSandbox(t.Context(), &cri.RunPodSandboxRequest{Config: config})
		if err := refusal(err, field); err != nil {
			t.Errorf("%s: %v", field, err)
		}
	}
	if got, want := slices.Sorted(maps.Keys(cases)), refusedRows(fieldRows(t)["PodSandboxConfig"]); !slices.Equal(got, want) {
		t.Errorf("refused here are %q, in docs/fields.md %q", got, want)
	}
}

func TestRefusedFieldsOfContainers(t *testing.T) {
	r := newRig(t)
	pod := r.runPod("a")
	cases := maps.Clone(refusedContainers)
	for field, options := range refusedModes(false) {
		cases[field] = func(c *cri.ContainerConfig) { c.Linux.SecurityContext.NamespaceOptions = options }
	}
	for field, change := range cases {
		config := &cri.ContainerConfig{
			Metadata: &cri.ContainerMetadata{Name: "c"}, Image: &cri.ImageSpec{Image: "image"}, Linux: &cri.LinuxContainerConfig{SecurityContext: &cri.LinuxContainerSecurityContext{}},
			Mounts: []*cri.Mount{{ContainerPath: "/x", HostPath: r.dir, Readonly: true}},
		}
		change(config)
		_, err := r.CreateContainer(t.Context(), &cri.CreateContainerRequest{PodSandboxId: pod, Config: config})
		if err := refusal(err, field); err != nil {
			t.Errorf("%s: %v", field, err)
		}
	}
	if got, want := slices.Sorted(maps.Keys(cases)), refusedRows(fieldRows(t)["ContainerConfig"]); !slices.Equal(got, want) {
		t.Errorf("refused here are %q, in docs/fields.md %q", got, want)
	}
}
