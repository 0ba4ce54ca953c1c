// Command faulty stands before a program that crivm runs, such as a VMM, a file server or a CNI plugin, and misbehaves
// as a test says: the file <control>/<name>.fault, where name is the program's, holds a mode, for a CNI plugin after the
// verb for which it is meant ("ADD hang"). Without a fault it becomes the real program, <control>/<name>.real.
//
//	fail     says so and ends with status 1
//	hang     does nothing, for ever
//	die      is the real program, and is killed amid it; a CNI plugin when it has done its work and not said so
//	garbage  says what makes no sense: on standard output, and to whoever connects to its first socket
//
// The control directory is set when it is built: -ldflags "-X main.control=DIR". Tests only.
package main

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

var control string

// killAfter is how long the real program has in mode die.
const killAfter = 300 * time.Millisecond

func main() {
	if len(os.Args) == 3 && os.Args[1] == "kill-later" {
		pid, err := strconv.Atoi(os.Args[2])
		if err != nil {
			fatal(err)
		}
		time.Sleep(killAfter) // amid whatever it does is the point
		unix.Kill(pid, unix.SIGKILL)
		return
	}
	name := filepath.Base(os.Args[0])
	real := filepath.Join(control, name+".real")
	verb, cni := os.LookupEnv("CNI_COMMAND")
	mode := fault(name, verb)
	if slices.Contains(os.Args, "--version") || slices.Contains(os.Args, "-version") { // asked by crivm's probes
		mode = ""
	}
	switch mode {
	case "":
	case "fail":
		fatal(fmt.Errorf("told to fail"))
	case "hang":
		for {
			unix.Pause()
		}
	case "garbage":
		fmt.Println("\x00{[nonsense")
		if !cni {
			answerWithGarbage()
		}
		return
	case "die":
		if cni {
			cmd := exec.Command(real)
			cmd.Stdin = os.Stdin
			cmd.Run()
			unix.Kill(os.Getpid(), unix.SIGKILL)
		}
		self, err := os.Executable()
		if err != nil {
			fatal(err)
		}
		if err := exec.Command(self, "kill-later", strconv.Itoa(os.Getpid())).Start(); err != nil {
			fatal(err)
		}
	default:
		fatal(fmt.Errorf("unknown mode %q", mode))
	}
	fatal(unix.Exec(real, append([]string{os.Args[0]}, os.Args[1:]...), os.Environ()))
}

// fault is the mode of this run.
func fault(name, verb string) string {
	text, err := os.ReadFile(filepath.Join(control, name+".fault"))
	if err != nil {
		return ""
	}
	fields := strings.Fields(string(text))
	if len(fields) == 2 {
		if fields[0] != verb {
			return ""
		}
		fields = fields[1:]
	}
	if len(fields) != 1 {
		return ""
	}
	return fields[0]
}

// answerWithGarbage serves the socket that is descriptor 3, for as long as this process lives.
func answerWithGarbage() {
	listener, err := net.FileListener(os.NewFile(3, "socket"))
	if err != nil {
		fatal(err)
	}
	for {
		conn, err := listener.Accept()
		if err != nil {
			fatal(err)
		}
		go func() {
			defer conn.Close()
			conn.Write([]byte(strings.Repeat("nonsense ", 1000) + "\n"))
			conn.Read(make([]byte, 1))
		}()
	}
}

func fatal(err error) {
	fmt.Fprintln(os.Stderr, "faulty:", err)
	os.Exit(1)
}
