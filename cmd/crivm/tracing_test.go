package main

import (
	"context"
	"encoding/hex"
	"net"
	"path/filepath"
	"testing"
	"time"

	collector "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	otlp "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crivm/crivm/conf"
	"github.com/crivm/crivm/server"
)

type collecting struct {
	collector.UnimplementedTraceServiceServer
	spans chan *otlp.Span
}

func (c collecting) Export(_ context.Context, r *collector.ExportTraceServiceRequest) (*collector.ExportTraceServiceResponse, error) {
	for _, rs := range r.GetResourceSpans() {
		for _, ss := range rs.GetScopeSpans() {
			for _, s := range ss.GetSpans() {
				c.spans <- s
			}
		}
	}
	return &collector.ExportTraceServiceResponse{}, nil
}

type anyRuntime struct {
	cri.UnimplementedRuntimeServiceServer
}

func (anyRuntime) Version(context.Context, *cri.VersionRequest) (*cri.VersionResponse, error) {
	return &cri.VersionResponse{}, nil
}

// TestSpansReachTheCollector calls as kubelet does, with a trace of its own that is sampled, and with one that is not.
func TestSpansReachTheCollector(t *testing.T) {
	sink := collecting{spans: make(chan *otlp.Span, 100)}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	sinkServer := grpc.NewServer()
	collector.RegisterTraceServiceServer(sinkServer, sink)
	go sinkServer.Serve(l)
	defer sinkServer.Stop()

	options, stop, err := startTracing(t.Context(), conf.Tracing{Endpoint: "http://" + l.Addr().String(), SamplesPerMillion: 0})
	if err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(t.TempDir(), "cri.sock")
	listener, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	calls := grpc.NewServer(append(options, grpc.UnaryInterceptor(server.UnaryInterceptor))...)
	cri.RegisterRuntimeServiceServer(calls, anyRuntime{})
	go calls.Serve(listener)
	defer calls.Stop()
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	const traceID, spanID = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
	for _, parent := range []string{"", "00-" + traceID[1:] + "0-" + spanID + "-00", "00-" + traceID + "-" + spanID + "-01"} {
		ctx := metadata.AppendToOutgoingContext(t.Context(), "traceparent", parent)
		if _, err := cri.NewRuntimeServiceClient(conn).Version(ctx, &cri.VersionRequest{}); err != nil {
			t.Fatal(err)
		}
	}
	calls.GracefulStop()
	stop()
	select {
	case s := <-sink.spans:
		if s.GetName() != "runtime.v1.RuntimeService/Version" || hex.EncodeToString(s.GetTraceId()) != traceID || hex.EncodeToString(s.GetParentSpanId()) != spanID {
			t.Errorf("span is %v", s)
		}
	case <-time.After(30 * time.Second):
		t.Fatal("no span was sent")
	}
	select {
	case s := <-sink.spans:
		t.Errorf("a call that is not sampled was sent: %v", s)
	default:
	}
}

func TestNoCollectorNothingIsSetUp(t *testing.T) {
	options, stop, err := startTracing(t.Context(), conf.Tracing{})
	if err != nil || len(options) > 0 {
		t.Errorf("%v, %v", options, err)
	}
	stop()
}
