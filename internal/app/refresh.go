package app

import (
	"context"
	"time"

	"flint"
	"flint/internal/config"
)

// imagesEvery is how often is looked whether pools have a newer image. What the look costs their policy says: most often
// nothing is asked or read but the state of a Dockerfile's directory.
const imagesEvery = time.Hour

// watchImages gives the next VMs newer images, as the pools' policies say, until ctx ends. What could not be had is tried
// again an hour later.
func (a *App) watchImages(ctx context.Context) error {
	tick := time.NewTicker(imagesEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			a.refreshImages(ctx, false)
		case <-ctx.Done():
			return nil
		}
	}
}

// refreshImages looks at the image of each pool that has one. Those with `pull: always` are had anew only when told.
func (a *App) refreshImages(ctx context.Context, told bool) {
	for _, p := range a.current().Pools {
		a.mu.Lock()
		have, prepared := a.supply[p.Name]
		a.mu.Unlock()
		if !prepared || p.Pull == config.PullAlways && !told {
			continue
		}
		base, err := a.prepareImage(ctx, p, nil)
		if ctx.Err() != nil {
			return
		}
		if err == nil && base.Path != have.Base {
			if err = a.supplyPool(ctx, p, base); err == nil {
				a.log.Info("the next VMs have a new image", "pool", p.Name, "image", p.Image, "digest", base.Digest)
				if a.demand != nil {
					a.demand.signal()
				}
			}
		}
		if err != nil {
			a.noteStale(p, err)
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
