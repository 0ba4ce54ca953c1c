package imageservice

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/gzip"
	"github.com/vbatts/tar-split/tar/asm"
	tarsplit "github.com/vbatts/tar-split/tar/storage"
	"go.podman.io/storage"
	graphdriver "go.podman.io/storage/drivers"
	"go.podman.io/storage/pkg/archive"
	"golang.org/x/sys/unix"

	"github.com/crivm/crivm/imageservice/rootdisk"
)

const (
	diskSuffix = ".erofs"
	tempSuffix = ".tmp"
)

func (s *Service) diskPath(id string) string { return filepath.Join(s.config.DiskDir, id+diskSuffix) }

// Disk returns the path of an image's read-only root disk, an EROFS file system. It is built if it is
// missing or damaged; concurrent callers share one build. The file may be unlinked when the image is
// removed; who has it open keeps it.
func (s *Service) Disk(ctx context.Context, ref string) (string, error) {
	id, ok := imageID(ref)
	if !ok {
		return "", fmt.Errorf("image ID %q: %w", ref, errdefs.ErrInvalidArgument)
	}
	if _, _, err := s.find(id); err != nil {
		return "", err
	}
	return s.disk(ctx, id)
}

func (s *Service) disk(ctx context.Context, id string) (string, error) {
	if s.usable(ctx, id, false) == nil {
		return s.diskPath(id), nil
	}
	return s.disks.do(ctx, id, func(ctx context.Context) (string, error) {
		err := s.usable(ctx, id, true)
		if err == nil {
			return s.diskPath(id), nil
		}
		if !errors.Is(err, fs.ErrNotExist) {
			slog.Warn("rebuilding root disk", "image", id, "error", err)
		}
		if err := s.building.Acquire(ctx, 1); err != nil {
			return "", err
		}
		defer s.building.Release(1)
		start := time.Now()
		if err := s.buildDisk(ctx, id); err != nil {
			return "", fmt.Errorf("root disk of image %s: %w", id, diskError(err))
		}
		s.sumBuilt(id)
		slog.Info("built root disk", "image", id, "took", time.Since(start).Round(time.Millisecond))
		return s.diskPath(id), nil
	})
}

// diskUUID names the file system after its image.
func diskUUID(id string) (u [16]byte) {
	_, _ = hex.Decode(u[:], []byte(id)[:32])
	u[6] = u[6]&0x0f | 0x80 // RFC 9562, version 8
	u[8] = u[8]&0x3f | 0x80
	return u
}

func checkDisk(path, id string) (rootdisk.Info, error) {
	f, err := os.Open(path)
	if err != nil {
		return rootdisk.Info{}, err
	}
	defer f.Close()
	return rootdisk.Verify(f, diskUUID(id))
}

// buildDisk makes the disk under a temporary name and renames it when it is on stable storage.
func (s *Service) buildDisk(ctx context.Context, id string) (err error) {
	r, err := s.record(id)
	if err != nil {
		return err
	}
	f, err := os.CreateTemp(s.config.DiskDir, id+".*"+tempSuffix)
	if err != nil {
		return err
	}
	defer func() {
		err = errors.Join(err, f.Close())
		if err != nil {
			_ = os.Remove(f.Name())
		}
	}()
	if err := s.space.full(); err != nil {
		return err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer s.space.guard(cancel)()
	layers, stop := s.aheadLayers(ctx, r.layers)
	defer stop()
	if err := rootdisk.Build(ctx, f, diskUUID(id), layers); err != nil {
		if cause := context.Cause(ctx); errdefs.IsResourceExhausted(cause) {
			return cause
		}
		return err
	}
	if err := f.Chmod(0o644); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if err := os.Rename(f.Name(), s.diskPath(id)); err != nil {
		return err
	}
	if err := syncDir(s.config.DiskDir); err != nil {
		return err
	}
	// RemoveImage deletes the image first and then unlinks, so one of the two sees the other.
	if !s.store.Exists(id) {
		_ = s.removeDisk(id)
		return fmt.Errorf("image was removed: %w", errdefs.ErrNotFound)
	}
	return nil
}

// openLayer opens the tar stream of a layer that the image library has unpacked, put together from the unpacked files and what the store kept of
// the original stream (tar-split). Files are checked against it while they are read.
//
// The store has Diff for this, but Diff locks out every pull and removal until its stream is closed, here for
// as long as a disk build takes. A layer never changes and its image is not removed without the build being
// noticed, so the same is done here without the lock; Diff serves where the driver or the layer is not of
// the kind that every pull makes.
func (s *Service) openLayer(id string) (io.ReadCloser, error) {
	r, err := s.assembleLayer(id)
	if err == nil {
		return r, nil
	}
	if !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, errdefs.ErrNotImplemented) {
		return nil, fmt.Errorf("layer %s: %w", id, err)
	}
	plain := archive.Uncompressed
	if r, err = s.store.Diff("", id, &storage.DiffOptions{Compression: &plain}); err != nil {
		return nil, fmt.Errorf("layer %s: %w", id, storeError(err))
	}
	return r, nil
}

func (s *Service) assembleLayer(id string) (_ io.ReadCloser, err error) {
	driver, err := s.store.GraphDriver()
	if err != nil {
		return nil, err
	}
	getter, ok := driver.(graphdriver.DiffGetterDriver)
	if !ok {
		return nil, errdefs.ErrNotImplemented
	}
	l := &layerStream{}
	defer func() {
		if err != nil {
			err = errors.Join(err, l.Close())
		}
	}()
	split, err := os.Open(filepath.Join(s.store.GraphRoot(), s.store.GraphDriverName()+"-layers", id+".tar-split.gz"))
	if err != nil {
		return nil, err
	}
	l.closers = append(l.closers, split)
	plain, err := gzip.NewReader(split)
	if err != nil {
		return nil, err
	}
	files, err := getter.DiffGetter(id)
	if err != nil {
		return nil, err
	}
	l.closers = append(l.closers, files)
	// Closing the stream first ends the goroutine that reads the others.
	l.ReadCloser = asm.NewOutputTarStream(files, tarsplit.NewJSONUnpacker(plain))
	return l, nil
}

// layerStream is a layer's tar and what it is made from.
type layerStream struct {
	io.ReadCloser
	closers []io.Closer
}

func (l *layerStream) Close() error {
	var errs []error
	if l.ReadCloser != nil {
		errs = append(errs, l.ReadCloser.Close())
	}
	for _, c := range l.closers {
		errs = append(errs, c.Close())
	}
	return errors.Join(errs...)
}

func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// diskError gives a full disk its class.
func diskError(err error) error {
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		return fmt.Errorf("%w: %w", err, errdefs.ErrResourceExhausted)
	}
	return err
}
