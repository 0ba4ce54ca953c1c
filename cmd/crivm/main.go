// Command crivm is the Kubernetes CRI runtime in which every pod is a microVM: the daemon, and the commands
// that prepare a node for it.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"

	"github.com/spf13/cobra"
	"go.podman.io/storage/pkg/reexec"
	"golang.org/x/sys/unix"
)

// version is set by the linker.
var version = "0.1.0-dev"

const defaultConfigPath = "/etc/crivm/config.toml"

func main() {
	if reexec.Init() { // the image library unpacks layers of unusual images in a child of this program
		return
	}
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGINT, unix.SIGTERM)
	defer stop()
	if err := command().ExecuteContext(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "crivm:", err)
		stop()
		os.Exit(1)
	}
}

func command() *cobra.Command {
	root := &cobra.Command{
		Use:           "crivm",
		Short:         "A Kubernetes CRI runtime where every pod is a microVM",
		SilenceUsage:  true,
		SilenceErrors: true,
		Version:       version,
	}
	root.AddCommand(serveCommand(), configCommand(), checkCommand(), gcCommand(), imagesCommand(), guestCommand(), traceCommand())
	return root
}
