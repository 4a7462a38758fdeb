package app

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sync/errgroup"

	"flint"
	"flint/internal/github"
	"flint/internal/host"
	"flint/internal/sched"
)

// Serve is the coordinator: it runs the jobs of the configured pools until ctx ends, and returns when the last runner is
// gone. Call Prepare first.
func (a *App) Serve(ctx context.Context) error {
	journals := filepath.Join(a.dir, "github")
	if err := os.MkdirAll(journals, 0o700); err != nil {
		return fmt.Errorf("make directory of journals: %w", err)
	}
	var h *host.Host
	gh, err := github.New(github.Config{
		URL: a.cfg.GitHub.Scope(), AppID: strconv.FormatInt(a.cfg.GitHub.AppID, 10), InstallationID: a.cfg.GitHub.InstallationID,
		PrivateKey: a.cfg.GitHub.PrivateKey, Owner: "flint-" + a.cfg.Host.Name, StateDir: journals,
		Pools: a.cfg.FlintPools(), Log: a.log,
		Events: func(ctx context.Context, ev flint.JobEvent) error { return h.Note(ctx, ev) },
	})
	if err != nil {
		return err
	}
	h = a.newHost(gh)
	if err := h.Sweep(ctx); err != nil {
		a.log.Error("not everything of an earlier process could be undone; the next start tries again", "err", err)
	}
	loop := sched.New(sched.Config{
		Pools: a.cfg.FlintPools, Source: gh, Hosts: []sched.Host{h}, NewID: host.NewID, Log: a.log, Done: a.ended,
	})
	// GitHub is listened to until the last runner is gone: its messages say how their jobs ended.
	listen, stopListening := context.WithCancel(context.WithoutCancel(ctx))
	defer stopListening()
	tasks, tctx := errgroup.WithContext(ctx)
	tasks.Go(func() error {
		err := gh.Run(listen)
		if listen.Err() != nil {
			return nil
		}
		return errors.Join(errors.New("GitHub's messages ended"), err)
	})
	tasks.Go(func() error {
		defer stopListening()
		stop := context.AfterFunc(tctx, h.Stop)
		defer stop()
		return loop.Run(tctx)
	})
	return tasks.Wait()
}

func (a *App) ended(res flint.Result, err error) {
	log := a.log.With("runner", res.Runner.ID, "pool", res.Runner.Pool, "reason", res.Reason)
	if res.Runner.Job != nil {
		log = log.With("job", res.Runner.Job.Name, "conclusion", res.Conclusion)
	}
	switch {
	case errors.Is(err, flint.ErrUnneeded), errors.Is(err, flint.ErrStopped):
		log.Info("runner ended")
	case err != nil:
		log.Error("runner ended", "err", err, "output", res.Output, "console", res.Console)
	case res.ExitCode != 0:
		log.Warn("runner ended", "exit", res.ExitCode, "output", res.Output)
	default:
		log.Info("runner ended", "peak_memory", res.PeakMemory)
	}
	if a.opt.Result != nil {
		a.opt.Result(res, err)
	}
}
