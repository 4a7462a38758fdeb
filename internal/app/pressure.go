package app

import (
	"context"
	"errors"
	"path/filepath"
	"time"

	"flint"
	"flint/internal/image"
	"flint/internal/kernel"
)

const (
	// pressureEvery is how often the machine is looked at. A VM's disk grows by some GB in that time at most.
	pressureEvery = 5 * time.Second
	// collectPause is how long unused images are left alone after a search that found none.
	collectPause = time.Minute
)

// watchPressure looks at the machine until ctx ends, and makes room before it has to refuse VMs.
func (a *App) watchPressure(ctx context.Context) error {
	tick := time.NewTicker(pressureEvery)
	defer tick.Stop()
	var collected time.Time // when last nothing was found; of a clock nobody sets
	for {
		if lacks := a.feelPressure(); lacks > 0 && (collected.IsZero() || time.Since(collected) >= collectPause) {
			collected = time.Time{}
			if !a.makeRoom(ctx, lacks) {
				collected = time.Now()
			}
			a.feelPressure()
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// feelPressure looks once, and says what has changed. It returns how much of the disk unused images should give back.
func (a *App) feelPressure() (lacks flint.Bytes) {
	cfg := a.current()
	cpus := 0 // of the largest VM
	for _, p := range cfg.Pools {
		cpus = max(cpus, p.VM.CPUs)
	}
	before := a.pressure.Reason()
	why, lacks := a.pressure.Look(a.cfg.StateDir, cfg.Host.MinFree, cpus)
	switch {
	case why.Code == before.Code:
	case why.IsZero():
		a.log.Info("VMs are started again", "after", before.Code)
		if a.demand != nil {
			a.demand.signal() // the scheduler looks at once
		}
	default:
		a.log.Warn("no VM is started", "reason", why)
	}
	return lacks
}

// makeRoom removes what is not needed until room more bytes are free, and reports whether it found anything.
func (a *App) makeRoom(ctx context.Context, room flint.Bytes) bool {
	freed, removed, err := a.collect(ctx, room)
	if err != nil && ctx.Err() == nil {
		a.log.Warn("not everything unused could be removed", "err", err)
	}
	if len(removed) > 0 {
		a.log.Warn("disk is filling: removed what was unused", "freed", freed, "number", len(removed))
		a.log.Info("removed", "what", removed)
	}
	return freed > 0
}

// collect lets go of what the next VMs are not made of, and removes what nobody uses until room more bytes are free. It does one after the
// other: what a later one has kept, an earlier one, which was told before what is needed, would let go.
func (a *App) collect(ctx context.Context, room flint.Bytes) (freed flint.Bytes, removed []string, err error) {
	a.collecting.Lock()
	defer a.collecting.Unlock()
	return collect(ctx, a.store, a.kernels(), a.needed(), room)
}

// collect removes images, then kernels, that are in neither use nor keep.
func collect(ctx context.Context, store *image.Store, kernels kernel.Config, keep []string, room flint.Bytes) (freed flint.Bytes, removed []string, err error) {
	if store != nil {
		freed, removed, err = store.GC(ctx, keep, room)
	}
	more, packs, kerr := kernel.Prune(ctx, kernels, keep, max(0, room-freed))
	return freed + more, append(removed, packs...), errors.Join(err, kerr)
}

func (a *App) kernels() kernel.Config {
	return kernel.Config{Dir: filepath.Join(a.cfg.StateDir, "kernels"), Log: a.log}
}

// needed lists the files that the next VMs are made of.
func (a *App) needed() []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	paths := []string{a.runnerDrive} // though all pools may pin another for now
	for _, s := range a.supply {
		paths = append(paths, s.Base, s.Runner, s.Tools, s.Kernel, s.Initrd, s.Modules)
	}
	return paths
}

// letGo lets go of the images that the next VMs were made of and are no longer, so that any process may remove them when room
// is needed.
func (a *App) letGo(ctx context.Context) {
	if _, _, err := a.collect(ctx, 0); err != nil {
		a.log.Warn("not all unused images could be let go", "err", err)
	}
}
