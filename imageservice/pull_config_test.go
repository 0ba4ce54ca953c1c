package imageservice

import (
	"context"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Credentials of the tests' registries.
const (
	testUser     = "alice"
	testPassword = "correct-horse-battery"
)

// basicAuth makes a registry ask for the credentials.
func basicAuth(w http.ResponseWriter, r *http.Request, next http.Handler) {
	user, password, _ := r.BasicAuth()
	if user != testUser || password != testPassword {
		w.Header().Set("WWW-Authenticate", `Basic realm="test"`)
		http.Error(w, `{"errors":[{"code":"UNAUTHORIZED","message":"authentication required"}]}`, http.StatusUnauthorized)
		return
	}
	next.ServeHTTP(w, r)
}

func TestAuth(t *testing.T) {
	sequential(t)
	reg := newRegistry(t, false)
	ref := reg.push(t, "private:1", simpleImage(t, "private"))
	reg.intercept(basicAuth)
	b64 := base64.StdEncoding.EncodeToString([]byte(testUser + ":" + testPassword))
	tests := []struct {
		name     string
		auth     *cri.AuthConfig
		authFile string
		ok       bool
	}{
		{"none", nil, "{}", false},
		{"password", &cri.AuthConfig{Username: testUser, Password: testPassword}, "{}", true},
		{"auth", &cri.AuthConfig{Auth: b64}, "{}", true},
		{"wrong password", &cri.AuthConfig{Username: testUser, Password: "wrong-and-secret"}, "{}", false},
		{"auth file", nil, fmt.Sprintf(`{"auths":{%q:{"auth":%q}}}`, reg.host, b64), true},
		{"given ones come first", &cri.AuthConfig{Username: testUser, Password: testPassword}, fmt.Sprintf(`{"auths":{%q:{"auth":"eDp5"}}}`, reg.host), true},
		{"for this server", &cri.AuthConfig{Username: testUser, Password: testPassword, ServerAddress: "http://" + reg.host + "/v2/"}, "{}", true},
		{"for another server", &cri.AuthConfig{Username: testUser, Password: testPassword, ServerAddress: "elsewhere.example"}, "{}", false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := newService(t, func(c *Config) {
				write(t, c.RegistriesConf, insecure(reg))
				write(t, c.AuthFile, tt.authFile)
			})
			_, err := tryPull(context.Background(), s, ref, tt.auth)
			if tt.ok != (err == nil) {
				t.Fatalf("pull: %v", err)
			}
			if err == nil {
				return
			}
			if !errdefs.IsUnauthorized(err) {
				t.Errorf("error %v, want unauthenticated", err)
			}
			checkNoSecrets(t, err, tt.auth)
			checkEmpty(t, s)
		})
	}
	t.Run("bad base64", func(t *testing.T) {
		s := newService(t, nil)
		auth := &cri.AuthConfig{Auth: "secret+not+base64"}
		_, err := tryPull(context.Background(), s, ref, auth)
		if !errdefs.IsInvalidArgument(err) {
			t.Errorf("error %v, want invalid argument", err)
		}
		checkNoSecrets(t, err, auth)
	})
}

func checkNoSecrets(t *testing.T, err error, a *cri.AuthConfig) {
	t.Helper()
	for _, secret := range []string{a.GetPassword(), a.GetAuth(), a.GetIdentityToken(), a.GetRegistryToken()} {
		if secret != "" && strings.Contains(err.Error(), secret) {
			t.Errorf("error holds a secret: %v", err)
		}
	}
}

// TestTokens: bearer tokens, given outright or fetched from a token server with an identity token.
func TestTokens(t *testing.T) {
	sequential(t)
	const bearer, identity = "bearer-token-1234", "identity-token-5678"
	reg := newRegistry(t, false)
	ref := reg.push(t, "token:1", simpleImage(t, "token"))
	reg.intercept(func(w http.ResponseWriter, r *http.Request, next http.Handler) {
		if r.URL.Path == "/token" {
			if r.FormValue("grant_type") != "refresh_token" || r.FormValue("refresh_token") != identity {
				http.Error(w, `{"errors":[{"code":"UNAUTHORIZED"}]}`, http.StatusUnauthorized)
				return
			}
			fmt.Fprintf(w, `{"access_token":%q}`, bearer)
			return
		}
		if r.Header.Get("Authorization") != "Bearer "+bearer {
			w.Header().Set("WWW-Authenticate", `Bearer realm="http://`+reg.host+`/token",service="test"`)
			http.Error(w, `{"errors":[{"code":"UNAUTHORIZED","message":"authentication required"}]}`, http.StatusUnauthorized)
			return
		}
		next.ServeHTTP(w, r)
	})
	for _, tt := range []struct {
		name string
		auth *cri.AuthConfig
		ok   bool
	}{
		{"registry token", &cri.AuthConfig{RegistryToken: bearer}, true},
		{"identity token", &cri.AuthConfig{IdentityToken: identity}, true},
		{"wrong identity token", &cri.AuthConfig{IdentityToken: "stale-token-99"}, false},
		{"wrong registry token", &cri.AuthConfig{RegistryToken: "stale-token-77"}, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := newService(t, func(c *Config) { write(t, c.RegistriesConf, insecure(reg)) })
			_, err := tryPull(context.Background(), s, ref, tt.auth)
			if tt.ok != (err == nil) {
				t.Fatalf("pull: %v", err)
			}
			if err != nil {
				if !errdefs.IsUnauthorized(err) {
					t.Errorf("error %v, want unauthenticated", err)
				}
				checkNoSecrets(t, err, tt.auth)
			}
		})
	}
}

// TestMirror: a mirror serves the reference of a registry that cannot be reached, and gets none of the
// credentials for it.
func TestMirror(t *testing.T) {
	sequential(t)
	mirror := newRegistry(t, false)
	img := simpleImage(t, "mirrored")
	mirror.push(t, "k8s/pause:3.9", img)
	mirror.intercept(func(w http.ResponseWriter, r *http.Request, next http.Handler) {
		if r.Header.Get("Authorization") != "" {
			t.Error("the mirror got credentials")
		}
		next.ServeHTTP(w, r)
	})
	s := newService(t, func(c *Config) {
		write(t, c.RegistriesConf, fmt.Sprintf("[[registry]]\nlocation = \"registry.invalid\"\n[[registry.mirror]]\nlocation = \"%s/k8s\"\ninsecure = true\n", mirror.host))
	})
	id, err := tryPull(context.Background(), s, "registry.invalid/pause:3.9", &cri.AuthConfig{Username: testUser, Password: testPassword})
	if err != nil {
		t.Fatal(err)
	}
	got := resolve(t, s, "registry.invalid/pause:3.9")
	if got.ID != id || got.RepoDigests[0] != "registry.invalid/pause@"+manifestDigest(t, img) {
		t.Errorf("image %+v", got)
	}
}

func TestShortNames(t *testing.T) {
	sequential(t)
	one, two := newRegistry(t, false), newRegistry(t, false)
	two.push(t, "tool:latest", simpleImage(t, "tool"))
	for _, tt := range []struct {
		name, conf, want string
	}{
		{"alias", "[aliases]\n\"tool\" = \"" + two.host + "/tool\"\n", ""},
		{"search", "unqualified-search-registries = [\"" + two.host + "\"]\n", ""},
		{"search in order", "short-name-mode = \"permissive\"\nunqualified-search-registries = [\"" + one.host + "\", \"" + two.host + "\"]\n", ""},
		{"enforcing", "short-name-mode = \"enforcing\"\nunqualified-search-registries = [\"" + one.host + "\", \"" + two.host + "\"]\n", "enforcing"},
		{"no registries", "", "did not resolve"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := newService(t, func(c *Config) {
				write(t, c.RegistriesConf, tt.conf+insecure(one, two))
				if strings.Contains(tt.conf, "[aliases]") {
					write(t, c.RegistriesConf, insecure(one, two)+tt.conf)
				}
			})
			id, err := tryPull(context.Background(), s, "tool", nil)
			if tt.want != "" {
				if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), tt.want) {
					t.Errorf("error %v, want invalid argument with %q", err, tt.want)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			for _, ref := range []string{"tool", "tool:latest", two.host + "/tool"} {
				if img := resolve(t, s, ref); img.ID != id || img.RepoTags[0] != two.host+"/tool:latest" {
					t.Errorf("%s is %+v", ref, img)
				}
			}
		})
	}
}

func TestCandidatesWithoutConfiguration(t *testing.T) {
	s := &Service{config: Config{RegistriesConfDir: t.TempDir(), ShortNameAliases: filepath.Join(t.TempDir(), "none")}}
	t.Setenv("HOME", t.TempDir())
	if configured, err := registriesConfigured(s.system()); err != nil {
		t.Fatal(err)
	} else if configured {
		t.Skip("this machine has a registries.conf, so its absence cannot be tested")
	}
	// The first file of any kind ends the default.
	write(t, filepath.Join(s.config.RegistriesConfDir, "x.conf"), "")
	if configured, err := registriesConfigured(s.system()); err != nil || !configured {
		t.Errorf("a file in registries.conf.d was not seen: %v", err)
	}
	if err := os.Remove(filepath.Join(s.config.RegistriesConfDir, "x.conf")); err != nil {
		t.Fatal(err)
	}
	for ref, want := range map[string]string{
		"busybox":            "docker.io/library/busybox:latest",
		"team/tool:2":        "docker.io/team/tool:2",
		"ghcr.io/team/tool":  "ghcr.io/team/tool:latest",
		"localhost/tool:dev": "localhost/tool:dev",
	} {
		got, err := s.candidates(ref)
		if err != nil || len(got) != 1 || got[0].named.String() != want {
			t.Errorf("candidates(%q) = %v, %v; want %s", ref, got, err, want)
		}
	}
}

func TestTLS(t *testing.T) {
	sequential(t)
	reg := newRegistry(t, true)
	ref := reg.push(t, "secure:1", simpleImage(t, "secure"))
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: reg.server.Certificate().Raw})
	t.Run("trusted", func(t *testing.T) {
		s := newService(t, func(c *Config) { write(t, filepath.Join(c.CertsDir, reg.host, "ca.crt"), string(ca)) })
		pull(t, s, ref)
	})
	t.Run("unknown authority", func(t *testing.T) {
		s := newService(t, nil)
		if _, err := tryPull(context.Background(), s, ref, nil); err == nil || !strings.Contains(err.Error(), "certificate") {
			t.Errorf("error %v, want one about the certificate", err)
		}
		checkEmpty(t, s)
	})
	t.Run("insecure", func(t *testing.T) {
		s := newService(t, func(c *Config) { write(t, c.RegistriesConf, insecure(reg)) })
		pull(t, s, ref)
	})
}

func TestPlainHTTPNeedsInsecure(t *testing.T) {
	reg := newRegistry(t, false)
	ref := reg.push(t, "plain:1", simpleImage(t, "plain"))
	s := newService(t, nil)
	if _, err := tryPull(context.Background(), s, ref, nil); err == nil || !strings.Contains(err.Error(), "HTTP response to HTTPS client") {
		t.Errorf("error %v, want a refusal of plain HTTP", err)
	}
}

func TestSignaturePolicy(t *testing.T) {
	sequential(t)
	reg := newRegistry(t, false)
	ref := reg.push(t, "unsigned:1", simpleImage(t, "unsigned"))
	for _, policy := range []string{
		`{"default":[{"type":"reject"}]}`,
		`{"default":[{"type":"insecureAcceptAnything"}],"transports":{"docker":{"` + reg.host + `":[{"type":"signedBy","keyType":"GPGKeys","keyData":"AAAA"}]}}}`,
	} {
		s := newService(t, func(c *Config) {
			write(t, c.RegistriesConf, insecure(reg))
			write(t, c.SignaturePolicy, policy)
		})
		_, err := tryPull(context.Background(), s, ref, nil)
		if st, _ := status.FromError(err); err == nil || st.Code() != codes.Unknown || !strings.HasPrefix(st.Message(), "SignatureValidationFailed: ") {
			t.Errorf("policy %s: error %v, want SignatureValidationFailed with code Unknown", policy, err)
		}
		checkEmpty(t, s)
		// The next pull sees a changed policy.
		write(t, s.config.SignaturePolicy, acceptAll)
		pull(t, s, ref)
	}
	t.Run("missing file", func(t *testing.T) {
		s := newService(t, func(c *Config) {
			write(t, c.RegistriesConf, insecure(reg))
			c.SignaturePolicy = "/nonexistent/policy.json"
		})
		if _, err := tryPull(context.Background(), s, ref, nil); err == nil || !strings.Contains(err.Error(), "signature policy") {
			t.Errorf("error %v, want one about the policy that was configured but is not there", err)
		}
	})
}

// TestRegistriesReloaded: an edit of registries.conf counts from the next pull on.
func TestRegistriesReloaded(t *testing.T) {
	sequential(t)
	reg := newRegistry(t, false)
	ref := reg.push(t, "late:1", simpleImage(t, "late"))
	s := newService(t, nil)
	if _, err := tryPull(context.Background(), s, ref, nil); err == nil {
		t.Fatal("pull over plain HTTP worked without permission")
	}
	write(t, s.config.RegistriesConf, "this is = = not toml")
	if _, err := tryPull(context.Background(), s, ref, nil); err == nil || !strings.Contains(err.Error(), "registries") {
		t.Errorf("error %v, want one about the broken file", err)
	}
	write(t, s.config.RegistriesConf, insecure(reg))
	pull(t, s, ref)
}

func TestPullForAHandler(t *testing.T) {
	reg := newRegistry(t, false)
	s := newService(t, func(c *Config) {
		write(t, c.RegistriesConf, insecure(reg))
		c.Handlers = []string{"", "large"}
	})
	ref := reg.push(t, "lib/one:v1", simpleImage(t, "one"))
	for handler, known := range map[string]bool{"": true, "large": true, "other": false} {
		_, err := s.PullImage(context.Background(), &cri.PullImageRequest{Image: &cri.ImageSpec{Image: ref, RuntimeHandler: handler}})
		if known && err != nil || !known && (!errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "runtime_handler")) {
			t.Errorf("pulling for handler %q: %v", handler, err)
		}
	}
}
