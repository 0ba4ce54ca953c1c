// Command demo shows one pod in a microVM, driven by crictl as any user would. `make demo` runs it after it
// has built everything; it needs root. All it makes is in the build directory and in network and mount
// namespaces of its own, and it checks at the end that nothing is left.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/crivm/crivm/integration/node"
	"github.com/crivm/crivm/integration/registry"
)

// limit bounds the whole demo; a pod under software emulation takes seconds.
const limit = 9 * time.Minute

func main() {
	build := flag.String("build", "build", "the checkout's build directory")
	flag.Parse()
	dir, err := node.Isolate(*build)
	if err != nil {
		fail(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt, unix.SIGTERM)
	defer stop()
	if err := demo(ctx, dir); err != nil {
		fail(err)
	}
}

func fail(err error) {
	fmt.Fprintln(os.Stderr, "demo:", err)
	os.Exit(1)
}

func demo(ctx context.Context, build string) (retErr error) {
	images, err := registry.Serve(filepath.Join(build, "images"))
	if err != nil {
		return fmt.Errorf("local registry: %w", err)
	}
	defer images.Close()
	state := filepath.Join(build, "demo")
	if err := os.RemoveAll(state); err != nil {
		return err
	}
	d := &show{}
	var n *node.Node
	fmt.Println("$ crivm serve")
	d.step("crivm serve, ready", func() error {
		n, err = node.Start(ctx, node.Options{Build: build, Dir: state, Registry: images.Addr()})
		return err
	})
	if d.err != nil {
		return d.err
	}
	d.n, d.ctx = n, ctx
	defer func() {
		cleanup, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Minute)
		defer cancel()
		if retErr != nil {
			fmt.Fprintf(os.Stderr, "\nlast lines of crivm's log:\n%s\n", n.LogTail())
		}
		retErr = errors.Join(retErr, n.RemoveAllPods(cleanup), n.CheckLeaks(cleanup), n.Stop(), node.RemoveCgroups())
		if retErr == nil {
			fmt.Println("\nnothing left behind: no process, network namespace, link, mount, cgroup or file.")
		}
	}()
	return d.pod(state)
}

// show runs commands, prints them and what they say, and stops at the first failure.
type show struct {
	n     *node.Node
	ctx   context.Context
	times []string
	err   error
}

func (d *show) step(title string, f func() error) {
	if d.err != nil {
		return
	}
	start := time.Now()
	d.err = f()
	took := time.Since(start)
	d.times = append(d.times, fmt.Sprintf("%-28s %6.2f s", title, took.Seconds()))
	if d.err == nil {
		fmt.Printf("   [%.2f s]\n", took.Seconds())
	}
}

// crictl shows the command as a user would type it.
func (d *show) crictl(args ...string) (out string) {
	if d.err != nil {
		return ""
	}
	fmt.Printf("\n$ crictl %s\n", strings.Join(args, " "))
	d.step("crictl "+args[0], func() error {
		var err error
		out, err = d.n.Crictl(d.ctx, args...)
		fmt.Print(out)
		return err
	})
	return strings.TrimSpace(out)
}

func (d *show) pod(dir string) error {
	const image = "docker.io/library/busybox:latest"
	podFile := d.write(dir, "pod.json", `{"metadata": {"name": "demo", "namespace": "default", "uid": "demo-1", "attempt": 0},
 "hostname": "demo", "log_directory": "`+filepath.Join(dir, "logs")+`",
 "labels": {"io.kubernetes.pod.name": "demo", "io.kubernetes.pod.namespace": "default"}, "dns_config": {"servers": ["192.0.2.53"]}}`)
	containerFile := d.write(dir, "container.json", `{"metadata": {"name": "hello", "attempt": 0}, "image": {"image": "`+image+`"},
 "command": ["sh", "-c", "echo hello from $(hostname), kernel $(uname -r); mkdir /www; echo it works > /www/index.html; exec httpd -f -p [::]:80 -h /www"],
 "labels": {"io.kubernetes.pod.name": "demo", "io.kubernetes.pod.namespace": "default"}, "log_path": "hello/0.log"}`)

	d.crictl("pull", image)
	pod := d.crictl("runp", podFile)
	container := d.crictl("create", pod, containerFile, podFile)
	d.crictl("start", container)
	d.crictl("pods")
	d.crictl("ps")
	guest := d.crictl("exec", container, "uname", "-r")
	d.crictl("exec", container, "ps")
	d.until("first line of the log", func() bool {
		out, err := d.n.Crictl(d.ctx, "logs", container)
		return err == nil && strings.Contains(out, "hello from")
	})
	d.crictl("logs", container)
	inspect := struct {
		Status struct {
			Network struct {
				IP  string `json:"ip"`
				IPs []struct {
					IP string `json:"ip"`
				} `json:"additionalIps"`
			} `json:"network"`
		} `json:"status"`
		Info struct {
			VMM          string `json:"vmm"`
			Acceleration string `json:"acceleration"`
			PID          int    `json:"pid"`
		} `json:"info"`
	}{}
	if d.err == nil {
		out, err := d.n.Crictl(d.ctx, "inspectp", pod)
		if err == nil {
			err = json.Unmarshal([]byte(out), &inspect)
		}
		d.err = err
	}
	addresses := []string{inspect.Status.Network.IP}
	for _, a := range inspect.Status.Network.IPs {
		addresses = append(addresses, a.IP)
	}
	for _, ip := range addresses {
		d.step("GET from the node", func() error { return d.get(ip) })
	}
	host, err := exec.CommandContext(d.ctx, "uname", "-r").Output()
	d.err = errors.Join(d.err, err)
	if d.err == nil {
		fmt.Printf("\n   kernel of the host: %s\n   kernel of the pod:  %s\n   addresses:          %s\n   VMM:                %s, %s, process %d\n",
			strings.TrimSpace(string(host)), guest, strings.Join(addresses, ", "), inspect.Info.VMM, inspect.Info.Acceleration, inspect.Info.PID)
		if strings.TrimSpace(string(host)) == guest {
			d.err = errors.New("the pod runs on the host's kernel")
		}
	}
	d.crictl("stop", container)
	d.crictl("stopp", pod)
	d.crictl("rmp", pod)
	if d.err == nil {
		fmt.Printf("\n   %s\n", strings.Join(d.times, "\n   "))
	}
	return d.err
}

func (d *show) write(dir, name, text string) string {
	path := filepath.Join(dir, name)
	if d.err == nil {
		d.err = os.WriteFile(path, []byte(text), 0o644)
	}
	return path
}

// get fetches the pod's page from the node.
func (d *show) get(ip string) error {
	url := "http://" + net.JoinHostPort(ip, "80") + "/"
	fmt.Printf("\n$ GET %s\n", url)
	client := &http.Client{Timeout: 10 * time.Second}
	resp, err := client.Get(url)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	page, err := io.ReadAll(io.LimitReader(resp.Body, 4096))
	fmt.Printf("%s: %s", resp.Status, page)
	return err
}

func (d *show) until(what string, true func() bool) {
	if d.err != nil {
		return
	}
	d.err = func() error {
		ctx, cancel := context.WithTimeout(d.ctx, 30*time.Second)
		defer cancel()
		tick := time.NewTicker(100 * time.Millisecond)
		defer tick.Stop()
		for !true() {
			select {
			case <-ctx.Done():
				return fmt.Errorf("waiting for %s: %w", what, ctx.Err())
			case <-tick.C:
			}
		}
		return nil
	}()
}
