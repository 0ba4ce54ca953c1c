package imageservice

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func isBlob(r *http.Request) bool {
	return r.Method == http.MethodGet && strings.Contains(r.URL.Path, "/blobs/")
}

func checkUnavailable(t *testing.T, err error) {
	t.Helper()
	if st, _ := status.FromError(err); err == nil || st.Code() != codes.Unknown || !strings.HasPrefix(st.Message(), "RegistryUnavailable: ") {
		t.Errorf("error %v, want RegistryUnavailable with code Unknown", err)
	}
}

func TestRegistryUnavailable(t *testing.T) {
	reg := newRegistry(t, false)
	ref := reg.push(t, "app:1", simpleImage(t, "app"))
	s := newService(t, func(c *Config) { write(t, c.RegistriesConf, insecure(reg)) })
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed.Close()
	t.Run("connection refused", func(t *testing.T) {
		_, err := tryPull(context.Background(), s, closed.Addr().String()+"/app:1", nil)
		checkUnavailable(t, err)
	})
	t.Run("unknown host", func(t *testing.T) {
		_, err := tryPull(context.Background(), s, "no-such-host.invalid/app:1", nil)
		checkUnavailable(t, err)
	})
	for _, code := range []int{500, 502, 503, 429} {
		t.Run(fmt.Sprint(code), func(t *testing.T) {
			reg.intercept(func(w http.ResponseWriter, r *http.Request, next http.Handler) {
				w.Header().Set("Retry-After", "0")
				http.Error(w, "broken", code)
			})
			defer reg.intercept(nil)
			_, err := tryPull(context.Background(), s, ref, nil)
			checkUnavailable(t, err)
		})
	}
	t.Run("blob 500", func(t *testing.T) {
		reg.intercept(func(w http.ResponseWriter, r *http.Request, next http.Handler) {
			if isBlob(r) {
				http.Error(w, "broken", 500)
				return
			}
			next.ServeHTTP(w, r)
		})
		defer reg.intercept(nil)
		_, err := tryPull(context.Background(), s, ref, nil)
		checkUnavailable(t, err)
	})
	t.Run("connection cut in a blob", func(t *testing.T) {
		reg.intercept(func(w http.ResponseWriter, r *http.Request, next http.Handler) {
			if isBlob(r) {
				w.Header().Set("Content-Length", "1000000")
				_, _ = io.WriteString(w, "some of it")
				panic(http.ErrAbortHandler)
			}
			next.ServeHTTP(w, r)
		})
		defer reg.intercept(nil)
		_, err := tryPull(context.Background(), s, ref, nil)
		checkUnavailable(t, err)
	})
	checkEmpty(t, s)
	pull(t, s, ref) // and all is well when the registry is
}

func TestPullNotFound(t *testing.T) {
	reg := newRegistry(t, false)
	ref := reg.push(t, "app:1", simpleImage(t, "app"))
	s := newService(t, func(c *Config) { write(t, c.RegistriesConf, insecure(reg)) })
	for _, missing := range []string{reg.host + "/app:2", reg.host + "/other:1"} {
		if _, err := tryPull(context.Background(), s, missing, nil); !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), missing) {
			t.Errorf("pull of %s: %v, want not found with the reference", missing, err)
		}
	}
	reg.intercept(func(w http.ResponseWriter, r *http.Request, next http.Handler) {
		http.Error(w, `{"errors":[{"code":"DENIED","message":"requested access to the resource is denied"}]}`, http.StatusForbidden)
	})
	if _, err := tryPull(context.Background(), s, ref, nil); !errdefs.IsPermissionDenied(err) {
		t.Errorf("error %v, want permission denied", err)
	}
}

// TestBrokenDigest: bytes that are not what their digest says are refused, in a layer, in the
// configuration and in a manifest, and nothing stays, not even the good layers.
func TestBrokenDigest(t *testing.T) {
	sequential(t)
	img, err := random.Image(20000, 3)
	if err != nil {
		t.Fatal(err)
	}
	layers, err := img.Layers()
	if err != nil {
		t.Fatal(err)
	}
	last, err := layers[2].Digest()
	if err != nil {
		t.Fatal(err)
	}
	rc, err := layers[1].Compressed()
	if err != nil {
		t.Fatal(err)
	}
	swap, err := io.ReadAll(rc)
	if err := errors.Join(err, rc.Close()); err != nil {
		t.Fatal(err)
	}
	for name, broken := range map[string]string{
		"layer":    "/blobs/" + last.String(),
		"config":   "/blobs/" + configDigest(t, img),
		"manifest": "/manifests/" + manifestDigest(t, img),
		"swapped":  "/blobs/" + last.String(), // another layer, itself in order
	} {
		t.Run(name, func(t *testing.T) {
			reg := newRegistry(t, false)
			s := newService(t, func(c *Config) { write(t, c.RegistriesConf, insecure(reg)) })
			ref := reg.push(t, "app:1", img)
			if name == "manifest" {
				ref = reg.host + "/app@" + manifestDigest(t, img)
			}
			var hits atomic.Int64
			reg.intercept(func(w http.ResponseWriter, r *http.Request, next http.Handler) {
				if r.Method != http.MethodGet || !strings.HasSuffix(r.URL.Path, broken) {
					next.ServeHTTP(w, r)
					return
				}
				hits.Add(1)
				rec := &recorder{header: http.Header{}}
				next.ServeHTTP(rec, r)
				body := rec.body.Bytes()
				body[len(body)/2] ^= 1
				if name == "swapped" {
					body = swap
				}
				w.Header().Set("Content-Type", rec.header.Get("Content-Type"))
				_, _ = w.Write(body)
			})
			_, err := tryPull(context.Background(), s, ref, nil)
			if err == nil {
				t.Error("broken bytes were accepted")
			}
			if hits.Load() == 0 {
				t.Error("the broken bytes were not asked for")
			}
			t.Log(err)
			checkEmpty(t, s)
			reg.intercept(nil)
			pull(t, s, ref)
		})
	}
}

type recorder struct {
	header http.Header
	body   bytes.Buffer
}

func (r *recorder) Header() http.Header         { return r.header }
func (r *recorder) WriteHeader(int)             {}
func (r *recorder) Write(b []byte) (int, error) { return r.body.Write(b) }

// TestBrokenLayers: layers that are what their digest says but cannot be unpacked.
func TestBrokenLayers(t *testing.T) {
	sequential(t)
	reg := newRegistry(t, false)
	s := newService(t, func(c *Config) { write(t, c.RegistriesConf, insecure(reg)) })
	garbage := newImage(t, nil, tarLayer(t, map[string]string{"good": "file"}), rawLayer(t, bytes.Repeat([]byte("not a tar"), 1000)))
	if _, err := tryPull(context.Background(), s, reg.push(t, "garbage:1", garbage), nil); err == nil {
		t.Error("garbage was accepted as a layer")
	}
	checkEmpty(t, s)
}

// TestRedirect: blobs come from another server, and its signed URL stays out of errors.
func TestRedirect(t *testing.T) {
	sequential(t)
	reg, store := newRegistry(t, false), newRegistry(t, false)
	img := simpleImage(t, "redirected")
	ref := reg.push(t, "app:1", img)
	store.push(t, "app:1", img)
	reg.intercept(func(w http.ResponseWriter, r *http.Request, next http.Handler) {
		if isBlob(r) {
			http.Redirect(w, r, store.server.URL+r.URL.Path+"?X-Signature=very-secret-signature", http.StatusTemporaryRedirect)
			return
		}
		next.ServeHTTP(w, r)
	})
	s := newService(t, func(c *Config) { write(t, c.RegistriesConf, insecure(reg)) })
	store.intercept(func(w http.ResponseWriter, r *http.Request, next http.Handler) { panic(http.ErrAbortHandler) })
	_, err := tryPull(context.Background(), s, ref, nil)
	if err == nil || strings.Contains(err.Error(), "very-secret") {
		t.Errorf("error %v, want one without the signature", err)
	}
	checkEmpty(t, s)
	store.intercept(nil)
	pull(t, s, ref)
}

// hang makes a registry never end an answer, after some bytes, until the test ends or the client leaves.
func hang(t testing.TB, reg *testRegistry, what func(*http.Request) bool) (reached chan struct{}) {
	t.Helper()
	reached = make(chan struct{})
	release := make(chan struct{})
	t.Cleanup(func() { close(release) })
	var once sync.Once
	reg.intercept(func(w http.ResponseWriter, r *http.Request, next http.Handler) {
		if !what(r) {
			next.ServeHTTP(w, r)
			return
		}
		if r.URL.Path != "/v2/" { // of a ping, the header is all that counts
			w.Header().Set("Content-Length", "100000000")
			_, _ = io.WriteString(w, "some bytes")
			w.(http.Flusher).Flush()
		}
		once.Do(func() { close(reached) })
		select {
		case <-release:
		case <-r.Context().Done():
		}
	})
	return reached
}

func TestStalledPull(t *testing.T) {
	for name, what := range map[string]func(*http.Request) bool{
		"blob":     isBlob,
		"manifest": func(r *http.Request) bool { return strings.Contains(r.URL.Path, "/manifests/") },
		"ping":     func(r *http.Request) bool { return r.URL.Path == "/v2/" },
	} {
		t.Run(name, func(t *testing.T) {
			reg := newRegistry(t, false)
			ref := reg.push(t, "app:1", simpleImage(t, "app"))
			s := newService(t, func(c *Config) {
				write(t, c.RegistriesConf, insecure(reg))
				c.PullProgressTimeout = 300 * time.Millisecond
			})
			hang(t, reg, what)
			start := time.Now()
			_, err := tryPull(context.Background(), s, ref, nil)
			checkUnavailable(t, err)
			if err != nil && !strings.Contains(err.Error(), "no data from the registry for 300ms") {
				t.Errorf("error %v does not say that the registry stalled", err)
			}
			if took := time.Since(start); took > 10*time.Second {
				t.Errorf("took %v", took)
			}
			checkEmpty(t, s)
		})
	}
}

// TestSlowPull: a registry that keeps sending, if slowly, is not stalled.
func TestSlowPull(t *testing.T) {
	reg := newRegistry(t, false)
	img, err := random.Image(20000, 1)
	if err != nil {
		t.Fatal(err)
	}
	ref := reg.push(t, "app:1", img)
	const timeout = 1500 * time.Millisecond
	s := newService(t, func(c *Config) {
		write(t, c.RegistriesConf, insecure(reg))
		c.PullProgressTimeout = timeout
	})
	reg.intercept(func(w http.ResponseWriter, r *http.Request, next http.Handler) {
		if !isBlob(r) {
			next.ServeHTTP(w, r)
			return
		}
		rec := &recorder{header: http.Header{}}
		next.ServeHTTP(rec, r)
		body := rec.body.Bytes()
		w.Header().Set("Content-Length", fmt.Sprint(len(body)))
		for len(body) > 0 {
			n := min(len(body), 1000)
			_, _ = w.Write(body[:n])
			w.(http.Flusher).Flush()
			body = body[n:]
			time.Sleep(timeout / 10)
		}
	})
	start := time.Now()
	pull(t, s, ref)
	if took := time.Since(start); took < timeout*3/2 {
		t.Errorf("took %v; the registry was not slow enough for this test", took)
	}
}

func TestCancelledPull(t *testing.T) {
	reg := newRegistry(t, false)
	ref := reg.push(t, "app:1", simpleImage(t, "app"))
	s := newService(t, func(c *Config) { write(t, c.RegistriesConf, insecure(reg)) })
	reached := hang(t, reg, isBlob)
	ctx, cancel := context.WithCancel(context.Background())
	result := make(chan error, 1)
	go func() {
		_, err := tryPull(ctx, s, ref, nil)
		result <- err
	}()
	<-reached
	cancel()
	start := time.Now()
	if err := <-result; !errors.Is(err, context.Canceled) {
		t.Errorf("error %v, want context.Canceled", err)
	}
	if took := time.Since(start); took > time.Second {
		t.Errorf("returned %v after the cancellation", took)
	}
	s.pulls.wait()
	checkEmpty(t, s)

	ctx, cancel = context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	if _, err := tryPull(ctx, s, ref, nil); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("error %v, want context.DeadlineExceeded", err)
	}
	s.pulls.wait()
	checkEmpty(t, s)
}

// TestSamePullsShare: one pull for equal calls, another for other credentials.
func TestSamePullsShare(t *testing.T) {
	reg := newRegistry(t, false)
	ref := reg.push(t, "app:1", simpleImage(t, "app"))
	s := newService(t, func(c *Config) { write(t, c.RegistriesConf, insecure(reg)) })
	var manifests atomic.Int64
	release := make(chan struct{})
	reg.intercept(func(w http.ResponseWriter, r *http.Request, next http.Handler) {
		if strings.Contains(r.URL.Path, "/manifests/") {
			manifests.Add(1)
			<-release
		}
		next.ServeHTTP(w, r)
	})
	auths := []*cri.AuthConfig{nil, nil, nil, {Username: "u", Password: "p"}, {Username: "u", Password: "p"}, {Username: "u", Password: "q"}}
	results := make(chan error, len(auths))
	for _, auth := range auths {
		go func() {
			_, err := tryPull(context.Background(), s, ref, auth)
			results <- err
		}()
	}
	waitUntil(t, "all pulls wait", func() bool {
		s.pulls.mu.Lock()
		defer s.pulls.mu.Unlock()
		n := 0
		for _, f := range s.pulls.running {
			n += f.waiting
		}
		return n == len(auths) && manifests.Load() == 3
	})
	close(release)
	for range auths {
		if err := <-results; err != nil {
			t.Error(err)
		}
	}
	if n := manifests.Load(); n != 3 {
		t.Errorf("%d requests for the manifest, want one for each kind of credentials", n)
	}
}

func waitUntil(t *testing.T, what string, cond func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !cond(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not reached within 20 s: %s", what)
		}
	}
}

// TestNoSpace: each step that can run out of disk says so and leaves nothing.
func TestNoSpace(t *testing.T) {
	sequential(t)
	if os.Geteuid() != 0 {
		t.Skip("mounting a small file system needs root")
	}
	reg := newRegistry(t, false)
	img, err := random.Image(6<<20, 1)
	if err != nil {
		t.Fatal(err)
	}
	ref := reg.push(t, "large:1", img)
	for name, sizes := range map[string]struct {
		root, disks string
		library     bool
	}{
		"download": {"4m", "64m", false},
		"unpack":   {"10m", "64m", true},
		"disk":     {"64m", "2m", false},
	} {
		t.Run(name, func(t *testing.T) {
			// Two file systems: one for layers, one for disks.
			base := t.TempDir()
			for dir, size := range map[string]string{"root": sizes.root, "disks": sizes.disks} {
				mountTmpfs(t, filepath.Join(base, dir), size)
			}
			s := newService(t, func(c *Config) {
				write(t, c.RegistriesConf, insecure(reg))
				c.Root, c.DiskDir = filepath.Join(base, "root", "r"), filepath.Join(base, "disks", "d")
			})
			if s.library = sizes.library; !s.library {
				_, err := tryPull(context.Background(), s, ref, nil)
				if !errdefs.IsResourceExhausted(err) || !strings.Contains(err.Error(), "needed at least") {
					t.Errorf("error %v, want one of the admission", err)
				}
				checkEmpty(t, s)
			}
			s.space.room = endless // as if others had taken the space meanwhile
			_, err := tryPull(context.Background(), s, ref, nil)
			if !errdefs.IsResourceExhausted(err) {
				t.Errorf("error %v, want resource exhausted", err)
			}
			checkEmpty(t, s)
			small := reg.push(t, "small:1", simpleImage(t, "small"))
			pull(t, s, small)
			remove(t, s, small)
			checkEmpty(t, s)
		})
	}
}

func mountTmpfs(t testing.TB, dir, size string) {
	t.Helper()
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size="+size); err != nil {
		t.Skipf("cannot mount a tmpfs here: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
}
