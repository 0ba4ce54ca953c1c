package main

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// maxData bounds the file that data works on.
const maxData = 512 << 10

// model is the file as it has to be.
type model struct {
	content []byte
	file    *os.File
	path    string
	rng     *rand.Rand
}

// data does random things to a file and to a model of it and compares them.
func data(dir string, seed uint64, ops int) error {
	m := &model{path: filepath.Join(dir, fmt.Sprintf("data-%d", seed)), rng: rand.New(rand.NewPCG(seed, 1))}
	defer os.Remove(m.path)
	if err := m.open(os.O_CREATE | os.O_EXCL); err != nil {
		return err
	}
	defer func() { m.file.Close() }()
	for i := range ops {
		if i == ops/10 {
			fmt.Println("under way")
		}
		name, err := m.step()
		if err != nil {
			return fmt.Errorf("seed %d, step %d, %s: %w", seed, i, name, err)
		}
	}
	if err := m.compare(0, len(m.content)); err != nil {
		return err
	}
	fmt.Println("data ok")
	return nil
}

func (m *model) open(flags int) (err error) {
	m.file, err = os.OpenFile(m.path, flags|os.O_RDWR, 0o600)
	return err
}

// span is a random range below a limit.
func (m *model) span(limit int) (at, n int) {
	at = m.rng.IntN(limit)
	return at, 1 + m.rng.IntN(min(limit-at, 16<<10))
}

func (m *model) grow(to int) {
	if to > len(m.content) {
		m.content = append(m.content, make([]byte, to-len(m.content))...)
	}
}

func (m *model) step() (string, error) {
	switch k := m.rng.IntN(100); {
	case k < 40:
		at, n := m.span(maxData)
		chunk := make([]byte, n)
		start, step := m.rng.Uint32(), byte(m.rng.Uint32()|1)
		for i := range chunk {
			chunk[i] = byte(start) + byte(i)*step + byte(i>>8)
		}
		m.grow(at + n)
		copy(m.content[at:], chunk)
		_, err := m.file.WriteAt(chunk, int64(at))
		return "write", err
	case k < 75:
		if len(m.content) == 0 {
			return "read", nil
		}
		at, n := m.span(len(m.content))
		return "read", m.compare(at, n)
	case k < 82:
		to := m.rng.IntN(maxData)
		if to < len(m.content) {
			m.content = m.content[:to:to]
		}
		m.grow(to)
		return "truncate", m.file.Truncate(int64(to))
	case k < 88:
		if len(m.content) == 0 {
			return "punch", nil
		}
		at, n := m.span(len(m.content))
		clear(m.content[at : at+n])
		return "punch", unix.Fallocate(int(m.file.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, int64(at), int64(n))
	case k < 91:
		at, n := m.span(maxData)
		m.grow(at + n)
		return "allocate", unix.Fallocate(int(m.file.Fd()), 0, int64(at), int64(n))
	case k < 94:
		return "mapped read", m.mapped()
	case k < 96:
		return "fsync", m.file.Sync()
	case k < 98:
		if err := m.file.Close(); err != nil {
			return "close", err
		}
		return "open", m.open(0)
	default:
		moved := m.path + ".moved"
		if err := os.Rename(m.path, moved); err != nil {
			return "rename", err
		}
		return "rename", os.Rename(moved, m.path)
	}
}

func (m *model) compare(at, n int) error {
	got := make([]byte, n)
	if _, err := m.file.ReadAt(got, int64(at)); n > 0 && err != nil {
		return err
	}
	return m.same(got, at)
}

func (m *model) same(got []byte, at int) error {
	want := m.content[at : at+len(got)]
	if bytes.Equal(got, want) {
		return nil
	}
	for i := range got {
		if got[i] != want[i] {
			return fmt.Errorf("byte %d is %#x, want %#x; the file has %d bytes", at+i, got[i], want[i], len(m.content))
		}
	}
	return nil
}

// mapped compares the whole file through a private mapping, which every file system here can do.
func (m *model) mapped() error {
	if len(m.content) == 0 {
		return nil
	}
	info, err := m.file.Stat()
	if err != nil {
		return err
	}
	if info.Size() != int64(len(m.content)) {
		return fmt.Errorf("size is %d, want %d", info.Size(), len(m.content))
	}
	view, err := unix.Mmap(int(m.file.Fd()), 0, len(m.content), unix.PROT_READ, unix.MAP_PRIVATE)
	if err != nil {
		return err
	}
	defer unix.Munmap(view)
	return m.same(view, 0)
}
