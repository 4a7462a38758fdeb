package app

import (
	"context"
	"errors"
	"slices"
	"time"

	"flint"
	"flint/internal/config"
)

const (
	// imagesEvery is how often is looked whether pools have a newer image. What the look costs their policy says: most often
	// nothing is asked or read but the state of a Dockerfile's directory.
	imagesEvery = time.Hour
	// prepareAgain is the pause before an image that could not be prepared is tried again.
	prepareAgain = time.Minute
)

// supplyPools prepares the images that reloads ask for, gives the next VMs newer images as the pools' policies say, and lets go
// of removed pools, until ctx ends. Nothing else changes what pools are made of while flint serves, but the runner software.
func (a *App) supplyPools(ctx context.Context) error {
	newer, again, look := time.NewTicker(imagesEvery), time.NewTicker(prepareAgain), time.NewTicker(retireLook)
	defer newer.Stop()
	defer again.Stop()
	defer look.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-look.C:
			a.retire(ctx, time.Now())
		case <-newer.C:
			a.refreshImages(ctx, false, nil)
		case <-a.reloading.todo:
			a.followReload(ctx)
			again.Reset(prepareAgain)
		case <-again.C:
			a.prepareNew(ctx)
			again.Reset(prepareAgain) // it may have taken long
		}
	}
}

// followReload prepares what a reload has changed, and looks at the rest.
func (a *App) followReload(ctx context.Context) {
	tried := a.prepareNew(ctx)
	a.refreshImages(ctx, true, tried)
}

// prepareNew prepares what the pools are made of now and were not before. It returns the pools it tried.
func (a *App) prepareNew(ctx context.Context) (tried []string) {
	r := &a.reloading
	for _, p := range a.current().Pools {
		want := madeFrom(p)
		r.mu.Lock()
		have, made := r.made[p.Name]
		r.mu.Unlock()
		if made && have.equal(want) {
			continue
		}
		tried = append(tried, p.Name)
		err := a.preparePool(ctx, p)
		if ctx.Err() != nil {
			return tried
		}
		if errors.Is(err, errOutdated) {
			continue
		}
		if err != nil {
			a.log.Error("image of a pool cannot be prepared yet", "pool", p.Name, "image", p.Image, "err", err)
			if !made {
				r.hold(p.Name, err)
			}
			continue
		}
		r.mu.Lock()
		r.made[p.Name] = want
		delete(r.held, p.Name)
		r.mu.Unlock()
		a.log.Info("image of a pool is ready", "pool", p.Name, "image", p.Image)
		a.demand.signal()
	}
	return tried
}

// refreshImages looks at the image of each pool that has one, but those that were just prepared. Those with `pull: always` are
// had anew only when told.
func (a *App) refreshImages(ctx context.Context, told bool, but []string) {
	for _, p := range a.current().Pools {
		a.mu.Lock()
		have, prepared := a.supply[p.Name]
		a.mu.Unlock()
		if !prepared || p.Pull == config.PullAlways && !told || slices.Contains(but, p.Name) {
			continue
		}
		base, err := a.prepareImage(ctx, p, nil)
		if ctx.Err() != nil {
			return
		}
		if err != nil || base.Path == have.Base && slices.Equal(poolEnv(p, base.Env), have.Env) {
			continue // prepareImage has said what is wrong
		}
		switch err := a.supplyPool(ctx, p, base); {
		case err == nil:
			a.log.Info("the next VMs have a new image", "pool", p.Name, "image", p.Image, "digest", base.Digest)
			a.demand.signal()
		case ctx.Err() == nil && !errors.Is(err, errOutdated):
			a.log.Warn("a new image cannot be used yet, because what else VMs need cannot be had", "pool", p.Name, "err", err)
		}
	}
}

// noteStale notes that a pool's image could not be had anew, and says so; nil: it could.
func (a *App) noteStale(p config.Pool, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if err == nil {
		delete(a.stale, p.Name)
		return
	}
	why := flint.Because("image.stale", "pool %s goes on with its last good image, because a new one cannot be had: %v", p.Name, err)
	if a.stale == nil {
		a.stale = map[string]flint.Reason{}
	}
	a.stale[p.Name] = why
	a.log.Warn("image could not be had anew, the last good one stays", "pool", p.Name, "image", p.Image, "reason", why)
}
