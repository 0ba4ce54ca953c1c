package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/crivm/crivm/conf"
)

// traceLimit bounds `crivm trace`, which asks the daemon for what it remembers.
const traceLimit = 30 * time.Second

func traceCommand() *cobra.Command {
	var path string
	cmd := &cobra.Command{
		Use:   "trace POD",
		Short: "Show where the time of a pod's start went, step by step, on the host and in the guest",
		Long: `Draw the calls that made a pod what it is: RunPodSandbox, and CreateContainer and StartContainer of its containers, with when
each step began, how long it took and its share of the call. POD is an ID, the beginning of one, NAME or NAMESPACE/NAME. The
daemon remembers them while it runs; no collector is needed.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			config, err := conf.Load(path, cmd.Flags().Changed("config"))
			if err != nil {
				return err
			}
			ctx, cancel := context.WithTimeout(cmd.Context(), traceLimit)
			defer cancel()
			conn, err := grpc.NewClient("unix://"+config.Socket, grpc.WithTransportCredentials(insecure.NewCredentials()),
				grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage)))
			if err != nil {
				return err
			}
			defer conn.Close()
			return showTrace(ctx, cri.NewRuntimeServiceClient(conn), args[0], cmd.OutOrStdout())
		},
	}
	cmd.Flags().StringVar(&path, "config", defaultConfigPath, "configuration file; conf.d beside it is read too")
	return cmd
}

// showTrace finds the pod, the newest one of a name, and prints what the daemon says.
func showTrace(ctx context.Context, runtime cri.RuntimeServiceClient, pod string, to io.Writer) error {
	list, err := runtime.ListPodSandbox(ctx, &cri.ListPodSandboxRequest{})
	if err != nil {
		return err
	}
	var found *cri.PodSandbox
	for _, p := range list.GetItems() {
		m := p.GetMetadata()
		named := pod == m.GetName() || pod == m.GetNamespace()+"/"+m.GetName()
		if !named && (len(pod) < 4 || !strings.HasPrefix(p.GetId(), pod)) {
			continue
		}
		if found == nil || p.GetCreatedAt() > found.GetCreatedAt() {
			found = p
		}
	}
	if found == nil {
		return fmt.Errorf("no pod %q", pod)
	}
	status, err := runtime.PodSandboxStatus(ctx, &cri.PodSandboxStatusRequest{PodSandboxId: found.GetId(), Verbose: true})
	if err != nil {
		return err
	}
	text, ok := status.GetInfo()["trace"]
	if !ok {
		return errors.New("what serves the socket remembers no calls: is it crivm?")
	}
	m := found.GetMetadata()
	_, err = fmt.Fprintf(to, "pod %s/%s, %s\n\n%s", m.GetNamespace(), m.GetName(), found.GetId(), text)
	return err
}
