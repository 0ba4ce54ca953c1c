package server

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crivm/crivm/server/store"
)

// PodSandboxStatus answers from the record. NotFound when it is unknown or still being made.
func (s *Server) PodSandboxStatus(_ context.Context, req *cri.PodSandboxStatusRequest) (*cri.PodSandboxStatusResponse, error) {
	now := time.Now().UnixNano() // before the records are read: what is told is at least as new
	rec, err := s.visibleSandbox(req.GetPodSandboxId())
	if err != nil {
		return nil, err
	}
	resp := &cri.PodSandboxStatusResponse{Status: sandboxStatus(rec), ContainersStatuses: s.containersStatuses(rec.ID), Timestamp: now}
	if req.GetVerbose() {
		if resp.Info, err = s.sandboxInfo(rec); err != nil {
			return nil, err
		}
	}
	return resp, nil
}

// sandboxStatus is what CRI shows of a sandbox.
func sandboxStatus(rec store.Sandbox) *cri.PodSandboxStatus {
	config := rec.Config
	options := config.GetLinux().GetSecurityContext().GetNamespaceOptions()
	status := &cri.PodSandboxStatus{
		Id: rec.ID, Metadata: config.GetMetadata(), State: sandboxState(rec.State), CreatedAt: rec.CreatedAt.UnixNano(),
		Labels: config.GetLabels(), Annotations: config.GetAnnotations(), RuntimeHandler: rec.Handler,
		Network: &cri.PodSandboxNetworkStatus{},
		Linux: &cri.LinuxPodSandboxStatus{Namespaces: &cri.Namespace{Options: &cri.NamespaceOption{
			Network: options.GetNetwork(), Pid: options.GetPid(), Ipc: options.GetIpc(), TargetId: options.GetTargetId(), UsernsOptions: options.GetUsernsOptions(),
		}}},
	}
	if rec.Network != nil {
		for i, ip := range rec.Network.IPs {
			if i == 0 {
				status.Network.Ip = ip.String()
				continue
			}
			status.Network.AdditionalIps = append(status.Network.AdditionalIps, &cri.PodIP{Ip: ip.String()})
		}
	}
	return status
}

// visibleSandbox is a sandbox that clients may see.
func (s *Server) visibleSandbox(id string) (store.Sandbox, error) {
	rec, err := s.store.Sandbox(id)
	if err == nil && !rec.State.Shown() {
		err = notFound("sandbox", id)
	}
	return rec, err
}

// sandboxInfo is what `crictl inspectp` shows beyond the status: where the VM is and how it is doing.
func (s *Server) sandboxInfo(rec store.Sandbox) (map[string]string, error) {
	info := map[string]any{
		"vmm": rec.Driver, "vmDirectory": rec.VMDir, "netns": rec.NetnsPath, "reason": rec.Reason, "acceleration": s.opts.Handlers[rec.Handler].Acceleration,
		"network": rec.Network, "config": rec.Config, "vmSize": rec.VM, "slot": rec.Slot,
	}
	if vm, err := s.sandbox(rec.ID).machine(); err == nil {
		info["pid"] = vm.PID()
		if agent := s.sandbox(rec.ID).connected(); agent != nil {
			hello := agent.Info()
			info["guest"] = map[string]any{"kernel": hello.GetKernel(), "agent": hello.GetAgentVersion(), "ociRuntime": hello.GetOciRuntime()}
		}
	}
	if m := s.figures(rec.ID); !m.at.IsZero() {
		info["lastCost"] = m.cost()
	}
	steps := s.sandbox(rec.ID).traces.waterfall()
	text, err := json.Marshal(info)
	if err != nil {
		return nil, fmt.Errorf("sandbox %s: %w", rec.ID, err)
	}
	return map[string]string{"info": string(text), "trace": steps}, nil
}

func sandboxState(s store.SandboxState) cri.PodSandboxState {
	if s == store.SandboxReady {
		return cri.PodSandboxState_SANDBOX_READY
	}
	return cri.PodSandboxState_SANDBOX_NOTREADY
}
