package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	cri "k8s.io/cri-api/pkg/apis"
	criv1 "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crivm/crivm/integration/node"
)

// callLimit bounds one CRI call; thirty VMs that boot at once in software emulation take minutes.
const callLimit = 10 * time.Minute

// system is a runtime under measurement, driven as kubelet drives it.
type system struct {
	name    string
	parent  string // cgroup of pods
	runtime cri.RuntimeService
	images  cri.ImageManagerService
	pid     int    // of the daemon
	image   string // what containers run
	logs    string // directory of container logs
	count   int    // pods so far, for their names

	// addTime is what CNI ADD took: of a pod, or of all pods so far with cumulative.
	addTime func(ctx context.Context, pod string) (time.Duration, error)
}

// crivmSystem is a node's crivm.
func crivmSystem(n *node.Node) *system {
	s := &system{name: "crivm", parent: node.CgroupParent, runtime: n.Runtime, images: n.Images, pid: n.PID()}
	return s
}

// podConfig is a new pod's.
func (s *system) podConfig() *criv1.PodSandboxConfig {
	s.count++
	name := fmt.Sprintf("bench%d", s.count)
	return &criv1.PodSandboxConfig{
		Metadata: &criv1.PodSandboxMetadata{Name: name, Namespace: "bench", Uid: s.name + name}, Hostname: name, LogDirectory: s.logs,
		Linux: &criv1.LinuxPodSandboxConfig{CgroupParent: s.parent},
	}
}

// containerConfig is a container's that only runs a command.
func (s *system) containerConfig(image string, command ...string) *criv1.ContainerConfig {
	return &criv1.ContainerConfig{
		Metadata: &criv1.ContainerMetadata{Name: "c"}, Image: &criv1.ImageSpec{Image: image}, Command: command, LogPath: fmt.Sprintf("%s-%d.log", s.name, s.count),
		Linux: &criv1.LinuxContainerConfig{Resources: &criv1.LinuxContainerResources{}},
	}
}

// start makes a pod with one running container.
func (s *system) start(ctx context.Context, handler, image string, command ...string) (pod, container string, err error) {
	config := s.podConfig()
	if pod, err = s.runtime.RunPodSandbox(ctx, config, handler); err != nil {
		return "", "", fmt.Errorf("%s: RunPodSandbox: %w", s.name, err)
	}
	if container, err = s.runtime.CreateContainer(ctx, pod, s.containerConfig(image, command...), config); err != nil {
		return pod, "", fmt.Errorf("%s: CreateContainer: %w", s.name, err)
	}
	if err := s.runtime.StartContainer(ctx, container); err != nil {
		return pod, container, fmt.Errorf("%s: StartContainer: %w", s.name, err)
	}
	return pod, container, nil
}

// remove stops and removes a pod.
func (s *system) remove(ctx context.Context, pod string) error {
	return errors.Join(s.runtime.StopPodSandbox(ctx, pod), s.runtime.RemovePodSandbox(ctx, pod))
}

func (s *system) removeAllPods(ctx context.Context) error {
	pods, err := s.runtime.ListPodSandbox(ctx, nil)
	if err != nil {
		return err
	}
	var errs []error
	for _, p := range pods {
		errs = append(errs, s.remove(ctx, p.Id))
	}
	return errors.Join(errs...)
}

// pull pulls an image and tells how long it took.
func (s *system) pull(ctx context.Context, ref string) (time.Duration, error) {
	took, err := clock(func() error {
		_, err := s.images.PullImage(ctx, &criv1.ImageSpec{Image: ref}, nil, nil)
		return err
	})
	if err != nil {
		return 0, fmt.Errorf("%s: PullImage %s: %w", s.name, ref, err)
	}
	return took, nil
}

func (s *system) removeImage(ctx context.Context, ref string) error {
	if err := s.images.RemoveImage(ctx, &criv1.ImageSpec{Image: ref}); err != nil {
		return fmt.Errorf("%s: RemoveImage %s: %w", s.name, ref, err)
	}
	return nil
}

func clock(f func() error) (time.Duration, error) {
	start := time.Now()
	err := f()
	return time.Since(start), err
}

// logFrom reads a log from an offset to its end.
func logFrom(path string, offset int64) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil || info.Size() <= offset {
		return "", err
	}
	text := make([]byte, info.Size()-offset)
	_, err = f.ReadAt(text, offset)
	return string(text), err
}
