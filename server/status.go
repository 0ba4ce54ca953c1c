package server

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"slices"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Version answers even when nothing else works. kubelet accepts no other `version` than "0.1.0".
func (s *Server) Version(context.Context, *cri.VersionRequest) (*cri.VersionResponse, error) {
	return &cri.VersionResponse{Version: "0.1.0", RuntimeName: "crivm", RuntimeVersion: s.opts.Version, RuntimeApiVersion: "v1"}, nil
}

// Status tells whether pods can be run, which handlers there are, and only those features that are enforced.
func (s *Server) Status(_ context.Context, req *cri.StatusRequest) (*cri.StatusResponse, error) {
	runtimeReady := &cri.RuntimeCondition{Type: "RuntimeReady", Status: true}
	networkReady := &cri.RuntimeCondition{Type: "NetworkReady", Status: true}
	if err := s.net.Status(); err != nil {
		networkReady.Status, networkReady.Reason, networkReady.Message = false, "NetworkPluginNotReady", err.Error()
	}
	resp := &cri.StatusResponse{
		Status:   &cri.RuntimeStatus{Conditions: []*cri.RuntimeCondition{runtimeReady, networkReady, s.troubles.condition()}},
		Features: &cri.RuntimeFeatures{SupplementalGroupsPolicy: true, MountOptions: true},
	}
	for _, name := range slices.Sorted(maps.Keys(s.opts.Handlers)) {
		resp.RuntimeHandlers = append(resp.RuntimeHandlers, &cri.RuntimeHandler{Name: name, Features: &cri.RuntimeHandlerFeatures{RecursiveReadOnlyMounts: true, UserNamespaces: true}})
	}
	if req.GetVerbose() {
		handlers := map[string]any{}
		for name, h := range s.opts.Handlers {
			handlers[name] = map[string]any{
				"vmm": h.Driver.Name(), "acceleration": h.Acceleration, "kernel": h.Kernel, "initramfs": h.Initrd,
				"vcpus": h.VCPUs, "memoryBytes": h.Memory, "scratchBytes": h.ScratchBytes,
			}
		}
		for key, value := range map[string]any{
			"config":   map[string]any{"stateDir": s.opts.StateDir, "runDir": s.opts.RunDir, "maxContainerLogLine": s.opts.MaxLogLine},
			"handlers": handlers, "warnings": s.opts.Warnings, "pools": s.PoolFigures(),
		} {
			text, err := json.Marshal(value)
			if err != nil {
				return nil, fmt.Errorf("status: %w", err)
			}
			if resp.Info == nil {
				resp.Info = map[string]string{}
			}
			resp.Info[key] = string(text)
		}
	}
	return resp, nil
}

// RuntimeConfig tells kubelet which cgroup driver to use.
func (s *Server) RuntimeConfig(context.Context, *cri.RuntimeConfigRequest) (*cri.RuntimeConfigResponse, error) {
	driver := cri.CgroupDriver_CGROUPFS
	if s.opts.SystemdCgroups {
		driver = cri.CgroupDriver_SYSTEMD
	}
	return &cri.RuntimeConfigResponse{Linux: &cri.LinuxRuntimeConfiguration{CgroupDriver: driver}}, nil
}

// UpdateRuntimeConfig takes kubelet's pod CIDR; addresses are the business of the CNI configuration.
func (s *Server) UpdateRuntimeConfig(context.Context, *cri.UpdateRuntimeConfigRequest) (*cri.UpdateRuntimeConfigResponse, error) {
	return &cri.UpdateRuntimeConfigResponse{}, nil
}
