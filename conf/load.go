package conf

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
)

const (
	maxFileSize = 256 << 10
	maxProblems = 100 // that one error tells
)

// problem is one thing that is wrong. keys are all that take part in it, the one to name first.
type problem struct {
	place
	keys []string
	text string
}

// Error reads "file:line: key: text", without what is not known.
func (p *problem) Error() string {
	var b strings.Builder
	if p.file != "" {
		b.WriteString(p.file)
		if p.line > 0 {
			fmt.Fprintf(&b, ":%d", p.line)
		}
		b.WriteString(": ")
	}
	if p.keys[0] != "" {
		b.WriteString(p.keys[0] + ": ")
	}
	return b.String() + p.text
}

func (p *problem) Unwrap() error { return errdefs.ErrInvalidArgument }

// Load reads a configuration file and then the *.toml files of the directory conf.d beside it in the order
// of their names; hidden files are left out. A later file wins key by key, a list is replaced as a whole. The
// file itself may be missing unless mustExist (fs.ErrNotExist), conf.d always may.
//
// The error joins everything that is wrong, one "file:line: key: text" a line, in the order of the files and
// then as Validate does.
func Load(path string, mustExist bool) (Config, error) {
	d := newDecoder()
	content, err := readFile(path)
	switch {
	case err == nil:
		d.decode(path, content)
	case mustExist || !errors.Is(err, fs.ErrNotExist):
		d.problems = append(d.problems, fmt.Errorf("configuration: %w", err))
	}
	dir := filepath.Join(filepath.Dir(path), "conf.d")
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		d.problems = append(d.problems, fmt.Errorf("configuration: %w", err))
	}
	for _, e := range entries {
		if filepath.Ext(e.Name()) != ".toml" || strings.HasPrefix(e.Name(), ".") {
			continue
		}
		fragment := filepath.Join(dir, e.Name())
		content, err := readFile(fragment)
		if err != nil {
			d.problems = append(d.problems, fmt.Errorf("configuration: %w", err))
			continue
		}
		d.decode(fragment, content)
	}
	d.config.resolve(d.handlers)
	if !d.broken {
		d.validate()
	}
	if more := len(d.problems) - maxProblems; more > 0 {
		d.problems = append(d.problems[:maxProblems:maxProblems], fmt.Errorf("and %d more: %w", more, errdefs.ErrInvalidArgument))
	}
	if err := errors.Join(d.problems...); err != nil {
		return Config{}, err
	}
	return d.config, nil
}

// readFile reads a regular file of bounded size.
func readFile(path string) ([]byte, error) {
	info, err := os.Stat(path) // a FIFO would block in open
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s: not a regular file: %w", path, errdefs.ErrInvalidArgument)
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	content, err := io.ReadAll(io.LimitReader(f, maxFileSize+1))
	if err != nil {
		return nil, err
	}
	if len(content) > maxFileSize {
		return nil, fmt.Errorf("%s: longer than %d bytes: %w", path, maxFileSize, errdefs.ErrInvalidArgument)
	}
	return content, nil
}

// validate adds what Validate finds, each at the place where one of its keys is set. What follows from a
// value that could not be read is left out.
func (d *decoder) validate() {
	isSet := func(key string) bool { _, ok := d.places[key]; return ok }
	for _, p := range d.config.problems(isSet) {
		doubtful := false
		for _, key := range p.keys {
			doubtful = doubtful || d.failed[key]
		}
		if doubtful {
			continue
		}
		for i, key := range p.keys {
			if at, ok := d.places[key]; ok {
				p.place = at
				p.keys[0], p.keys[i] = key, p.keys[0]
				break
			}
		}
		d.problems = append(d.problems, p)
	}
}
