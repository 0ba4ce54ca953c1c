package server

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/crivm/crivm/agentproto"
)

const (
	// A volume is uploaded at once when dataLink moved, and else when nothing has happened in it for copyQuiet, or
	// copyLatest after the first change: kubelet makes and removes links right after it has moved dataLink.
	copyQuiet  = 2 * time.Millisecond
	copyLatest = 10 * time.Millisecond
	// uploadLimit bounds one part of an upload.
	uploadLimit = 30 * time.Second
	// A scan amid changes is done again, this often, before that counts as a failure.
	tornTries = 20
	tornPause = 5 * time.Millisecond
	// Failures to bring a guest up to date are followed by pauses of these lengths.
	copyRetry, copyRetryMax = 100 * time.Millisecond, 30 * time.Second
)

// why is how much a copy is to be distrusted, from little to much.
type why int

const (
	// whyNotice: it may have changed while nobody looked.
	whyNotice why = iota
	// whyNames: a name beside dataLink came or went. What is behind dataLink stays as it was, so one scan tells.
	whyNames
	// whyContent: content has changed, which its stamps need not show. It is uploaded whatever a scan finds.
	whyContent
	// whySwap: dataLink moved. It is uploaded at once: containers wait for just that.
	whySwap
)

// poke makes sure that a copy is looked at. It does not wait.
func (c *hostCopy) poke(w why) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.poked, c.why, c.last = true, max(c.why, w), time.Now()
	if !c.running && c.ctx.Err() == nil {
		c.running = true
		c.wake()
	}
}

// followCopy brings a copy up to date until nothing pokes it any more.
func (s *Server) followCopy(sb *sandbox, c *hostCopy) {
	wait, said := copyRetry, ""
	for {
		w, ok := s.settle(c)
		if !ok {
			return
		}
		start := time.Now()
		err := s.upToDate(c.ctx, sb, c, w)
		_, dead := sb.machine()
		switch {
		case c.ctx.Err() != nil || dead != nil:
			return
		case err == nil:
			wait = copyRetry
			s.log.Debug("a volume follows the host", "sandbox", sb.id, "volume", c.source, "took", time.Since(start).Round(time.Millisecond))
		case errors.Is(err, fs.ErrNotExist):
			s.watches.lookAgain(c) // kubelet takes it away after the pod
		case errors.Is(err, errTooLarge):
			s.log.Error("a volume does not follow the host any more", "sandbox", sb.id, "volume", c.source, "error", err)
			s.watches.lookAgain(c)
		default:
			if err.Error() != said {
				said = err.Error()
				s.log.Warn("a volume does not follow the host; tried again", "sandbox", sb.id, "volume", c.source, "error", err)
			}
			if !s.pause(c.ctx, wait) {
				return
			}
			wait = min(2*wait, copyRetryMax)
			c.again()
		}
		c.mu.Lock()
		c.running = c.poked
		more := c.running
		c.mu.Unlock()
		if !more {
			return
		}
	}
}

// settle waits for the end of a run of changes, and takes them on.
func (s *Server) settle(c *hostCopy) (w why, ok bool) {
	for first := time.Now(); ; {
		c.mu.Lock()
		quiet := time.Since(c.last)
		if c.why == whySwap || quiet >= copyQuiet || time.Since(first) >= copyLatest {
			w = c.why
			c.poked, c.why = false, whyNotice
			c.mu.Unlock()
			return w, c.ctx.Err() == nil
		}
		c.mu.Unlock()
		if !s.pause(c.ctx, copyQuiet-quiet) {
			return w, false
		}
	}
}

// again takes a failed upload up once more.
func (c *hostCopy) again() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.poked, c.why = true, max(c.why, whyContent)
}

// upToDate makes the guest's copy what the host has.
func (s *Server) upToDate(ctx context.Context, sb *sandbox, c *hostCopy, w why) error {
	if err := c.op.lock(ctx); err != nil {
		return err
	}
	defer c.op.unlock()
	for try := 1; ; try++ {
		err := s.update(ctx, sb, c, w)
		if !errors.Is(err, errTorn) || try == tornTries || !s.pause(ctx, tornPause) {
			return err
		}
	}
}

// update scans and uploads once. c.op is held.
func (s *Server) update(ctx context.Context, sb *sandbox, c *hostCopy, w why) error {
	met := map[string]bool{}
	look := visitor{directory: func(dir string) {
		if met[dir] = true; !c.fixed {
			s.watches.watch(c, dir)
		}
	}}
	if w < whyContent && c.generation != "" {
		if c.fixed {
			return nil
		}
		found, err := scanVolume(c.source, look)
		if err != nil {
			return err
		}
		if found.generation == c.generation || w == whyNames && found.stamps == c.stamps {
			s.watches.settled(c, met)
			return nil
		}
	}
	select {
	case sb.uploads <- struct{}{}:
		defer func() { <-sb.uploads }()
	case <-ctx.Done():
		return ctx.Err()
	}
	agent, err := sb.client(ctx)
	if err != nil {
		return err
	}
	c.generation, c.upload = "", max(c.upload+1, uint64(time.Now().UnixNano()))
	u := upload{volume: c.name, id: c.upload, put: func(r *agentproto.PutVolumeRequest) error {
		ctx, cancel := context.WithTimeout(ctx, uploadLimit)
		defer cancel()
		_, err := agent.PutVolume(ctx, r)
		return err
	}}
	look.file = u.add
	found, err := scanVolume(c.source, look)
	if err != nil {
		return err
	}
	if err := u.send(found.generation); err != nil {
		return fmt.Errorf("in the guest: %w", err)
	}
	c.generation, c.stamps = found.generation, found.stamps
	s.watches.settled(c, met)
	return nil
}

// upload carries a scan to the agent in parts. The last one is sent when the scan has proved to be whole.
type upload struct {
	volume  string
	id      uint64
	put     func(*agentproto.PutVolumeRequest) error
	part    uint32
	entries []*agentproto.File
	size    int // of entries, roughly
}

func (u *upload) add(root *os.Root, f hostFile) error {
	entry := &agentproto.File{Path: f.path, Mode: f.stat.Mode, Uid: f.stat.Uid, Gid: f.stat.Gid, LinkTarget: f.link}
	if f.stat.Mode&unix.S_IFMT != unix.S_IFREG {
		return u.push(entry)
	}
	entry.MtimeNanos = f.stat.Mtim.Nano()
	return readFile(root, f, maxUpload, func(content []byte, first bool) error {
		if !first {
			entry = &agentproto.File{Path: f.path, Mode: f.stat.Mode, MtimeNanos: f.stat.Mtim.Nano(), Append: true}
		}
		entry.Content = content
		return u.push(entry)
	})
}

func (u *upload) push(f *agentproto.File) error {
	size := 64 + len(f.Path) + len(f.LinkTarget) + len(f.Content)
	if len(u.entries) > 0 && u.size+size > maxUpload {
		if err := u.send(""); err != nil {
			return fmt.Errorf("in the guest: %w", err)
		}
	}
	u.entries = append(u.entries, f)
	u.size += size
	return nil
}

func (u *upload) send(generation string) error {
	err := u.put(&agentproto.PutVolumeRequest{Volume: u.volume, Upload: u.id, Part: u.part, Entries: u.entries, Generation: generation})
	u.part++
	u.entries, u.size = nil, 0
	return err
}
