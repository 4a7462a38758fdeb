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
// of removed pools, until ctx ends and all it began has ended. Nothing else changes what pools are made of while flint serves, but
// the runner software.
func (a *App) supplyPools(ctx context.Context) error {
	defer a.preparations.stop()
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
			a.renewPools(ctx, hourly)
		case <-a.reloading.todo:
			a.renewPools(ctx, told)
		case <-again.C:
			a.renewPools(ctx, untried)
		}
	}
}

// makePool prepares a pool that is made of something new, or looks whether there is a newer image.
func (a *App) makePool(ctx context.Context, p config.Pool, why renewal) error {
	if !a.reloading.isMade(p) {
		return a.prepareNew(ctx, p)
	}
	if p.Pull != config.PullAlways || why == told { // with `pull: always` at reloads only
		a.refreshImage(ctx, p)
	}
	return nil
}

// prepareNew prepares a pool that is made of something else than before.
func (a *App) prepareNew(ctx context.Context, p config.Pool) error {
	r := &a.reloading
	err := a.preparePool(ctx, p)
	if ctx.Err() != nil || errors.Is(err, errOutdated) {
		return err
	}
	r.mu.Lock()
	_, before := r.made[p.Name]
	if err == nil {
		r.made[p.Name] = madeFrom(p)
		delete(r.held, p.Name)
	}
	r.mu.Unlock()
	if err != nil {
		a.log.Error("image of a pool cannot be prepared yet", "pool", p.Name, "image", p.Image, "err", err)
		if !before {
			r.hold(p.Name, err)
		}
		return err
	}
	a.log.Info("image of a pool is ready", "pool", p.Name, "image", p.Image)
	a.demand.signal()
	return nil
}

// refreshImage looks at the image of a pool that has one.
func (a *App) refreshImage(ctx context.Context, p config.Pool) {
	a.mu.Lock()
	have, prepared := a.supply[p.Name]
	a.mu.Unlock()
	if !prepared {
		return
	}
	base, err := a.prepareImage(ctx, p, nil)
	if ctx.Err() != nil || err != nil || base.Path == have.Base && base.Dir == have.Dir && slices.Equal(poolEnv(p, base.Env), have.Env) {
		return // prepareImage has said what is wrong
	}
	switch err := a.supplyPool(ctx, p, base); {
	case err == nil:
		a.log.Info("the next VMs have a new image", "pool", p.Name, "image", p.Image, "digest", base.Digest)
		a.demand.signal()
	case ctx.Err() == nil && !errors.Is(err, errOutdated):
		a.log.Warn("a new image cannot be used yet, because what else VMs need cannot be had", "pool", p.Name, "err", err)
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
