package main

import (
	"context"
	"errors"

	"github.com/spf13/cobra"

	"flint"
	"flint/internal/app"
)

func newServe() *cobra.Command {
	c := &cobra.Command{
		Use: "serve", Short: "Run the coordinator: serve the jobs of the configured pools until told to stop", Args: noArgs,
	}
	file := c.Flags().StringP("config", "c", defaultConfig, "configuration file")
	c.RunE = func(c *cobra.Command, _ []string) error {
		cfg, err := loadServe(*file)
		if err != nil {
			return err
		}
		log, err := logger(c, c.ErrOrStderr(), cfg.LogLevel)
		if err != nil {
			return err
		}
		ctx := c.Context()
		a, err := app.New(ctx, cfg, app.Options{Log: log, Progress: newSteps(c.ErrOrStderr()).report})
		if err != nil {
			return stopped(ctx, err)
		}
		err = a.Prepare(ctx)
		if err == nil {
			log.Info("serving", "scope", cfg.GitHub.Scope(), "pools", len(cfg.Pools))
			err = a.Serve(ctx)
		}
		return stopped(ctx, errors.Join(err, a.Close(ctx)))
	}
	return c
}

// stopped turns what a signal interrupted into success: the program was told to stop, and did.
func stopped(ctx context.Context, err error) error {
	if ctx.Err() != nil && (errors.Is(err, context.Canceled) || errors.Is(err, flint.ErrStopped)) {
		return nil
	}
	return err
}
