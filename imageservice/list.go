package imageservice

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// ListImages lists all images, or the one that the filter names.
func (s *Service) ListImages(ctx context.Context, req *cri.ListImagesRequest) (*cri.ListImagesResponse, error) {
	images, err := s.list(req.GetFilter())
	if err != nil {
		return nil, err
	}
	return &cri.ListImagesResponse{Images: images}, nil
}

// partBytes is about how big a message of a streamed list becomes, as with the other lists: far below the 16 MiB that
// clients take. An image is never split, so one with very many names is a message of its own.
const partBytes = 1 << 20

// StreamImages is ListImages in messages of bounded size.
func (s *Service) StreamImages(req *cri.StreamImagesRequest, stream grpc.ServerStreamingServer[cri.StreamImagesResponse]) error {
	images, err := s.list(req.GetFilter())
	if err != nil {
		return err
	}
	return sendImages(images, stream)
}

func sendImages(images []*cri.Image, stream grpc.ServerStreamingServer[cri.StreamImagesResponse]) error {
	for len(images) > 0 {
		n, size := 1, proto.Size(images[0])
		for n < len(images) {
			if size += proto.Size(images[n]); size > partBytes {
				break
			}
			n++
		}
		if err := stream.Send(&cri.StreamImagesResponse{Images: images[:n]}); err != nil {
			return err
		}
		images = images[n:]
	}
	return nil
}

func (s *Service) list(filter *cri.ImageFilter) ([]*cri.Image, error) {
	if ref := filter.GetImage().GetImage(); ref != "" {
		img, r, err := s.find(ref)
		if errdefs.IsNotFound(err) {
			return nil, nil
		}
		if err != nil {
			return nil, err
		}
		return []*cri.Image{s.criImage(img.Names, r)}, nil
	}
	images, err := s.store.Images()
	if err != nil {
		return nil, fmt.Errorf("list images: %w", err)
	}
	var out []*cri.Image
	for _, img := range images {
		if hidden(img.Names) {
			continue
		}
		r, err := s.record(img.ID)
		if errdefs.IsNotFound(err) {
			continue // removed in between
		}
		if err != nil {
			slog.Warn("image left out of the list", "image", img.ID, "error", err)
			continue
		}
		out = append(out, s.criImage(img.Names, r))
	}
	return out, nil
}

// ImageStatus describes one image; without one the response is empty. With verbose, info holds the image's
// configuration and the path of its root disk.
func (s *Service) ImageStatus(ctx context.Context, req *cri.ImageStatusRequest) (*cri.ImageStatusResponse, error) {
	img, r, err := s.find(req.GetImage().GetImage())
	if errdefs.IsNotFound(err) {
		return &cri.ImageStatusResponse{}, nil
	}
	if err != nil {
		return nil, err
	}
	resp := &cri.ImageStatusResponse{Image: s.criImage(img.Names, r)}
	if req.GetVerbose() {
		info, err := json.Marshal(struct {
			ImageSpec ocispec.Image `json:"imageSpec"`
			Disk      string        `json:"disk"`
		}{r.config, s.diskPath(r.id)})
		if err != nil {
			return nil, fmt.Errorf("image %s: %w", r.id, err)
		}
		resp.Info = map[string]string{"info": string(info)}
	}
	return resp, nil
}

func (s *Service) criImage(names []string, r *record) *cri.Image {
	img := s.image(names, r)
	out := &cri.Image{
		Id:          img.ID,
		RepoTags:    img.RepoTags,
		RepoDigests: img.RepoDigests,
		Size:        img.Size,
		Pinned:      img.Pinned,
		Spec:        &cri.ImageSpec{Image: img.ID, Annotations: r.annotations},
	}
	// User is "user", "uid", "user:group" or a mix; kubelet wants the user as one or the other.
	user, _, _ := strings.Cut(img.Config.User, ":")
	if uid, err := strconv.ParseInt(user, 10, 64); err == nil {
		out.Uid = &cri.Int64Value{Value: uid}
	} else {
		out.Username = user
	}
	return out
}
