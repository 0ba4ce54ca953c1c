package image

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

func TestAddProgramFollowsLibraries(t *testing.T) {
	root := t.TempDir()
	loader := writeFile(t, testProgram(t, "", ""), root, "lib64/ld-linux-x86-64.so.2")
	writeFile(t, testProgram(t, "", "", "ld-linux-x86-64.so.2"), root, "lib/libc.so.6")
	writeFile(t, testProgram(t, "", "", "libc.so.6", "libdeep.so.3"), root, "lib/libtop.so.1")
	writeFile(t, testProgram(t, "", "", "libc.so.6", "libtop.so.1"), root, "other/libdeep.so.3")
	writeFile(t, []byte("a linker script"), root, "lib/libdeep.so.3")
	writeFile(t, testProgram(t, "", ""), root, "opt/lib/libown.so")
	writeFile(t, testProgram(t, "", ""), root, "lib64/libunused.so")
	program := writeFile(t, testProgram(t, loader, "$ORIGIN/../lib", "libtop.so.1", "libown.so"), root, "opt/bin/crun")

	var a archive
	guestPath, err := addProgram(&a, program, []string{root + "/lib", root + "/other", root + "/lib64"})
	if err != nil {
		t.Fatal(err)
	}
	if guestPath != "/usr/bin/crun" {
		t.Errorf("guest path %s", guestPath)
	}
	var files []string
	for name, e := range a.entries {
		if e.mode&typeRegular != 0 {
			files = append(files, strings.TrimPrefix(name, root))
		}
	}
	slices.Sort(files)
	want := []string{"/lib/libc.so.6", "/lib/libdeep.so.3", "/lib/libown.so", "/lib/libtop.so.1", "/lib64/ld-linux-x86-64.so.2", "/usr/bin/crun"}
	if !slices.Equal(files, want) {
		t.Errorf("files\n%q, want\n%q", files, want)
	}
}

func TestAddProgramStatic(t *testing.T) {
	program := writeFile(t, testProgram(t, "", ""), t.TempDir(), "runc")
	var a archive
	if got, err := addProgram(&a, program, nil); err != nil || got != "/usr/bin/runc" {
		t.Fatalf("%s, %v", got, err)
	}
	if got := slices.Sorted(maps.Keys(a.entries)); !slices.Equal(got, []string{"/usr", "/usr/bin", "/usr/bin/runc"}) {
		t.Errorf("entries %q", got)
	}
}

func TestAddProgramErrors(t *testing.T) {
	root := t.TempDir()
	loader := writeFile(t, testProgram(t, "", ""), root, "ld.so")
	for _, test := range []struct {
		program string
		want    string
		class   func(error) bool
	}{
		{root + "/absent", "absent: no such file", errdefs.IsNotFound},
		{writeFile(t, []byte("#!/bin/sh\n"), root, "script"), "is not an ELF file", errdefs.IsInvalidArgument},
		{writeFile(t, testProgram(t, root+"/nold.so", ""), root, "a"), "dynamic loader:", errdefs.IsNotFound},
		{writeFile(t, testProgram(t, loader, "", "libgone.so.1"), root, "b"), "shared library libgone.so.1 is in none of " + root + "/lib", errdefs.IsNotFound},
	} {
		var a archive
		_, err := addProgram(&a, test.program, []string{root + "/lib"})
		if err == nil || !strings.Contains(err.Error(), test.want) || !test.class(err) {
			t.Errorf("%s: error %v, want %q", test.program, err, test.want)
		}
	}
	if err := addAgent(&archive{}, writeFile(t, testProgram(t, loader, ""), root, "agent")); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "CGO_ENABLED=0") {
		t.Errorf("dynamic agent: %v", err)
	}
}

func TestReadLDConf(t *testing.T) {
	root := t.TempDir()
	main := writeFile(t, fmt.Appendf(nil, "# comment\ninclude conf.d/*.conf\n/opt/z # last\nrelative\ninclude %s\n", root+"/ld.so.conf"), root, "ld.so.conf")
	writeFile(t, []byte("/opt/b\n"), root, "conf.d/2.conf")
	writeFile(t, []byte("/opt/a\n"), root, "conf.d/1.conf")
	got := readLDConf(main, 0)
	if want := []string{"/opt/a", "/opt/b", "/opt/z"}; !slices.Equal(got[:min(3, len(got))], want) {
		t.Errorf("got %q, want %q first", got, want)
	}
	if len(got) > 30 {
		t.Errorf("a file that includes itself gave %d directories", len(got))
	}
}
