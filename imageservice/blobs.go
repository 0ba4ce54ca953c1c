package imageservice

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"go.podman.io/storage"
)

// Layers are kept as they came from the registry, compressed: Root/crivm-layers/<hex of the blob's digest>. Nothing of an
// image is ever unpacked to files of the host; disks are made of the blobs, and containers see only disks.
//
// A file there is complete, since it gets its name when its digest was checked, and is checked again whenever a disk is
// made of it, so it need not be synced: after a power cut a damaged one is found out and fetched again. It belongs to the
// images that name it in their manifest and to the pulls that hold it; sweepBlobs removes what belongs to neither.
const blobsDir = "crivm-layers"

func (s *Service) blobDir() string { return filepath.Join(s.config.Root, blobsDir) }

func (s *Service) blobPath(blob digest.Digest) string {
	return filepath.Join(s.blobDir(), blob.Encoded())
}

// holds counts who needs blobs that no image names yet. Blobs are removed only with mu locked.
type holds struct {
	mu     sync.Mutex
	counts map[digest.Digest]int
}

// holdBlobs keeps blobs, those that are there and those that come, until the release that it returns.
func (s *Service) holdBlobs(blobs []digest.Digest) (release func()) {
	s.held.mu.Lock()
	defer s.held.mu.Unlock()
	if s.held.counts == nil {
		s.held.counts = map[digest.Digest]int{}
	}
	for _, b := range blobs {
		s.held.counts[b]++
	}
	return func() {
		s.held.mu.Lock()
		for _, b := range blobs {
			if s.held.counts[b]--; s.held.counts[b] == 0 {
				delete(s.held.counts, b)
			}
		}
		s.held.mu.Unlock()
		if err := s.sweepBlobs(blobs); err != nil {
			slog.Warn("layers of no image could not be removed; the next start does it", "error", err)
		}
	}
}

// hasBlob tells whether a layer's blob is there in its full length.
func (s *Service) hasBlob(blob digest.Digest, size int64) bool {
	st, err := os.Stat(s.blobPath(blob))
	return err == nil && st.Mode().IsRegular() && st.Size() == size
}

// sweepBlobs removes those of the given blobs that no image names and nobody holds.
func (s *Service) sweepBlobs(blobs []digest.Digest) error {
	s.held.mu.Lock()
	defer s.held.mu.Unlock()
	var rest []digest.Digest
	for _, b := range blobs {
		if _, err := os.Lstat(s.blobPath(b)); err == nil && s.held.counts[b] == 0 {
			rest = append(rest, b)
		}
	}
	if len(rest) == 0 {
		return nil
	}
	images, err := s.store.Images()
	if err != nil {
		return err
	}
	named := map[digest.Digest]bool{}
	for _, img := range images {
		r, err := s.record(img.ID)
		if errdefs.IsNotFound(err) {
			continue // removed by now
		}
		if err != nil { // nobody knows its layers: a pull replaces it with all that it has
			slog.Debug("layers of an image that cannot be used", "image", img.ID, "error", err)
			continue
		}
		for _, l := range r.layers {
			named[l.blob] = true
		}
	}
	var errs []error
	for _, b := range rest {
		if named[b] {
			continue
		}
		if err := os.Remove(s.blobPath(b)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// unnamedBlobs are the files in the directory of layers that none of the images names and nobody holds. Called while no
// pull is under way.
func (s *Service) unnamedBlobs(images []storage.Image) ([]string, error) {
	entries, err := os.ReadDir(s.blobDir())
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	named := map[string]bool{}
	for _, img := range images {
		r, err := s.record(img.ID)
		if err != nil {
			continue // as in sweepBlobs
		}
		for _, l := range r.layers {
			if l.blob != "" {
				named[l.blob.Encoded()] = true
			}
		}
	}
	var unnamed []string
	for _, e := range entries {
		if !named[e.Name()] {
			unnamed = append(unnamed, filepath.Join(s.blobDir(), e.Name()))
		}
	}
	return unnamed, nil
}

// openBlob opens the tar stream of a layer. It fails instead of ending when it is not what the image's configuration says,
// and when it is longer than the file system of the disks, so that a bomb ends by itself.
func (s *Service) openBlob(ctx context.Context, l layer) (_ io.ReadCloser, err error) {
	file, err := os.Open(s.blobPath(l.blob))
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			file.Close()
		}
	}()
	room, err := s.space.room(s.config.DiskDir)
	if err != nil {
		return nil, err
	}
	plain, end, err := decompress(file)
	if err != nil {
		return nil, err
	}
	bounded := &boundedReader{r: &contextReader{ctx, plain}, left: int64(min(room.size, 1<<62))}
	return &blobStream{&checkedReader{r: bounded, hash: sha256.New(), want: l.diffID}, end, file}, nil
}

// blobStream is an open layer.
type blobStream struct {
	io.Reader
	end  func()
	file *os.File
}

func (b *blobStream) Close() error {
	b.end()
	return b.file.Close()
}

// boundedReader fails when more than a number of bytes comes.
type boundedReader struct {
	r    io.Reader
	left int64
}

func (b *boundedReader) Read(p []byte) (int, error) {
	n, err := b.r.Read(p)
	if b.left -= int64(n); b.left < 0 {
		return n, fmt.Errorf("layer unpacks to more than the file system of the disks has: %w", errdefs.ErrResourceExhausted)
	}
	return n, err
}

// dropDamaged removes the blobs of an image that are not, or no longer, what their names say, whoever names them; tells
// whether there was one that is missing or damaged.
func (s *Service) dropDamaged(ctx context.Context, layers []layer) (damaged bool) {
	for _, l := range layers {
		if l.blob == "" {
			continue
		}
		err := checkBlob(ctx, s.blobPath(l.blob), l.blob)
		if err == nil || ctx.Err() != nil {
			continue
		}
		damaged = true
		if !errors.Is(err, fs.ErrNotExist) {
			slog.Warn("layer is damaged and removed", "layer", l.blob, "error", err)
			_ = os.Remove(s.blobPath(l.blob))
		}
	}
	return damaged
}

func checkBlob(ctx context.Context, path string, want digest.Digest) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	hash := sha256.New()
	if _, err := io.Copy(hash, &contextReader{ctx, f}); err != nil {
		return err
	}
	if got := digest.NewDigest(digest.SHA256, hash); got != want {
		return fmt.Errorf("its content has the digest %s", got)
	}
	return nil
}

// blobBytes is what the layers of an image take, each once.
func blobBytes(layers []layer) (n int64) {
	seen := map[string]bool{}
	for _, l := range layers {
		if !seen[l.id] {
			seen[l.id] = true
			n += max(l.bytes, 0)
		}
	}
	return n
}
