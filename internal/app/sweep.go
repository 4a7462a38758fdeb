package app

import (
	"context"
	"time"
)

const (
	// sweepEvery is how often what was left by whoever is looked for.
	sweepEvery = 5 * time.Minute
	// sweepSoon is how long after a sweep that left something the next one comes; each further one takes twice as long.
	sweepSoon = 30 * time.Second
	// sweepFirst is how long it is tried before anything else is done.
	sweepFirst = 20 * time.Second
)

// undoEarlier undoes what earlier processes left, here and at GitHub, and reports whether all of it is gone.
func (a *App) undoEarlier(ctx context.Context) bool {
	err := a.host.Sweep(ctx)
	if err != nil {
		a.log.Warn("not everything of an earlier process could be undone yet", "err", err)
	}
	return err == nil
}

// undoFirst is undoEarlier before anything else is done. GitHub may be away, and each registration is then asked for in vain:
// Serve is not to wait for all of them.
func (a *App) undoFirst(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, sweepFirst)
	defer cancel()
	a.undoEarlier(ctx)
}

// prune removes the registrations that bear our mark and that no runner claims.
func (a *App) prune(ctx context.Context) {
	removed, err := a.github.Prune(ctx, a.host.Claims)
	if len(removed) > 0 {
		a.log.Warn("removed registrations nobody claims", "runners", removed)
	}
	if err != nil && ctx.Err() == nil {
		a.log.Warn("registrations could not be swept", "err", err)
	}
}

// regularly calls sweep until ctx ends: every sweepEvery, and sooner after a start, where it reports that something is left, and when
// left says so. GitHub, for one, keeps a registration until it has noticed that its job is lost.
func regularly(ctx context.Context, left <-chan struct{}, sweep func(context.Context) (clean bool)) {
	wait, again := sweepSoon, 2*sweepSoon
	for {
		due := time.Now().Add(wait)
		timer := time.NewTimer(wait)
		select {
		case <-left:
			timer.Stop()
			wait, again = min(sweepSoon, time.Until(due)), 2*sweepSoon
			continue
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return
		}
		if sweep(ctx) {
			wait, again = sweepEvery, sweepSoon
		} else {
			wait, again = again, min(2*again, sweepEvery)
		}
	}
}
