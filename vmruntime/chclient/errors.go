package chclient

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/containerd/errdefs"
)

// Error is a refusal by the VMM. Its texts are for people: they change with every release. Unwrap gives the
// errdefs class of the status.
type Error struct {
	Status   int
	Messages []string // outermost first, root cause last; may be empty
}

func (e *Error) Error() string {
	if len(e.Messages) == 0 {
		return fmt.Sprintf("status %d", e.Status)
	}
	return fmt.Sprintf("%s (status %d)", strings.Join(e.Messages, ": "), e.Status)
}

// Unwrap maps the status to an errdefs class. 500 stands for everything from a wrong state to a file that
// cannot be opened, hence Unknown; callers that need to know look at the VM's state.
func (e *Error) Unwrap() error {
	switch e.Status {
	case http.StatusBadRequest, http.StatusRequestEntityTooLarge:
		return errdefs.ErrInvalidArgument
	case http.StatusNotFound:
		return errdefs.ErrNotFound
	case http.StatusConflict:
		return errdefs.ErrAlreadyExists
	case http.StatusTooManyRequests, http.StatusServiceUnavailable:
		return errdefs.ErrUnavailable
	case http.StatusNotImplemented, http.StatusMethodNotAllowed:
		return errdefs.ErrNotImplemented
	default:
		return errdefs.ErrUnknown
	}
}

const (
	maxMessages      = 16
	maxMessageLength = 1024
)

// parseMessages reads an error body: a JSON array of strings since v47, a plain text before, and neither from
// the HTTP parser, whose bodies hold raw newlines within what looks like JSON.
func parseMessages(body []byte) []string {
	var list []string
	if json.Unmarshal(body, &list) != nil {
		list = []string{string(body)}
	}
	var out []string
	for _, m := range list {
		if m = printable(m); m != "" && len(out) < maxMessages {
			out = append(out, m)
		}
	}
	return out
}

// printable makes one short line of a text that a hostile VMM may have written.
func printable(s string) string {
	if len(s) > maxMessageLength {
		s = s[:maxMessageLength]
	}
	return strings.Join(strings.FieldsFunc(s, func(r rune) bool {
		return !unicode.IsPrint(r) || r == ' ' || r == utf8.RuneError
	}), " ")
}
