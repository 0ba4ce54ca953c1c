// Package registry serves container images over HTTP on loopback, for tests and the demo: a real registry
// protocol server, kept in memory, that tests can make fail in the ways real ones do.
package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/remote"
)

// RefAnnotation names an image in an OCI layout: its reference, such as
// docker.io/library/busybox:latest.
const RefAnnotation = "org.opencontainers.image.ref.name"

const stopLimit = 5 * time.Second

// Registry is a running server.
type Registry struct {
	server   *http.Server
	listener net.Listener
	served   chan error

	mu        sync.Mutex
	intercept func(http.ResponseWriter, *http.Request) bool
	requests  []string
}

// Serve starts a registry on a free port of 127.0.0.1 with the images of an OCI layout. An image annotated
// docker.io/library/busybox:latest is served as docker.io/library/busybox, for mirrors whose location
// ends in the name of the registry they mirror, and as library/busybox. dir "" starts it empty.
func Serve(dir string) (_ *Registry, err error) {
	r := &Registry{served: make(chan error, 1)}
	if r.listener, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
		return nil, err
	}
	handler := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	r.server = &http.Server{ReadHeaderTimeout: 10 * time.Second, Handler: http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		r.mu.Lock()
		r.requests = append(r.requests, req.Method+" "+req.URL.Path)
		intercept := r.intercept
		r.mu.Unlock()
		if intercept == nil || !intercept(w, req) {
			handler.ServeHTTP(w, req)
		}
	})}
	go func() { r.served <- r.server.Serve(r.listener) }()
	if dir == "" {
		return r, nil
	}
	if err := r.load(dir); err != nil {
		return nil, errors.Join(fmt.Errorf("images of %s: %w", dir, err), r.Close())
	}
	r.mu.Lock()
	r.requests = nil
	r.mu.Unlock()
	return r, nil
}

// Addr is host:port.
func (r *Registry) Addr() string { return r.listener.Addr().String() }

// Close stops the server and breaks what it is still sending.
func (r *Registry) Close() error {
	ctx, cancel := context.WithTimeout(context.Background(), stopLimit)
	defer cancel()
	err := r.server.Shutdown(ctx)
	if err != nil {
		err = r.server.Close() // a client holds a connection; tests of slow registries do so on purpose
	}
	if served := <-r.served; !errors.Is(served, http.ErrServerClosed) {
		err = errors.Join(err, served)
	}
	return err
}

// Intercept lets f see every request first; when it returns true it has answered. nil ends that.
func (r *Registry) Intercept(f func(http.ResponseWriter, *http.Request) bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.intercept = f
}

// Requests lists what was asked since the start or the last call, as "GET /v2/...".
func (r *Registry) Requests() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	requests := r.requests
	r.requests = nil
	return requests
}

// Push adds an image (v1.Image or v1.ImageIndex) under a repository and tag of this registry, such as
// library/busybox:latest.
func (r *Registry) Push(repository string, image remote.Taggable) error {
	tag, err := name.NewTag(r.Addr()+"/"+repository, name.Insecure)
	if err != nil {
		return err
	}
	switch i := image.(type) {
	case v1.ImageIndex:
		return remote.WriteIndex(tag, i)
	case v1.Image:
		return remote.Write(tag, i)
	}
	return fmt.Errorf("%s: cannot push a %T", repository, image)
}

func (r *Registry) load(dir string) error {
	path, err := layout.FromPath(dir)
	if err != nil {
		return err
	}
	index, err := path.ImageIndex()
	if err != nil {
		return err
	}
	manifest, err := index.IndexManifest()
	if err != nil {
		return err
	}
	for _, d := range manifest.Manifests {
		reference := d.Annotations[RefAnnotation]
		if reference == "" {
			continue
		}
		var image remote.Taggable
		if d.MediaType.IsIndex() {
			image, err = index.ImageIndex(d.Digest)
		} else {
			image, err = index.Image(d.Digest)
		}
		if err != nil {
			return fmt.Errorf("%s: %w", reference, err)
		}
		_, short, _ := strings.Cut(reference, "/")
		for _, repository := range []string{reference, short} {
			if err := r.Push(repository, image); err != nil {
				return fmt.Errorf("%s: %w", reference, err)
			}
		}
	}
	return nil
}

// Pull gives an image of this registry.
func (r *Registry) Pull(repository string) (v1.Image, error) {
	tag, err := name.NewTag(r.Addr()+"/"+repository, name.Insecure)
	if err != nil {
		return nil, err
	}
	return remote.Image(tag)
}
