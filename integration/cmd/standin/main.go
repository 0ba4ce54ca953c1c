// Command standin is the program in the images that stand for those which Kubernetes' own tests pull: a
// web server that looks like nginx to them, a program that prints its effective user, and one that waits.
// It is statically linked and small, so that a microVM without much memory starts it at once.
//
//	standin serve PORT [PIDFILE]   answers every connection with an HTTP page
//	standin euid                   prints "Effective uid: N"; its file in the image is setuid root
//	standin pause                  waits for a signal
//	standin echo ADDR              sends back what each TCP connection sends, until its end
//	standin events DIR             prints what inotify tells of a directory, with what its file "key" says then, and
//	                               each line of its input
//	standin lines N MBPS           prints N numbered lines of 100 bytes at that many MB/s at most (0: as fast as it can)
package main

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// title is argv[0] of the server; tests look for it in /proc/1/cmdline.
const title = "nginx: master process standin"

const page = "<html><body>It works!</body></html>\n"

func main() {
	if err := run(os.Args); err != nil {
		fmt.Fprintln(os.Stderr, "standin:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	switch {
	case len(args) == 2 && args[1] == "euid":
		fmt.Printf("Effective uid: %d\n", os.Geteuid())
		return nil
	case len(args) == 2 && args[1] == "pause":
		return wait()
	case len(args) == 3 && args[1] == "echo":
		listener, err := net.Listen("tcp", args[2])
		if err != nil {
			return err
		}
		go echo(listener)
		return wait()
	case len(args) == 3 && args[1] == "events":
		return events(args[2])
	case len(args) == 4 && args[1] == "lines":
		n, err := strconv.Atoi(args[2])
		if err != nil {
			return err
		}
		rate, err := strconv.Atoi(args[3])
		if err != nil {
			return err
		}
		return lines(n, rate)
	case len(args) >= 3 && args[1] == "serve":
		if !strings.HasPrefix(args[0], "nginx:") {
			self, err := os.Executable()
			if err != nil {
				return err
			}
			return unix.Exec(self, append([]string{title}, args[1:]...), os.Environ())
		}
		if len(args) > 3 {
			if err := os.MkdirAll(filepath.Dir(args[3]), 0o755); err != nil {
				return err
			}
			if err := os.WriteFile(args[3], fmt.Appendf(nil, "%d\n", os.Getpid()), 0o644); err != nil {
				return err
			}
		}
		listener, err := net.Listen("tcp", ":"+args[2])
		if err != nil {
			return err
		}
		fmt.Fprintln(os.Stderr, "standin for nginx and httpd: serving port", args[2]) // critest looks for httpd in the log
		go serve(listener)
		return wait()
	}
	return fmt.Errorf("usage: standin serve PORT [PIDFILE] | euid | pause | echo ADDR | events DIR | lines N MBPS")
}

func echo(listener net.Listener) {
	for {
		c, err := listener.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			io.Copy(c, c)
		}()
	}
}

// events prints "event NAME CONTENT" for each name that appears in a directory, and "echo LINE".
func events(dir string) error {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC)
	if err != nil {
		return err
	}
	if _, err := unix.InotifyAddWatch(fd, dir, unix.IN_CREATE|unix.IN_MOVED_TO); err != nil {
		return err
	}
	fmt.Println("watching")
	go func() {
		in := bufio.NewScanner(os.Stdin)
		for in.Scan() {
			fmt.Println("echo " + in.Text())
		}
	}()
	buf := make([]byte, 64<<10)
	for {
		n, err := unix.Read(fd, buf)
		if err != nil {
			return err
		}
		// struct inotify_event: wd, mask, cookie, length of the name, name
		for b := buf[:n]; len(b) >= unix.SizeofInotifyEvent; {
			end := unix.SizeofInotifyEvent + int(binary.NativeEndian.Uint32(b[12:]))
			key, _ := os.ReadFile(filepath.Join(dir, "key"))
			fmt.Printf("event %s %.100s\n", unix.ByteSliceToString(b[unix.SizeofInotifyEvent:end]), key)
			b = b[end:]
		}
	}
}

// lines writes "000000001 000…0\n" and so on, 512 lines a write.
func lines(n, megabytesPerSecond int) error {
	const length, batch = 100, 512
	text := bytes.Repeat([]byte{'0'}, length*batch)
	for i := range batch {
		text[i*length+9], text[i*length+length-1] = ' ', '\n'
	}
	start := time.Now()
	for done := 0; done < n; {
		count := min(batch, n-done)
		for i := range count {
			number := text[i*length : i*length+9]
			for at, rest := 8, done+i+1; at >= 0; at, rest = at-1, rest/10 {
				number[at] = byte('0' + rest%10)
			}
		}
		if _, err := os.Stdout.Write(text[:count*length]); err != nil {
			return err
		}
		done += count
		if megabytesPerSecond > 0 {
			time.Sleep(time.Until(start.Add(time.Duration(done*length) * time.Microsecond / time.Duration(megabytesPerSecond))))
		}
	}
	return nil
}

func wait() error {
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, unix.SIGTERM, unix.SIGINT, unix.SIGQUIT)
	<-signals
	return nil
}

func serve(listener net.Listener) {
	for {
		c, err := listener.Accept()
		if err != nil {
			return
		}
		go answer(c)
	}
}

// answer reads a request's head and sends the page, whatever was asked.
func answer(c net.Conn) {
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(10 * time.Second)); err != nil {
		return
	}
	head := bufio.NewScanner(c)
	for head.Scan() && strings.TrimSpace(head.Text()) != "" {
	}
	fmt.Fprintf(c, "HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s", len(page), page)
}
