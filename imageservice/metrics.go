package imageservice

import (
	"context"
	"fmt"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// figures are what Prometheus is told of pulls.
type figures struct {
	pulled  prometheus.Counter     // bytes of blobs, as registries sent them
	pulls   *prometheus.CounterVec // by result
	seconds prometheus.Histogram   // of pulls that succeeded
}

// newFigures makes the counters; register tells Prometheus of them.
func newFigures() figures {
	return figures{
		pulled: prometheus.NewCounter(prometheus.CounterOpts{Name: "crivm_image_pull_bytes_total", Help: "Bytes of layers and image configurations that came from registries."}),
		pulls:  prometheus.NewCounterVec(prometheus.CounterOpts{Name: "crivm_image_pulls_total", Help: "Pulls that have ended, by result. Equal calls at a time are one pull."}, []string{"result"}),
		seconds: prometheus.NewHistogram(prometheus.HistogramOpts{Name: "crivm_image_pull_seconds", Help: "Time of pulls that succeeded, until the root disk was ready.",
			Buckets: []float64{.1, .25, .5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600}}),
	}
}

// register tells Prometheus of the service; a nil registry keeps the figures to the service.
func (s *Service) register(registry prometheus.Registerer) error {
	if registry == nil {
		return nil
	}
	active := prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "crivm_image_pulls", Help: "Pulls under way."}, func() float64 {
		return float64(len(s.pullStates()))
	})
	rest := prometheus.NewGaugeFunc(prometheus.GaugeOpts{Name: "crivm_image_pull_remaining_bytes", Help: "Bytes of layers that pulls under way have still to receive."}, func() float64 {
		sum := int64(0)
		for _, p := range s.pullStates() {
			done, total := p.bytes()
			sum += total - done
		}
		return float64(sum)
	})
	for _, c := range []prometheus.Collector{s.figures.pulled, s.figures.pulls, s.figures.seconds, active, rest} {
		if err := registry.Register(c); err != nil {
			return fmt.Errorf("metrics of images: %w", err)
		}
	}
	return nil
}

// ended counts a pull.
func (f figures) ended(ctx context.Context, err error, took time.Duration) {
	switch {
	case err == nil:
		f.pulls.WithLabelValues("ok").Inc()
		f.seconds.Observe(took.Seconds())
	case ctx.Err() != nil:
		f.pulls.WithLabelValues("cancelled").Inc()
	default:
		f.pulls.WithLabelValues("failed").Inc()
	}
}
