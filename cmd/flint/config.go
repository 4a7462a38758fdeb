package main

import (
	"errors"
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"flint"
	"flint/internal/config"
)

// defaultConfig is where `flint serve` looks unless told otherwise.
const defaultConfig = "/etc/flint/flint.yaml"

func newConfig() *cobra.Command {
	c := &cobra.Command{Use: "config", Short: "Check the configuration, or print an example"}
	file := c.PersistentFlags().StringP("config", "c", defaultConfig, "configuration file")
	c.AddCommand(
		&cobra.Command{
			Use: "check", Short: "Check the configuration file, and say everything that is wrong with it", Args: noArgs,
			RunE: func(c *cobra.Command, _ []string) error {
				if _, err := loadServe(*file); err != nil {
					return err
				}
				fmt.Fprintln(c.OutOrStdout(), *file, "is valid")
				return nil
			},
		},
		&cobra.Command{
			Use: "example", Short: "Print the smallest useful configuration file", Args: noArgs,
			Run: func(c *cobra.Command, _ []string) { fmt.Fprint(c.OutOrStdout(), config.Example) },
		},
	)
	return c
}

// loadServe reads a configuration that is complete enough for the coordinator.
func loadServe(file string) (config.Config, error) {
	cfg, err := config.Load(file, os.Environ())
	if err != nil {
		return cfg, err
	}
	return cfg, servable(&cfg, file)
}

// servable reports whether a configuration is complete enough for the coordinator, and reads its secrets.
func servable(cfg *config.Config, where string) error {
	if err := cfg.ValidateServe(); err != nil {
		return config.Invalid(where, err)
	}
	err := cfg.CheckFiles()
	if err == nil {
		return nil
	}
	var fault *flint.Fault
	if all := parts(err); len(all) == 1 && errors.As(all[0], &fault) {
		return all[0]
	}
	return config.Invalid(where, err)
}
