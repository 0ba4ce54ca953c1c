package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	grpcstatus "google.golang.org/grpc/status"

	"github.com/crivm/crivm/conf"
	"github.com/crivm/crivm/server"
)

// collectLimit bounds `crivm gc`: plugins may take a minute for each network that is left.
const collectLimit = 10 * time.Minute

// errLeft is what `crivm gc` ends with when something could not be removed.
var errLeft = errors.New("not everything could be removed")

func gcCommand() *cobra.Command {
	var path string
	var dryRun, asJSON bool
	cmd := &cobra.Command{
		Use:   "gc",
		Short: "Remove what crivm has made and no record owns any more; --dry-run only lists it",
		Long: `Compare crivm's records with the processes, directories, cgroups and networks of pods, and the image store with its
images, and remove what belongs to nobody. The same is done whenever the daemon starts. A running daemon is asked to do
it; without one the records are opened here.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			config, err := conf.Load(path, cmd.Flags().Changed("config"))
			if err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), collectLimit)
			defer cancel()
			c, err := collect(ctx, config, dryRun)
			if err != nil {
				return err
			}
			if asJSON {
				err = writeJSON(cmd.OutOrStdout(), c)
			} else {
				err = writeCollected(cmd.OutOrStdout(), c)
			}
			for _, l := range c.Leftovers {
				if l.Error != "" {
					err = errors.Join(err, errLeft)
					break
				}
			}
			return err
		},
	}
	cmd.Flags().StringVar(&path, "config", defaultConfigPath, "configuration file; conf.d beside it is read too")
	cmd.Flags().BoolVar(&dryRun, "dry-run", false, "remove nothing")
	cmd.Flags().BoolVar(&asJSON, "json", false, "write JSON")
	return cmd
}

// collect asks the daemon on the configured socket, or, where nobody listens, looks for itself.
func collect(ctx context.Context, config conf.Config, dryRun bool) (server.Collected, error) {
	probe, err := net.DialTimeout("unix", config.Socket, 5*time.Second)
	if err != nil {
		return collectStopped(ctx, config, dryRun)
	}
	probe.Close()
	var c server.Collected
	err = askDaemon(config, func(conn *grpc.ClientConn) (err error) {
		c, err = server.CollectFrom(ctx, conn, dryRun)
		return err
	})
	if grpcstatus.Code(err) == codes.Unimplemented {
		return c, fmt.Errorf("the daemon on %s is an older crivm, or none: restarting it collects, too", config.Socket)
	}
	return c, err
}

// askDaemon calls the daemon on the configured socket.
func askDaemon(config conf.Config, call func(*grpc.ClientConn) error) error {
	conn, err := grpc.NewClient("unix://"+config.Socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer conn.Close()
	if err := call(conn); err != nil {
		return fmt.Errorf("daemon on %s: %w", config.Socket, err)
	}
	return nil
}

// collectStopped does what the daemon would, from the same parts. While it does, no daemon can start.
func collectStopped(ctx context.Context, config conf.Config, dryRun bool) (_ server.Collected, retErr error) {
	handlers, _, err := handlers(ctx, config)
	if err != nil {
		return server.Collected{}, err
	}
	network, err := openNetwork(config)
	if err != nil {
		return server.Collected{}, err
	}
	defer func() { retErr = errors.Join(retErr, network.Close()) }()
	store := imageConfig(config)
	store.KeepLeftovers = true
	images := lateImages{config: store}
	defer func() { retErr = errors.Join(retErr, images.Close()) }()
	return server.CollectStopped(ctx, serverOptions(config, handlers, nil), network, &images, dryRun)
}

func writeCollected(w io.Writer, c server.Collected) error {
	table := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, l := range c.Leftovers {
		state := "removed"
		switch {
		case l.Error != "":
			state = "FAILED: " + l.Error
		case c.DryRun:
			state = "found"
		}
		fmt.Fprintf(table, "%s\t%s\t%s\t%s\n", l.Kind, l.Name, state, l.Why)
	}
	if err := table.Flush(); err != nil {
		return err
	}
	for _, s := range c.Skipped {
		fmt.Fprintln(w, "not looked at:", s)
	}
	if len(c.Leftovers) == 0 {
		fmt.Fprintln(w, "nothing is left that nobody owns")
	}
	return nil
}
