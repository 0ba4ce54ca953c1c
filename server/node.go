package server

import (
	"context"
	"encoding/json"
	"fmt"
	"path"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/crivm/crivm/imageservice"
)

// ImageLeftovers is the part of the image service that knows its own leftovers.
type ImageLeftovers interface {
	Leftovers(ctx context.Context, remove bool) ([]imageservice.Leftover, error)
}

// Collected is what a collection of leftovers has found, and removed unless it was a dry run.
type Collected struct {
	DryRun    bool       `json:"dryRun"`
	Leftovers []Leftover `json:"leftovers"`
	Skipped   []string   `json:"skipped"` // what could not be looked at now, and why
}

// Collect compares the records with the host and removes what no record owns; with dryRun it only tells.
func (s *Server) Collect(ctx context.Context, images ImageLeftovers, dryRun bool) (Collected, error) {
	c := Collected{DryRun: dryRun, Leftovers: []Leftover{}, Skipped: []string{}}
	s.collecting.Lock()
	defer s.collecting.Unlock()
	var err error
	var found []Leftover
	if dryRun {
		found, err = s.leftovers()
	} else {
		found, err = s.removeLeftovers(ctx)
	}
	if err != nil {
		c.Skipped = append(c.Skipped, err.Error())
	}
	c.Leftovers = append(c.Leftovers, found...)
	left, err := images.Leftovers(ctx, !dryRun)
	if err != nil && !errdefs.IsUnavailable(err) {
		return c, fmt.Errorf("images: %w", err)
	}
	if err != nil {
		c.Skipped = append(c.Skipped, err.Error())
	}
	for _, l := range left {
		out := Leftover{Kind: l.Kind, Name: l.Name, Why: l.Why}
		if l.Err != nil {
			out.Error = l.Err.Error()
		}
		c.Leftovers = append(c.Leftovers, out)
	}
	return c, nil
}

// The Node service is what `crivm gc` and `crivm images` ask the running daemon. It is served beside CRI, on the same
// socket, which only root can open. Messages are well-known types, answers are JSON: two calls for one's own program are
// not worth generated code.
const (
	nodeName      = "crivm.v1.Node"
	collectMethod = "/" + nodeName + "/Collect"
	imagesMethod  = "/" + nodeName + "/Images"
)

// NodeImages is the part of the image service that the Node service has.
type NodeImages interface {
	ImageLeftovers
	Overview(ctx context.Context) (imageservice.Overview, error)
}

type nodeService interface {
	collect(ctx context.Context, dryRun bool) (Collected, error)
}

type node struct {
	s      *Server
	images NodeImages
}

func (n node) collect(ctx context.Context, dryRun bool) (Collected, error) {
	return n.s.Collect(ctx, n.images, dryRun)
}

// RegisterNode adds the service to a gRPC server.
func RegisterNode(g *grpc.Server, s *Server, images NodeImages) {
	n := node{s, images}
	g.RegisterService(&grpc.ServiceDesc{
		ServiceName: nodeName, HandlerType: (*nodeService)(nil),
		Methods: []grpc.MethodDesc{
			nodeMethod(collectMethod, &wrapperspb.BoolValue{}, func(ctx context.Context, dryRun *wrapperspb.BoolValue) (any, error) {
				return n.collect(ctx, dryRun.GetValue())
			}),
			nodeMethod(imagesMethod, &emptypb.Empty{}, func(ctx context.Context, _ *emptypb.Empty) (any, error) {
				return s.ImageOverview(ctx, images)
			}),
		},
	}, n)
}

// nodeMethod is a method whose answer is JSON; empty tells the type of its requests.
func nodeMethod[T proto.Message](method string, empty T, call func(context.Context, T) (any, error)) grpc.MethodDesc {
	return grpc.MethodDesc{MethodName: path.Base(method), Handler: func(srv any, ctx context.Context, decode func(any) error, interceptor grpc.UnaryServerInterceptor) (any, error) {
		req := empty.ProtoReflect().New().Interface().(T)
		if err := decode(req); err != nil {
			return nil, err
		}
		handle := func(ctx context.Context, req any) (any, error) {
			answer, err := call(ctx, req.(T))
			if err != nil {
				return nil, err
			}
			text, err := json.Marshal(answer)
			return wrapperspb.String(string(text)), err
		}
		if interceptor == nil {
			return handle(ctx, req)
		}
		return interceptor(ctx, req, &grpc.UnaryServerInfo{Server: srv, FullMethod: method}, handle)
	}}
}

// CollectFrom asks a running daemon. Unimplemented when it is an older one.
func CollectFrom(ctx context.Context, conn *grpc.ClientConn, dryRun bool) (c Collected, err error) {
	err = askNode(ctx, conn, collectMethod, wrapperspb.Bool(dryRun), &c)
	return c, err
}

func askNode(ctx context.Context, conn *grpc.ClientConn, method string, req proto.Message, into any) error {
	answer := &wrapperspb.StringValue{}
	if err := conn.Invoke(ctx, method, req, answer); err != nil {
		return err
	}
	if err := json.Unmarshal([]byte(answer.GetValue()), into); err != nil {
		return fmt.Errorf("answer of the daemon: %w", err)
	}
	return nil
}
