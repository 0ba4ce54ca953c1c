package server

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/crivm/crivm/server/store"
)

// scratchSerial is how the guest finds the scratch disk.
const scratchSerial = "scratch"

// makeScratch makes the pod's scratch disk: a sparse file with an empty ext4, copied from a template that
// is formatted once per size. The host never reads it after the guest has booted. No journal: what is on it
// dies with the VM, and ext4 with one stays read-only after the host's disk was full. No checksums of metadata for the
// same reason: making a file computes them over some 10 KiB, in a guest whose kernel has no fast code for it loaded.
func (s *Server) makeScratch(ctx context.Context, rec store.Sandbox, size int64) (string, error) {
	template, err := s.diskTemplate(ctx, "scratch", size, "-O", "^has_journal,^resize_inode,^metadata_csum,uninit_bg", "-E", "lazy_itable_init=1,nodiscard")
	if err != nil {
		return "", err
	}
	if err := os.MkdirAll(rec.Dir, 0o711); err != nil {
		return "", err
	}
	path := filepath.Join(rec.Dir, "scratch.img")
	if err := copySparse(path, template); err != nil {
		return "", err
	}
	if err := os.Chown(path, rec.UID, rec.UID); err != nil {
		return "", err
	}
	return path, nil
}

// diskTemplate is an empty ext4 of a size, formatted once for all disks of a kind.
func (s *Server) diskTemplate(ctx context.Context, kind string, size int64, format ...string) (string, error) {
	s.scratchMu.Lock()
	defer s.scratchMu.Unlock()
	path := filepath.Join(s.opts.StateDir, kind+"-"+strconv.FormatInt(size, 10)+".ext4")
	if _, err := os.Stat(path); err == nil {
		return path, nil
	}
	temp := path + ".tmp"
	defer os.Remove(temp)
	f, err := os.OpenFile(temp, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return "", err
	}
	defer f.Close()
	if err := f.Truncate(size); err != nil {
		return "", err
	}
	out, err := exec.CommandContext(ctx, "mkfs.ext4", append([]string{"-q", "-F", "-m", "0"}, append(format, temp)...)...).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("mkfs.ext4: %w: %s", err, out)
	}
	if err := f.Sync(); err != nil {
		return "", err
	}
	return path, os.Rename(temp, path)
}

// copySparse copies the data of a file and leaves its holes.
func copySparse(to, from string) error {
	out, err := os.OpenFile(to, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	return errors.Join(fillSparse(out, from), out.Close())
}

// fillSparse makes an empty file a copy. Where the original has zeros for long the copy has holes.
func fillSparse(out *os.File, from string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	info, err := in.Stat()
	if err != nil {
		return err
	}
	if err := out.Truncate(info.Size()); err != nil {
		return err
	}
	for at := int64(0); at < info.Size(); {
		data, err := unix.Seek(int(in.Fd()), at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("%s: %w", from, err)
		}
		hole, err := unix.Seek(int(in.Fd()), data, unix.SEEK_HOLE)
		if err != nil {
			return fmt.Errorf("%s: %w", from, err)
		}
		if err := copyData(out, in, data, hole); err != nil {
			return err
		}
		at = hole
	}
	return nil
}

// copyData copies a range of a file but for its blocks of zeros.
func copyData(out, in *os.File, from, to int64) error {
	const block = 4096
	buf, zeros := make([]byte, 64*block), make([]byte, block)
	for from < to {
		n, err := in.ReadAt(buf[:min(int64(len(buf)), to-from)], from)
		if n == 0 && err != nil {
			return err
		}
		for at := 0; at < n; at += block {
			part := buf[at:min(at+block, n)]
			if bytes.Equal(part, zeros[:len(part)]) {
				continue
			}
			if _, err := out.WriteAt(part, from+int64(at)); err != nil {
				return err
			}
		}
		from += int64(n)
	}
	return nil
}

// makeOwned makes a directory, with its parents, that belongs to a VMM's uid.
func makeOwned(path string, mode os.FileMode, uid int) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o711); err != nil {
		return err
	}
	if err := os.Mkdir(path, mode); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	return os.Chown(path, uid, uid)
}
