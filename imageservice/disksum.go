package imageservice

import (
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// A disk that was built in this boot of the host is what was written. After a power cut the file system may give back
// something else, and bits rot. So every disk has a sum beside it, DiskDir/<id>.sum, made when it was built, and is read
// in full and compared when it is first used after a boot. A disk without a sum, as when the power went before it was
// made, is built anew.
//
// Which disks have been compared in this boot is noted below RunRoot, which does not survive one, with the boot ID all
// the same.
const sumSuffix = ".sum"

func (s *Service) sumPath(id string) string { return filepath.Join(s.config.DiskDir, id+sumSuffix) }

func (s *Service) notePath(id string) string {
	return filepath.Join(s.config.RunRoot, "crivm-disks", id)
}

// usable tells whether a disk is there and can be trusted. What is fast comes first; with compare set, the disk is read
// where that is needed.
func (s *Service) usable(ctx context.Context, id string, compare bool) error {
	path := s.diskPath(id)
	if _, err := checkDisk(path, id); err != nil {
		return err
	}
	note, err := diskNote(path)
	if err != nil {
		return err
	}
	if text, err := os.ReadFile(s.notePath(id)); err == nil && string(text) == note {
		return nil
	}
	if !compare {
		return errors.New("not compared since the host was booted")
	}
	want, err := os.ReadFile(s.sumPath(id))
	if err != nil {
		return fmt.Errorf("without a sum it cannot be trusted after a boot: %w", err)
	}
	got, err := diskSum(ctx, path)
	if err != nil {
		return err
	}
	if got != string(want) {
		return fmt.Errorf("the disk has the sum %q instead of %q", got, want)
	}
	return s.trust(id, note)
}

// trust notes that a disk is what it should be.
func (s *Service) trust(id, note string) error {
	if err := os.MkdirAll(filepath.Dir(s.notePath(id)), 0o700); err != nil {
		return err
	}
	return os.WriteFile(s.notePath(id), []byte(note), 0o600)
}

// diskNote is which file was found good, and in which boot.
func diskNote(path string) (string, error) {
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", err
	}
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return "", err
	}
	return fmt.Sprintf("%s %d %d %d.%09d", strings.TrimSpace(string(boot)), st.Ino, st.Size, st.Mtim.Sec, st.Mtim.Nsec), nil
}

// diskSum reads a disk in full.
func diskSum(ctx context.Context, path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	sum := crc32.New(crc32.MakeTable(crc32.Castagnoli))
	buf, n := make([]byte, 1<<20), 0
	for {
		read, err := f.Read(buf)
		sum.Write(buf[:read])
		n += read
		if errors.Is(err, io.EOF) {
			break
		}
		if err = errors.Join(err, ctx.Err()); err != nil {
			return "", fmt.Errorf("%s: %w", path, err)
		}
	}
	return fmt.Sprintf("crc32c %08x %d\n", sum.Sum32(), n), nil
}

// sumBuilt trusts a disk that was just built, and makes its sum beside what goes on: nobody waits for it.
func (s *Service) sumBuilt(id string) {
	path := s.diskPath(id)
	note, err := diskNote(path)
	if err == nil {
		err = s.trust(id, note)
	}
	if err != nil {
		slog.Warn("noting that a disk was built", "image", id, "error", err)
	}
	s.sums.Go(func() {
		ctx := s.disks.life
		if s.building.Acquire(ctx, 1) != nil {
			return
		}
		defer s.building.Release(1)
		if err := s.writeSum(ctx, id, path); err != nil && ctx.Err() == nil && !errors.Is(err, os.ErrNotExist) { // the image may be gone by now
			slog.Warn("sum of a disk; it is built anew after the next boot", "image", id, "error", err)
		}
	})
}

func (s *Service) writeSum(ctx context.Context, id, path string) error {
	sum, err := diskSum(ctx, path)
	if err != nil {
		return err
	}
	f, err := os.CreateTemp(s.config.DiskDir, id+".*"+tempSuffix)
	if err != nil {
		return err
	}
	_, err = f.WriteString(sum)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	if err := os.Rename(f.Name(), s.sumPath(id)); err != nil {
		return err
	}
	if !s.store.Exists(id) { // RemoveImage deletes the image first and then the files, so one of the two sees the other
		return s.removeDisk(id)
	}
	return nil
}

// removeDisk removes a disk and what belongs to it. Idempotent.
func (s *Service) removeDisk(id string) error {
	var errs []error
	for _, path := range []string{s.diskPath(id), s.sumPath(id), s.notePath(id)} {
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}
