package imageservice

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
	"go.podman.io/storage"
)

// Leftover is something in the image store that belongs to no image.
type Leftover struct {
	Kind string // "image", "layer", "image disk", "download"
	Name string // ID or path
	Why  string // why it is the store's and nobody's
	Err  error  // why it could not be removed
}

// Leftovers lists what interrupted pulls and disk builds left, and removes it when remove is set. Unavailable while pulls
// or builds are under way: they own what looks the same.
func (s *Service) Leftovers(ctx context.Context, remove bool) ([]Leftover, error) {
	if !s.pulling.TryLock() {
		return nil, fmt.Errorf("image store: images are being pulled: %w", errdefs.ErrUnavailable)
	}
	defer s.pulling.Unlock()
	if !s.building.TryAcquire(parallelBuilds) {
		return nil, fmt.Errorf("image store: disks are being built: %w", errdefs.ErrUnavailable)
	}
	defer s.building.Release(parallelBuilds)
	var found []Leftover
	add := func(kind, name, why string, do func() error) {
		l := Leftover{Kind: kind, Name: name, Why: why}
		if remove {
			if err := do(); err != nil && !errors.Is(err, fs.ErrNotExist) && !isGone(err) {
				l.Err = fmt.Errorf("%s %s: %w", kind, name, err)
			}
		}
		found = append(found, l)
	}
	downloads, err := os.ReadDir(s.tempDir())
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	for _, e := range downloads {
		path := filepath.Join(s.tempDir(), e.Name())
		add("download", path, "in the store's directory for downloads, and none is under way", func() error { return os.RemoveAll(path) })
	}
	images, err := s.store.Images()
	if err != nil {
		return nil, err
	}
	exist, pulled := map[string]bool{}, images[:0:0]
	for _, img := range images {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		if hidden(img.Names) {
			add("image", img.ID, "has only the name of a pull, and none is under way", func() error {
				_, err := s.store.DeleteImage(img.ID, true)
				return err
			})
			continue
		}
		exist[img.ID], pulled = true, append(pulled, img)
	}
	layers, err := s.unusedLayers(pulled)
	if err != nil {
		return nil, err
	}
	for _, id := range layers {
		add("layer", id, "was pulled, and no image is made of it", func() error { return s.store.DeleteLayer(id) })
	}
	blobs, err := s.unnamedBlobs(pulled)
	if err != nil {
		return nil, err
	}
	for _, path := range blobs {
		add("layer", path, "in the directory of images' layers, and no image has it", func() error { return os.Remove(path) })
	}
	disks, err := os.ReadDir(s.config.DiskDir)
	if err != nil {
		return nil, err
	}
	for _, e := range disks {
		id, isDisk := strings.CutSuffix(e.Name(), diskSuffix)
		if !isDisk {
			id, isDisk = strings.CutSuffix(e.Name(), sumSuffix)
		}
		if !isDisk && !strings.HasSuffix(e.Name(), tempSuffix) || isDisk && exist[id] {
			continue
		}
		path := filepath.Join(s.config.DiskDir, e.Name())
		add("image disk", path, "in the directory of image disks; there is no such image, or its building was interrupted", func() error { return os.Remove(path) })
	}
	return found, nil
}

// unusedLayers are those that belong to none of the images and to no container, children before their parents.
func (s *Service) unusedLayers(images []storage.Image) ([]string, error) {
	layers, err := s.store.Layers()
	if err != nil {
		return nil, err
	}
	containers, err := s.store.Containers()
	if err != nil {
		return nil, err
	}
	byID := map[string]*storage.Layer{}
	for i := range layers {
		byID[layers[i].ID] = &layers[i]
	}
	used := map[string]bool{}
	use := func(id string) {
		for ; id != "" && !used[id] && byID[id] != nil; id = byID[id].Parent {
			used[id] = true
		}
	}
	for _, img := range images {
		use(img.TopLayer)
		for _, id := range img.MappedTopLayers {
			use(id)
		}
	}
	for _, c := range containers {
		use(c.LayerID)
	}
	// Only layers that came from a blob: a container's own layer exists shortly before its container.
	for _, l := range layers {
		if l.UncompressedDigest == "" && l.CompressedDigest == "" && l.TOCDigest == "" {
			use(l.ID)
		}
	}
	children := map[string]int{}
	for _, l := range layers {
		children[l.Parent]++
	}
	var unused []string
	for _, l := range layers {
		if !used[l.ID] && children[l.ID] == 0 {
			unused = append(unused, l.ID)
		}
	}
	for i := 0; i < len(unused); i++ { // it grows: a parent whose children are all unused follows them
		parent := byID[unused[i]].Parent
		if children[parent]--; parent != "" && children[parent] == 0 && !used[parent] && byID[parent] != nil {
			unused = append(unused, parent)
		}
	}
	return unused, nil
}
