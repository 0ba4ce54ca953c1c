package main

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
)

// runtimePackages are what crivm runs (QEMU), puts into the guest (crun), and what tests and demo use.
var runtimePackages = []string{
	"busybox", "ca-certificates", "crun", "e2fsprogs", "erofs-utils", "iproute2", "iptables", "mount",
	"qemu-system-common", "qemu-system-x86", "util-linux",
}

// packages is a step that installs what is missing of list.
func (p *provisioner) packages(name string, extra bool, list []string) step {
	return step{
		name: name, extra: extra,
		key:  func(context.Context) (string, error) { return strings.Join(list, " "), nil },
		have: func(ctx context.Context) bool { return len(missing(ctx, list)) == 0 },
		make: func(ctx context.Context) error {
			lacking := missing(ctx, list)
			if len(lacking) == 0 {
				return nil
			}
			fmt.Printf("provision: %-9s installing %s\n", name, strings.Join(lacking, " "))
			if _, err := exec.LookPath("apt-get"); err != nil {
				return fmt.Errorf("no apt-get here: this needs Debian 12 or 13, or install by other means: %s", strings.Join(lacking, " "))
			}
			if os.Geteuid() != 0 {
				return fmt.Errorf("not root, cannot install them; run as root: apt-get install --no-install-recommends %s", strings.Join(lacking, " "))
			}
			if err := p.refreshLists(ctx); err != nil {
				return err
			}
			args := append([]string{"install", "-y", "-q", "--no-install-recommends"}, lacking...)
			return apt(ctx, "", args...)
		},
	}
}

// missing lists the packages that are not installed.
func missing(ctx context.Context, list []string) []string {
	var lacking []string
	for _, name := range list {
		out, err := exec.CommandContext(ctx, "dpkg-query", "-W", "-f", "${Status}", name).Output()
		if err != nil || strings.TrimSpace(string(out)) != "install ok installed" {
			lacking = append(lacking, name)
		}
	}
	return lacking
}

func (p *provisioner) refreshLists(ctx context.Context) error {
	if p.listsFresh {
		return nil
	}
	if err := apt(ctx, "", "update", "-q"); err != nil {
		return fmt.Errorf("package lists (is the network there?): %w", err)
	}
	p.listsFresh = true
	return nil
}

// kernel unpacks the newest cloud kernel of this Debian release. It is fetched once; -force gets a newer.
func (p *provisioner) kernel() step {
	dir := filepath.Join(p.build, "kernel")
	meta := "linux-image-cloud-" + runtime.GOARCH
	return step{
		name: "kernel",
		key: func(context.Context) (string, error) {
			return meta + " of " + debianRelease(), nil
		},
		have: func(context.Context) bool {
			kernels, _ := filepath.Glob(filepath.Join(dir, "boot/vmlinuz-*"))
			modules, _ := filepath.Glob(filepath.Join(dir, "lib/modules/*/kernel"))
			return len(kernels) == 1 && len(modules) == 1
		},
		make: func(ctx context.Context) error {
			name, err := kernelPackage(ctx, meta)
			if err != nil {
				if err := p.refreshLists(ctx); err != nil {
					return err
				}
				if name, err = kernelPackage(ctx, meta); err != nil {
					return err
				}
			}
			fmt.Printf("provision: kernel    %s\n", name)
			temp, err := os.MkdirTemp(p.build, "kernel-")
			if err != nil {
				return err
			}
			defer os.RemoveAll(temp)
			if err := apt(ctx, temp, "download", "-q", name); err != nil {
				// The list may name a version that is no longer served.
				if err := p.refreshLists(ctx); err != nil {
					return err
				}
				if name, err = kernelPackage(ctx, meta); err != nil {
					return err
				}
				if err := apt(ctx, temp, "download", "-q", name); err != nil {
					return err
				}
			}
			files, err := filepath.Glob(filepath.Join(temp, "*.deb"))
			if err != nil || len(files) != 1 {
				return fmt.Errorf("apt-get download %s left %v", name, files)
			}
			unpacked := filepath.Join(temp, "root")
			if err := run(ctx, temp, nil, "dpkg-deb", "-x", files[0], unpacked); err != nil {
				return err
			}
			// From Debian 13 on modules are packaged below /usr/lib.
			if _, err := os.Stat(filepath.Join(unpacked, "lib")); os.IsNotExist(err) {
				if err := os.Symlink("usr/lib", filepath.Join(unpacked, "lib")); err != nil {
					return err
				}
			}
			if err := os.RemoveAll(dir); err != nil {
				return err
			}
			return os.Rename(unpacked, dir)
		},
	}
}

// kernelPackage finds the package that the meta package stands for.
func kernelPackage(ctx context.Context, meta string) (string, error) {
	out, err := exec.CommandContext(ctx, "apt-cache", "depends", "--important", meta).Output()
	if err != nil {
		return "", fmt.Errorf("apt-cache depends %s: %w", meta, err)
	}
	for _, field := range strings.Fields(string(out)) {
		if strings.HasPrefix(field, "linux-image-") && field != meta {
			return field, nil
		}
	}
	return "", fmt.Errorf("apt knows no kernel package behind %s", meta)
}

// debianRelease is "debian 12" or what else runs here.
func debianRelease() string {
	data, err := os.ReadFile("/etc/os-release")
	if err != nil {
		return "an unknown system"
	}
	id, version := "", ""
	for line := range strings.Lines(string(data)) {
		key, value, _ := strings.Cut(strings.TrimSpace(line), "=")
		switch key {
		case "ID":
			id = strings.Trim(value, `"`)
		case "VERSION_ID":
			version = strings.Trim(value, `"`)
		}
	}
	return strings.TrimSpace(id + " " + version)
}

// apt runs apt-get without questions, waiting for another apt to finish.
func apt(ctx context.Context, dir string, args ...string) error {
	options := []string{"-o", "DPkg::Lock::Timeout=300", "-o", "APT::Sandbox::User=root", "-o", "Acquire::Retries=3"}
	return run(ctx, dir, []string{"DEBIAN_FRONTEND=noninteractive"}, "apt-get", append(options, args...)...)
}

// run runs a command and keeps quiet about what it prints unless it fails.
func run(ctx context.Context, dir string, env []string, name string, args ...string) error {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), env...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err := cmd.Run()
	if err == nil {
		return nil
	}
	if ctx.Err() != nil {
		err = ctx.Err()
	}
	return fmt.Errorf("%s %s: %w\n%s", name, strings.Join(args, " "), err, tail(out.Bytes()))
}

// tail is the end of what a command said.
func tail(out []byte) string {
	lines := strings.Split(strings.TrimSpace(string(out)), "\n")
	if len(lines) > 25 {
		lines = append([]string{"..."}, lines[len(lines)-25:]...)
	}
	return "    " + strings.Join(lines, "\n    ")
}

// executable tells whether path is a program.
func executable(path string) bool {
	st, err := os.Stat(path)
	return err == nil && st.Mode().IsRegular() && st.Mode()&0o111 != 0
}

// replace puts the file or directory from in the place of to.
func replace(from, to string) error {
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return err
	}
	if err := os.RemoveAll(to); err != nil && !os.IsNotExist(err) {
		return err
	}
	return os.Rename(from, to)
}
