package main

import (
	"context"
	"fmt"
	"io"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	grpcstatus "google.golang.org/grpc/status"

	"github.com/crivm/crivm/conf"
	"github.com/crivm/crivm/imageservice"
	"github.com/crivm/crivm/server"
)

// imagesLimit bounds `crivm images`.
const imagesLimit = time.Minute

func imagesCommand() *cobra.Command {
	var path string
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "images",
		Short: "List images with what their layers and root disks take, and pulls under way",
		Long: `Ask the running daemon for its images: the bytes of their layers as they are kept (of them, those that no other image
has), the bytes of their root disks, and how many containers use them. Pulls under way follow, with the layers and bytes
that are there already.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			config, err := conf.Load(path, cmd.Flags().Changed("config"))
			if err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), imagesLimit)
			defer cancel()
			var o imageservice.Overview
			err = askDaemon(config, func(conn *grpc.ClientConn) (err error) {
				o, err = server.ImagesFrom(ctx, conn)
				return err
			})
			if grpcstatus.Code(err) == codes.Unimplemented {
				return fmt.Errorf("the daemon on %s is an older crivm, or none", config.Socket)
			}
			if err != nil {
				return err
			}
			if asJSON {
				return writeJSON(cmd.OutOrStdout(), o)
			}
			return writeImages(cmd.OutOrStdout(), o)
		},
	}
	cmd.Flags().StringVar(&path, "config", defaultConfigPath, "configuration file; conf.d beside it is read too")
	cmd.Flags().BoolVar(&asJSON, "json", false, "write JSON, with all names")
	return cmd
}

func writeImages(w io.Writer, o imageservice.Overview) error {
	table := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(table, "IMAGE\tID\tLAYERS\tOWN\tDISK\tCONTAINERS")
	for _, img := range o.Images {
		name := "<none>"
		if len(img.Names) > 0 {
			name = img.Names[0]
		}
		if img.Pinned {
			name += " (pinned)"
		}
		disk := "none"
		if img.DiskBytes > 0 {
			disk = mebibytes(int64(img.DiskBytes))
		}
		fmt.Fprintf(table, "%s\t%.19s\t%s\t%s\t%s\t%d\n", name, img.ID, mebibytes(img.LayerBytes), mebibytes(img.OwnBytes), disk, img.Containers)
	}
	if len(o.Pulls) > 0 {
		fmt.Fprintln(table, "\nPULLING\tFOR\tPHASE\tLAYERS\tBYTES")
	}
	for _, p := range o.Pulls {
		layers, received := "", ""
		if p.LayerCount > 0 {
			layers = fmt.Sprintf("%d of %d", p.Layers, p.LayerCount)
			received = fmt.Sprintf("%s of %s", mebibytes(p.Bytes), mebibytes(p.TotalBytes))
		}
		fmt.Fprintf(table, "%s\t%s\t%s\t%s\t%s\n", p.Image, time.Duration(p.Seconds*float64(time.Second)).Round(time.Second), p.Phase, layers, received)
	}
	return table.Flush()
}

func mebibytes(n int64) string { return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20)) }
