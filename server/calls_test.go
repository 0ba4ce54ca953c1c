package server

import (
	"context"
	"slices"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// TestEveryCall: of all calls that CRI knows only those are Unimplemented that are meant to be, also with a CRI that is
// newer. What a call makes of an empty request is its own business.
func TestEveryCall(t *testing.T) {
	r := newRig(t)
	conn, err := dial(r.serve())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	service := cri.File_staging_src_k8s_io_cri_api_pkg_apis_runtime_v1_api_proto.Services().ByName("RuntimeService")
	var without []string
	for i := range service.Methods().Len() {
		method := service.Methods().Get(i)
		if err := callEmpty(t, conn, method); status.Code(err) == codes.Unimplemented {
			without = append(without, string(method.Name()))
		}
	}
	slices.Sort(without)
	if want := []string{"CheckpointContainer", "CheckpointPod", "RestorePod"}; !slices.Equal(without, want) {
		t.Errorf("of %d calls %q are not implemented, want %q", service.Methods().Len(), without, want)
	}
}

// callEmpty makes a call with an empty request and waits for its end, or for the first message of a stream.
func callEmpty(t *testing.T, conn *grpc.ClientConn, method protoreflect.MethodDescriptor) error {
	t.Helper()
	message := func(d protoreflect.MessageDescriptor) proto.Message {
		m, err := protoregistry.GlobalTypes.FindMessageByName(d.FullName())
		if err != nil {
			t.Fatal(err)
		}
		return m.New().Interface()
	}
	name := "/" + string(method.Parent().FullName()) + "/" + string(method.Name())
	request, response := message(method.Input()), message(method.Output())
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if !method.IsStreamingServer() {
		return conn.Invoke(ctx, name, request, response)
	}
	if method.Name() == "GetContainerEvents" { // it answers when something happens; TestEvents
		return nil
	}
	stream, err := conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true}, name)
	if err == nil {
		err = stream.SendMsg(request)
	}
	if err == nil {
		err = stream.CloseSend()
	}
	if err == nil {
		err = stream.RecvMsg(response)
	}
	return err
}

// TestRuntimeConfig: kubelet takes its cgroup driver from here, and tells its pod CIDR.
func TestRuntimeConfig(t *testing.T) {
	for systemd, want := range map[bool]cri.CgroupDriver{false: cri.CgroupDriver_CGROUPFS, true: cri.CgroupDriver_SYSTEMD} {
		s := &Server{opts: Options{SystemdCgroups: systemd}}
		resp, err := s.RuntimeConfig(t.Context(), &cri.RuntimeConfigRequest{})
		if err != nil || resp.GetLinux().GetCgroupDriver() != want {
			t.Errorf("systemd %t: %v (%v), want %s", systemd, resp, err, want)
		}
	}
	s := &Server{}
	if _, err := s.UpdateRuntimeConfig(t.Context(), &cri.UpdateRuntimeConfigRequest{RuntimeConfig: &cri.RuntimeConfig{NetworkConfig: &cri.NetworkConfig{PodCidr: "10.0.0.0/24"}}}); err != nil {
		t.Errorf("UpdateRuntimeConfig: %v", err)
	}
}
