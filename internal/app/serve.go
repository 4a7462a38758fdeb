package app

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sync/errgroup"

	"flint"
	"flint/internal/github"
	"flint/internal/host"
	"flint/internal/sched"
)

// sweepEvery is how often what could not be released is tried again.
const sweepEvery = 5 * time.Minute

// Connect makes the coordinator's side of GitHub, without talking to it yet, and undoes what an earlier process left: VMs,
// registrations, records. What cannot be undone now is tried again while Serve runs.
func (a *App) Connect(ctx context.Context) error {
	journals := filepath.Join(a.dir, "github")
	if err := os.MkdirAll(journals, 0o700); err != nil {
		return fmt.Errorf("make directory of journals: %w", err)
	}
	var err error
	a.github, err = github.New(github.Config{
		Accounts: []github.Account{{
			URL: a.cfg.GitHub.Scope(), AppID: strconv.FormatInt(a.cfg.GitHub.AppID, 10), InstallationID: a.cfg.GitHub.InstallationID,
			PrivateKey: a.cfg.GitHub.PrivateKey,
		}},
		Owner: "flint-" + a.cfg.Host.Name, StateDir: journals,
		Pools: a.cfg.FlintPools(), Log: a.log,
		Events: func(ctx context.Context, ev flint.JobEvent) error { return a.host.Note(ctx, ev) },
	})
	if err != nil {
		return err
	}
	a.host = a.newHost(a.github)
	a.undoEarlier(ctx)
	return nil
}

func (a *App) undoEarlier(ctx context.Context) {
	if err := a.host.Sweep(ctx); err != nil {
		a.log.Warn("not everything of an earlier process could be undone yet", "err", err)
	}
}

// Serve is the coordinator: it runs the jobs of the configured pools until ctx ends, and returns when the last runner is
// gone. Call Connect and Prepare first.
func (a *App) Serve(ctx context.Context) error {
	gh, h := a.github, a.host
	loop := sched.New(sched.Config{
		Pools: a.cfg.FlintPools, Source: gh, Hosts: []sched.Host{h}, Log: a.log, Done: a.ended,
		NewID: func(pool string) string { return host.NewID("flint-", pool) },
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
	tasks.Go(func() error { return a.watchNetwork(tctx) })
	tasks.Go(func() error {
		tick := time.NewTicker(sweepEvery)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				a.undoEarlier(tctx)
			case <-tctx.Done():
				return nil
			}
		}
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
