package server

import (
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crivm/crivm/agentproto"
)

func idMapping(container, host, length uint32) []*cri.IDMapping {
	return []*cri.IDMapping{{ContainerId: container, HostId: host, Length: length}}
}

func TestUserNamespaceForm(t *testing.T) {
	good := idMapping(0, 65536, 65536)
	for what, c := range map[string]struct {
		options *cri.UserNamespace
		says    string // "" is fine
	}{
		"none":              {nil, ""},
		"node":              {&cri.UserNamespace{Mode: cri.NamespaceMode_NODE}, ""},
		"pod":               {&cri.UserNamespace{Uids: good, Gids: good}, ""},
		"gids of their own": {&cri.UserNamespace{Uids: good, Gids: idMapping(0, 1, 10)}, ""},
		"node with uids":    {&cri.UserNamespace{Mode: cri.NamespaceMode_NODE, Uids: good}, "f.uids"},
		"container":         {&cri.UserNamespace{Mode: cri.NamespaceMode_CONTAINER, Uids: good, Gids: good}, "f.mode"},
		"target":            {&cri.UserNamespace{Mode: cri.NamespaceMode_TARGET, Uids: good, Gids: good}, "f.mode"},
		"no mapping":        {&cri.UserNamespace{}, "f.uids"},
		"no gids":           {&cri.UserNamespace{Uids: good}, "f.gids"},
		"two":               {&cri.UserNamespace{Uids: append(idMapping(0, 1, 1), good...), Gids: good}, "f.uids"},
		"without root":      {&cri.UserNamespace{Uids: good, Gids: idMapping(1, 65536, 10)}, "f.gids"},
		"empty":             {&cri.UserNamespace{Uids: idMapping(0, 65536, 0), Gids: good}, "f.uids"},
		"beyond the last":   {&cri.UserNamespace{Uids: idMapping(0, 1<<32-10, 10), Gids: good}, "f.uids"},
	} {
		err := validateUserNamespace("f", c.options)
		if c.says == "" && err != nil || c.says != "" && (!errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), c.says)) {
			t.Errorf("%s: error is %v, want one with %q", what, err, c.says)
		}
	}
}

// A container is in its pod's user namespace, its mounts have the pod's mapping, and both statuses say so.
func TestUserNamespaceOfContainers(t *testing.T) {
	r := newRig(t)
	have, other := idMapping(0, 196608, 65536), idMapping(0, 131072, 65536)
	options := func(uids, gids []*cri.IDMapping) *cri.NamespaceOption {
		return &cri.NamespaceOption{UsernsOptions: &cri.UserNamespace{Mode: cri.NamespaceMode_POD, Uids: uids, Gids: gids}}
	}
	config := r.podConfig("mapped")
	config.Linux = &cri.LinuxPodSandboxConfig{SecurityContext: &cri.LinuxSandboxSecurityContext{NamespaceOptions: options(have, have)}}
	resp, err := r.RunPodSandbox(t.Context(), &cri.RunPodSandboxRequest{Config: config})
	if err != nil {
		t.Fatal(err)
	}
	with, without := resp.PodSandboxId, r.runPod("plain")
	status, err := r.PodSandboxStatus(t.Context(), &cri.PodSandboxStatusRequest{PodSandboxId: with})
	if err != nil || !proto.Equal(status.Status.Linux.Namespaces.Options.UsernsOptions, options(have, have).UsernsOptions) {
		t.Errorf("the status has %v (%v)", status.GetStatus().GetLinux(), err)
	}
	mount := func(uids, gids []*cri.IDMapping) *cri.Mount {
		return &cri.Mount{ContainerPath: "/x", HostPath: r.dir, UidMappings: uids, GidMappings: gids}
	}
	for what, c := range map[string]struct {
		pod     string
		options *cri.NamespaceOption
		mount   *cri.Mount
		says    string
	}{
		"none in a pod with one":        {with, nil, nil, ""},
		"the pod's":                     {with, options(have, have), nil, ""},
		"other uids":                    {with, options(other, have), nil, "userns_options"},
		"other gids":                    {with, options(have, other), nil, "userns_options"},
		"the node's":                    {with, &cri.NamespaceOption{UsernsOptions: &cri.UserNamespace{Mode: cri.NamespaceMode_NODE}}, nil, "userns_options"},
		"one in a pod without":          {without, options(have, have), nil, "userns_options"},
		"the node's in a pod without":   {without, &cri.NamespaceOption{UsernsOptions: &cri.UserNamespace{Mode: cri.NamespaceMode_NODE}}, nil, ""},
		"mount without":                 {with, nil, mount(nil, nil), "uidMappings"},
		"mount with other uids":         {with, nil, mount(other, have), "uidMappings"},
		"mount with other gids":         {with, nil, mount(have, other), "gidMappings"},
		"mount with uids in a pod w/o":  {without, nil, mount(have, nil), "uidMappings"},
		"mount with gids in a pod w/o":  {without, nil, mount(nil, have), "gidMappings"},
		"image volume without mappings": {with, nil, &cri.Mount{ContainerPath: "/x", Image: &cri.ImageSpec{Image: "image"}, Readonly: true}, "uidMappings"},
	} {
		req := r.createRequest(c.pod, "c-"+strings.Map(func(r rune) rune {
			if r == ' ' || r == '/' || r == '\'' {
				return '-'
			}
			return r
		}, what), "true")
		req.Config.Linux = &cri.LinuxContainerConfig{SecurityContext: &cri.LinuxContainerSecurityContext{NamespaceOptions: c.options}}
		if c.mount != nil {
			req.Config.Mounts = []*cri.Mount{c.mount}
		}
		_, err := r.CreateContainer(t.Context(), req)
		if c.says == "" && err != nil || c.says != "" && (err == nil || !strings.Contains(err.Error(), c.says)) {
			t.Errorf("%s: error is %v, want one with %q", what, err, c.says)
		}
	}
}

// A guest image that is older than the daemon does not know of user namespaces: its pods must not run without.
func TestOldGuestHasNoUserNamespaces(t *testing.T) {
	asked := &agentproto.SetupSandboxRequest{UserNamespace: &agentproto.UserNamespace{}}
	for _, c := range []struct {
		asked *agentproto.SetupSandboxRequest
		made  bool
		fine  bool
	}{{asked, true, true}, {asked, false, false}, {&agentproto.SetupSandboxRequest{}, false, true}} {
		if err := checkUserNamespace(c.asked, &agentproto.SetupSandboxResponse{UserNamespace: c.made}); (err == nil) != c.fine {
			t.Errorf("asked %v, made %v: %v", c.asked, c.made, err)
		}
	}
}

// Status offers what is enforced, and nothing else: each of these has tests on real VMs.
func TestOfferedFeatures(t *testing.T) {
	r := newRig(t)
	resp, err := r.Status(t.Context(), &cri.StatusRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if want := (&cri.RuntimeFeatures{SupplementalGroupsPolicy: true, MountOptions: true}); !proto.Equal(resp.Features, want) {
		t.Errorf("features are %v, want %v", resp.Features, want)
	}
	if len(resp.RuntimeHandlers) == 0 {
		t.Error("no runtime handlers")
	}
	for _, h := range resp.RuntimeHandlers {
		if want := (&cri.RuntimeHandlerFeatures{RecursiveReadOnlyMounts: true, UserNamespaces: true}); !proto.Equal(h.Features, want) {
			t.Errorf("features of handler %q are %v, want %v", h.Name, h.Features, want)
		}
	}
}
