package main

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// check is one promise of a file system. It works in a fresh directory.
type check struct {
	name string
	try  func(dir string) error
}

// posix tries all checks; one that differs is not an error of the program.
func posix(dir string) error {
	unix.Umask(0o022)
	for i, c := range checks {
		at := filepath.Join(dir, fmt.Sprint("posix-", i))
		if err := os.Mkdir(at, 0o755); err != nil {
			return err
		}
		if err := c.try(at); err != nil {
			fmt.Printf("%s differs: %v\n", c.name, strings.ReplaceAll(err.Error(), "\n", "; "))
		} else {
			fmt.Printf("%s ok\n", c.name)
		}
		if err := os.RemoveAll(at); err != nil {
			return err
		}
	}
	return nil
}

func put(path, content string) error { return os.WriteFile(path, []byte(content), 0o644) }

func has(path, content string) error {
	b, err := os.ReadFile(path)
	if err == nil && string(b) != content {
		err = fmt.Errorf("%s has %q, want %q", filepath.Base(path), b, content)
	}
	return err
}

func stat(path string) (st unix.Stat_t, err error) { return st, unix.Lstat(path, &st) }

// want is nil when err is the wanted error.
func want(err, wanted error) error {
	if errors.Is(err, wanted) {
		return nil
	}
	return fmt.Errorf("error is %v, want %v", err, wanted)
}

func all(errs ...error) error { return errors.Join(errs...) }

var checks = []check{
	{"rename-over", func(d string) error {
		err := all(put(d+"/a", "new"), put(d+"/b", "old"), os.Rename(d+"/a", d+"/b"), has(d+"/b", "new"))
		return all(err, want(unix.Access(d+"/a", unix.F_OK), unix.ENOENT))
	}},
	{"rename-over-open", func(d string) error {
		if err := all(put(d+"/a", "new"), put(d+"/b", "old")); err != nil {
			return err
		}
		f, err := os.Open(d + "/b")
		if err != nil {
			return err
		}
		defer f.Close()
		if err := os.Rename(d+"/a", d+"/b"); err != nil {
			return err
		}
		b := make([]byte, 3)
		_, err = f.ReadAt(b, 0)
		if err == nil && string(b) != "old" {
			err = fmt.Errorf("the open file has %q", b)
		}
		return err
	}},
	{"rename-directories", func(d string) error {
		err := all(os.MkdirAll(d+"/full/x", 0o755), os.Mkdir(d+"/empty", 0o755), os.Mkdir(d+"/from", 0o755), put(d+"/file", ""))
		return all(err, want(unix.Rename(d+"/from", d+"/full"), unix.ENOTEMPTY), unix.Rename(d+"/from", d+"/empty"),
			want(unix.Rename(d+"/empty", d+"/file"), unix.ENOTDIR), want(unix.Rename(d+"/file", d+"/full"), unix.EISDIR),
			want(unix.Rename(d+"/full", d+"/full/x/y"), unix.EINVAL))
	}},
	{"rename-exchange", func(d string) error {
		err := all(put(d+"/a", "a"), put(d+"/b", "b"), unix.Renameat2(unix.AT_FDCWD, d+"/a", unix.AT_FDCWD, d+"/b", unix.RENAME_EXCHANGE))
		return all(err, has(d+"/a", "b"), has(d+"/b", "a"))
	}},
	{"rename-noreplace", func(d string) error {
		return all(put(d+"/a", "a"), put(d+"/b", "b"), want(unix.Renameat2(unix.AT_FDCWD, d+"/a", unix.AT_FDCWD, d+"/b", unix.RENAME_NOREPLACE), unix.EEXIST), has(d+"/b", "b"))
	}},
	{"unlink-open", func(d string) error {
		if err := put(d+"/a", "kept"); err != nil {
			return err
		}
		f, err := os.OpenFile(d+"/a", os.O_RDWR, 0)
		if err != nil {
			return err
		}
		defer f.Close()
		if err := os.Remove(d + "/a"); err != nil {
			return err
		}
		if _, err := f.WriteAt([]byte("!"), 4); err != nil {
			return err
		}
		b := make([]byte, 5)
		_, err = f.ReadAt(b, 0)
		info, statErr := f.Stat()
		if err = all(err, statErr); err == nil && (string(b) != "kept!" || info.Size() != 5) {
			err = fmt.Errorf("%q, %d bytes", b, info.Size())
		}
		return err
	}},
	{"exclusive-create", func(d string) error {
		open := func(name string, flags int) error {
			fd, err := unix.Open(d+name, flags, 0o600)
			if err == nil {
				unix.Close(fd)
			}
			return err
		}
		const excl = unix.O_CREAT | unix.O_EXCL | unix.O_WRONLY
		return all(open("/a", excl), want(open("/a", excl), unix.EEXIST), os.Symlink("nowhere", d+"/link"), want(open("/link", excl), unix.EEXIST))
	}},
	{"hard-links", func(d string) error {
		if err := all(put(d+"/a", "a"), os.Link(d+"/a", d+"/b")); err != nil {
			return err
		}
		a, errA := stat(d + "/a")
		b, errB := stat(d + "/b")
		if err := all(errA, errB); err != nil || a.Ino != b.Ino || a.Nlink != 2 {
			return fmt.Errorf("inodes %d and %d, %d links (%v)", a.Ino, b.Ino, a.Nlink, err)
		}
		err := all(put(d+"/b", "changed"), has(d+"/a", "changed"), os.Remove(d+"/a"), has(d+"/b", "changed"))
		if b, errB = stat(d + "/b"); b.Nlink != 1 {
			return fmt.Errorf("%d links (%v)", b.Nlink, all(err, errB))
		}
		return all(err, os.Mkdir(d+"/dir", 0o755), want(unix.Link(d+"/dir", d+"/dir2"), unix.EPERM))
	}},
	{"symbolic-links", func(d string) error {
		err := all(os.Symlink("loop", d+"/loop"), os.Symlink(strings.Repeat("x", 4000), d+"/long"))
		_, statErr := os.Stat(d + "/loop")
		err = all(err, want(statErr, unix.ELOOP))
		to, linkErr := os.Readlink(d + "/long")
		if len(to) != 4000 {
			err = all(err, fmt.Errorf("target has %d bytes", len(to)))
		}
		return all(err, linkErr)
	}},
	{"truncate", func(d string) error {
		err := all(put(d+"/a", "abcdef"), os.Truncate(d+"/a", 3), has(d+"/a", "abc"), os.Truncate(d+"/a", 6), has(d+"/a", "abc\x00\x00\x00"))
		f, openErr := os.Open(d + "/a")
		if openErr != nil {
			return openErr
		}
		defer f.Close()
		return all(err, want(f.Truncate(1), unix.EINVAL))
	}},
	{"fsync", func(d string) error {
		f, err := os.Create(d + "/a")
		if err != nil {
			return err
		}
		defer f.Close()
		_, err = f.WriteString("x")
		dir, dirErr := os.Open(d)
		if dirErr != nil {
			return dirErr
		}
		defer dir.Close()
		return all(err, f.Sync(), unix.Fdatasync(int(f.Fd())), dir.Sync())
	}},
	{"sparse", func(d string) error {
		f, err := os.Create(d + "/a")
		if err != nil {
			return err
		}
		defer f.Close()
		if _, err := f.WriteAt([]byte("end"), 8<<20); err != nil {
			return err
		}
		if err := f.Sync(); err != nil {
			return err
		}
		st, err := stat(d + "/a")
		if err != nil || st.Size != 8<<20+3 || st.Blocks*512 > 1<<20 {
			return fmt.Errorf("%d bytes in %d blocks (%v)", st.Size, st.Blocks, err)
		}
		at, err := unix.Seek(int(f.Fd()), 0, unix.SEEK_DATA)
		if err != nil || at < 4<<20 {
			return fmt.Errorf("data starts at %d (%v)", at, err)
		}
		return nil
	}},
	{"punch-hole", func(d string) error {
		f, err := os.Create(d + "/a")
		if err != nil {
			return err
		}
		defer f.Close()
		_, err = f.Write(bytes.Repeat([]byte("x"), 128<<10))
		err = all(err, unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, 64<<10))
		b := make([]byte, 1)
		_, readErr := f.ReadAt(b, 100)
		if b[0] != 0 {
			readErr = errors.New("the hole has data")
		}
		return all(err, readErr)
	}},
	{"modes", func(d string) error {
		if err := put(d+"/a", ""); err != nil {
			return err
		}
		for _, mode := range []uint32{0, 0o600, 0o4755, 0o2755, 0o1777} {
			err := unix.Chmod(d+"/a", mode)
			if st, statErr := stat(d + "/a"); err != nil || st.Mode&0o7777 != mode {
				return fmt.Errorf("mode is %o, want %o (%v)", st.Mode&0o7777, mode, all(err, statErr))
			}
		}
		return nil
	}},
	{"setgid-directory", func(d string) error {
		err := all(os.Mkdir(d+"/s", 0o755), os.Chown(d+"/s", 0, 1234), unix.Chmod(d+"/s", 0o2775), put(d+"/s/a", ""), os.Mkdir(d+"/s/d", 0o755))
		a, errA := stat(d + "/s/a")
		b, errB := stat(d + "/s/d")
		if err = all(err, errA, errB); err != nil || a.Gid != 1234 || b.Gid != 1234 || b.Mode&unix.S_ISGID == 0 {
			return fmt.Errorf("groups %d and %d, mode %o (%v)", a.Gid, b.Gid, b.Mode, err)
		}
		return nil
	}},
	{"owners", func(d string) error {
		err := all(put(d+"/a", ""), unix.Chmod(d+"/a", 0o4755), os.Chown(d+"/a", 1000, 2000))
		st, statErr := stat(d + "/a")
		if err = all(err, statErr); err != nil || st.Uid != 1000 || st.Gid != 2000 || st.Mode&unix.S_ISUID != 0 {
			return fmt.Errorf("%d:%d %o (%v)", st.Uid, st.Gid, st.Mode, err)
		}
		return nil
	}},
	{"times", func(d string) error {
		if err := put(d+"/a", ""); err != nil {
			return err
		}
		at := time.Date(2001, 2, 3, 4, 5, 6, 123456789, time.UTC)
		err := os.Chtimes(d+"/a", at, at)
		if st, statErr := stat(d + "/a"); err != nil || st.Mtim.Nano() != at.UnixNano() || st.Atim.Nano() != at.UnixNano() {
			return fmt.Errorf("mtime %d, atime %d (%v)", st.Mtim.Nano(), st.Atim.Nano(), all(err, statErr))
		}
		if err := put(d+"/a", "x"); err != nil {
			return err
		}
		if st, statErr := stat(d + "/a"); statErr != nil || time.Since(time.Unix(0, st.Mtim.Nano())) > time.Hour {
			return fmt.Errorf("after a write mtime is %s (%v)", time.Unix(0, st.Mtim.Nano()), statErr)
		}
		return nil
	}},
	{"locks-fcntl", func(d string) error {
		return locked(d, func(f *os.File) error {
			return unix.FcntlFlock(f.Fd(), unix.F_SETLK, &unix.Flock_t{Type: unix.F_WRLCK})
		})
	}},
	{"locks-ofd", func(d string) error {
		return locked(d, func(f *os.File) error {
			return unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_WRLCK})
		})
	}},
	{"locks-flock", func(d string) error {
		if err := put(d+"/l", ""); err != nil {
			return err
		}
		a, errA := os.Open(d + "/l")
		b, errB := os.Open(d + "/l")
		if err := all(errA, errB); err != nil {
			return err
		}
		defer a.Close()
		defer b.Close()
		return all(unix.Flock(int(a.Fd()), unix.LOCK_EX), want(unix.Flock(int(b.Fd()), unix.LOCK_EX|unix.LOCK_NB), unix.EWOULDBLOCK))
	}},
	{"mmap-shared", func(d string) error { return mapped(d, unix.MAP_SHARED) }},
	{"mmap-private", func(d string) error { return mapped(d, unix.MAP_PRIVATE) }},
	{"append", func(d string) error {
		open := func() (*os.File, error) { return os.OpenFile(d+"/a", os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644) }
		a, errA := open()
		b, errB := open()
		if err := all(errA, errB); err != nil {
			return err
		}
		defer a.Close()
		defer b.Close()
		for range 3 {
			if _, err := a.WriteString("a"); err != nil {
				return err
			}
			if _, err := b.WriteString("b"); err != nil {
				return err
			}
		}
		return has(d+"/a", "ababab")
	}},
	{"names", func(d string) error {
		long := strings.Repeat("n", 255)
		err := all(put(d+"/"+long, "x"), has(d+"/"+long, "x"), want(unix.Access(d+"/"+long+"n", unix.F_OK), unix.ENAMETOOLONG))
		for _, name := range []string{" ", "\n", "\xff\xfe", "…", "-", "a:b", "*"} {
			err = all(err, put(d+"/"+name, name), has(d+"/"+name, name))
		}
		return err
	}},
	{"case", func(d string) error { return all(put(d+"/a", "1"), put(d+"/A", "2"), has(d+"/a", "1")) }},
	{"readdir", func(d string) error {
		for i := range 300 {
			if err := put(fmt.Sprint(d, "/", i), ""); err != nil {
				return err
			}
		}
		list, err := os.ReadDir(d)
		if err == nil && len(list) != 300 {
			err = fmt.Errorf("%d entries", len(list))
		}
		return err
	}},
	{"readdir-while-deleting", func(d string) error {
		for i := range 100 {
			if err := put(fmt.Sprint(d, "/", i), ""); err != nil {
				return err
			}
		}
		f, err := os.Open(d)
		if err != nil {
			return err
		}
		defer f.Close()
		seen := 0
		for {
			names, err := f.Readdirnames(10)
			for _, n := range names {
				seen++
				if err := os.Remove(d + "/" + n); err != nil {
					return err
				}
			}
			if len(names) == 0 || err != nil {
				break
			}
		}
		if seen != 100 {
			return fmt.Errorf("%d of 100 entries seen", seen)
		}
		return nil
	}},
	{"rmdir", func(d string) error {
		return all(os.MkdirAll(d+"/a/b", 0o755), want(unix.Rmdir(d+"/a"), unix.ENOTEMPTY), unix.Rmdir(d+"/a/b"), unix.Rmdir(d+"/a"), want(unix.Rmdir(d+"/a"), unix.ENOENT))
	}},
	{"permissions", func(d string) error {
		err := all(put(d+"/secret", "x"), unix.Chmod(d+"/secret", 0o600), os.Mkdir(d+"/closed", 0o700), put(d+"/open", "x"))
		return all(err, asUser(1000, func() error {
			_, readErr := os.ReadFile(d + "/secret")
			_, openErr := os.ReadFile(d + "/open")
			return all(want(readErr, unix.EACCES), openErr, want(put(d+"/open", "y"), unix.EACCES), want(os.Mkdir(d+"/closed/x", 0o755), unix.EACCES), want(os.Remove(d+"/open"), unix.EACCES))
		}))
	}},
	{"sticky", func(d string) error {
		err := all(os.Mkdir(d+"/tmp", 0o755), unix.Chmod(d+"/tmp", 0o1777), put(d+"/tmp/mine", ""))
		return all(err, asUser(1000, func() error {
			return all(put(d+"/tmp/theirs", ""), os.Remove(d+"/tmp/theirs"), want(os.Remove(d+"/tmp/mine"), unix.EPERM))
		}))
	}},
	{"suid-cleared-by-write", func(d string) error {
		err := all(put(d+"/a", "x"), unix.Chmod(d+"/a", 0o4777))
		err = all(err, asUser(1000, func() error {
			f, err := os.OpenFile(d+"/a", os.O_WRONLY, 0)
			if err != nil {
				return err
			}
			defer f.Close()
			_, err = f.WriteString("y")
			return err
		}))
		if st, statErr := stat(d + "/a"); st.Mode&unix.S_ISUID != 0 {
			err = all(err, statErr, errors.New("it is still setuid"))
		}
		return err
	}},
	{"fifo", func(d string) error {
		err := unix.Mkfifo(d+"/f", 0o600)
		st, statErr := stat(d + "/f")
		if err = all(err, statErr); err == nil && st.Mode&unix.S_IFMT != unix.S_IFIFO {
			err = fmt.Errorf("mode is %o", st.Mode)
		}
		return err
	}},
	{"socket", func(d string) error {
		fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		client, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM, 0)
		if err != nil {
			return err
		}
		defer unix.Close(client)
		at := &unix.SockaddrUnix{Name: d + "/s"}
		return all(unix.Bind(fd, at), unix.Listen(fd, 1), unix.Connect(client, at))
	}},
	{"device-node", func(d string) error {
		if err := unix.Mknod(d+"/null", unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))); err != nil {
			return err
		}
		return put(d+"/null", "gone")
	}},
	{"tmpfile", func(d string) error {
		fd, err := unix.Open(d, unix.O_TMPFILE|unix.O_RDWR, 0o600)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		_, err = unix.Write(fd, []byte("named"))
		return all(err, unix.Linkat(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", fd), unix.AT_FDCWD, d+"/a", unix.AT_SYMLINK_FOLLOW), has(d+"/a", "named"))
	}},
	{"xattr", func(d string) error {
		b := make([]byte, 8)
		err := all(put(d+"/a", ""), unix.Setxattr(d+"/a", "user.note", []byte("value"), 0))
		n, getErr := unix.Getxattr(d+"/a", "user.note", b)
		if err = all(err, getErr); err == nil && string(b[:n]) != "value" {
			err = fmt.Errorf("value is %q", b[:n])
		}
		return err
	}},
	{"acl", func(d string) error { // user 1000 may read what is nobody's else
		entry := func(tag, perm uint16, id uint32) []byte {
			return binary.LittleEndian.AppendUint32(binary.LittleEndian.AppendUint16(binary.LittleEndian.AppendUint16(nil, tag), perm), id)
		}
		const none = ^uint32(0)
		acl := slices.Concat([]byte{2, 0, 0, 0}, entry(1, 6, none), entry(2, 4, 1000), entry(4, 0, none), entry(0x10, 4, none), entry(0x20, 0, none))
		err := all(put(d+"/a", ""), unix.Setxattr(d+"/a", "system.posix_acl_access", acl, 0))
		b := make([]byte, 64)
		n, getErr := unix.Getxattr(d+"/a", "system.posix_acl_access", b)
		if err = all(err, getErr); err == nil && !bytes.Equal(b[:n], acl) {
			err = fmt.Errorf("the list is %x", b[:n])
		}
		if st, statErr := stat(d + "/a"); err == nil && (statErr != nil || st.Mode&0o777 != 0o640) {
			err = fmt.Errorf("mode is %o (%v), want the mask as the group's", st.Mode, statErr)
		}
		return err
	}},
	{"direct-io", func(d string) error {
		fd, err := unix.Open(d+"/a", unix.O_CREAT|unix.O_RDWR|unix.O_DIRECT, 0o600)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		page, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_ANON|unix.MAP_PRIVATE)
		if err != nil {
			return err
		}
		defer unix.Munmap(page)
		_, err = unix.Pwrite(fd, page, 0)
		_, readErr := unix.Pread(fd, page, 0)
		return all(err, readErr)
	}},
	{"copy-file-range", func(d string) error {
		if err := put(d+"/a", "copied"); err != nil {
			return err
		}
		a, errA := os.Open(d + "/a")
		b, errB := os.Create(d + "/b")
		if err := all(errA, errB); err != nil {
			return err
		}
		defer a.Close()
		defer b.Close()
		_, err := unix.CopyFileRange(int(a.Fd()), nil, int(b.Fd()), nil, 6, 0)
		return all(err, has(d+"/b", "copied"))
	}},
	{"text-busy", func(d string) error {
		self, err := os.ReadFile("/proc/self/exe")
		if err != nil {
			return err
		}
		if err := os.WriteFile(d+"/program", self, 0o755); err != nil {
			return err
		}
		f, err := os.OpenFile(d+"/program", os.O_WRONLY, 0)
		if err != nil {
			return err
		}
		defer f.Close()
		return want(exec.Command(d+"/program").Run(), unix.ETXTBSY)
	}},
	{"inotify", func(d string) error {
		fd, err := unix.InotifyInit1(unix.IN_NONBLOCK)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		if _, err := unix.InotifyAddWatch(fd, d, unix.IN_CREATE|unix.IN_MOVED_TO); err != nil {
			return err
		}
		b := make([]byte, 4096)
		err = put(d+"/a", "")
		n, readErr := unix.Read(fd, b)
		if err = all(err, readErr); err == nil && n <= 0 {
			err = errors.New("no event")
		}
		return err
	}},
	{"directory-links", func(d string) error {
		err := all(os.Mkdir(d+"/p", 0o755), os.Mkdir(d+"/p/a", 0o755), os.Mkdir(d+"/p/b", 0o755))
		st, statErr := stat(d + "/p")
		if err = all(err, statErr); err == nil && st.Nlink != 4 {
			err = fmt.Errorf("%d links", st.Nlink)
		}
		return err
	}},
	{"deep", func(d string) error {
		at, err := os.Open(d)
		if err != nil {
			return err
		}
		defer func() { at.Close() }()
		for range 40 {
			if err := unix.Mkdirat(int(at.Fd()), strings.Repeat("d", 100), 0o755); err != nil {
				return err
			}
			fd, err := unix.Openat(int(at.Fd()), strings.Repeat("d", 100), unix.O_DIRECTORY|unix.O_RDONLY, 0)
			if err != nil {
				return err
			}
			at.Close()
			at = os.NewFile(uintptr(fd), "deep")
		}
		return nil
	}},
}

// locked takes a lock and has another process find that it is taken.
func locked(d string, lock func(*os.File) error) error {
	f, err := os.Create(d + "/l")
	if err != nil {
		return err
	}
	defer f.Close()
	if err := lock(f); err != nil {
		return err
	}
	if out, err := exec.Command("/proc/self/exe", "lock", d+"/l").CombinedOutput(); err != nil {
		return fmt.Errorf("another process: %w: %s", err, out)
	}
	return nil
}

// tryLock succeeds when somebody else holds the lock.
func tryLock(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	return want(unix.FcntlFlock(f.Fd(), unix.F_SETLK, &unix.Flock_t{Type: unix.F_WRLCK}), unix.EAGAIN)
}

func mapped(d string, kind int) error {
	if err := put(d+"/m", strings.Repeat("x", 4096)); err != nil {
		return err
	}
	f, err := os.OpenFile(d+"/m", os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	view, err := unix.Mmap(int(f.Fd()), 0, 4096, unix.PROT_READ|unix.PROT_WRITE, kind)
	if err != nil {
		return fmt.Errorf("mmap: %w", err)
	}
	defer unix.Munmap(view)
	view[0] = 'y'
	b := make([]byte, 1)
	_, err = f.ReadAt(b, 0)
	if shared := kind == unix.MAP_SHARED; err == nil && (b[0] == 'y') != shared {
		err = fmt.Errorf("the file has %q", b)
	}
	return err
}

// asUser runs f with the rights of another user, on the calling thread.
func asUser(uid int, f func() error) error {
	if err := unix.Setresuid(-1, uid, -1); err != nil { // of all threads
		return err
	}
	err := f()
	return all(err, unix.Setresuid(-1, 0, -1))
}
