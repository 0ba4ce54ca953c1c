package imageservice

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/trace"
	"go.podman.io/image/v5/copy"
	"go.podman.io/image/v5/docker"
	"go.podman.io/image/v5/docker/reference"
	"go.podman.io/image/v5/manifest"
	"go.podman.io/image/v5/pkg/sysregistriesv2"
	"go.podman.io/image/v5/signature"
	imagestorage "go.podman.io/image/v5/storage"
	"go.podman.io/image/v5/types"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// tracer makes the spans of pulls; they go nowhere unless cmd/crivm has configured a collector.
var tracer = otel.Tracer("github.com/crivm/crivm/imageservice")

// PullImage pulls an image and builds its root disk. Calls with the same reference and the same credentials
// share one pull, which ends when the last of their contexts does. Changes of the configuration files count
// from the next pull on.
//
// Errors that kubelet tells apart by their first word are gRPC statuses already: see pullError.
func (s *Service) PullImage(ctx context.Context, req *cri.PullImageRequest) (*cri.PullImageResponse, error) {
	ref := req.GetImage().GetImage()
	if ref == "" {
		return nil, fmt.Errorf("empty image reference: %w", errdefs.ErrInvalidArgument)
	}
	if handler := req.GetImage().GetRuntimeHandler(); handler != "" && !slices.Contains(s.config.Handlers, handler) {
		return nil, fmt.Errorf("image.runtime_handler: %q is not configured: %w", handler, errdefs.ErrInvalidArgument)
	}
	creds, err := parseAuth(req.GetAuth())
	if err != nil {
		return nil, fmt.Errorf("pull %q: %w", ref, err)
	}
	caller := trace.SpanContextFromContext(ctx)
	id, err := s.pulls.do(ctx, ref+"\x00"+creds.key(), func(ctx context.Context) (string, error) {
		ctx = trace.ContextWithSpanContext(ctx, caller) // spans of work that is shared belong to who began it
		start := time.Now()
		id, err := s.pull(ctx, ref, creds)
		s.figures.ended(ctx, err, time.Since(start))
		return id, err
	})
	if ctxErr := ctx.Err(); err != nil && ctxErr != nil {
		return nil, fmt.Errorf("pull %q: %w", ref, ctxErr)
	}
	if err != nil {
		return nil, pullError(ref, err, creds)
	}
	return &cri.PullImageResponse{ImageRef: "sha256:" + id}, nil
}

// pull tries the names that ref may mean, and sweeps after a failure.
func (s *Service) pull(ctx context.Context, ref string, creds credentials) (id string, err error) {
	if _, err := sysregistriesv2.TryUpdatingCache(s.system()); err != nil {
		return "", fmt.Errorf("registries configuration: %w", err)
	}
	candidates, err := s.candidates(ref)
	if err != nil {
		return "", err
	}
	defer func() {
		if err != nil {
			if sweepErr := s.sweepLayers(); sweepErr != nil {
				slog.Warn("layers of a failed pull could not be removed", "error", sweepErr)
			}
		}
	}()
	s.pulling.RLock()
	defer s.pulling.RUnlock()
	var errs []error
	for _, c := range candidates {
		id, err = s.pullName(ctx, c.named, creds)
		if err == nil {
			if c.record != nil {
				if err := c.record(); err != nil {
					slog.Warn("short-name alias could not be recorded", "error", err)
				}
			}
			return id, nil
		}
		errs = append(errs, err)
		if ctx.Err() != nil {
			break
		}
	}
	return "", errors.Join(errs...)
}

// pullName pulls one name, again if another image's removal took layers that this pull had counted on, or if
// the image was in the store already but is damaged there.
func (s *Service) pullName(ctx context.Context, named reference.Named, creds credentials) (string, error) {
	const attempts = 3
	for i := 1; ; i++ {
		removals := s.removals.Load()
		id, err := s.pullOnce(ctx, named, creds)
		if err == nil || i == attempts || ctx.Err() != nil {
			return id, err
		}
		var damaged *damagedError
		switch {
		case errors.As(err, &damaged):
			slog.Warn("image is damaged and pulled anew", "image", damaged.id, "error", damaged.err)
			if err := s.deleteImage(damaged.id); err != nil {
				return "", err
			}
		case removals == s.removals.Load() || !missing(err):
			return "", err
		}
	}
}

// damagedError says that no disk can be made of an image that was pulled before: its layers are damaged.
type damagedError struct {
	id  string
	err error
}

func (e *damagedError) Error() string { return e.err.Error() }
func (e *damagedError) Unwrap() error { return e.err }

// missing tells whether a pull may have failed since something in the store was removed.
func missing(err error) bool {
	return isGone(err) || errors.Is(err, errdefs.ErrNotFound) || errors.Is(err, fs.ErrNotExist)
}

// pullOnce brings an image into the store under a name of its own, builds its disk, and then gives it its
// real names in one step.
func (s *Service) pullOnce(ctx context.Context, named reference.Named, creds credentials) (_ string, err error) {
	p := &pullState{ref: named.String(), started: time.Now()}
	slot := s.takeSlot(p)
	defer s.freeSlot(slot)
	defer p.report()()
	temp, err := pullingName(slot)
	if err != nil {
		return "", err
	}
	defer func() {
		if err != nil {
			s.abandon(temp.String())
		}
	}()
	_, span := tracer.Start(ctx, "fetch and store")
	digests, err := s.fetchImage(ctx, named, temp, creds, p)
	span.End()
	if err != nil {
		return "", err
	}
	img, err := s.store.Image(temp.String())
	if err != nil {
		return "", storeError(err)
	}
	r, err := s.record(img.ID)
	if err != nil {
		return "", err
	}
	if a := r.config.Architecture; a != "" && a != s.system().ArchitectureChoice {
		slog.Warn("image is for another architecture", "image", named.String(), "architecture", a)
	}
	copied := time.Now()
	p.building.Store(true)
	_, span = tracer.Start(ctx, "root disk")
	_, err = s.disk(ctx, img.ID)
	span.End()
	if err != nil {
		if ctx.Err() == nil && !errdefs.IsResourceExhausted(err) && !errdefs.IsNotFound(err) && !isGone(err) {
			if dropped := s.dropDamaged(ctx, r.layers); dropped || len(permanent(img.Names)) > 0 {
				err = &damagedError{img.ID, err}
			}
		}
		return "", err
	}
	names := []string{named.String()}
	for _, d := range digests {
		canonical, err := reference.WithDigest(reference.TrimNamed(named), d)
		if err != nil {
			return "", err
		}
		names = append(names, canonical.String())
	}
	if err := s.rename(img.ID, temp.String(), names); err != nil {
		return "", err
	}
	slog.Info("pulled image", "image", named.String(), "id", img.ID, "copy", copied.Sub(p.started).Round(time.Millisecond),
		"disk", time.Since(copied).Round(time.Millisecond))
	return img.ID, nil
}

// pullingName is the name of an image while it is pulled. The store remembers all names an image ever had,
// so there are no more of them than pulls at a time.
func pullingName(slot int) (reference.Named, error) {
	return reference.ParseNormalizedNamed(fmt.Sprintf("%s:%d", pullingRepository, slot))
}

func (s *Service) takeSlot(p *pullState) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	slot := 0
	for s.slots[slot] != nil {
		slot++
	}
	s.slots[slot] = p
	return slot
}

func (s *Service) freeSlot(slot int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.slots, slot)
}

// rename gives an image real names and takes the name of its pull away; an image that had one of them loses
// it. Each step is atomic in the store, since copies under way name their images too.
func (s *Service) rename(id, temp string, names []string) error {
	if err := s.store.AddNames(id, names); err != nil {
		return storeError(err)
	}
	return storeError(s.store.RemoveNames(id, []string{temp}))
}

// abandon takes the name of a failed pull away, and the image if it has no other. Should another pull be
// about to name it, that pull finds it removed and tries again.
func (s *Service) abandon(temp string) {
	img, err := s.store.Image(temp)
	if err != nil && isGone(err) {
		return
	}
	if err == nil {
		if len(img.Names) == 1 {
			err = s.deleteImage(img.ID)
		} else {
			err = s.store.RemoveNames(img.ID, []string{temp})
		}
	}
	if err != nil {
		slog.Warn("image of a failed pull could not be removed; the next start does it", "error", err)
	}
}

// fetchImage brings an image from its registry into the store, under the name temp, and returns the digests of what its
// name stood for: index and manifest, or manifest alone.
func (s *Service) fetchImage(ctx context.Context, named, temp reference.Named, creds credentials, p *pullState) (_ []digest.Digest, err error) {
	if err := s.space.check(0); err != nil { // before the registry is bothered; each blob is checked when it begins
		return nil, err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer s.space.guard(cancel)()
	defer func() {
		if cause := context.Cause(ctx); err != nil && errdefs.IsResourceExhausted(cause) {
			err = cause
		} else if err != nil && cause == errStalled {
			err = fmt.Errorf("%w for %v: %w", errStalled, s.config.PullProgressTimeout, errdefs.ErrUnavailable)
		}
	}()
	policy, err := s.policy()
	if err != nil {
		return nil, err
	}
	defer policy.Destroy()
	from, err := docker.NewReference(named)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	sys := s.system()
	creds.apply(sys, reference.Domain(named))
	stop := p.watch(cancel, s.config.PullProgressTimeout)
	defer func() { stop() }()
	opening, err := from.NewImageSource(ctx, sys)
	if err != nil {
		return nil, err
	}
	source := newSharedSource(opening)
	defer source.release()
	top, kind, err := source.GetManifest(ctx, nil)
	if err != nil {
		return nil, err
	}
	instance, err := s.fetchUsual(ctx, policy, source, top, kind, temp.String(), p)
	if errors.Is(err, errUnusual) {
		slog.Debug("image is left to the image library", "image", named.String(), "why", err)
		stop()
		stop = func() {}
		instance, err = s.copyImage(ctx, cancel, policy, opened{from, opening}, temp, sys, p)
	}
	if err != nil {
		return nil, err
	}
	var digests []digest.Digest
	for _, m := range [][]byte{top, instance} {
		d, err := manifest.Digest(m)
		if err != nil {
			return nil, err
		}
		if !slices.Contains(digests, d) {
			digests = append(digests, d)
		}
	}
	return digests, nil
}

// fetchUsual fetches what an image of the usual kind lacks and puts it into the store; returns its manifest. errUnusual
// when nothing was done, or layers are compressed in a way that only the library knows.
func (s *Service) fetchUsual(ctx context.Context, policy *signature.PolicyContext, source *sharedSource, top []byte, kind, name string, p *pullState) ([]byte, error) {
	img, err := s.usualOf(ctx, policy, source.ImageSource, top, kind)
	if err != nil {
		return nil, err
	}
	if have, err := s.store.Image(img.id); err == nil && have.TopLayer != "" { // unpacked by the library once
		return nil, errUnusual
	}
	var blobs []digest.Digest
	for _, l := range img.layers {
		blobs = append(blobs, l.blob)
	}
	defer s.holdBlobs(blobs)()
	p.expect(img.layers)
	if err := s.fetchLayers(ctx, source, img.layers, p); err != nil {
		return nil, err
	}
	return img.manifest, s.putImage(img, name)
}

// opened is a reference of which the source is open already. The copy then reads the very manifest that
// was looked at here, and the registry is asked once.
type opened struct {
	types.ImageReference
	source types.ImageSource
}

func (o opened) NewImageSource(context.Context, *types.SystemContext) (types.ImageSource, error) {
	return o.source, nil
}

// copyImage has the image library copy an image, of whatever kind, into the store under a name; returns its manifest there.
func (s *Service) copyImage(ctx context.Context, cancel context.CancelCauseFunc, policy *signature.PolicyContext, from opened, temp reference.Named, sys *types.SystemContext, p *pullState) ([]byte, error) {
	blobs := incoming{space: s.space, bytes: s.figures.pulled}
	defer blobs.end()
	events, stop := watchProgress(cancel, s.config.PullProgressTimeout, func(e types.ProgressProperties) error {
		p.note(e)
		return blobs.note(e)
	})
	defer stop()
	to, err := imagestorage.Transport.NewStoreReference(s.store, temp, "")
	if err != nil {
		return nil, err
	}
	return copy.Image(ctx, policy, to, from, &copy.Options{
		SourceCtx:            sys,
		DestinationCtx:       sys,
		Progress:             events,
		ProgressInterval:     progressInterval,
		MaxParallelDownloads: s.config.MaxParallelDownloads,
	})
}

// policy loads the signature policy. On a machine without any policy file every image is accepted, as by
// other runtimes there, with a warning.
func (s *Service) policy() (*signature.PolicyContext, error) {
	policy, err := signature.DefaultPolicy(s.system())
	if errors.Is(err, fs.ErrNotExist) && s.config.SignaturePolicy == "" {
		s.warnPolicy.Do(func() {
			slog.Warn("no containers-policy.json(5) on this machine: images are accepted without signatures", "error", err)
		})
		policy = &signature.Policy{Default: signature.PolicyRequirements{signature.NewPRInsecureAcceptAnything()}}
	} else if err != nil {
		return nil, fmt.Errorf("signature policy: %w", err)
	}
	return signature.NewPolicyContext(policy)
}
