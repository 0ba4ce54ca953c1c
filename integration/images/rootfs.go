package images

import (
	"archive/tar"
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// epoch is the time of every file, so that the same inputs give the same image.
var epoch = time.Date(2025, 1, 1, 0, 0, 0, 0, time.UTC)

// tree is a layer being put together: headers and contents in the order in which they are written.
type tree struct {
	entries []entry
	have    map[string]bool
}

type entry struct {
	header tar.Header
	data   []byte
}

// add takes an entry, and makes its parent directories when they are missing.
func (t *tree) add(h tar.Header, data []byte) {
	h.Name = strings.TrimPrefix(h.Name, "/")
	if t.have == nil {
		t.have = map[string]bool{}
	}
	if parent := path.Dir(strings.TrimSuffix(h.Name, "/")); parent != "." && !t.have[parent] {
		t.dir(parent, 0o755)
	}
	if h.ModTime.IsZero() {
		h.ModTime = epoch
	}
	if h.Typeflag == tar.TypeReg {
		h.Size = int64(len(data))
	}
	h.Format = tar.FormatPAX
	t.have[strings.TrimSuffix(h.Name, "/")] = true
	t.entries = append(t.entries, entry{h, data})
}

func (t *tree) dir(name string, mode int64) {
	t.add(tar.Header{Typeflag: tar.TypeDir, Name: strings.TrimSuffix(name, "/") + "/", Mode: mode}, nil)
}

func (t *tree) file(name string, mode int64, data string) {
	t.add(tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: mode}, []byte(data))
}

func (t *tree) symlink(name, target string) {
	t.add(tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: target, Mode: 0o777}, nil)
}

// copyFile takes a file of this machine, following symbolic links.
func (t *tree) copyFile(from, to string, mode int64) error {
	data, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	t.add(tar.Header{Typeflag: tar.TypeReg, Name: to, Mode: mode}, data)
	return nil
}

// bytes writes the layer as an uncompressed tar.
func (t *tree) bytes() ([]byte, error) {
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for _, e := range t.entries {
		if err := w.WriteHeader(&e.header); err != nil {
			return nil, fmt.Errorf("%s: %w", e.header.Name, err)
		}
		if _, err := w.Write(e.data); err != nil {
			return nil, fmt.Errorf("%s: %w", e.header.Name, err)
		}
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return out.Bytes(), nil
}

const passwd = `root:x:0:0:root:/root:/bin/sh
daemon:x:1:1:daemon:/usr/sbin:/bin/false
www-data:x:33:33:www-data:/var/www:/bin/false
nobody:x:65534:65534:nobody:/home:/bin/false
`

const group = `root:x:0:
daemon:x:1:
www-data:x:33:
users:x:100:
nogroup:x:65534:
`

// scripts are programs that Debian's busybox lacks and critest calls, as far as it does.
var scripts = []struct{ name, text string }{
	{"pgrep", `#!/bin/sh
found=1
for process in /proc/[0-9]*; do
	{ read -r name <"$process/comm"; } 2>/dev/null || continue
	case $name in *"$1"*) echo "${process#/proc/}"; found=0 ;; esac
done
exit $found
`},
	{"ipcs", `#!/bin/sh
exec cat /proc/sysvipc/shm
`},
}

// rootfs is Debian's busybox with the libraries it is linked to and the few files a root needs.
func rootfs(busybox string) (*tree, error) {
	t := &tree{}
	for _, dir := range []string{"bin", "dev", "etc", "home", "proc", "sys", "usr/bin", "usr/sbin", "sbin", "var/log", "var/run", "var/www"} {
		t.dir(dir, 0o755)
	}
	t.dir("root", 0o700)
	t.dir("tmp", 0o1777)
	t.file("etc/passwd", 0o644, passwd)
	t.file("etc/group", 0o644, group)
	t.file("etc/nsswitch.conf", 0o644, "passwd: files\ngroup: files\nhosts: files dns\n")
	if err := t.copyFile(busybox, "bin/busybox", 0o755); err != nil {
		return nil, err
	}
	libraries, err := linked(busybox)
	if err != nil {
		return nil, err
	}
	for _, library := range libraries {
		if err := t.copyFile(library, library, 0o755); err != nil {
			return nil, err
		}
	}
	out, err := exec.Command(busybox, "--list").Output()
	if err != nil {
		return nil, fmt.Errorf("%s --list: %w", busybox, err)
	}
	applets := strings.Fields(string(out))
	slices.Sort(applets)
	for _, applet := range applets {
		if applet != "busybox" {
			// Hard links, as in the image that this one stands for: critest masks /bin/ls alone.
			t.add(tar.Header{Typeflag: tar.TypeLink, Name: "bin/" + applet, Linkname: "bin/busybox", Mode: 0o755}, nil)
		}
	}
	for _, script := range scripts {
		if !slices.Contains(applets, script.name) {
			t.file("bin/"+script.name, 0o755, script.text)
		}
	}
	return t, nil
}

// linked lists the libraries that the dynamic linker would load, and the linker itself.
func linked(program string) ([]string, error) {
	out, err := exec.Command("ldd", program).CombinedOutput()
	if strings.Contains(string(out), "not a dynamic executable") {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("ldd %s: %w: %s", program, err, bytes.TrimSpace(out))
	}
	var libraries []string
	for line := range strings.Lines(string(out)) {
		if strings.Contains(line, "not found") {
			return nil, fmt.Errorf("ldd %s: %s", program, strings.TrimSpace(line))
		}
		for _, field := range strings.Fields(line) {
			if filepath.IsAbs(field) {
				libraries = append(libraries, field)
				break
			}
		}
	}
	slices.Sort(libraries)
	return slices.Compact(libraries), nil
}
