package main

import (
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/crivm/crivm/conf"
)

// TestMetricsAreServed: a registered counter is found at the configured address, and nothing else is.
func TestMetricsAreServed(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := l.Addr().String()
	registry := newRegistry()
	counter := prometheus.NewCounter(prometheus.CounterOpts{Name: "crivm_test_total", Help: "of the test"})
	registry.MustRegister(counter)
	counter.Add(3)
	if _, err := startMetrics(t.Context(), conf.Metrics{Address: address}, registry); err == nil {
		t.Fatal("an address in use is no error")
	}
	stop := serveMetrics(t.Context(), l, registry)
	defer stop()
	get := func(path string) (int, string) {
		resp, err := http.Get("http://" + address + path)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return resp.StatusCode, string(body)
	}
	if code, body := get("/metrics"); code != http.StatusOK || !strings.Contains(body, "\ncrivm_test_total 3\n") || !strings.Contains(body, "\ngo_goroutines ") {
		t.Errorf("metrics are %d\n%s", code, body)
	}
	if code, _ := get("/debug/pprof/"); code != http.StatusNotFound {
		t.Errorf("another path is answered with %d", code)
	}
	http.DefaultClient.CloseIdleConnections()
	stop()
	if _, err := l.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("listening has not ended: %v", err)
	}
	if stop, err := startMetrics(t.Context(), conf.Metrics{}, registry); err != nil {
		t.Error(err)
	} else {
		stop()
	}
}
