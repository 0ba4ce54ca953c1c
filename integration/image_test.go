//go:build integration

package integration

import (
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const staging = "gcr.io/k8s-staging-cri-tools/"

// pull pulls an image and returns its ID; it is removed when the test ends.
func pull(t *testing.T, reference string) string {
	t.Helper()
	id, err := shared.Images.PullImage(testContext(t, time.Minute), &cri.ImageSpec{Image: reference}, nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if err := shared.Images.RemoveImage(ctx, &cri.ImageSpec{Image: reference}); err != nil {
			t.Error(err)
		}
	})
	return id
}

// imageIDs of all images that are listed.
func imageIDs(t *testing.T) []string {
	t.Helper()
	list, err := shared.Images.ListImages(t.Context(), nil)
	if err != nil {
		t.Fatal(err)
	}
	var ids []string
	for _, i := range list {
		ids = append(ids, i.Id)
	}
	slices.Sort(ids)
	return ids
}

// imageStatus is nil when there is no such image.
func imageStatus(t *testing.T, reference string) *cri.Image {
	t.Helper()
	resp, err := shared.Images.ImageStatus(t.Context(), &cri.ImageSpec{Image: reference}, false)
	if err != nil {
		t.Fatal(err)
	}
	return resp.Image
}

// An image goes with all its names, whichever of them is given, and takes what it needed on disk along.
func TestRemoveImage(t *testing.T) {
	tags := []string{staging + "test-image-tags:1", staging + "test-image-tags:2", staging + "test-image-tags:3"}
	for _, by := range []string{"tag", "ID", "digest", "short ID"} {
		t.Run(by, func(t *testing.T) {
			before, bytesBefore := imageIDs(t), imageBytes(t)
			for _, tag := range tags {
				pull(t, tag)
			}
			image := imageStatus(t, tags[0])
			if image == nil || len(image.RepoTags) != len(tags) || len(image.RepoDigests) == 0 {
				t.Fatalf("status of an image with three tags is %v", image)
			}
			if got := imageBytes(t); got <= bytesBefore {
				t.Errorf("the image file system holds %d bytes before a pull and %d after it", bytesBefore, got)
			}
			reference := map[string]string{"tag": tags[1], "ID": image.Id, "digest": image.RepoDigests[0], "short ID": strings.TrimPrefix(image.Id, "sha256:")[:12]}[by]
			for range 2 { // idempotent
				if err := shared.Images.RemoveImage(t.Context(), &cri.ImageSpec{Image: reference}); err != nil {
					t.Fatal(err)
				}
				for _, name := range append([]string{image.Id, image.RepoDigests[0]}, tags...) {
					if left := imageStatus(t, name); left != nil {
						t.Errorf("removed by %s, %s is still there: %v", by, name, left)
					}
				}
			}
			if after := imageIDs(t); !slices.Equal(after, before) {
				t.Errorf("listed are %v, before %v", after, before)
			}
			if after := imageBytes(t); after != bytesBefore {
				t.Errorf("the image file system holds %d bytes, before %d", after, bytesBefore)
			}
		})
	}
}

// A running container keeps its root when its image is removed; the name in its status stays.
func TestRemoveImageInUse(t *testing.T) {
	const reference = staging + "test-image-1:latest"
	pull(t, reference)
	p := runPod(t, shared)
	c := p.start("sleep 1000", func(c *cri.ContainerConfig) { c.Image.Image = reference })
	if err := shared.Images.RemoveImage(t.Context(), &cri.ImageSpec{Image: reference}); err != nil {
		t.Fatal(err)
	}
	if imageStatus(t, reference) != nil {
		t.Error("the image is still there")
	}
	if got := p.exec(c, "cat", "/test-image-1"); got != "1\n" {
		t.Errorf("a file of the image is %q after its removal", got)
	}
	resp, err := shared.Runtime.ContainerStatus(t.Context(), c, false)
	if err != nil {
		t.Fatal(err)
	}
	if s := resp.Status; s.Image.Image != reference || s.ImageRef == "" || s.ImageId == "" {
		t.Errorf("status of the container is %v", s)
	}
}

// imageBytes is what ImageFsInfo says of the file system with the images.
func imageBytes(t *testing.T) uint64 {
	t.Helper()
	info, err := shared.Images.ImageFsInfo(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if len(info.ImageFilesystems) != 1 {
		t.Fatalf("image file systems are %v", info.ImageFilesystems)
	}
	return info.ImageFilesystems[0].GetUsedBytes().GetValue()
}

// Kubelet asks the file system itself for its size, by the mount point that it is told, and evicts by it.
func TestImageFsInfo(t *testing.T) {
	p := runPod(t, shared)
	p.start("sleep 1000")
	start := time.Now()
	info, err := shared.Images.ImageFsInfo(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if len(info.ImageFilesystems) != 1 || len(info.ContainerFilesystems) != 1 {
		t.Fatalf("file systems are %v", info)
	}
	for what, fs := range map[string]*cri.FilesystemUsage{"image": info.ImageFilesystems[0], "container": info.ContainerFilesystems[0]} {
		dir := fs.GetFsId().GetMountpoint()
		if stat, err := os.Stat(dir); err != nil || !stat.IsDir() || !strings.HasPrefix(dir, filepath.Join(baseDir, "shared")) {
			t.Errorf("%s: mount point %q is no directory of the node (%v)", what, dir, err)
		}
		if fs.GetUsedBytes().GetValue() == 0 || fs.GetInodesUsed().GetValue() == 0 {
			t.Errorf("%s: nothing is used: %v", what, fs)
		}
		if fs.GetTimestamp() < start.UnixNano() || fs.GetTimestamp() > time.Now().UnixNano() {
			t.Errorf("%s: time stamp %d", what, fs.GetTimestamp())
		}
	}
	out, err := shared.Crivm(testContext(t, time.Minute), "images", "--json")
	if err != nil {
		t.Fatal(err)
	}
	var overview struct {
		Images []struct {
			ID                    string
			LayerBytes, DiskBytes int64
			Containers            int
		}
	}
	if err := json.Unmarshal([]byte(out[strings.Index(out, "{"):]), &overview); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	used := 0
	for _, img := range overview.Images {
		used += img.Containers
		if img.LayerBytes == 0 || img.DiskBytes == 0 {
			t.Errorf("crivm images: %+v", img)
		}
	}
	if used == 0 {
		t.Errorf("crivm images knows no container: %s", out)
	}
}
