package guest

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/crivm/crivm/agentproto"
)

// uploader numbers uploads as a host does.
type uploader struct {
	t      *testing.T
	agent  *Agent
	volume string
	upload uint64
}

// put uploads in as many parts as there are lists of entries.
func (u *uploader) put(parts ...[]*agentproto.File) error {
	u.t.Helper()
	u.upload++
	for n, entries := range parts {
		r := &agentproto.PutVolumeRequest{Volume: u.volume, Upload: u.upload, Part: uint32(n), Entries: entries}
		if n == len(parts)-1 {
			r.Generation = fmt.Sprint("g", u.upload)
		}
		if _, err := u.agent.PutVolume(u.t.Context(), r); err != nil {
			return err
		}
	}
	return nil
}

func (u *uploader) mustPut(parts ...[]*agentproto.File) {
	u.t.Helper()
	if err := u.put(parts...); err != nil {
		u.t.Fatal(err)
	}
}

func (u *uploader) content() string {
	return filepath.Join(u.agent.Dir, "volumes", "copies", u.volume, copyContent)
}

func dirEntry(path string) *agentproto.File {
	return &agentproto.File{Path: path, Mode: unix.S_IFDIR | 0o755}
}

func fileEntry(path, content string) *agentproto.File {
	return &agentproto.File{Path: path, Mode: unix.S_IFREG | 0o644, Content: []byte(content)}
}

func linkEntry(path, target string) *agentproto.File {
	return &agentproto.File{Path: path, Mode: unix.S_IFLNK | 0o777, LinkTarget: target}
}

// written is a volume as kubelet's atomic writer leaves it.
func written(version string, files map[string]string) []*agentproto.File {
	stamp := "..2026_" + version
	entries := []*agentproto.File{dirEntry(""), dirEntry(stamp)}
	for name, content := range files {
		entries = append(entries, fileEntry(stamp+"/"+name, content))
	}
	entries = append(entries, linkEntry(dataLink, stamp))
	for name := range files {
		entries = append(entries, linkEntry(name, dataLink+"/"+name))
	}
	return entries
}

// tree lists a directory as path, mode, owner and content.
func tree(t *testing.T, dir string) string {
	t.Helper()
	var lines []string
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		rel, _ := filepath.Rel(dir, path)
		line := fmt.Sprint(rel, " ", info.Mode())
		if info.Mode().Type() == fs.ModeSymlink {
			target, _ := os.Readlink(path)
			line += " " + target
		} else if info.Mode().IsRegular() {
			content, _ := os.ReadFile(path)
			line += " " + string(content)
		}
		lines = append(lines, line)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return strings.Join(lines, "\n")
}

func TestHostCopyFollowsTheAtomicWriter(t *testing.T) {
	a, _ := newTestAgent(t)
	u := &uploader{t: t, agent: a, volume: "v"}
	u.mustPut(written("1", map[string]string{"key": "one", "old": "gone soon", "same": "same"}))
	if b, err := os.ReadFile(filepath.Join(u.content(), "key")); string(b) != "one" {
		t.Fatalf("key is %q (%v)", b, err)
	}
	events := watchEvents(t, u.content())
	first := written("2", map[string]string{"key": "two", "new": "new", "same": "same"})
	u.mustPut(first[:2], first[2:])
	want := `. drwxr-xr-x
..2026_2 drwxr-xr-x
..2026_2/key -rw-r--r-- two
..2026_2/new -rw-r--r-- new
..2026_2/same -rw-r--r-- same
..data Lrwxrwxrwx ..2026_2
key Lrwxrwxrwx ..data/key
new Lrwxrwxrwx ..data/new
same Lrwxrwxrwx ..data/same`
	if got := tree(t, u.content()); got != want {
		t.Errorf("after the change there is\n%s", got)
	}
	// One swap, after the new files and before the old ones go; links that stay are not touched.
	if got := events(); !slices.Equal(got, []string{"moved to ..2026_2", "moved to ..data", "moved to new", "deleted old", "deleted ..2026_1"}) {
		t.Errorf("events are %q", got)
	}
	u.mustPut(first)
	if got := events(); len(got) > 0 {
		t.Errorf("events without a change are %q", got)
	}
	if _, err := a.DropVolume(t.Context(), &agentproto.DropVolumeRequest{Volume: "v"}); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(filepath.Dir(u.content())); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a dropped copy is still there (%v)", err)
	}
}

// watchEvents returns a function that tells what has happened in a directory since it was last called.
func watchEvents(t *testing.T, dir string) func() []string {
	t.Helper()
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	if _, err := unix.InotifyAddWatch(fd, dir, unix.IN_CREATE|unix.IN_MOVED_TO|unix.IN_MOVED_FROM|unix.IN_DELETE|unix.IN_MODIFY|unix.IN_ATTRIB); err != nil {
		t.Fatal(err)
	}
	names := map[byte]string{unix.IN_CREATE >> 1: "created", unix.IN_MOVED_TO >> 1: "moved to", unix.IN_MOVED_FROM >> 1: "moved from"}
	return func() []string {
		var list []string
		buf := make([]byte, 64<<10)
		n, _ := unix.Read(fd, buf)
		for b := buf[:max(n, 0)]; len(b) > 0; {
			mask := uint32(b[4]) | uint32(b[5])<<8
			what := names[byte(mask>>1)]
			switch {
			case mask&unix.IN_DELETE != 0:
				what = "deleted"
			case mask&unix.IN_MODIFY != 0:
				what = "modified"
			case mask&unix.IN_ATTRIB != 0:
				what = "attributes of"
			}
			size := int(b[12]) | int(b[13])<<8
			list = append(list, what+" "+unix.ByteSliceToString(b[16:16+size]))
			b = b[16+size:]
		}
		return list
	}
}

// Owners and modes follow without a new file; a plain directory's files change one by one.
func TestHostCopyOfPlainDirectory(t *testing.T) {
	a, _ := newTestAgent(t)
	u := &uploader{t: t, agent: a, volume: "v"}
	u.mustPut([]*agentproto.File{dirEntry(""), fileEntry("f", "x"), dirEntry("d"), fileEntry("d/g", "y"), fileEntry("turns", "into a directory")})
	before, _ := os.Stat(filepath.Join(u.content(), "f"))
	mode := fileEntry("f", "x")
	mode.Mode = unix.S_IFREG | 0o440
	u.mustPut([]*agentproto.File{dirEntry(""), mode, dirEntry("d"), fileEntry("d/g", "z"), dirEntry("turns"), fileEntry("turns/x", "")})
	if got := tree(t, u.content()); got != `. drwxr-xr-x
d drwxr-xr-x
d/g -rw-r--r-- z
f -r--r----- x
turns drwxr-xr-x
turns/x -rw-r--r-- ` {
		t.Errorf("there is\n%s", got)
	}
	if after, _ := os.Stat(filepath.Join(u.content(), "f")); !os.SameFile(before, after) {
		t.Error("a change of mode makes another file")
	}
	large := strings.Repeat("0123456789", 1000)
	more := fileEntry("large", large)
	more.Append = true
	u.mustPut([]*agentproto.File{dirEntry(""), fileEntry("large", large)}, []*agentproto.File{more})
	if b, _ := os.ReadFile(filepath.Join(u.content(), "large")); string(b) != large+large {
		t.Errorf("a file in two parts has %d bytes", len(b))
	}
}

// A file is rewritten in place, as containers have mounted that very file.
func TestHostCopyOfFile(t *testing.T) {
	a, _ := newTestAgent(t)
	u := &uploader{t: t, agent: a, volume: "v"}
	u.mustPut([]*agentproto.File{fileEntry("", "a long line\n")})
	before, err := os.Stat(u.content())
	if err != nil {
		t.Fatal(err)
	}
	u.mustPut([]*agentproto.File{fileEntry("", "short\n")})
	after, _ := os.Stat(u.content())
	if b, _ := os.ReadFile(u.content()); string(b) != "short\n" || !os.SameFile(before, after) {
		t.Errorf("file is %q, the same: %v", b, os.SameFile(before, after))
	}
	if err := u.put([]*agentproto.File{dirEntry("")}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("a file that became a directory: %v", err)
	}
}

func TestHostCopyOrder(t *testing.T) {
	a, d := newTestAgent(t)
	u := &uploader{t: t, agent: a, volume: "v", upload: 10}
	u.mustPut([]*agentproto.File{dirEntry(""), fileEntry("f", "new")})
	call := func(upload uint64, part uint32, generation string, entries ...*agentproto.File) error {
		_, err := a.PutVolume(t.Context(), &agentproto.PutVolumeRequest{Volume: "v", Upload: upload, Part: part, Generation: generation, Entries: entries})
		return err
	}
	for name, err := range map[string]error{
		"earlier":        call(9, 0, "old", dirEntry(""), fileEntry("f", "old")),
		"again":          call(11, 0, "old", dirEntry(""), fileEntry("f", "old")),
		"without a head": call(12, 1, "old", fileEntry("f", "old")),
	} {
		if !errdefs.IsAborted(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := call(20, 0, "", dirEntry("")); err != nil {
		t.Error(err)
	}
	if err := call(20, 2, "skipped", fileEntry("f", "old")); !errdefs.IsAborted(err) {
		t.Errorf("a part is left out: %v", err)
	}
	if err := call(21, 0, "", dirEntry(""), fileEntry("../f", "x")); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a path that leads out: %v", err)
	}
	if err := call(21, 1, "after a failure", fileEntry("f", "old")); !errdefs.IsAborted(err) {
		t.Errorf("a part after one that failed: %v", err)
	}
	if b, _ := os.ReadFile(filepath.Join(u.content(), "f")); string(b) != "new" {
		t.Errorf("file is %q", b)
	}
	c := connect(t, d)
	_, err := c.CreateContainer(testContext(t), &agentproto.CreateContainerRequest{ContainerId: "a", OciSpec: ociSpec(t, "true"), Mounts: []*agentproto.Mount{
		{Destination: "/v", Source: &agentproto.Mount_HostCopy{HostCopy: &agentproto.HostCopy{Volume: "v"}}},
	}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := a.DropVolume(t.Context(), &agentproto.DropVolumeRequest{Volume: "v"}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("dropping a copy in use: %v", err)
	}
	list, err := c.ListContainers(testContext(t), &agentproto.ListContainersRequest{})
	if err != nil || len(list.Volumes) != 1 || list.Volumes[0].Generation != "g11" || list.Volumes[0].Upload != 21 {
		t.Errorf("list is %v (%v)", list, err)
	}
	if _, err := c.DeleteContainer(testContext(t), &agentproto.DeleteContainerRequest{ContainerId: "a"}); err != nil {
		t.Error(err)
	}
	for range 2 {
		if _, err := a.DropVolume(t.Context(), &agentproto.DropVolumeRequest{Volume: "v"}); err != nil {
			t.Error(err)
		}
	}
	_, err = c.CreateContainer(testContext(t), &agentproto.CreateContainerRequest{ContainerId: "b", OciSpec: ociSpec(t, "true"), Mounts: []*agentproto.Mount{
		{Destination: "/v", Source: &agentproto.Mount_HostCopy{HostCopy: &agentproto.HostCopy{Volume: "v"}}},
	}})
	if !errdefs.IsNotFound(err) {
		t.Errorf("mount of a copy that is not there: %v", err)
	}
}

// What a container with all capabilities may have written into its copy does not lead the agent out of it.
func TestHostCopySpoilt(t *testing.T) {
	a, _ := newTestAgent(t)
	u := &uploader{t: t, agent: a, volume: "v"}
	outside := t.TempDir()
	if err := os.WriteFile(filepath.Join(outside, "key"), []byte("outside"), 0o644); err != nil {
		t.Fatal(err)
	}
	u.mustPut([]*agentproto.File{dirEntry(""), dirEntry("d"), fileEntry("d/key", "1"), fileEntry("f", "1"), dirEntry("e"), fileEntry("e/f", "1")})
	if err := errors.Join(
		os.RemoveAll(filepath.Join(u.content(), "d")), os.Symlink(outside, filepath.Join(u.content(), "d")),
		os.Remove(filepath.Join(u.content(), "f")), unix.Mkfifo(filepath.Join(u.content(), "f"), 0o644),
		os.Symlink("/", filepath.Join(u.content(), "junk")), os.Mkdir(filepath.Join(u.content(), "..data"), 0o755),
		os.Remove(filepath.Join(u.content(), "e/f")), os.Symlink(filepath.Join(outside, "key"), filepath.Join(u.content(), "e/f")),
	); err != nil {
		t.Fatal(err)
	}
	u.mustPut([]*agentproto.File{dirEntry(""), dirEntry("d"), fileEntry("d/key", "2"), fileEntry("f", "2"), dirEntry("e"), fileEntry("e/f", "2"), linkEntry(dataLink, "d")})
	if got := tree(t, u.content()); got != `. drwxr-xr-x
..data Lrwxrwxrwx d
d drwxr-xr-x
d/key -rw-r--r-- 2
e drwxr-xr-x
e/f -rw-r--r-- 2
f -rw-r--r-- 2` {
		t.Errorf("there is\n%s", got)
	}
	if b, err := os.ReadFile(filepath.Join(outside, "key")); string(b) != "outside" {
		t.Errorf("outside is %q (%v)", b, err)
	}
}

func TestTerminationLog(t *testing.T) {
	a, d := newTestAgent(t)
	c := connect(t, d)
	log := &agentproto.Mount{Destination: "/dev/termination-log", Source: &agentproto.Mount_TerminationLog{TerminationLog: &agentproto.TerminationLog{
		File: &agentproto.File{Mode: unix.S_IFREG | 0o666, Content: []byte("start ")},
	}}}
	path := filepath.Join(a.Dir, "containers", "a", "termination-log")
	_, err := c.CreateContainer(testContext(t), &agentproto.CreateContainerRequest{
		ContainerId: "a", OciSpec: ociSpec(t, "sh", "-c", "echo last words >> "+path), Mounts: []*agentproto.Mount{log},
	})
	if err != nil {
		t.Fatal(err)
	}
	start(t, c, "a")
	for range 2 { // until the host deletes the container
		resp, err := c.Wait(testContext(t), &agentproto.WaitRequest{ContainerId: "a"})
		if err != nil || string(resp.TerminationLog) != "start last words\n" {
			t.Errorf("log is %q (%v)", resp.GetTerminationLog(), err)
		}
	}
	if err := os.WriteFile(path, []byte(strings.Repeat("x", maxTerminationLog)+"end"), 0o666); err != nil {
		t.Fatal(err)
	}
	if resp, err := c.Wait(testContext(t), &agentproto.WaitRequest{ContainerId: "a"}); err != nil || len(resp.TerminationLog) != maxTerminationLog || !strings.HasSuffix(string(resp.TerminationLog), "xend") {
		t.Errorf("of a long log there are %d bytes (%v)", len(resp.GetTerminationLog()), err)
	}
	run(t, c, "b", nil, "true")
	if resp, err := c.Wait(testContext(t), &agentproto.WaitRequest{ContainerId: "b"}); err != nil || resp.TerminationLog != nil {
		t.Errorf("a container without a log has %q (%v)", resp.GetTerminationLog(), err)
	}
}

// Names that a container has put into its copy go with the next change, however many they are, and without a list of them.
func TestHostCopyWithManyStrayNames(t *testing.T) {
	a, _ := newTestAgent(t)
	u := &uploader{t: t, agent: a, volume: "v"}
	u.mustPut(written("1", map[string]string{"key": "one"}))
	const names = 60_000 // hard links of one file; file systems allow no more
	first := filepath.Join(u.content(), "stray")
	if err := errors.Join(os.WriteFile(first, nil, 0o644), os.MkdirAll(filepath.Join(u.content(), "dir/below"), 0o755)); err != nil {
		t.Fatal(err)
	}
	for i := range names {
		if err := unix.Link(first, filepath.Join(u.content(), fmt.Sprint("stray-", i))); err != nil {
			t.Fatal(err)
		}
	}
	if high := peakHeap(func() { u.mustPut(written("2", map[string]string{"key": "two"})) }); high > 16<<20 {
		t.Errorf("removing %d names takes %d MiB", names, high>>20)
	}
	entries, err := os.ReadDir(u.content())
	if err != nil || len(entries) != 3 {
		t.Errorf("%d names are left (%v)", len(entries), err)
	}
}

// A rehearsal is a change like any, with its event, and leaves nothing.
func TestRehearsalOfACopy(t *testing.T) {
	a, _ := newTestAgent(t)
	u := &uploader{t: t, agent: a, volume: "v"}
	u.mustPut(written("1", map[string]string{"key": "one"}))
	base := filepath.Dir(filepath.Dir(u.content()))
	events := watchEvents(t, base)
	before := tree(t, base)
	if err := a.volumes.copies.rehearse(); err != nil {
		t.Fatal(err)
	}
	if got := events(); !slices.Equal(got, []string{"created rehearsal", "deleted rehearsal"}) {
		t.Errorf("events are %q", got)
	}
	if after := tree(t, base); after != before {
		t.Errorf("there was\n%s\nand is\n%s", before, after)
	}
	if list := a.volumes.copies.list(); len(list) != 1 || list[0].GetVolume() != "v" {
		t.Errorf("copies are %v", list)
	}
}
