package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// perDirectory is how many small files are in one directory, as in a source tree.
const perDirectory = 50

// dropCaches makes what comes next read from the disk. Only a privileged container may.
func dropCaches() error {
	unix.Sync()
	return os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0)
}

func timed(what string, f func() error) error {
	start := time.Now()
	if err := f(); err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	fmt.Printf("%s %d\n", what, time.Since(start).Nanoseconds())
	return nil
}

// small times what builds and package managers do. Each step ends when its result is on the disk: with sync(2), as a
// container's root says that it has synced when the disk below it has not (a volatile overlay).
func small(dir string, files int) error {
	top := filepath.Join(dir, "small")
	content := make([]byte, 2048)
	each := func(f func(path string) error) error {
		for i := range files {
			if err := f(filepath.Join(top, fmt.Sprint(i/perDirectory), fmt.Sprint("file-", i))); err != nil {
				return err
			}
		}
		return nil
	}
	err := timed("create", func() error {
		for i := 0; i < files; i += perDirectory {
			if err := os.MkdirAll(filepath.Join(top, fmt.Sprint(i/perDirectory)), 0o755); err != nil {
				return err
			}
		}
		defer unix.Sync()
		return each(func(path string) error { return os.WriteFile(path, content, 0o644) })
	})
	if err == nil {
		err = dropCaches()
	}
	if err == nil {
		err = timed("stat", func() error {
			return each(func(path string) error { _, err := os.Lstat(path); return err })
		})
	}
	if err == nil {
		err = dropCaches()
	}
	if err == nil {
		err = timed("read", func() error {
			return each(func(path string) error { _, err := os.ReadFile(path); return err })
		})
	}
	if err == nil {
		err = timed("delete", func() error { defer unix.Sync(); return os.RemoveAll(top) })
	}
	return err
}

// stream times one large file.
func stream(dir string, mib int) error {
	path := filepath.Join(dir, "stream")
	defer os.Remove(path)
	block := make([]byte, 1<<20)
	for i := range block {
		block[i] = byte(i * 7)
	}
	err := timed("write", func() error {
		f, err := os.Create(path)
		if err != nil {
			return err
		}
		defer f.Close()
		for range mib {
			if _, err := f.Write(block); err != nil {
				return err
			}
		}
		return f.Sync()
	})
	if err == nil {
		err = dropCaches()
	}
	if err != nil {
		return err
	}
	return timed("read", func() error {
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		defer f.Close()
		n, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{f}, block)
		if err == nil && n != int64(mib)<<20 {
			err = fmt.Errorf("%d bytes", n)
		}
		return err
	})
}

// entries makes very many names in one directory.
func entries(dir string, files int) error {
	top := filepath.Join(dir, "entries")
	if err := os.Mkdir(top, 0o755); err != nil {
		return err
	}
	defer os.RemoveAll(top)
	first := filepath.Join(top, "0")
	if err := os.WriteFile(first, nil, 0o644); err != nil {
		return err
	}
	linked, from := 1, first
	for i := 1; i < files; i++ { // hard links: names without inodes
		err := os.Link(from, filepath.Join(top, fmt.Sprint(i)))
		if errors.Is(err, unix.EMLINK) {
			from = filepath.Join(top, fmt.Sprint(i))
			err = os.WriteFile(from, nil, 0o644)
		}
		if errors.Is(err, unix.ENOSPC) {
			break
		}
		if err != nil {
			return err
		}
		linked++
	}
	list, err := os.ReadDir(top)
	if err == nil && len(list) != linked {
		err = fmt.Errorf("%d names made, %d listed", linked, len(list))
	}
	if err == nil {
		fmt.Println("entries", linked)
	}
	return err
}

// race swaps a directory for a symbolic link to the root of the host's tree while another goroutine opens files through
// it. Whatever it reads must be the container's.
func race(dir string, rounds int) error {
	if err := os.MkdirAll(filepath.Join(dir, "swap", "etc"), 0o755); err != nil {
		return err
	}
	if err := errors.Join(os.WriteFile(filepath.Join(dir, "swap/etc/outside"), []byte("inside"), 0o644), os.Symlink("../../..", filepath.Join(dir, "up"))); err != nil {
		return err
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for range rounds {
			unix.Renameat2(unix.AT_FDCWD, filepath.Join(dir, "swap"), unix.AT_FDCWD, filepath.Join(dir, "up"), unix.RENAME_EXCHANGE)
		}
	}()
	for {
		select {
		case <-done:
			fmt.Println("race ok")
			return nil
		default:
		}
		for _, path := range []string{"swap/etc/outside", "up/etc/outside", "swap/outside", "up/outside", "swap/../outside"} {
			if b, err := os.ReadFile(filepath.Join(dir, path)); err == nil && string(b) != "inside" {
				return fmt.Errorf("%s is %q", path, b)
			}
		}
	}
}
