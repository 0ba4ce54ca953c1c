package server

import (
	"strconv"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/crivm/crivm/server/store"
)

// Figures for an operator's Prometheus, of the daemon itself. What kubelet shows at /metrics/cadvisor is in metrics.go.

// defaultHandler stands for the handler "" in labels, where an empty value means no label.
const defaultHandler = "default"

// observed is what cannot be read off records and pools when somebody asks.
type observed struct {
	starts *prometheus.HistogramVec // seconds of RunPodSandbox, of pods that came to be
	ages   *prometheus.HistogramVec // seconds that slots had waited when they were taken
}

func newObserved() observed {
	return observed{
		starts: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "crivm_run_pod_sandbox_seconds", Help: "Time of RunPodSandbox calls that made a pod; warm ones took a slot of the pool.",
			Buckets: []float64{0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 2, 3, 5, 10, 20, 60},
		}, []string{"handler", "warm"}),
		ages: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "crivm_pool_slot_age_seconds", Help: "Age of slots of the warm pool when pods took them.",
			Buckets: []float64{1, 5, 15, 60, 300, 900, 3600, 6 * 3600, 24 * 3600},
		}, []string{"handlers"}),
	}
}

func (o observed) start(handler string, warm bool, took time.Duration) {
	o.starts.WithLabelValues(handlerLabel(handler), strconv.FormatBool(warm)).Observe(took.Seconds())
}

var (
	podsDesc       = prometheus.NewDesc("crivm_pods", "Pod sandboxes that have a record, by state.", []string{"state"}, nil)
	containersDesc = prometheus.NewDesc("crivm_containers", "Containers that have a record, by state.", []string{"state"}, nil)

	poolSizeDesc      = prometheus.NewDesc("crivm_pool_size", "Slots that a warm pool is to have.", []string{"handlers"}, nil)
	poolSlotsDesc     = prometheus.NewDesc("crivm_pool_slots", "Slots of a warm pool, by state.", []string{"handlers", "state"}, nil)
	poolRehearsedDesc = prometheus.NewDesc("crivm_pool_rehearsed_slots", "Ready slots of a warm pool whose guest has rehearsed.", []string{"handlers"}, nil)
	poolHitsDesc      = prometheus.NewDesc("crivm_pool_hits_total", "Pods that took a slot of a warm pool.", []string{"handlers"}, nil)
	poolMissesDesc    = prometheus.NewDesc("crivm_pool_misses_total", "Pods that booted their own VM although there is a pool, by reason.", []string{"handlers", "reason"}, nil)
	poolBootsDesc     = prometheus.NewDesc("crivm_pool_boots_total", "Boots of slots of a warm pool, by result.", []string{"handlers", "result"}, nil)
	poolDroppedDesc   = prometheus.NewDesc("crivm_pool_dropped_total", "Slots of a warm pool that no pod got, by reason.", []string{"handlers", "reason"}, nil)
	poolOldestDesc    = prometheus.NewDesc("crivm_pool_oldest_slot_seconds", "Age of the oldest slot that is ready; 0 without one.", []string{"handlers"}, nil)
)

// Collector tells Prometheus of pods, containers and warm pools. It reads records only, and waits for no guest.
func (s *Server) Collector() prometheus.Collector { return collector{s} }

type collector struct{ *Server }

// Describe names what never changes.
func (c collector) Describe(to chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{
		podsDesc, containersDesc, poolSizeDesc, poolSlotsDesc, poolRehearsedDesc, poolHitsDesc, poolMissesDesc, poolBootsDesc, poolDroppedDesc, poolOldestDesc,
	} {
		to <- d
	}
	c.observed.starts.Describe(to)
	c.observed.ages.Describe(to)
}

// Collect counts.
func (c collector) Collect(to chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, value float64, labels ...string) {
		to <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, value, labels...)
	}
	count := func(d *prometheus.Desc, value uint64, labels ...string) {
		to <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(value), labels...)
	}
	pods := map[store.SandboxState]int{store.SandboxCreating: 0, store.SandboxReady: 0, store.SandboxStopping: 0, store.SandboxNotReady: 0}
	for _, e := range c.store.SandboxEntries() {
		if !e.Record.State.Slot() { // those are the pools'
			pods[e.Record.State]++
		}
	}
	for state, n := range pods {
		gauge(podsDesc, float64(n), strings.ToLower(string(state)))
	}
	containers := map[store.ContainerState]int{store.ContainerCreating: 0, store.ContainerCreated: 0, store.ContainerRunning: 0, store.ContainerExited: 0}
	for _, e := range c.store.ContainerEntries() {
		containers[e.Record.State]++
	}
	for state, n := range containers {
		gauge(containersDesc, float64(n), strings.ToLower(string(state)))
	}
	for _, p := range c.PoolFigures() {
		handlers := handlersLabel(p.Handlers)
		gauge(poolSizeDesc, float64(p.Size), handlers)
		gauge(poolSlotsDesc, float64(p.Ready), handlers, "ready")
		gauge(poolSlotsDesc, float64(p.Booting), handlers, "booting")
		gauge(poolRehearsedDesc, float64(p.Rehearsed), handlers)
		gauge(poolOldestDesc, p.OldestSeconds, handlers)
		count(poolHitsDesc, p.Hits, handlers)
		count(poolBootsDesc, p.Booted, handlers, "ready")
		count(poolBootsDesc, p.BootsFailed, handlers, "failed")
		for _, reason := range []string{missEmpty, missSmaller, missLarger, missGrowth, missChanged} { // 0 too, so that a rate can be seen from the first on
			count(poolMissesDesc, p.Misses[reason], handlers, reason)
		}
		for reason, n := range p.Dropped {
			count(poolDroppedDesc, n, handlers, reason)
		}
	}
	c.observed.starts.Collect(to)
	c.observed.ages.Collect(to)
}

func handlerLabel(name string) string {
	if name == "" {
		return defaultHandler
	}
	return name
}

// handlersLabel names a pool by the handlers that share it.
func handlersLabel(names []string) string {
	labels := make([]string, len(names))
	for i, name := range names {
		labels[i] = handlerLabel(name)
	}
	return strings.Join(labels, ",")
}
