package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/crivm/crivm/conf"
)

const (
	metricsPath = "/metrics"
	// scrapeLimit bounds a request for metrics, and each phase of its connection.
	scrapeLimit = 10 * time.Second
	// parallelScrapes are answered at a time; more are told to come again.
	parallelScrapes = 4
)

// newRegistry is where all parts of the daemon register their metrics, whether or not somebody can read them.
func newRegistry() *prometheus.Registry {
	registry := prometheus.NewRegistry()
	registry.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return registry
}

// startMetrics answers Prometheus at the configured address. stop ends that; without an address there is nothing to end.
func startMetrics(ctx context.Context, config conf.Metrics, registry *prometheus.Registry) (stop func(), _ error) {
	if config.Address == "" {
		return func() {}, nil
	}
	listener, err := net.Listen("tcp", config.Address)
	if err != nil {
		return nil, fmt.Errorf("metrics: %w", err)
	}
	return serveMetrics(ctx, listener, registry), nil
}

func serveMetrics(ctx context.Context, listener net.Listener, registry *prometheus.Registry) (stop func()) {
	mux := http.NewServeMux()
	mux.Handle("GET "+metricsPath, promhttp.HandlerFor(registry, promhttp.HandlerOpts{
		ErrorLog: slog.NewLogLogger(slog.Default().Handler(), slog.LevelWarn), ErrorHandling: promhttp.ContinueOnError,
		MaxRequestsInFlight: parallelScrapes, Timeout: scrapeLimit,
	}))
	server := &http.Server{
		Handler: mux, ReadTimeout: scrapeLimit, WriteTimeout: 2 * scrapeLimit, IdleTimeout: 5 * time.Minute,
		BaseContext: func(net.Listener) context.Context { return context.WithoutCancel(ctx) },
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		if err := server.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
			slog.Error("metrics are not served any more", "error", err)
		}
	}()
	slog.Info("serving metrics", "address", "http://"+listener.Addr().String()+metricsPath)
	return func() {
		server.Close()
		<-ended
	}
}
