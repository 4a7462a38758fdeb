package main

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/term"

	"flint"
	"flint/internal/app"
	"flint/internal/config"
	"flint/internal/regular"
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
	fl.StringVar(&f.privateKey, "privateKey", "", "path of the GitHub App's private key, or the key itself, which other users can then read")
	fl.StringVar(&f.webhookSecret, "webhookSecret", "", "absolute path of a file with the App's webhook secret, or the secret itself, which other users can then read")
	fl.StringVar(&f.organization, "organization", "", "the GitHub organisation")
	fl.Int64Var(&f.appID, "appID", 0, "the GitHub App's id")
	fl.BoolVar(&f.interactive, "interactive", false, "start one VM on this terminal, and listen to nothing")
}

// seedNames are the names of all these flags.
func seedNames() (names []string) {
	own := pflag.NewFlagSet("", pflag.ContinueOnError)
	new(seedFlags).register(own)
	own.VisitAll(func(flag *pflag.Flag) { names = append(names, flag.Name) })
	return names
}

// seedGiven reports whether the command line is of that kind, even if a script has left all its values empty.
func seedGiven(fl *pflag.FlagSet) bool { return slices.ContainsFunc(seedNames(), fl.Changed) }

// config maps the flags onto the configuration that a file would hold. A flag that is given goes before the environment.
func (f *seedFlags) config(environ []string) (config.Config, error) {
	cfg, err := config.FromEnvironment(environ)
	if err != nil {
		return cfg, err
	}
	if err := f.check(); err != nil {
		return cfg, err
	}
	if f.firecracker != "" || f.jailer != "" {
		cfg.VM.Driver = "firecracker"
	}
	for to, value := range map[*string]string{&cfg.Firecracker.Binary: f.firecracker, &cfg.Firecracker.Jailer: f.jailer} {
		if value != "" {
			*to = value
		}
	}
	if f.kernel != "" {
		cfg.Kernel = config.Kernel{Vmlinuz: f.kernel}
	}
	f.account(&cfg.GitHub)
	if cfg.Runner.Dir == "" && cfg.Runner.InImage == "" {
		cfg.Runner.InImage = "auto"
	}
	// It is a file wherever it lies, and never an image's name in a registry.
	image, err := filepath.Abs(f.filesystem)
	if err != nil {
		return cfg, fmt.Errorf("find --filesystem: %w", err)
	}
	cfg.Pools = []config.Pool{config.NewPool("self-hosted", image)}
	return cfg, cfg.Complete()
}

// account maps what the flags say of GitHub.
func (f *seedFlags) account(g *config.GitHub) {
	g.Mode = config.Webhooks
	if f.organization != "" {
		g.Organization, g.Repository, g.Enterprise = f.organization, "", ""
	}
	if f.appID != 0 {
		g.AppID, g.TokenFile = f.appID, ""
	}
	switch {
	case isKey(f.privateKey):
		g.PrivateKey, g.PrivateKeyFile = flint.Secret(f.privateKey), ""
	case f.privateKey != "":
		g.PrivateKeyFile = f.privateKey
	}
	switch {
	case isPath(f.webhookSecret):
		g.WebhookSecretFile = f.webhookSecret
	case f.webhookSecret != "":
		g.WebhookSecret, g.WebhookSecretFile = flint.Secret(f.webhookSecret), ""
	}
}

// check returns everything that is wrong with the values, as far as looking at the files tells. It repeats no value that
// may be a secret.
func (f *seedFlags) check() error {
	var errs []error
	bad := func(flag string, err error) { errs = append(errs, fmt.Errorf("--%s: %w", flag, err)) }
	for _, file := range []struct {
		flag, path string
		program    bool
	}{{"jailer", f.jailer, true}, {"firecracker", f.firecracker, true}, {"kernel", f.kernel, false}, {"filesystem", f.filesystem, false}} {
		if file.path == "" {
			continue
		}
		switch info, err := os.Stat(file.path); {
		case err != nil:
			bad(file.flag, fmt.Errorf("%s: %w", file.path, regular.Cause(err)))
		case !info.Mode().IsRegular() && file.flag != "filesystem":
			bad(file.flag, fmt.Errorf("%s is no file", file.path))
		case file.program && info.Mode()&0o111 == 0:
			bad(file.flag, fmt.Errorf("%s is not executable", file.path))
		}
	}
	if f.filesystem == "" {
		errs = append(errs, errors.New("--filesystem is missing: it names the image to boot"))
	}
	if f.appID < 0 {
		bad("appID", fmt.Errorf("%d is no id: it stands on the App's settings page", f.appID))
	}
	if strings.ContainsAny(f.organization, "/:") {
		bad("organization", fmt.Errorf("%q is not the plain name of an organisation", f.organization))
	}
	if _, err := os.Stat(f.privateKey); f.privateKey != "" && !isKey(f.privateKey) && err != nil {
		bad("privateKey", fmt.Errorf("it names no file that can be read (%w), and is no key in PEM form either", regular.Cause(err)))
	}
	if isPath(f.webhookSecret) {
		if _, err := os.Stat(f.webhookSecret); err != nil {
			bad("webhookSecret", fmt.Errorf("it begins with / and so names a file: %w", regular.Cause(err)))
		}
	}
	if len(errs) == 0 {
		return nil
	}
	return &flint.Fault{
		Code: "config.invalid", What: "use the launch line", Kind: flint.ErrConfig, Err: errors.Join(errs...),
		Fix: "mend the flags named above; `flint --help` says what each is",
	}
}

// isKey reports whether the value of --privateKey is a key itself.
func isKey(value string) bool { return strings.Contains(value, "-----BEGIN") }

// isPath reports whether the value of --webhookSecret is a path, and not a secret itself.
func isPath(value string) bool { return filepath.IsAbs(value) }

// warn tells of secrets in the command line.
func (f *seedFlags) warn(log *slog.Logger) {
	tell := func(flag string) {
		log.Warn("the secret --" + flag + " is in the command line, where every user of this machine can read it: " +
			"make a new one, put it into a file (chmod 600), and give the absolute path of that")
	}
	if isKey(f.privateKey) {
		tell("privateKey")
	}
	if f.webhookSecret != "" && !isPath(f.webhookSecret) {
		tell("webhookSecret")
	}
}

func (f *seedFlags) run(c *cobra.Command, told *signals) error {
	cfg, err := f.config(os.Environ())
	if err != nil {
		return err
	}
	log, err := logger(c, c.ErrOrStderr(), "warn", true)
	if err != nil {
		return err
	}
	f.warn(log)
	if !f.interactive {
		if err := cfg.CheckServe("of the launch line"); err != nil {
			return err
		}
		return coordinate(c, told, cfg, app.Options{})
	}
	if in, ok := c.InOrStdin().(*os.File); !ok || !term.IsTerminal(int(in.Fd())) {
		return usage(c, errors.New("--interactive needs a terminal on standard input"))
	}
	shell := runFlags{interactive: true, tty: true, preset: &cfg}
	return shell.command(c, []string{"/bin/sh", "-l"})
}

// withoutValues takes the values out of what is said of a command line that was not understood: one may be a secret.
// pflag repeats a flag with one dash as a whole, value and all.
func withoutValues(err error) error {
	var unknown *pflag.NotExistError
	if !errors.As(err, &unknown) {
		return err
	}
	name, _, valued := strings.Cut(unknown.GetSpecifiedShortnames(), "=")
	if !valued {
		return err
	}
	if slices.Contains(seedNames(), name) {
		return fmt.Errorf("unknown flag: -%s; it has two dashes: --%s", name, name)
	}
	return fmt.Errorf("unknown flag: -%s", name)
}
