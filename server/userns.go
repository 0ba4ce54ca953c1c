package server

import (
	"errors"
	"fmt"
	"math"

	"github.com/containerd/errdefs"
	"google.golang.org/protobuf/proto"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crivm/crivm/agentproto"
	"github.com/crivm/crivm/vmruntime/virtiofsd"
)

// A pod's user namespace (KEP-127) is made in its guest, by the agent: the IDs of the mapping that CRI calls the host's
// are IDs of the guest, in which nobody but this pod is. Volumes show IDs as the host has them, which is what kubelet asks
// for with the mappings of a mount; see guest/userns.go for how.

// userNamespace is the pod's user namespace as asked for; nil when it has none.
func userNamespace(config *cri.PodSandboxConfig) *cri.UserNamespace {
	u := config.GetLinux().GetSecurityContext().GetNamespaceOptions().GetUsernsOptions()
	if u == nil || u.GetMode() == cri.NamespaceMode_NODE {
		return nil
	}
	return u
}

// validateUserNamespace checks what is asked for.
func validateUserNamespace(field string, u *cri.UserNamespace) error {
	switch {
	case u == nil:
		return nil
	case u.GetMode() == cri.NamespaceMode_NODE:
		if len(u.GetUids())+len(u.GetGids()) > 0 {
			return invalid(field+".uids", "mappings (uids, gids) are for mode POD")
		}
		return nil
	case u.GetMode() != cri.NamespaceMode_POD:
		return invalid(field+".mode", "%s is not a mode of a user namespace", u.GetMode())
	}
	return errors.Join(validateMapping(field+".uids", u.GetUids()), validateMapping(field+".gids", u.GetGids()))
}

func validateMapping(field string, ms []*cri.IDMapping) error {
	if len(ms) != 1 {
		return invalid(field, "%d mappings: a user namespace has exactly one", len(ms))
	}
	m := ms[0]
	switch {
	case m.GetContainerId() != 0:
		return invalid(field, "maps containers' IDs from %d on: 0 must be mapped", m.GetContainerId())
	case m.GetLength() == 0 || uint64(m.GetHostId())+uint64(m.GetLength()) > math.MaxUint32:
		return invalid(field, "%d IDs from %d on", m.GetLength(), m.GetHostId())
	}
	return nil
}

// validateUserNamespaceOf checks that a container is in its pod's user namespace, one way or the other, and that its mounts'
// IDs are mapped as the pod's.
func validateUserNamespaceOf(config *cri.ContainerConfig, pod *cri.PodSandboxConfig) error {
	const field = "config.linux.security_context.namespace_options.userns_options"
	asked := config.GetLinux().GetSecurityContext().GetNamespaceOptions().GetUsernsOptions()
	if err := validateUserNamespace(field, asked); err != nil {
		return err
	}
	have := userNamespace(pod)
	switch {
	case have == nil && asked != nil && asked.GetMode() != cri.NamespaceMode_NODE:
		return invalid(field, "the sandbox has no user namespace, and all containers of a pod share one")
	case have != nil && asked != nil && (asked.GetMode() == cri.NamespaceMode_NODE || !sameMapping(asked.GetUids(), have.GetUids()) || !sameMapping(asked.GetGids(), have.GetGids())):
		return invalid(field, "is not the sandbox's, and all containers of a pod share one")
	}
	for n, m := range config.GetMounts() {
		if err := validateMountMapping(fmt.Sprintf("config.mounts[%d] (%s)", n, m.GetContainerPath()), m, have); err != nil {
			return err
		}
	}
	return nil
}

// validateMountMapping: IDs of a mount are mapped as those of the pod, or not at all in a pod without user namespace. kubelet
// asks for nothing else.
func validateMountMapping(field string, m *cri.Mount, pod *cri.UserNamespace) error {
	switch {
	case pod == nil && len(m.GetUidMappings()) > 0:
		return unsupported(field+".uidMappings", "mapped IDs of a mount are for pods with a user namespace (hostUsers: false)")
	case pod == nil && len(m.GetGidMappings()) > 0:
		return unsupported(field+".gidMappings", "mapped IDs of a mount are for pods with a user namespace (hostUsers: false)")
	case pod == nil:
		return nil
	case !sameMapping(m.GetUidMappings(), pod.GetUids()):
		return unsupported(field+".uidMappings", "are not those of the pod's user namespace: a mount with IDs of its own cannot be had")
	case !sameMapping(m.GetGidMappings(), pod.GetGids()):
		return unsupported(field+".gidMappings", "are not those of the pod's user namespace: a mount with IDs of its own cannot be had")
	}
	return nil
}

func sameMapping(a, b []*cri.IDMapping) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		if !proto.Equal(a[i], b[i]) {
			return false
		}
	}
	return true
}

// mountMapping is how owners of a shared mount are shown to the guest.
func mountMapping(m *cri.Mount) virtiofsd.IDMapping {
	if len(m.GetUidMappings()) != 1 || len(m.GetGidMappings()) != 1 { // checked: none
		return virtiofsd.IDMapping{}
	}
	uid, gid := m.GetUidMappings()[0], m.GetGidMappings()[0]
	return virtiofsd.IDMapping{FirstUID: uid.GetHostId(), UIDs: uid.GetLength(), FirstGID: gid.GetHostId(), GIDs: gid.GetLength()}
}

// guestUserNamespace is what the agent is told of it.
func guestUserNamespace(config *cri.PodSandboxConfig) *agentproto.UserNamespace {
	u := userNamespace(config)
	if u == nil {
		return nil
	}
	mapping := func(ms []*cri.IDMapping) *agentproto.IDMapping {
		return &agentproto.IDMapping{ContainerId: ms[0].GetContainerId(), GuestId: ms[0].GetHostId(), Length: ms[0].GetLength()}
	}
	return &agentproto.UserNamespace{Uid: mapping(u.GetUids()), Gid: mapping(u.GetGids())}
}

// checkUserNamespace makes sure that the guest has done it: the agent of an older guest image would know nothing of it.
func checkUserNamespace(asked *agentproto.SetupSandboxRequest, made *agentproto.SetupSandboxResponse) error {
	if asked.GetUserNamespace() != nil && !made.GetUserNamespace() {
		return fmt.Errorf("user namespace: the guest image is older than the daemon and makes none; build it anew: %w", errdefs.ErrFailedPrecondition)
	}
	return nil
}
