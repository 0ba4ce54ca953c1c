package imageservice

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// ImageFsInfo reports the directories that hold images and the containers' writable disks. Kubelet takes
// the file systems' size and free space from the mount points itself. Used bytes and inodes are what the
// image records add up to, without reading any directory of the store: layers count once with their
// unpacked size, disks with their allocated size, inodes with the number of files in each image.
func (s *Service) ImageFsInfo(ctx context.Context, _ *cri.ImageFsInfoRequest) (*cri.ImageFsInfoResponse, error) {
	images, err := s.store.Images()
	if err != nil {
		return nil, fmt.Errorf("image file system: %w", err)
	}
	var bytes, inodes uint64
	seen := map[string]bool{}
	for _, img := range images {
		r, err := s.record(img.ID)
		if err != nil {
			continue // being pulled or removed
		}
		for _, l := range r.layers {
			if !seen[l.id] {
				seen[l.id] = true
				bytes += uint64(max(l.bytes, 0))
			}
		}
		if info, err := checkDisk(s.diskPath(img.ID), img.ID); err == nil {
			inodes += info.Inodes + 1
		}
		n, _, err := allocated(s.diskPath(img.ID))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("image file system: %w", err)
		}
		bytes += n
	}
	usage := func(dir string, bytes, inodes uint64) *cri.FilesystemUsage {
		return &cri.FilesystemUsage{
			Timestamp:  time.Now().UnixNano(),
			FsId:       &cri.FilesystemIdentifier{Mountpoint: dir},
			UsedBytes:  &cri.UInt64Value{Value: bytes},
			InodesUsed: &cri.UInt64Value{Value: inodes},
		}
	}
	imageFS := usage(s.config.Root, bytes, inodes)
	containerFS := imageFS
	if dir := s.config.ScratchDir; dir != "" {
		bytes, inodes, err := scratchUsage(dir)
		switch {
		case err == nil:
			containerFS = usage(dir, bytes, inodes)
		case !errors.Is(err, fs.ErrNotExist): // it does not exist before the first pod
			return nil, fmt.Errorf("container file system: %w", err)
		}
	}
	return &cri.ImageFsInfoResponse{
		ImageFilesystems:     []*cri.FilesystemUsage{imageFS},
		ContainerFilesystems: []*cri.FilesystemUsage{containerFS},
	}, nil
}

// scratchUsage adds up the scratch disks. There are a few files for each pod.
func scratchUsage(dir string) (bytes, inodes uint64, err error) {
	err = filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		if err == nil {
			var b, i uint64
			b, i, err = allocated(path)
			bytes += b
			inodes += i
		}
		if errors.Is(err, fs.ErrNotExist) && path != dir {
			return nil // removed in between
		}
		return err
	})
	return bytes, inodes, err
}

// allocated is the room a file takes.
func allocated(path string) (bytes, inodes uint64, err error) {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return 0, 0, &os.PathError{Op: "lstat", Path: path, Err: err}
	}
	return uint64(st.Blocks) * 512, 1, nil
}
