package guest

import (
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// commandFailure says that a container's command itself cannot be executed, as opposed to a failure of the
// runtime. Its text is what people know from other runtimes; its class is NotFound, PermissionDenied or
// InvalidArgument.
type commandFailure struct {
	text  string
	class error
}

func (e *commandFailure) Error() string { return e.text }
func (e *commandFailure) Unwrap() error { return e.class }

// isCommandFailure finds a commandFailure in err.
func isCommandFailure(err error) bool {
	var f *commandFailure
	return errors.As(err, &f)
}

// commandError makes a commandFailure of the error that executing a command gave.
func commandError(name string, err error) error {
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ENOTDIR):
		return &commandFailure{fmt.Sprintf("exec: %q: stat %s: no such file or directory", name, name), errdefs.ErrNotFound}
	case errors.Is(err, fs.ErrPermission):
		return &commandFailure{fmt.Sprintf("exec: %q: permission denied", name), errdefs.ErrPermissionDenied}
	case errors.Is(err, unix.ENOEXEC):
		return &commandFailure{fmt.Sprintf("exec: %q: exec format error", name), errdefs.ErrInvalidArgument}
	}
	return err
}

func notInPath(name string) error {
	return &commandFailure{fmt.Sprintf("exec: %q: executable file not found in $PATH", name), errdefs.ErrNotFound}
}

// commandWords are in what crun and runc say when it is the command that fails.
var commandWords = []string{"executable file", "exec: ", "open executable", "exec format", "execve"}

// runtimeError makes an error of what an OCI runtime printed when it was to run name.
func runtimeError(name, text string) error {
	text = strings.TrimSpace(text)
	lower := strings.ToLower(text)
	if slices.ContainsFunc(commandWords, func(w string) bool { return strings.Contains(lower, w) }) {
		switch {
		case strings.Contains(lower, "not found in $path") && !strings.Contains(name, "/"):
			return notInPath(name)
		case strings.Contains(lower, "no such file or directory"), strings.Contains(lower, "not a directory"):
			return commandError(name, fs.ErrNotExist)
		case strings.Contains(lower, "permission denied"), strings.Contains(lower, "operation not permitted"),
			strings.Contains(lower, "is a directory"):
			return commandError(name, fs.ErrPermission)
		case strings.Contains(lower, "exec format error"):
			return commandError(name, unix.ENOEXEC)
		}
	}
	if text == "" {
		text = "no message"
	}
	return fmt.Errorf("OCI runtime: %s: %w", text, errdefs.ErrUnknown)
}

// firstLine is the first line of s.
func firstLine(s string) string {
	line, _, _ := strings.Cut(s, "\n")
	return line
}
