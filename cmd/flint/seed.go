package main

import (
	"errors"
	"os"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"flint"
	"flint/internal/config"
)

// seedFlags are the launch line of the tool that flint supersedes: every setting a flag, no subcommand, no file.
type seedFlags struct {
	jailer, firecracker, kernel, filesystem string
	privateKey, webhookSecret, organization string
	appID                                   int64
	interactive                             bool
}

func (f *seedFlags) register(fl *pflag.FlagSet) {
	fl.StringVar(&f.jailer, "jailer", "", "path of Firecracker's jailer")
	fl.StringVar(&f.firecracker, "firecracker", "", "path of Firecracker")
	fl.StringVar(&f.kernel, "kernel", "", "a kernel to boot as it is (vmlinux)")
	fl.StringVar(&f.filesystem, "filesystem", "", "an ext4 image to boot as it is")
	fl.StringVar(&f.privateKey, "privateKey", "", "the GitHub App's private key file")
	fl.StringVar(&f.webhookSecret, "webhookSecret", "", "the App's webhook secret")
	fl.StringVar(&f.organization, "organization", "", "the GitHub organisation")
	fl.Int64Var(&f.appID, "appID", 0, "the GitHub App's id")
	fl.BoolVar(&f.interactive, "interactive", false, "start one VM on this terminal, and listen to nothing")
}

// given reports whether the command line is of that kind.
func (f *seedFlags) given() bool { return *f != seedFlags{} }

// config maps the flags onto the configuration that a file would hold.
func (f *seedFlags) config(environ []string) (config.Config, error) {
	cfg, err := config.FromEnvironment(environ)
	if err != nil {
		return cfg, err
	}
	if f.firecracker != "" || f.jailer != "" {
		cfg.VM.Driver = "firecracker"
	}
	cfg.Firecracker.Binary, cfg.Firecracker.Jailer = f.firecracker, f.jailer
	cfg.Kernel.Vmlinuz = f.kernel
	cfg.GitHub.Organization, cfg.GitHub.AppID, cfg.GitHub.PrivateKeyFile = f.organization, f.appID, f.privateKey
	if f.filesystem == "" {
		return cfg, config.Invalid("of the launch line", errors.New("--filesystem is missing: it names the image to boot"))
	}
	cfg.Pools = []config.Pool{config.NewPool("self-hosted", f.filesystem)}
	return cfg, cfg.Complete()
}

func (f *seedFlags) run(c *cobra.Command) error {
	cfg, err := f.config(os.Environ())
	if err != nil {
		return err
	}
	if !f.interactive {
		return &flint.Fault{
			Code: "seed.webhooks", What: "serve webhooks", Kind: flint.ErrUsage,
			Err: errors.New("this flint takes its jobs from GitHub's scale sets, not from webhooks"),
			Fix: "write a configuration (`flint config example`) and run `flint serve`; --interactive works with this launch line",
		}
	}
	shell := runFlags{interactive: true, tty: true, preset: &cfg}
	return shell.command(c, []string{"/bin/sh", "-l"})
}
