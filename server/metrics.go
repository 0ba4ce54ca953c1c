package server

import (
	"context"
	"path"
	"slices"
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crivm/crivm/server/store"
)

// metricLabels are the labels of every metric, as cAdvisor has them; a metric's own follow.
var metricLabels = []string{"id", "name", "image", "namespace", "pod", "container"}

// metric is one of those that kubelet shows at /metrics/cadvisor.
type metric struct {
	name, help string
	kind       cri.MetricType
	labels     []string // beyond metricLabels
	container  func(containerSubject) []point
	pod        func(podSubject) []point
}

// point is one value of a metric; CRI has integers only, so seconds are whole ones.
type point struct {
	labels []string
	value  uint64
}

// containerSubject is a running container with figures.
type containerSubject struct {
	containerSample
	rec store.Container
	pod sample
}

// podSubject is a pod with figures of the host.
type podSubject struct {
	sample
	rec store.Sandbox
}

// ListMetricDescriptors names all metrics; kubelet drops those that are not named.
func (s *Server) ListMetricDescriptors(context.Context, *cri.ListMetricDescriptorsRequest) (*cri.ListMetricDescriptorsResponse, error) {
	resp := &cri.ListMetricDescriptorsResponse{}
	for _, m := range metrics {
		resp.Descriptors = append(resp.Descriptors, &cri.MetricDescriptor{Name: m.name, Help: m.help, LabelKeys: slices.Concat(metricLabels, m.labels)})
	}
	return resp, nil
}

// ListPodSandboxMetrics gives the metrics of all READY pods and their running containers.
func (s *Server) ListPodSandboxMetrics(ctx context.Context, _ *cri.ListPodSandboxMetricsRequest) (*cri.ListPodSandboxMetricsResponse, error) {
	return &cri.ListPodSandboxMetricsResponse{PodMetrics: s.podMetrics(ctx)}, nil
}

// StreamPodSandboxMetrics is ListPodSandboxMetrics in parts.
func (s *Server) StreamPodSandboxMetrics(_ *cri.StreamPodSandboxMetricsRequest, stream cri.RuntimeService_StreamPodSandboxMetricsServer) error {
	return inParts(s.podMetrics(stream.Context()), func(part []*cri.PodSandboxMetrics) error {
		return stream.Send(&cri.StreamPodSandboxMetricsResponse{PodSandboxMetrics: part})
	})
}

func (s *Server) podMetrics(ctx context.Context) []*cri.PodSandboxMetrics {
	sandboxes := s.measuredSandboxes(nil)
	all, containers := s.runningContainers(sandboxes)
	s.collect(ctx, sandboxes, all, true)
	found := make([]*cri.PodSandboxMetrics, 0, len(sandboxes))
	for _, rec := range sandboxes {
		found = append(found, s.sandboxMetrics(rec, containers[rec.ID]))
	}
	return found
}

func (s *Server) sandboxMetrics(rec store.Sandbox, containers []store.Container) *cri.PodSandboxMetrics {
	pod := podSubject{sample: s.figures(rec.ID), rec: rec}
	result := &cri.PodSandboxMetrics{PodSandboxId: rec.ID}
	if pod.at.IsZero() {
		return result
	}
	cgroup, m := s.cgroupParent(rec.Config.PodSandboxConfig), rec.Config.GetMetadata()
	for _, c := range containers {
		figures, ok := pod.containers[c.ID]
		if !ok || !figures.GetRunning() {
			continue
		}
		subject := containerSubject{containerSample: figures, rec: c, pod: pod.sample}
		labels := []string{path.Join(cgroup, c.ID), c.ID, c.ImageName, m.GetNamespace(), m.GetName(), c.Config.GetMetadata().GetName()}
		list := &cri.ContainerMetrics{ContainerId: c.ID}
		for _, kind := range metrics {
			if kind.container != nil {
				list.Metrics = kind.add(list.Metrics, figures.at, labels, kind.container(subject))
			}
		}
		result.ContainerMetrics = append(result.ContainerMetrics, list)
	}
	labels := []string{path.Join(cgroup, "crivm-"+rec.ID), "", "", m.GetNamespace(), m.GetName(), ""}
	for _, kind := range metrics {
		if kind.pod != nil {
			result.Metrics = kind.add(result.Metrics, pod.at, labels, kind.pod(pod))
		}
	}
	return result
}

func (m metric) add(to []*cri.Metric, at time.Time, labels []string, points []point) []*cri.Metric {
	for _, p := range points {
		to = append(to, &cri.Metric{
			Name: m.name, Timestamp: at.UnixNano(), MetricType: m.kind, LabelValues: slices.Concat(labels, p.labels), Value: value(p.value),
		})
	}
	return to
}
