// Package integration tests crivm as its users meet it: the real binary, its CRI socket, real VMs, CNI plugins
// and registries, with the real crictl and k8s.io/cri-client as clients. It imports nothing of crivm.
package integration
