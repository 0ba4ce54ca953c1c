package server

import (
	"context"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/crivm/crivm/imageservice"
)

// ImageOverview is what the image service tells of images and pulls, with the containers that use each.
func (s *Server) ImageOverview(ctx context.Context, images NodeImages) (imageservice.Overview, error) {
	o, err := images.Overview(ctx)
	if err != nil {
		return o, err
	}
	users := map[string]int{}
	for _, e := range s.store.ContainerEntries() {
		users[e.Record.ImageID]++
	}
	for i := range o.Images {
		o.Images[i].Containers = users[o.Images[i].ID]
	}
	return o, nil
}

// ImagesFrom asks a running daemon for its images. Unimplemented when it is an older one.
func ImagesFrom(ctx context.Context, conn *grpc.ClientConn) (o imageservice.Overview, err error) {
	err = askNode(ctx, conn, imagesMethod, &emptypb.Empty{}, &o)
	return o, err
}
