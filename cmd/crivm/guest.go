package main

import (
	"fmt"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/crivm/crivm/guest/image"
)

func guestCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "guest",
		Short: "Build what the VMs boot",
	}
	cmd.AddCommand(guestBuildCommand())
	return cmd
}

func guestBuildCommand() *cobra.Command {
	var o image.Options
	cmd := &cobra.Command{
		Use:   "build",
		Short: "Build the guest image: kernel and initramfs",
		Long: `Build the guest image from a distribution's kernel, the agent and an OCI runtime: vmlinux, initramfs and
guest.json in the output directory. The same inputs give the same bytes. Nothing is installed or run.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if o.Agent == "" {
				o.Agent = beside("crivm-agent")
			}
			if _, err := os.Stat(beside("crun")); o.OCIRuntime == "" && err == nil {
				o.OCIRuntime = beside("crun")
			}
			d, err := image.Build(cmd.Context(), o)
			if err != nil {
				return fmt.Errorf("build guest image: %w", err)
			}
			for _, file := range []string{image.KernelFile, image.InitramfsFile} {
				info, err := os.Stat(filepath.Join(o.Output, file))
				if err != nil {
					return err
				}
				fmt.Fprintf(cmd.OutOrStdout(), "%s: %.1f MiB\n", filepath.Join(o.Output, file), float64(info.Size())/(1<<20))
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "kernel %s, %d modules, OCI runtime %s\n", d.Kernel, len(d.Modules), filepath.Base(d.OCIRuntime))
			return err
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&o.Kernel, "kernel", "", "kernel, as bzImage (vmlinuz) or ELF; the newest of /boot when not given")
	flags.StringVar(&o.ModulesDir, "modules", "", `directory of the kernel's modules; "none" for a kernel that has everything built in; looked for beside the kernel and in /lib/modules when not given`)
	flags.StringVar(&o.Agent, "agent", "", "static crivm-agent; the one beside this program when not given")
	flags.StringVar(&o.OCIRuntime, "oci-runtime", "", "crun or runc, best a static one (guest/crun/build.sh); a crun beside this program, or one in PATH, when not given")
	flags.StringVar(&o.Output, "output", "/usr/lib/crivm", "directory to write to")
	flags.StringVar(&o.Compression, "compression", "none", "of the initramfs: none, lz4 or zstd")
	return cmd
}

// beside is where a file is that is installed together with crivm.
func beside(name string) string {
	self, err := os.Executable()
	if err != nil {
		return filepath.Join("/usr/bin", name)
	}
	return filepath.Join(filepath.Dir(self), name)
}
