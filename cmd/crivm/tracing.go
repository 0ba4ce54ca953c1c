package main

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"go.opentelemetry.io/contrib/instrumentation/google.golang.org/grpc/otelgrpc"
	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracegrpc"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/sdk/resource"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"google.golang.org/grpc"

	"github.com/crivm/crivm/conf"
)

// flushLimit bounds sending the last spans when the daemon stops.
const flushLimit = 5 * time.Second

// startTracing has spans of calls sent to the configured collector, as children of what the client sends along. A
// collector that is not there is none of the pods' business: spans are dropped, and the log says so. stop sends what is
// left. Without a collector nothing is set up, and spans cost nothing.
func startTracing(ctx context.Context, config conf.Tracing) (options []grpc.ServerOption, stop func(), err error) {
	if config.Endpoint == "" {
		return nil, func() {}, nil
	}
	exporter, err := otlptracegrpc.New(ctx, otlptracegrpc.WithEndpointURL(config.Endpoint)) // connects when there is something to send
	if err != nil {
		return nil, nil, fmt.Errorf("tracing: %w", err)
	}
	provider := sdktrace.NewTracerProvider(
		sdktrace.WithBatcher(exporter),
		sdktrace.WithSampler(sdktrace.ParentBased(sdktrace.TraceIDRatioBased(float64(config.SamplesPerMillion)/1e6))),
		sdktrace.WithResource(resource.NewSchemaless(attribute.String("service.name", "crivm"), attribute.String("service.version", version))),
	)
	otel.SetErrorHandler(otel.ErrorHandlerFunc(func(err error) { slog.Warn("tracing", "error", err) }))
	otel.SetTracerProvider(provider)
	handler := otelgrpc.NewServerHandler(otelgrpc.WithTracerProvider(provider), otelgrpc.WithPropagators(propagation.TraceContext{}))
	slog.Info("sending spans", "endpoint", config.Endpoint)
	return []grpc.ServerOption{grpc.StatsHandler(handler)}, func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), flushLimit)
		defer cancel()
		if err := provider.Shutdown(ctx); err != nil {
			slog.Warn("tracing: the last spans were not sent", "error", err)
		}
	}, nil
}
