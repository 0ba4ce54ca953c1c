package imageservice

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"strings"

	"github.com/containerd/errdefs"
	"go.podman.io/image/v5/types"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// credentials are what kubelet gave for one pull. The zero value means none: those of auth.json are used.
type credentials struct {
	config types.DockerAuthConfig // user and password, or an identity token
	bearer string                 // registry token
	server string                 // the registry they are for; "" is any
}

// parseAuth reads an AuthConfig. "auth" is base64 of user:password, and only used without a user name.
func parseAuth(a *cri.AuthConfig) (credentials, error) {
	c := credentials{
		config: types.DockerAuthConfig{Username: a.GetUsername(), Password: a.GetPassword(), IdentityToken: a.GetIdentityToken()},
		bearer: a.GetRegistryToken(),
		server: registryHost(a.GetServerAddress()),
	}
	if c.config.Username == "" && c.config.IdentityToken == "" && a.GetAuth() != "" {
		plain, err := base64.StdEncoding.DecodeString(a.GetAuth())
		user, password, ok := strings.Cut(string(plain), ":")
		if err != nil || !ok {
			// Neither the text nor the decoder's message, which may quote it.
			return credentials{}, fmt.Errorf("auth is not base64 of user:password: %w", errdefs.ErrInvalidArgument)
		}
		c.config.Username, c.config.Password = user, strings.TrimRight(password, "\x00")
	}
	return c, nil
}

// registryHost takes the host out of a server address such as https://index.docker.io/v1/.
func registryHost(address string) string {
	if _, rest, ok := strings.Cut(address, "://"); ok {
		address = rest
	}
	host, _, _ := strings.Cut(address, "/")
	if host == "index.docker.io" || host == "registry-1.docker.io" {
		return "docker.io"
	}
	return host
}

// apply makes a pull from a registry use the credentials, if they are for it.
func (c credentials) apply(sys *types.SystemContext, registry string) {
	if c.server != "" && c.server != registry {
		return
	}
	if c.bearer != "" {
		sys.DockerBearerRegistryToken = c.bearer
	} else if c.config != (types.DockerAuthConfig{}) {
		config := c.config
		sys.DockerAuthConfig = &config
	}
}

// key tells credentials apart without revealing them.
func (c credentials) key() string {
	h := sha256.New()
	for _, part := range []string{c.config.Username, c.config.Password, c.config.IdentityToken, c.bearer, c.server} {
		fmt.Fprintf(h, "%d:%s", len(part), part)
	}
	return hex.EncodeToString(h.Sum(nil))
}

// secrets are the texts that must not appear in an error.
func (c credentials) secrets() []string {
	var out []string
	add := func(s string) {
		if s != "" {
			out = append(out, s)
		}
	}
	add(c.config.Password)
	add(c.config.IdentityToken)
	add(c.bearer)
	if c.config.Username != "" {
		add(base64.StdEncoding.EncodeToString([]byte(c.config.Username + ":" + c.config.Password)))
	}
	return out
}
