package server

import (
	"bytes"
	"fmt"
	"os"
	"path"
	"strings"
	"syscall"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crivm/crivm/agentproto"
	"github.com/crivm/crivm/imageservice"
	"github.com/crivm/crivm/server/store"
)

// guestVolumes are a container's volumes, as the agent gets them, and what they need before it does.
type guestVolumes struct {
	mounts         []*agentproto.Mount
	shared         []sharedVolume   // to be in the share before; the caller closes them
	copies         []store.HostCopy // to be in the guest before
	terminationLog string           // file of the host; "" none
}

// guestMounts are the container's volumes: what the configuration asks for and the files that every
// container has.
func guestMounts(rec store.Container, sandboxRec store.Sandbox, images map[int]imageservice.Image, empty map[int]*agentproto.Mount) (v guestVolumes, retErr error) {
	defer func() {
		if retErr != nil {
			closeVolumes(v.shared)
		}
	}()
	config, pod := rec.Config, sandboxRec.Config
	v.mounts = []*agentproto.Mount{{Destination: "/dev/shm", Source: &agentproto.Mount_Shm{Shm: &agentproto.SharedMemory{}}}}
	given := map[string]bool{}
	for n, m := range config.GetMounts() {
		given[path.Clean(m.GetContainerPath())] = true
		if image, ok := images[n]; ok {
			v.mounts = append(v.mounts, imageMount(m, image))
			continue
		}
		if mount, ok := empty[n]; ok {
			v.mounts = append(v.mounts, mount)
			continue
		}
		if err := v.addHostVolume(rec, pod.GetMetadata().GetUid(), n, m); err != nil {
			return v, err
		}
	}
	resolvConf, err := resolvConf(pod.GetDnsConfig())
	if err != nil {
		return v, err
	}
	for _, f := range []struct{ path, content string }{
		{"/etc/hostname", pod.GetHostname() + "\n"},
		{"/etc/hosts", hostsFile(sandboxRec)},
		{"/etc/resolv.conf", resolvConf},
	} {
		if given[f.path] {
			continue
		}
		entry := &agentproto.File{Mode: syscall.S_IFREG | 0o644, Content: []byte(f.content)}
		v.mounts = append(v.mounts, &agentproto.Mount{Destination: f.path, Source: &agentproto.Mount_Files{
			Files: &agentproto.Files{Volume: "pod" + strings.ReplaceAll(f.path, "/", "-"), Entries: []*agentproto.File{entry}},
		}})
	}
	return v, nil
}

// resolvConf is the pod's, or the host's when the pod has none.
func resolvConf(dns *cri.DNSConfig) (string, error) {
	if len(dns.GetServers())+len(dns.GetSearches())+len(dns.GetOptions()) == 0 {
		text, err := readBounded("/etc/resolv.conf", 64<<10)
		if os.IsNotExist(err) {
			return "", nil
		}
		return string(text), err
	}
	var out strings.Builder
	if len(dns.GetSearches()) > 0 {
		fmt.Fprintf(&out, "search %s\n", strings.Join(dns.GetSearches(), " "))
	}
	for _, server := range dns.GetServers() {
		fmt.Fprintf(&out, "nameserver %s\n", server)
	}
	if len(dns.GetOptions()) > 0 {
		fmt.Fprintf(&out, "options %s\n", strings.Join(dns.GetOptions(), " "))
	}
	return out.String(), nil
}

// hostsFile is for containers into which kubelet does not mount one.
func hostsFile(rec store.Sandbox) string {
	var out bytes.Buffer
	out.WriteString("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n")
	if rec.Network != nil && rec.Config.GetHostname() != "" {
		for _, ip := range rec.Network.IPs {
			fmt.Fprintf(&out, "%s\t%s\n", ip, rec.Config.GetHostname())
		}
	}
	return out.String()
}
