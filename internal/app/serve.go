package app

import (
	"context"
	"errors"
	"time"

	"golang.org/x/sync/errgroup"

	"flint"
	"flint/internal/api"
	"flint/internal/host"
	"flint/internal/sched"
)

// Serve is the coordinator: it runs the jobs of the configured pools until ctx ends, and returns when the last runner is
// gone, or left to the next process. Call Connect, and Prepare or PrepareToServe, first.
func (a *App) Serve(ctx context.Context) error {
	ctx, drained := a.drainFirst(ctx)
	defer drained()
	loop := sched.New(sched.Config{
		Pools: a.pools, Source: a.demand, Hosts: []sched.Host{a.host}, Log: a.log, Done: a.ended,
		NewID: func(pool string) string { return host.NewID(a.prefix, pool) },
	})
	a.mu.Lock()
	a.loop = loop
	a.mu.Unlock()
	// GitHub is listened to until the last runner is gone: its messages say how their jobs ended.
	listen, stopListening := context.WithCancel(context.WithoutCancel(ctx))
	defer stopListening()
	tasks, tctx := errgroup.WithContext(ctx)
	if err := a.serveAPI(tctx, tasks); err != nil {
		return err
	}
	tasks.Go(func() error { return untilTold(listen, "GitHub's messages", a.github.Run) })
	for _, s := range a.demand.all {
		tasks.Go(func() error { return a.demand.forward(tctx, s) })
	}
	if a.hooks != nil {
		tasks.Go(func() error { return untilTold(listen, "GitHub's webhooks", a.hooks.Run) })
		tasks.Go(func() error {
			return untilTold(listen, "the port for webhooks", func(ctx context.Context) error {
				return a.hooks.Serve(ctx, a.listener, a.cfg.Webhook.Path)
			})
		})
	}
	a.feelPressure() // before the first VM
	tasks.Go(func() error { return a.watchPressure(tctx) })
	tasks.Go(func() error { return a.watchNetwork(tctx) })
	tasks.Go(func() error { return a.watchClock(tctx, timeOfDay) })
	tasks.Go(func() error { return a.heartbeat(listen, tctx, loop) })
	tasks.Go(func() error { return a.supplyPools(tctx) })
	tasks.Go(func() error { return a.hearReloads(tctx) })
	tasks.Go(func() error { return a.watchSoftware(tctx) })
	tasks.Go(func() error { return a.reruns.Run(tctx, a.github.Rerun) })
	tasks.Go(func() error {
		a.prune(tctx)
		regularly(tctx, a.left, func(ctx context.Context) bool {
			clean := a.undoEarlier(ctx)
			a.prune(ctx)
			return clean
		})
		return nil
	})
	tasks.Go(func() error {
		defer stopListening()
		defer a.awaitAdopted()
		run, stop := context.WithCancel(context.WithoutCancel(tctx))
		defer stop()
		// In this order: a runner whose context ends has to know whether its VM goes on.
		defer context.AfterFunc(tctx, func() {
			if a.detaches() {
				a.host.Detach()
			}
			stop()
			a.stopAdopted()
		})()
		return loop.Run(run)
	})
	return tasks.Wait()
}

// untilTold runs f until ctx ends; that it ends before is an error.
func untilTold(ctx context.Context, what string, f func(context.Context) error) error {
	err := f(ctx)
	if ctx.Err() != nil {
		return nil
	}
	return errors.Join(errors.New(what+" ended"), err)
}

// serveAPI starts to answer the commands, where a socket is asked for.
func (a *App) serveAPI(ctx context.Context, tasks *errgroup.Group) error {
	if a.opt.API == "" {
		return nil
	}
	s, err := api.Listen(ctx, a.opt.API, a, a.log)
	if err != nil {
		return err
	}
	tasks.Go(func() error { return s.Serve(ctx) })
	return nil
}

// ended is told how each runner ended.
func (a *App) ended(res flint.Result, err error) {
	if a.wentOn(res, err) {
		return
	}
	log := a.log.With("runner", res.Runner.ID, "pool", res.Runner.Pool, "reason", res.Reason)
	if res.Runner.Job != nil {
		log = log.With("job", res.Runner.Job.Name, "conclusion", res.Conclusion)
	}
	switch {
	case res.Lost:
		log.Error("job lost", "err", err, "output", res.Output, "console", res.Console)
	case errors.Is(err, flint.ErrUnneeded), errors.Is(err, flint.ErrStopped):
		log.Info("runner ended")
	case err != nil:
		log.Error("runner ended", "err", err, "output", res.Output, "console", res.Console)
	case res.ExitCode != 0:
		log.Warn("runner ended", "exit", res.ExitCode, "output", res.Output)
	default:
		log.Info("runner ended", "peak_memory", res.PeakMemory)
	}
	if errors.Is(err, flint.ErrRelease) {
		select {
		case a.left <- struct{}{}:
		default: // it is said already
		}
	}
	if res.Reason.Code == "runner.deprecated" {
		a.refuse(res.Runner.Pool, time.Now())
	}
	if res.Lost {
		a.lost(res.Runner, *res.Runner.Job)
	}
	if a.opt.Result != nil {
		a.opt.Result(res, err)
	}
}

// lost puts a lost job on the list of those that are to run again, if its pool wants that. It may be told of one twice.
func (a *App) lost(r flint.Runner, job flint.Job) {
	if !a.rerunsLost(r.Pool) {
		return
	}
	if err := a.reruns.Add(job, r.ID); err != nil {
		a.log.Error("it is not sure that a lost job runs again", "runner", r.ID, "job", job.Name, "err", err)
	}
}

func (a *App) rerunsLost(pool string) bool {
	p, _ := poolNamed(a.current(), pool)
	return p.RerunLost
}
