package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"

	"github.com/spf13/cobra"

	"flint"
	"flint/internal/app"
	"flint/internal/config"
)

func newServe(told *signals) *cobra.Command {
	c := &cobra.Command{
		Use: "serve", Short: "Run the coordinator: serve the jobs of the configured pools until told to stop", Args: noArgs,
	}
	file := configFlag(c.Flags(), "configuration file")
	drain := c.Flags().Duration("drain-timeout", 0, "when told to stop, let running jobs finish for so long at first, such as 10m; told again, stop at once (default: do not wait)")
	c.RunE = func(c *cobra.Command, _ []string) error {
		load := func() (config.Config, error) { return config.LoadServe(*file, os.Environ()) }
		cfg, err := load()
		if err != nil {
			return err
		}
		if *drain < 0 {
			return usage(c, fmt.Errorf("--drain-timeout %s is below zero", *drain))
		}
		return coordinate(c, told, cfg, app.Options{DrainTimeout: *drain, Reload: load})
	}
	return c
}

// coordinate is the coordinator of a configuration that is complete, until the program is told to stop.
func coordinate(c *cobra.Command, told *signals, cfg config.Config, opt app.Options) error {
	at, err := levelOf(c, cfg.LogLevel)
	if err != nil {
		return err
	}
	var level slog.LevelVar
	level.Set(at)
	log := slog.New(slog.NewTextHandler(c.ErrOrStderr(), &slog.HandlerOptions{Level: &level}))
	ctx := c.Context()
	opt.Outlive = true
	opt.Log, opt.Progress, opt.API, opt.Reloads, opt.Hurry = log, newSteps(c.ErrOrStderr()).report, cfg.API.Socket, told.takeReloads(), told.hurry
	opt.SetLevel = func(configured string) bool {
		l, err := levelOf(c, configured)
		if err == nil {
			level.Set(l)
		}
		return err == nil && levelFlag(c) == ""
	}
	a, err := app.New(ctx, cfg, opt)
	if err != nil {
		return stopped(ctx, err)
	}
	err = a.Connect(ctx)
	if err == nil {
		err = a.PrepareToServe(ctx)
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
