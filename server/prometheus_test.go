package server

import (
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	dto "github.com/prometheus/client_model/go"
)

// gathered is the value of each metric by name and labels; of a histogram, how often it was observed.
func gathered(t *testing.T, s *Server) map[string]float64 {
	t.Helper()
	registry := prometheus.NewPedanticRegistry()
	registry.MustRegister(s.Collector())
	families, err := registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	values := map[string]float64{}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			key := f.GetName()
			for _, l := range m.GetLabel() {
				key += " " + l.GetName() + "=" + l.GetValue()
			}
			switch f.GetType() {
			case dto.MetricType_COUNTER:
				values[key] = m.GetCounter().GetValue()
			case dto.MetricType_GAUGE:
				values[key] = m.GetGauge().GetValue()
			case dto.MetricType_HISTOGRAM:
				values[key] = float64(m.GetHistogram().GetSampleCount())
			}
		}
	}
	return values
}

// TestPrometheus: pods, containers and a pool are counted as they are.
func TestPrometheus(t *testing.T) {
	r := newPoolRig(t, 1)
	first := gathered(t, r.Server)
	pod := r.runPod("a")
	r.create(pod, "c", "")
	r.awaitPool(func(f PoolFigures) bool { return f.Ready == 1 })
	r.setPool(0) // a daemon that has counted nothing yet
	r.setPool(1)
	r.awaitPool(func(f PoolFigures) bool { return f.Ready == 1 })
	release := r.bootsCold() // keeps the pool from being filled
	r.runPod("b")
	r.runPod("c")
	got := gathered(t, r.Server)
	release()
	for key, want := range map[string]float64{
		"crivm_pods state=ready": 3, "crivm_pods state=notready": 0, "crivm_containers state=created": 1, "crivm_containers state=running": 0,
		"crivm_run_pod_sandbox_seconds handler=default warm=true": 1, "crivm_run_pod_sandbox_seconds handler=default warm=false": 1,
		"crivm_pool_size handlers=default": 1, "crivm_pool_slots handlers=default state=ready": 0, "crivm_pool_slots handlers=default state=booting": 0,
		"crivm_pool_hits_total handlers=default": 1, "crivm_pool_misses_total handlers=default reason=empty": 1, "crivm_pool_misses_total handlers=default reason=larger": 0,
		"crivm_pool_boots_total handlers=default result=ready": 1, "crivm_pool_boots_total handlers=default result=failed": 0,
		"crivm_pool_slot_age_seconds handlers=default": 1, "crivm_pool_oldest_slot_seconds handlers=default": 0,
	} {
		if v, ok := got[key]; !ok || v != want {
			t.Errorf("%s is %v (%v), want %v", key, v, ok, want)
		}
	}
	if v := first["crivm_pool_slots handlers=default state=ready"]; v != 1 || first["crivm_pool_oldest_slot_seconds handlers=default"] <= 0 {
		t.Errorf("before the first pod: %v", first)
	}
	r.removeAll()
}

// TestPrometheusNames: pools that several handlers share have one name.
func TestPrometheusNames(t *testing.T) {
	if got := handlersLabel([]string{"", "crivm"}); got != "default,crivm" {
		t.Errorf("label is %q", got)
	}
}
