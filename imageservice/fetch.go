package imageservice

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"sync/atomic"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	imagelib "go.podman.io/image/v5/image"
	"go.podman.io/image/v5/manifest"
	"go.podman.io/image/v5/pkg/blobinfocache/none"
	"go.podman.io/image/v5/signature"
	"go.podman.io/image/v5/types"
	"go.podman.io/storage"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sync/semaphore"
)

// defaultDownloads is how many layers of an image are fetched at a time where the configuration does not say.
const defaultDownloads = 3

// usualOf asks the signature policy about the image that a source has for this machine, and reads what it consists of.
func (s *Service) usualOf(ctx context.Context, policy *signature.PolicyContext, source types.ImageSource, top []byte, kind string) (*usualImage, error) {
	if s.library {
		return nil, errUnusual
	}
	var instance *digest.Digest
	if manifest.MIMETypeIsMultiImage(kind) {
		list, err := manifest.ListFromBlob(top, kind)
		if err != nil {
			return nil, fmt.Errorf("index: %w", err)
		}
		chosen, err := list.ChooseInstance(s.system())
		if err != nil {
			return nil, fmt.Errorf("%w: %w", err, errUnusual) // the library has words and a class for it
		}
		instance = &chosen
	}
	unparsed := imagelib.UnparsedInstance(source, instance)
	if allowed, err := policy.IsRunningImageAllowed(ctx, unparsed); !allowed || err != nil {
		return nil, fmt.Errorf("source image rejected: %w", err)
	}
	img, err := usual(ctx, source, unparsed)
	if err == nil {
		s.figures.pulled.Add(float64(len(img.config)))
	}
	return img, err
}

// fetchLayers brings those layers of an image into the store that are not there, several at a time, uppermost first, since
// disks are made in this order. The caller holds them.
func (s *Service) fetchLayers(ctx context.Context, source *sharedSource, layers []layer, p *pullState) error {
	downloads := int64(s.config.MaxParallelDownloads)
	if downloads == 0 {
		downloads = defaultDownloads
	}
	slots := semaphore.NewWeighted(downloads)
	group, ctx := errgroup.WithContext(ctx)
	for i, l := range slices.Backward(layers) {
		blob := p.blobs[i]
		if s.hasBlob(l.blob, l.bytes) {
			blob.ready()
			continue
		}
		group.Go(func() error {
			if err := s.fetchLayer(ctx, source, slots, l, blob); err != nil {
				return fmt.Errorf("layer %s: %w", l.blob, err)
			}
			blob.ready()
			return nil
		})
	}
	return group.Wait()
}

// fetchLayer fetches a layer, or waits for another pull that does already, of whatever image. The work goes on as long as
// one of them wants the layer. What goes wrong with one registry or its credentials must not fail a pull from another, so
// each tries itself before it gives up.
func (s *Service) fetchLayer(ctx context.Context, source *sharedSource, slots *semaphore.Weighted, l layer, blob *blobProgress) error {
	const attempts = 100 // each fails with another pull
	var err error
	for range attempts {
		own := false
		_, err = s.fetches.doBegun(ctx, l.blob.String(), func(counter *blobCounter) func(context.Context) (struct{}, error) {
			own = true
			source.retain()
			release := s.holdBlobs([]digest.Digest{l.blob})
			s.pulling.RLock() // the pull holds it too, so this does not wait
			return func(ctx context.Context) (struct{}, error) {
				defer s.pulling.RUnlock()
				defer release()
				defer source.release()
				if err := slots.Acquire(ctx, 1); err != nil {
					return struct{}{}, err
				}
				defer slots.Release(1)
				return struct{}{}, s.receive(ctx, source.ImageSource, l, counter)
			}
		}, blob.follow)
		if err == nil || own || ctx.Err() != nil {
			return err
		}
	}
	return err
}

// receive fetches a layer's blob into the store.
func (s *Service) receive(ctx context.Context, source types.ImageSource, l layer, counter *blobCounter) (err error) {
	if s.hasBlob(l.blob, l.bytes) {
		return nil // the flight before this one has brought it
	}
	blobs := incoming{space: s.space, bytes: s.figures.pulled}
	defer blobs.end()
	info := types.BlobInfo{Digest: l.blob, Size: l.bytes}
	if err := blobs.note(types.ProgressProperties{Event: types.ProgressEventNewArtifact, Artifact: info}); err != nil {
		return err // there is no room for it
	}
	file, err := os.CreateTemp(s.tempDir(), "layer-")
	if err != nil {
		return err
	}
	defer func() {
		err = errors.Join(err, file.Close())
		if rmErr := os.Remove(file.Name()); rmErr != nil && !errors.Is(rmErr, fs.ErrNotExist) {
			err = errors.Join(err, rmErr)
		}
	}()
	counter.receiving.Store(true)
	defer counter.receiving.Store(false)
	stream, _, err := source.GetBlob(ctx, info, none.NoCache)
	if err != nil {
		return err
	}
	defer stream.Close()
	hash := sha256.New()
	progress := writerFunc(func(p []byte) {
		got := counter.got.Add(int64(len(p)))
		_ = blobs.note(types.ProgressProperties{Event: types.ProgressEventRead, Artifact: info, Offset: uint64(got)})
	})
	n, err := io.Copy(io.MultiWriter(file, hash, progress), io.LimitReader(&contextReader{ctx, stream}, l.bytes+1))
	if err != nil {
		return err
	}
	if got := digest.NewDigest(digest.SHA256, hash); n != l.bytes || got != l.blob {
		return fmt.Errorf("%d bytes with digest %s came, the manifest says %d", n, got, l.bytes)
	}
	if _, err := compressionOf(file); err != nil {
		return err
	}
	return os.Rename(file.Name(), s.blobPath(l.blob))
}

type writerFunc func([]byte)

func (f writerFunc) Write(p []byte) (int, error) {
	f(p)
	return len(p), nil
}

// sharedSource is a registry's image that several pulls read layers from: it is closed when the last has ended. Nothing is
// wrapped around the library's source, which has methods that only the library knows.
type sharedSource struct {
	types.ImageSource
	users atomic.Int64
}

func newSharedSource(source types.ImageSource) *sharedSource {
	s := &sharedSource{ImageSource: source}
	s.users.Store(1)
	return s
}

func (s *sharedSource) retain() { s.users.Add(1) }

func (s *sharedSource) release() {
	if s.users.Add(-1) == 0 {
		_ = s.ImageSource.Close() // ends idle connections, no more
	}
}

// putImage makes an image without layers of the store's own: its manifest says which blobs it has. An image that is there
// gets what it lacks of that, and is not touched else.
func (s *Service) putImage(img *usualImage, name string) error {
	manifestDigest, err := manifest.Digest(img.manifest)
	if err != nil {
		return err
	}
	data := []storage.ImageBigDataOption{
		{Key: digest.NewDigestFromEncoded(digest.SHA256, img.id).String(), Data: img.config, Digest: digest.FromBytes(img.config)},
		{Key: storage.ImageDigestManifestBigDataNamePrefix + "-" + manifestDigest.String(), Data: img.manifest, Digest: manifestDigest},
		{Key: storage.ImageDigestBigDataKey, Data: img.manifest, Digest: manifestDigest},
	}
	create := func() error {
		_, err := s.store.CreateImage(img.id, []string{name}, "", "", &storage.ImageOptions{BigData: data, Digest: manifestDigest})
		return err
	}
	err = create()
	if errors.Is(err, storage.ErrDuplicateName) { // of a pull that could not take it away
		s.abandon(name)
		err = create()
	}
	if !errors.Is(err, storage.ErrDuplicateID) {
		return err
	}
	for _, d := range data {
		have, err := s.store.ImageBigData(img.id, d.Key)
		if err == nil && string(have) == string(d.Data) {
			continue
		}
		if err := s.store.SetImageBigData(img.id, d.Key, d.Data, manifest.Digest); err != nil {
			return storeError(err)
		}
		s.forget(img.id)
	}
	return storeError(s.store.AddNames(img.id, []string{name}))
}

// blobLayers are the layers of an image that putImage made.
func (s *Service) blobLayers(id string, config []byte) ([]layer, error) {
	raw, err := s.store.ImageBigData(id, storage.ImageDigestBigDataKey)
	if err != nil {
		return nil, fmt.Errorf("manifest of image %s: %w", id, err)
	}
	m, err := manifest.FromBlob(raw, manifest.GuessMIMEType(raw))
	if err != nil {
		return nil, fmt.Errorf("manifest of image %s: %w: %w", id, err, errdefs.ErrDataLoss)
	}
	layers, err := manifestLayers(m, config)
	if err != nil {
		return nil, fmt.Errorf("manifest of image %s: %w: %w", id, err, errdefs.ErrDataLoss)
	}
	return layers, nil
}
