package server

import (
	"context"
	"testing"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc/codes"
	grpcstatus "google.golang.org/grpc/status"

	"github.com/crivm/crivm/imageservice"
)

// TestImageOverview: what `crivm images` gets from a daemon, with the containers that use an image.
func TestImageOverview(t *testing.T) {
	r := newRig(t)
	pod := r.runPod("a")
	r.create(pod, "one", "sleep 1000")
	used := r.store.ContainerEntries()[0].Record.ImageID
	images := &imageLeftovers{overview: imageservice.Overview{
		Images: []imageservice.ImageUse{{ID: used, Names: []string{"used:1"}, DiskBytes: 4096}, {ID: "sha256:other"}},
		Pulls:  []imageservice.PullUnder{{Image: "coming:1", Phase: "layers", Bytes: 5, TotalBytes: 10}},
	}}
	conn := serveNode(t, r, images)
	o, err := ImagesFrom(t.Context(), conn)
	if err != nil || len(o.Images) != 2 || o.Images[0].Containers != 1 || o.Images[0].DiskBytes != 4096 || o.Images[1].Containers != 0 {
		t.Errorf("images are %+v (%v)", o.Images, err)
	}
	if len(o.Pulls) != 1 || o.Pulls[0] != images.overview.Pulls[0] {
		t.Errorf("pulls are %+v", o.Pulls)
	}
	images.err = errdefs.ErrUnavailable
	if _, err := ImagesFrom(context.Background(), conn); grpcstatus.Code(err) != codes.Unavailable {
		t.Errorf("error %v, want Unavailable", err)
	}
}
