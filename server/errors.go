package server

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path"
	"runtime/debug"
	"time"

	"github.com/containerd/errdefs/pkg/errgrpc"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// UnaryInterceptor is the one place where errors become gRPC codes, calls are logged and a panic of a
// handler becomes an error of that call. Calls that kubelet repeats every second are logged at debug level.
func UnaryInterceptor(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (resp any, err error) {
	call := path.Base(info.FullMethod)
	ctx, steps := withTimings(ctx, call)
	defer func() {
		took := steps.finish().Round(10 * time.Microsecond)
		if p := recover(); p != nil {
			slog.Error("handler panicked", "call", call, "panic", p, "stack", string(debug.Stack()))
			resp, err = nil, status.Errorf(codes.Internal, "%s panicked: %v", call, p)
		}
		level := slog.LevelInfo
		if quietCalls[call] {
			level = slog.LevelDebug
		}
		if err != nil {
			slog.Log(ctx, max(level, slog.LevelInfo), "call failed", "call", call, "took", took, "error", err)
			return
		}
		if s, _ := steps.sorted(); len(s) == 0 {
			slog.Log(ctx, level, "call", "call", call, "took", took)
			return
		}
		args := []any{"call", call, "took", took, "steps", steps}
		if r, ok := req.(*cri.RunPodSandboxRequest); ok {
			args = append(args, "handler", r.GetRuntimeHandler())
		}
		slog.Log(ctx, level, "call", args...)
	}()
	resp, err = handler(ctx, req)
	return resp, grpcError(err)
}

// StreamInterceptor is UnaryInterceptor's like for calls that answer with a stream.
func StreamInterceptor(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) (err error) {
	call := path.Base(info.FullMethod)
	start := time.Now()
	defer func() {
		if p := recover(); p != nil {
			slog.Error("handler panicked", "call", call, "panic", p, "stack", string(debug.Stack()))
			err = status.Errorf(codes.Internal, "%s panicked: %v", call, p)
		}
		level := slog.LevelDebug
		if err != nil && stream.Context().Err() == nil {
			level = slog.LevelInfo
		}
		slog.Log(stream.Context(), level, "stream ended", "call", call, "took", time.Since(start).Round(time.Millisecond), "error", err)
	}()
	return grpcError(handler(srv, stream))
}

var quietCalls = map[string]bool{
	"Version": true, "Status": true, "ListPodSandbox": true, "ListContainers": true, "PodSandboxStatus": true, "ContainerStatus": true,
	"ListImages": true, "ImageStatus": true, "ImageFsInfo": true, "ExecSync": true, "RuntimeConfig": true,
}

// grpcError maps errdefs classes to gRPC codes. An error that has a code already keeps it.
func grpcError(err error) error {
	if err == nil {
		return nil
	}
	if _, ok := status.FromError(err); ok {
		return err
	}
	switch {
	case errors.Is(err, context.DeadlineExceeded):
		return status.Error(codes.DeadlineExceeded, err.Error())
	case errors.Is(err, context.Canceled):
		return status.Error(codes.Canceled, err.Error())
	}
	if usedUp(err) {
		return status.Error(codes.ResourceExhausted, err.Error())
	}
	return errgrpc.ToGRPC(err)
}

// usedUp tells whether the kernel has refused something for want of space, descriptors, memory or processes.
func usedUp(err error) bool {
	for _, none := range []error{unix.ENOSPC, unix.EDQUOT, unix.EMFILE, unix.ENFILE, unix.ENOMEM} {
		if errors.Is(err, none) {
			return true
		}
	}
	var start *os.PathError // EAGAIN is a limit of processes only where one is started
	return errors.As(err, &start) && start.Op == "fork/exec" && errors.Is(start.Err, unix.EAGAIN)
}
