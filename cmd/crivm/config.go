package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/crivm/crivm/conf"
)

func configCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "config",
		Short: "Print the default configuration, or check one",
	}
	cmd.AddCommand(&cobra.Command{
		Use:   "default",
		Short: "Print a commented configuration file with every key at its default",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			_, err := cmd.OutOrStdout().Write(conf.DefaultTOML())
			return err
		},
	}, &cobra.Command{
		Use:   "check [FILE]",
		Short: "Read a configuration file and conf.d beside it, and tell file, line and key of what is wrong",
		Args:  cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			path := defaultConfigPath
			if len(args) == 1 {
				path = args[0]
			}
			config, err := conf.Load(path, len(args) == 1)
			if err != nil {
				return err
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s is right; CRI socket %s, %d handlers\n", path, config.Socket, len(config.Handlers))
			return err
		},
	})
	return cmd
}
