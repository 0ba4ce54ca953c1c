package imageservice

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"regexp"
	"strconv"
	"strings"
	"syscall"

	"github.com/containerd/errdefs"
	"github.com/docker/distribution/registry/api/errcode"
	dockerv2 "github.com/docker/distribution/registry/api/v2"
	"go.podman.io/image/v5/docker"
	"go.podman.io/image/v5/signature"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Markers that kubelet looks for at the start of a PullImage error (k8s.io/kubernetes pkg/kubelet/images).
// Its client strips the gRPC wrapping for code Unknown only, so these errors carry that code.
const (
	markUnavailable = "RegistryUnavailable"
	markSignature   = "SignatureValidationFailed"
)

// pullError makes the error of a pull that a caller sees: without secrets, with its class.
func pullError(ref string, err error, creds credentials) error {
	text := fmt.Sprintf("pull %q: %s", ref, redact(err.Error(), creds))
	switch class := pullClass(err); class {
	case context.Canceled:
		return fmt.Errorf("pull %q: %w", ref, class)
	case errdefs.ErrUnavailable:
		return status.Error(codes.Unknown, markUnavailable+": "+text)
	case errSignature:
		return status.Error(codes.Unknown, markSignature+": "+text)
	case nil:
		return errors.New(text)
	default:
		return fmt.Errorf("%s%w", text, silent{class})
	}
}

// silent is an error class that adds no text.
type silent struct{ error }

func (silent) Error() string   { return "" }
func (s silent) Unwrap() error { return s.error }

var errSignature = errors.New("signature")

// pullClass finds out what went wrong in a pull; nil when it cannot be told.
func pullClass(err error) error {
	var (
		policy       signature.PolicyRequirementError
		badSignature signature.InvalidSignatureError
		unauthorized docker.ErrUnauthorizedForCredentials
		httpStatus   docker.UnexpectedHTTPStatusError
		code         errcode.Error
		coder        errcode.ErrorCoder
		network      net.Error
	)
	switch {
	case errors.Is(err, context.Canceled):
		return context.Canceled
	case errors.As(err, &policy), errors.As(err, &badSignature):
		return errSignature
	// Unpacking runs in another process, from which only the text comes.
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT), errors.Is(err, errdefs.ErrResourceExhausted),
		strings.Contains(err.Error(), "no space left on device"), strings.Contains(err.Error(), "disk quota exceeded"):
		return errdefs.ErrResourceExhausted
	case errors.As(err, &unauthorized):
		return errdefs.ErrUnauthenticated
	case errors.Is(err, docker.ErrTooManyRequests):
		return errdefs.ErrUnavailable
	case errors.As(err, &code):
		return codeClass(code.Code)
	case errors.As(err, &coder):
		return codeClass(coder.ErrorCode())
	case errors.As(err, &httpStatus):
		return statusClass(httpStatus.StatusCode)
	}
	for _, class := range []error{errdefs.ErrUnavailable, errdefs.ErrInvalidArgument, errdefs.ErrFailedPrecondition, errdefs.ErrNotFound} {
		if errors.Is(err, class) {
			return class
		}
	}
	if errors.As(err, &network) || errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, syscall.ECONNRESET) ||
		errors.Is(err, io.ErrUnexpectedEOF) {
		return errdefs.ErrUnavailable
	}
	// The library keeps the type of some HTTP errors to itself.
	if m := statusText.FindStringSubmatch(err.Error()); m != nil {
		n, _ := strconv.Atoi(m[1])
		return statusClass(n)
	}
	return nil
}

var statusText = regexp.MustCompile(`StatusCode: (\d{3})`)

// codeClass classifies an error code of the registry protocol.
func codeClass(code errcode.ErrorCode) error {
	switch code {
	case errcode.ErrorCodeUnauthorized:
		return errdefs.ErrUnauthenticated
	case errcode.ErrorCodeDenied:
		return errdefs.ErrPermissionDenied
	case errcode.ErrorCodeUnavailable, errcode.ErrorCodeTooManyRequests:
		return errdefs.ErrUnavailable
	case dockerv2.ErrorCodeManifestUnknown, dockerv2.ErrorCodeNameUnknown, dockerv2.ErrorCodeBlobUnknown:
		return errdefs.ErrNotFound
	}
	return nil
}

// statusClass classifies an HTTP status.
func statusClass(code int) error {
	switch {
	case code >= 500, code == http.StatusTooManyRequests:
		return errdefs.ErrUnavailable
	case code == http.StatusNotFound:
		return errdefs.ErrNotFound
	case code == http.StatusUnauthorized:
		return errdefs.ErrUnauthenticated
	case code == http.StatusForbidden:
		return errdefs.ErrPermissionDenied
	}
	return nil
}

// urlSecret matches what may be secret in a URL: user information and the query, which holds the
// signature of redirects to object stores.
var urlSecret = regexp.MustCompile(`(https?://)([^/\s"'@]*@)?([^\s"'?]*)(\?[^\s"']*)?`)

// redact takes credentials out of an error text.
func redact(text string, creds credentials) string {
	for _, secret := range creds.secrets() {
		text = strings.ReplaceAll(text, secret, "[redacted]")
	}
	return urlSecret.ReplaceAllStringFunc(text, func(url string) string {
		m := urlSecret.FindStringSubmatch(url)
		if m[4] != "" {
			m[4] = "?[redacted]"
		}
		return m[1] + m[3] + m[4]
	})
}
