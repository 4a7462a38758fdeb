package main

import (
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"

	"flint/internal/api"
	"flint/internal/config"
)

// defaultConfig is where `flint serve` looks unless told otherwise.
const defaultConfig = "/etc/flint/flint.yaml"

func newConfig() *cobra.Command {
	c := &cobra.Command{Use: "config", Short: "Check the configuration, let the running flint read it again, or print an example"}
	file := c.PersistentFlags().StringP("config", "c", defaultConfig, "configuration file")
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
	daemon := daemonFlags{}
	c := &cobra.Command{
		Use: "reload", Short: "Let the running flint read its configuration again, and say what it applied", Args: noArgs,
		Long: "Reload lets the running flint (flint serve) read its own configuration file again and apply what can change, as SIGHUP\n" +
			"does. It prints what was applied and what needs a restart. A configuration that is not valid changes nothing.",
	}
	c.Flags().StringVar(&daemon.socket, "socket", "", "path of its API's socket (overrides the configuration)")
	asJSON := c.Flags().Bool("json", false, "print {applied, restart}, arrays of {key, from, to, note}")
	c.RunE = func(c *cobra.Command, _ []string) error {
		daemon.file = *file
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
