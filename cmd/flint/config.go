package main

import (
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"flint"
	"flint/internal/api"
	"flint/internal/config"
)

// defaultConfig is where `flint serve` looks unless told otherwise.
const defaultConfig = "/etc/flint/flint.yaml"

// configFlag gives a command the flag that names the configuration file, and returns its value.
func configFlag(fl *pflag.FlagSet, what string) *string {
	file := defaultConfig
	if named := os.Getenv(config.FileVariable); named != "" {
		file = named
	}
	return fl.StringP("config", "c", file, what)
}

// loadOrDefault reads the configuration. Where nobody named a file, and there is none at the usual place, it is the defaults with
// the environment above them, and there is false.
func loadOrDefault(c *cobra.Command, file string) (cfg config.Config, there bool, err error) {
	cfg, err = config.Load(file, os.Environ())
	if errors.Is(err, flint.ErrNotFound) && !c.Flags().Changed("config") && os.Getenv(config.FileVariable) == "" {
		cfg, err = config.FromEnvironment(os.Environ())
		return cfg, false, err
	}
	return cfg, true, err
}

func newConfig() *cobra.Command {
	c := &cobra.Command{Use: "config", Short: "Check the configuration, let the running flint read it again, or print an example"}
	file := configFlag(c.PersistentFlags(), "configuration file")
	c.AddCommand(
		&cobra.Command{
			Use: "check", Short: "Check the configuration file, and say everything that is wrong with it", Args: noArgs,
			RunE: func(c *cobra.Command, _ []string) error {
				if _, err := config.LoadServe(*file, os.Environ()); err != nil {
					return err
				}
				fmt.Fprintln(c.OutOrStdout(), *file, "is valid")
				return nil
			},
		},
		newConfigReload(file),
		&cobra.Command{
			Use: "example", Short: "Print the smallest useful configuration file", Args: noArgs,
			Run: func(c *cobra.Command, _ []string) { fmt.Fprint(c.OutOrStdout(), config.Example) },
		},
	)
	return c
}

func newConfigReload(file *string) *cobra.Command {
	daemon := daemonFlags{file: file}
	c := &cobra.Command{
		Use: "reload", Short: "Let the running flint read its configuration again, and say what it applied", Args: noArgs,
		Long: "Reload lets the running flint (flint serve) read its own configuration file again and apply what can change, as SIGHUP\n" +
			"does. It prints what was applied and what needs a restart. A configuration that is not valid changes nothing.",
	}
	c.Flags().StringVar(&daemon.socket, "socket", "", "path of its API's socket (overrides the configuration)")
	asJSON := c.Flags().Bool("json", false, "print {applied, restart}, arrays of {key, from, to, note}")
	c.RunE = func(c *cobra.Command, _ []string) error {
		client, err := daemon.connect(c)
		if err != nil {
			return err
		}
		done, err := client.Reload(c.Context())
		if err != nil {
			return err
		}
		if *asJSON {
			return printJSON(c.OutOrStdout(), done)
		}
		showReloaded(c.OutOrStdout(), done)
		return nil
	}
	return c
}

// showReloaded writes what changed, and what is as it was until a restart.
func showReloaded(w io.Writer, done api.Reloaded) {
	s := styleOf(w)
	if len(done.Applied)+len(done.Restart) == 0 {
		fmt.Fprintln(w, "Nothing has changed.")
		return
	}
	var rows [][]string
	for _, part := range []struct {
		changes []api.Change
		outcome string
	}{{done.Applied, "applied"}, {done.Restart, "needs a restart"}} {
		for _, c := range part.changes {
			outcome := part.outcome
			if c.Note != "" {
				outcome += ": " + c.Note
			}
			rows = append(rows, []string{oneLine(c.Key), orNone(c.From), orNone(c.To), outcome})
		}
	}
	table(w, s, []string{"key", "was", "is now", "outcome"}, rows)
}

func orNone(value string) string {
	if value == "" {
		return "-"
	}
	return oneLine(value)
}
