package main

import (
	"context"
	"errors"

	"github.com/spf13/cobra"

	"flint"
	"flint/internal/app"
	"flint/internal/config"
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
		return coordinate(c, cfg)
	}
	return c
}

// coordinate is the coordinator of a configuration that is complete, until the program is told to stop.
func coordinate(c *cobra.Command, cfg config.Config) error {
	log, err := logger(c, c.ErrOrStderr(), cfg.LogLevel, false)
	if err != nil {
		return err
	}
	ctx := c.Context()
	a, err := app.New(ctx, cfg, app.Options{Log: log, Progress: newSteps(c.ErrOrStderr()).report, API: cfg.API.Socket})
	if err != nil {
		return stopped(ctx, err)
	}
	err = a.Connect(ctx)
	if err == nil {
		err = a.Prepare(ctx)
	}
	if err == nil {
		for _, g := range cfg.All() {
			log.Info("serving", "scope", g.Scope(), "mode", g.Mode)
		}
		err = a.Serve(ctx)
	}
	return errors.Join(stopped(ctx, err), a.Close(ctx))
}

// stopped leaves out of err what is only there because the program was told to stop, and did.
func stopped(ctx context.Context, err error) error {
	if ctx.Err() == nil {
		return err
	}
	var rest []error
	for _, e := range parts(err) {
		if !errors.Is(e, context.Canceled) && !errors.Is(e, context.Cause(ctx)) && !errors.Is(e, flint.ErrStopped) {
			rest = append(rest, e)
		}
	}
	return errors.Join(rest...)
}

// parts takes apart what errors.Join put together.
func parts(err error) []error {
	if err == nil {
		return nil
	}
	var fault *flint.Fault
	joined, ok := err.(interface{ Unwrap() []error })
	if !ok || errors.As(err, &fault) && fault == err {
		return []error{err}
	}
	if errors.Join(joined.Unwrap()...).Error() != err.Error() {
		return []error{err} // a sentence with several causes
	}
	var all []error
	for _, e := range joined.Unwrap() {
		all = append(all, parts(e)...)
	}
	return all
}
