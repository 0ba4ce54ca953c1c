package imageservice

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-containerregistry/pkg/v1/random"
	"go.podman.io/storage/pkg/reexec"
)

// The child of TestKilled: a daemon that pulls until it is killed.
func init() {
	reexec.Register("imageservice-test-pull", func() {
		c := Config{Root: os.Args[1], RunRoot: os.Args[2], DiskDir: os.Args[3], RegistriesConf: os.Args[4], SignaturePolicy: os.Args[5]}
		s, err := New(context.Background(), c)
		if err == nil {
			_, err = tryPull(context.Background(), s, os.Args[6], nil)
		}
		fmt.Println("pulled", err)
		_, _ = io.Copy(io.Discard, os.Stdin)
	})
}

// TestKilled kills a daemon at several moments of a pull. The next one has a store that is as before the
// pull and can pull.
func TestKilled(t *testing.T) {
	sequential(t)
	if os.Geteuid() != 0 {
		t.Skip("unpacking layers with their owners needs root")
	}
	img, err := random.Image(30000, 5)
	if err != nil {
		t.Fatal(err)
	}
	other := simpleImage(t, "from before")
	for _, after := range []int{1, 5} { // requests for blobs that are answered before the kill
		t.Run(fmt.Sprintf("after %d blobs", after), func(t *testing.T) {
			reg := newRegistry(t, false)
			c := testConfig(t, func(c *Config) { write(t, c.RegistriesConf, insecure(reg)) })
			s := openService(t, c)
			before := pull(t, s, reg.push(t, "other:1", other))
			ref := reg.push(t, "app:1", img)

			child := reexec.Command("imageservice-test-pull", c.Root, c.RunRoot, c.DiskDir, c.RegistriesConf, c.SignaturePolicy, ref)
			reached, release := make(chan struct{}), make(chan struct{})
			turn := make(chan int, 1)
			turn <- 0
			reg.intercept(func(w http.ResponseWriter, r *http.Request, next http.Handler) {
				if isBlob(r) {
					n := <-turn + 1
					turn <- n
					if n == after+1 {
						close(reached)
					}
					if n > after {
						<-release
					}
				}
				next.ServeHTTP(w, r)
			})
			runUntil(t, child, reached)
			close(release)
			reg.intercept(nil)

			s2 := openService(t, c)
			images := list(t, s2)
			if len(images) != 1 || images[0].GetId() != before {
				t.Errorf("after the kill: %v", images)
			}
			if n := countBlobs(t, c); n != 1 {
				t.Errorf("%d layers, want that of the image from before", n)
			}
			checkNoTemp(t, c)
			id := pull(t, s2, ref)
			if _, err := s2.Disk(context.Background(), id); err != nil {
				t.Error(err)
			}
		})
	}
}

// runUntil runs the child until reached is closed or it has pulled, and kills it.
func runUntil(t *testing.T, child *exec.Cmd, reached chan struct{}) {
	t.Helper()
	stdin, err := child.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	defer stdin.Close()
	stdout, err := child.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	var stderr bytes.Buffer
	child.Stderr = &stderr
	child.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	pulled := make(chan string, 1)
	go func() {
		line := make([]byte, 1000)
		n, _ := stdout.Read(line)
		pulled <- string(line[:n])
	}()
	select {
	case <-reached:
	case line := <-pulled:
		if !strings.HasPrefix(line, "pulled <nil>") {
			t.Errorf("the child ended its pull early: %s %s", line, stderr.String())
		}
	}
	if err := child.Process.Kill(); err != nil {
		t.Error(err)
	}
	_ = child.Wait()
}

// TestSweep: what a crash may leave is gone after New, and what is in use stays.
func TestSweep(t *testing.T) {
	sequential(t)
	reg := newRegistry(t, false)
	c := testConfig(t, func(c *Config) { write(t, c.RegistriesConf, insecure(reg)) })
	if os.Geteuid() != 0 {
		t.Skip("unpacking layers with their owners needs root")
	}
	s := openService(t, c)
	kept := pull(t, s, reg.push(t, "kept:1", simpleImage(t, "kept")))
	half := pull(t, s, reg.push(t, "half:1", simpleImage(t, "half")))
	hex := strings.TrimPrefix(half, "sha256:")
	temp, err := pullingName(0)
	if err != nil {
		t.Fatal(err)
	}
	// As between copy and naming: an image that has only the name of its pull.
	if err := s.store.SetNames(hex, []string{temp.String()}); err != nil {
		t.Fatal(err)
	}
	if images := list(t, s); len(images) != 1 {
		t.Errorf("%d images listed, want the one that is complete", len(images))
	}
	if _, err := s.Resolve(context.Background(), half); err == nil {
		t.Error("an image that is not complete resolves")
	}
	// As between naming and unnaming.
	if err := s.store.AddNames(strings.TrimPrefix(kept, "sha256:"), []string{strings.Replace(temp.String(), ":0", ":1", 1)}); err != nil {
		t.Fatal(err)
	}
	orphan := filepath.Join(c.DiskDir, strings.Repeat("1", 64)+diskSuffix)
	unfinished := filepath.Join(c.DiskDir, hex+".123"+tempSuffix)
	download := filepath.Join(c.Root, "crivm-tmp", "container_images_storage1")
	for _, p := range []string{orphan, unfinished, download} {
		write(t, p, "left")
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}

	s2 := openService(t, c)
	for _, p := range []string{orphan, unfinished, download, s.diskPath(hex)} {
		if _, err := os.Stat(p); !os.IsNotExist(err) {
			t.Errorf("%s is still there: %v", p, err)
		}
	}
	if _, err := os.Stat(s.diskPath(strings.TrimPrefix(kept, "sha256:"))); err != nil {
		t.Error(err)
	}
	images := list(t, s2)
	if len(images) != 1 || images[0].GetId() != kept || len(images[0].GetRepoTags()) != 1 {
		t.Errorf("listed %v", images)
	}
	remove(t, s2, kept)
	checkEmpty(t, s2)
}
