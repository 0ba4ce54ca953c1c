package image

import (
	"bytes"
	"debug/elf"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
)

// agentPath is where the kernel looks for the first program of an initramfs.
const agentPath = "/init"

// addAgent puts the agent in as PID 1. It must be static: it runs before anything else is there.
func addAgent(a *archive, name string) error {
	content, file, err := readELF(name)
	if err != nil {
		return err
	}
	if interpreter(file) != "" {
		return fmt.Errorf("needs a dynamic loader; build it with CGO_ENABLED=0: %w", errdefs.ErrInvalidArgument)
	}
	a.addFile(agentPath, 0o755, content)
	a.addSymlink("/sbin/crivm-agent", agentPath)
	return nil
}

// findOCIRuntime looks for the runtimes that the agent can drive, the preferred one first
// (docs/decisions/0001-oci-runtime-in-the-guest.md).
func findOCIRuntime() (string, error) {
	for _, name := range []string{"crun", "runc"} {
		if found, err := exec.LookPath(name); err == nil {
			return found, nil
		}
	}
	return "", fmt.Errorf("neither crun nor runc in PATH: install the package crun or name an OCI runtime: %w", errdefs.ErrNotFound)
}

// addProgram puts a program with all its shared libraries in, and returns its path in the guest. Libraries
// are found by reading the ELF files; nothing of them is run.
//
// All libraries go into the directory of the C library, because there is no ld.so.cache in the guest
// and that directory is one that the loader searches by itself.
func addProgram(a *archive, name string, searchPaths []string) (string, error) {
	content, file, err := readELF(name)
	if err != nil {
		return "", err
	}
	guestPath := "/usr/bin/" + filepath.Base(name)
	a.addFile(guestPath, 0o755, content)
	loader := interpreter(file)
	if loader == "" {
		return guestPath, nil
	}
	loaderContent, _, err := readELF(loader)
	if err != nil {
		return "", fmt.Errorf("dynamic loader: %w", err)
	}
	a.addFile(loader, 0o755, loaderContent)

	libraries, err := collectLibraries(name, file, searchPaths)
	if err != nil {
		return "", err
	}
	dir := filepath.Dir(loader)
	if libc, ok := libraries["libc.so.6"]; ok {
		dir = filepath.Dir(libc.path)
	}
	for soname, lib := range libraries {
		if soname != filepath.Base(loader) {
			a.addFile(filepath.Join(dir, soname), 0o644, lib.content)
		}
	}
	return guestPath, nil
}

type library struct {
	path    string
	content []byte
}

// collectLibraries follows DT_NEEDED from file on and returns the libraries by the name they are
// needed by.
func collectLibraries(name string, file *elf.File, searchPaths []string) (map[string]library, error) {
	type user struct {
		name string
		file *elf.File
	}
	found := map[string]library{}
	todo := []user{{name, file}}
	for len(todo) > 0 {
		u := todo[0]
		todo = todo[1:]
		needed, err := u.file.ImportedLibraries()
		if err != nil {
			return nil, fmt.Errorf("%s: %w", u.name, err)
		}
		dirs := append(runPaths(u.name, u.file), searchPaths...)
		for _, soname := range needed {
			if _, ok := found[soname]; ok {
				continue
			}
			path, content, lib, err := findLibrary(soname, dirs)
			if err != nil {
				return nil, fmt.Errorf("needed by %s: %w", u.name, err)
			}
			found[soname] = library{path, content}
			todo = append(todo, user{path, lib})
		}
	}
	return found, nil
}

// findLibrary takes the first file of that name that can be used, as ld.so does.
func findLibrary(soname string, dirs []string) (string, []byte, *elf.File, error) {
	if strings.Contains(soname, "/") {
		dirs, soname = []string{filepath.Dir(soname)}, filepath.Base(soname)
	}
	for _, dir := range dirs {
		path := filepath.Join(dir, soname)
		content, file, err := readELF(path)
		if err == nil {
			return path, content, file, nil
		}
	}
	return "", nil, nil, fmt.Errorf("shared library %s is in none of %s: %w", soname, strings.Join(dirs, ", "), errdefs.ErrNotFound)
}

// runPaths are the directories that an ELF file itself names, with $ORIGIN resolved.
func runPaths(name string, file *elf.File) []string {
	var dirs []string
	for _, tag := range []elf.DynTag{elf.DT_RPATH, elf.DT_RUNPATH} {
		values, err := file.DynString(tag)
		if err != nil {
			continue // no dynamic section: nothing named
		}
		for _, value := range values {
			for dir := range strings.SplitSeq(value, ":") {
				origin := filepath.Dir(name)
				dir = strings.NewReplacer("${ORIGIN}", origin, "$ORIGIN", origin).Replace(dir)
				if filepath.IsAbs(dir) {
					dirs = append(dirs, dir)
				}
			}
		}
	}
	return dirs
}

// hostLibraryPaths are the directories that ldconfig(8) and ld.so(8) of this machine search.
func hostLibraryPaths() []string {
	return append(readLDConf("/etc/ld.so.conf", 0),
		"/lib/x86_64-linux-gnu", "/usr/lib/x86_64-linux-gnu", "/lib64", "/usr/lib64", "/lib", "/usr/lib")
}

// readLDConf reads a file as ldconfig does: a directory a line, or "include PATTERN". A file that
// cannot be read names nothing.
func readLDConf(name string, depth int) []string {
	const maxDepth = 8
	raw, err := os.ReadFile(name)
	if err != nil || depth > maxDepth {
		return nil
	}
	var dirs []string
	for line := range strings.Lines(string(raw)) {
		line, _, _ = strings.Cut(line, "#")
		fields := strings.Fields(line)
		switch {
		case len(fields) == 0:
		case fields[0] == "include":
			for _, pattern := range fields[1:] {
				if !filepath.IsAbs(pattern) {
					pattern = filepath.Join(filepath.Dir(name), pattern)
				}
				names, err := filepath.Glob(pattern)
				if err != nil {
					continue // not a pattern: names nothing, as with ldconfig
				}
				slices.Sort(names)
				for _, n := range names {
					dirs = append(dirs, readLDConf(n, depth+1)...)
				}
			}
		case filepath.IsAbs(fields[0]):
			dirs = append(dirs, fields[0])
		}
	}
	return dirs
}

// readELF reads a whole ELF file for 64-bit x86.
func readELF(name string) ([]byte, *elf.File, error) {
	content, err := os.ReadFile(name)
	if err != nil {
		return nil, nil, missing(err)
	}
	file, err := elf.NewFile(bytes.NewReader(content))
	if err != nil {
		return nil, nil, fmt.Errorf("%s is not an ELF file: %w: %w", name, err, errdefs.ErrInvalidArgument)
	}
	if file.Class != elf.ELFCLASS64 || file.Machine != elf.EM_X86_64 {
		return nil, nil, fmt.Errorf("%s is %v %v, not 64-bit x86: %w", name, file.Class, file.Machine, errdefs.ErrInvalidArgument)
	}
	return content, file, nil
}

// interpreter is the dynamic loader that an ELF file asks for, "" for a static one.
func interpreter(file *elf.File) string {
	const maxPath = 4096
	for _, p := range file.Progs {
		if p.Type == elf.PT_INTERP && p.Filesz < maxPath {
			name := make([]byte, p.Filesz)
			if n, err := p.ReadAt(name, 0); err == nil || n == len(name) {
				return strings.TrimRight(string(name), "\x00")
			}
		}
	}
	return ""
}
