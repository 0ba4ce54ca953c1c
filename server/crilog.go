package server

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"
)

// The log format of CRI: "<RFC 3339 time with ns> <stdout|stderr> <P|F> <line>\n". P marks a part of a
// line that goes on in the next entry of the same stream, or that ended without a newline.
const (
	tagPartial = "P"
	tagFull    = "F"
)

// logFile is the log of one container, written by its streams in turn. Beside the log it keeps a position
// record: how far each stream has been written, and how long the log was then. A daemon that died between
// writing and recording finds the log longer than recorded, cuts it back, and takes the bytes from the agent
// again, which keeps them until they are acknowledged: every line is there exactly once.
type logFile struct {
	path, positionPath string

	mu       sync.Mutex
	file     *os.File
	position *os.File
	at       logPosition
}

// logPosition is what is on disk of a log's state.
type logPosition struct {
	Offsets [2]uint64 // of stdout and stderr: all before it is in the log
	Size    int64     // of the log file
	Inode   uint64    // of the log file, which may have been rotated meanwhile
}

const positionSize = 32

// openLog opens the log for appending, the rest of an earlier daemon's writing cut off.
func openLog(path, positionPath string) (_ *logFile, retErr error) {
	l := &logFile{path: path, positionPath: positionPath}
	defer func() {
		if retErr != nil {
			l.close()
		}
	}()
	if err := os.MkdirAll(filepath.Dir(positionPath), 0o711); err != nil {
		return nil, err
	}
	var err error
	if l.position, err = os.OpenFile(positionPath, os.O_RDWR|os.O_CREATE, 0o600); err != nil {
		return nil, err
	}
	known, err := l.readPosition()
	if err != nil {
		return nil, err
	}
	if err := l.open(os.O_APPEND); err != nil {
		return nil, err
	}
	size, inode := l.at.Size, l.at.Inode
	l.at = known
	switch {
	case path == os.DevNull, known.Inode == 0: // new
	case known.Inode == inode && size > known.Size:
		if err := l.file.Truncate(known.Size); err != nil {
			return nil, fmt.Errorf("cutting %s back to what was recorded: %w", path, err)
		}
		size = known.Size
	case known.Inode != inode:
		if err := cutRotated(path, known); err != nil {
			return nil, err
		}
	}
	l.at.Size, l.at.Inode = size, inode
	return l, l.writePosition()
}

// cutRotated cuts a log back to what was recorded that was renamed after the last writing to it and never reopened.
// kubelet renames within the directory. A log that is not there any more has no line to be doubled.
func cutRotated(path string, known logPosition) error {
	entries, err := os.ReadDir(filepath.Dir(path))
	if err != nil {
		return err
	}
	for _, e := range entries {
		info, err := e.Info()
		if err != nil || !info.Mode().IsRegular() || info.Sys().(*syscall.Stat_t).Ino != known.Inode || info.Size() <= known.Size {
			continue
		}
		// Opened before it is looked at again, and not followed: by now the name may be another file's.
		f, err := os.OpenFile(filepath.Join(filepath.Dir(path), e.Name()), os.O_WRONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
		if err != nil {
			return fmt.Errorf("log that was rotated: %w", err)
		}
		if info, err = f.Stat(); err == nil && info.Sys().(*syscall.Stat_t).Ino == known.Inode {
			err = f.Truncate(known.Size)
		}
		if err = errors.Join(err, f.Close()); err != nil {
			return fmt.Errorf("cutting %s back to what was recorded: %w", f.Name(), err)
		}
	}
	return nil
}

// open (re)opens the file at path; flags besides O_WRONLY|O_CREATE.
func (l *logFile) open(flags int) error {
	f, err := os.OpenFile(l.path, os.O_WRONLY|os.O_CREATE|flags, 0o640)
	if err != nil {
		return err
	}
	info, err := f.Stat()
	if err != nil {
		return errors.Join(err, f.Close())
	}
	if l.file != nil {
		l.file.Close()
	}
	l.file, l.at.Size, l.at.Inode = f, info.Size(), info.Sys().(*syscall.Stat_t).Ino
	return nil
}

// reopen goes over to a new file at path after a rotation.
func (l *logFile) reopen() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.file == nil {
		return os.ErrClosed
	}
	if err := l.open(os.O_APPEND); err != nil {
		return err
	}
	return l.writePosition()
}

// write appends entries of one stream and records that the stream has been written up to offset.
func (l *logFile) write(entries []byte, stream int, offset uint64) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.file == nil {
		return os.ErrClosed
	}
	n, err := l.file.Write(entries)
	if err != nil {
		if n > 0 { // no half entry stays before the retry
			err = errors.Join(err, l.file.Truncate(l.at.Size))
		}
		return err
	}
	before := l.at
	l.at.Size += int64(n)
	l.at.Offsets[stream] = offset
	if err := l.writePosition(); err != nil { // what is not recorded must not be there twice after the retry
		l.at = before
		return errors.Join(fmt.Errorf("position of the log: %w", err), l.file.Truncate(before.Size))
	}
	return nil
}

func (l *logFile) offset(stream int) uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.at.Offsets[stream]
}

func (l *logFile) close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	var errs []error
	for _, f := range []*os.File{l.file, l.position} {
		if f != nil {
			errs = append(errs, f.Close())
		}
	}
	l.file, l.position = nil, nil
	return errors.Join(errs...)
}

func (l *logFile) readPosition() (p logPosition, err error) {
	var b [positionSize]byte
	if n, _ := l.position.ReadAt(b[:], 0); n < positionSize {
		return p, nil // new
	}
	p.Offsets = [2]uint64{binary.LittleEndian.Uint64(b[0:]), binary.LittleEndian.Uint64(b[8:])}
	p.Size, p.Inode = int64(binary.LittleEndian.Uint64(b[16:])), binary.LittleEndian.Uint64(b[24:])
	return p, nil
}

func (l *logFile) writePosition() error {
	var b [positionSize]byte
	binary.LittleEndian.PutUint64(b[0:], l.at.Offsets[0])
	binary.LittleEndian.PutUint64(b[8:], l.at.Offsets[1])
	binary.LittleEndian.PutUint64(b[16:], uint64(l.at.Size))
	binary.LittleEndian.PutUint64(b[24:], l.at.Inode)
	_, err := l.position.WriteAt(b[:], 0)
	return err
}

// lineSplitter turns the bytes of one stream into log entries.
type lineSplitter struct {
	stream  string // "stdout" or "stderr"
	maxLine int    // longer lines are cut into parts; 0 means never
	pending []byte // begin of a line that is not complete
}

// split returns the entries for the lines that p completes, and how many bytes of the stream stay pending.
func (s *lineSplitter) split(entries *bytes.Buffer, p []byte, now time.Time) int {
	for len(p) > 0 {
		end := bytes.IndexByte(p, '\n')
		if end >= 0 && (s.maxLine == 0 || len(s.pending)+end <= s.maxLine) {
			s.entry(entries, tagFull, now, p[:end])
			p = p[end+1:]
			continue
		}
		if s.maxLine == 0 || len(s.pending)+len(p) <= s.maxLine {
			s.pending = append(s.pending, p...)
			break
		}
		part := s.maxLine - len(s.pending)
		s.entry(entries, tagPartial, now, p[:part])
		p = p[part:]
	}
	return len(s.pending)
}

// finish writes what ended without a newline, which it does not invent.
func (s *lineSplitter) finish(entries *bytes.Buffer, now time.Time) {
	if len(s.pending) > 0 {
		s.entry(entries, tagPartial, now, nil)
	}
}

func (s *lineSplitter) entry(entries *bytes.Buffer, tag string, now time.Time, text []byte) {
	entries.Write(now.AppendFormat(entries.AvailableBuffer(), time.RFC3339Nano))
	entries.WriteByte(' ')
	entries.WriteString(s.stream)
	entries.WriteByte(' ')
	entries.WriteString(tag)
	entries.WriteByte(' ')
	entries.Write(s.pending)
	entries.Write(text)
	entries.WriteByte('\n')
	s.pending = s.pending[:0]
}
