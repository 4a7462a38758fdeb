package app

import (
	"context"
	"errors"
	"maps"
	"slices"
	"time"

	"flint"
	"flint/internal/runnersoft"
)

// refuse notes that GitHub refused the software of a pool's runner: that of all pools, unless each has its own in its image, or
// this one pins it.
func (a *App) refuse(pool string, now time.Time) {
	if a.cfg.Runner.InImage == "" && pinOf(a.current(), pool) == "" {
		pool = ""
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.refused == nil {
		a.refused = map[string]runnersoft.Refusal{}
	}
	a.refused[pool] = runnersoft.Refusal{At: now}
}

// softwareEvery is how often GitHub is asked for its newest runner software; softwareAgain, when it did not answer; softwareLook,
// how often flint looks whether a command has put another one in place.
const (
	softwareEvery = 24 * time.Hour
	softwareAgain = 15 * time.Minute
	softwareLook  = time.Minute
)

// watchSoftware fetches GitHub's newest runner software where flint keeps it, or else compares what it has with that, now and
// every day, and says how long it will be taken.
func (a *App) watchSoftware(ctx context.Context) error {
	next := time.NewTimer(0)
	defer next.Stop()
	look := time.NewTicker(softwareLook)
	defer look.Stop()
	for {
		select {
		case <-next.C:
			wait := softwareEvery
			if err := errors.Join(a.refreshSoftware(ctx, time.Now()), a.checkSoftware(ctx, time.Now())); err != nil {
				wait = softwareAgain
			}
			next.Reset(wait)
		case <-look.C:
			a.followSoftware(ctx)
		case <-ctx.Done():
			return nil
		}
	}
}

// checkSoftware returns an error where GitHub could not be asked.
func (a *App) checkSoftware(ctx context.Context, now time.Time) error {
	a.mu.Lock()
	known := a.software.Version != "" || len(a.pinned) > 0
	a.mu.Unlock()
	if !known {
		a.log.Debug("version of the runner software is not known")
		return nil
	}
	version, published, err := a.github.LatestRunner(ctx)
	if err != nil {
		a.log.Info("GitHub's newest runner software is not known", "err", err)
	}
	a.mu.Lock()
	if err == nil {
		a.software = a.software.Beside(version, published)
		for v, s := range a.pinned {
			a.pinned[v] = s.Beside(version, published)
		}
	}
	all := append([]runnersoft.Standing{a.software}, slices.Collect(maps.Values(a.pinned))...)
	a.mu.Unlock()
	for _, s := range all {
		s.Tell(a.log, now)
	}
	if errors.Is(err, flint.ErrNotFound) { // this server has none, and will not have one soon
		return nil
	}
	return err
}

// pools are the configured pools as they are now.
func (a *App) pools() []flint.Pool {
	cfg := a.current()
	pools := a.reloading.pools(cfg)
	now := time.Now()
	a.mu.Lock()
	defer a.mu.Unlock()
	for i := range pools {
		if p := &pools[i]; p.Held.IsZero() {
			p.Held = a.softwareHeld(p.Name, pinOf(cfg, p.Name), now)
		}
	}
	return pools
}

// softwareHeld says why no runner of a pool, which pins a version or none, is to be started for its software; zero where one is.
// a.mu is held.
func (a *App) softwareHeld(pool, pin string, now time.Time) flint.Reason {
	s, refused := a.software, a.refused[""]
	if pin != "" {
		s, refused = a.pinned[pin], a.refused[pool]
	}
	if held := s.Held(now, refused); !held.IsZero() {
		return held
	}
	return a.refused[pool].Held(now, "that of pool "+pool, "put a newer one into its image and restart flint")
}
