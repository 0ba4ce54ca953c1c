package imageservice

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
)

// Overview is what the store holds and what is under way in it.
type Overview struct {
	Images []ImageUse  `json:"images"` // by their first names
	Pulls  []PullUnder `json:"pulls"`  // oldest first
}

// ImageUse is an image and what it takes.
type ImageUse struct {
	ID         string   `json:"id"`    // "sha256:<hex>"
	Names      []string `json:"names"` // tags, then digests
	Pinned     bool     `json:"pinned"`
	Layers     int      `json:"layers"`
	LayerBytes int64    `json:"layerBytes"` // of its layers as they are kept, each once
	OwnBytes   int64    `json:"ownBytes"`   // of those of them that no other image has
	DiskBytes  uint64   `json:"diskBytes"`  // what its root disk takes; 0 when it has none now
	Containers int      `json:"containers"` // that use it; the image service does not know, see server
}

// PullUnder is a pull under way.
type PullUnder struct {
	Image      string  `json:"image"`
	Phase      string  `json:"phase"` // "manifest", "layers" or "root disk"
	Seconds    float64 `json:"seconds"`
	Layers     int     `json:"layers"` // that are there
	LayerCount int     `json:"layerCount"`
	Bytes      int64   `json:"bytes"` // of layers that are there, also before this pull
	TotalBytes int64   `json:"totalBytes"`
}

// Overview lists images and pulls under way.
func (s *Service) Overview(ctx context.Context) (Overview, error) {
	o := Overview{Images: []ImageUse{}, Pulls: []PullUnder{}}
	images, err := s.store.Images()
	if err != nil {
		return o, fmt.Errorf("list images: %w", err)
	}
	var records []*record
	users := map[string]int{} // of each layer
	for _, img := range images {
		if hidden(img.Names) {
			continue
		}
		r, err := s.record(img.ID)
		if err != nil {
			if !errdefs.IsNotFound(err) {
				o.Images = append(o.Images, ImageUse{ID: "sha256:" + img.ID, Names: permanent(img.Names)}) // it cannot be used, but it is there
			}
			continue
		}
		view := s.image(img.Names, r)
		records = append(records, r)
		seen := map[string]bool{}
		for _, l := range r.layers {
			if !seen[l.id] {
				seen[l.id] = true
				users[l.id]++
			}
		}
		o.Images = append(o.Images, ImageUse{
			ID: view.ID, Names: append(view.RepoTags, view.RepoDigests...), Pinned: view.Pinned,
			Layers: len(r.layers), LayerBytes: blobBytes(r.layers), DiskBytes: s.diskBytes(r.id),
		})
	}
	for _, r := range records {
		var own []layer
		for _, l := range r.layers {
			if users[l.id] == 1 {
				own = append(own, l)
			}
		}
		i := slices.IndexFunc(o.Images, func(u ImageUse) bool { return u.ID == "sha256:"+r.id })
		o.Images[i].OwnBytes = blobBytes(own)
	}
	slices.SortFunc(o.Images, func(a, b ImageUse) int {
		return cmp.Or(slices.Compare(a.Names, b.Names), strings.Compare(a.ID, b.ID))
	})
	for _, p := range s.pullStates() {
		u := PullUnder{Image: p.ref, Phase: p.phase(), Seconds: time.Since(p.started).Seconds()}
		u.Layers, u.LayerCount = p.layers()
		u.Bytes, u.TotalBytes = p.bytes()
		o.Pulls = append(o.Pulls, u)
	}
	return o, ctx.Err()
}

// pullStates are the pulls under way, oldest first.
func (s *Service) pullStates() []*pullState {
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []*pullState
	for _, p := range s.slots {
		all = append(all, p)
	}
	slices.SortFunc(all, func(a, b *pullState) int { return a.started.Compare(b.started) })
	return all
}
