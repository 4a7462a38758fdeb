package app

import (
	"context"
	"sync"

	"flint/internal/config"
)

// renewal is why pools' images are looked at.
type renewal int

const (
	untried renewal = iota // those that could not be made yet are tried again
	hourly                 // there may be newer ones
	told                   // by a reload
)

// preparations are those of pools that run: at most one for each pool, in a task of its own, so that none waits for
// another's registry or build.
type preparations struct {
	tasks sync.WaitGroup

	mu    sync.Mutex
	of    map[string]*preparation // by pool; guarded by mu
	ended bool                    // none begins any more; guarded by mu
}

// preparation is that of one pool.
type preparation struct {
	from   madeOf
	cancel context.CancelCauseFunc // nil until it has begun
	again  bool                    // the configuration was reloaded meanwhile
}

// renewPools has each pool's image looked at as its policy says. It waits for none.
func (a *App) renewPools(ctx context.Context, why renewal) {
	cfg := a.current()
	if why == told {
		a.preparations.end(func(pool string, of madeOf) bool {
			p, ok := poolNamed(cfg, pool)
			return !ok || !madeFrom(p).equal(of)
		})
	}
	for _, p := range cfg.Pools {
		if why != untried || !a.reloading.isMade(p) {
			a.beginPreparing(ctx, p.Name, why, nil)
		}
	}
}

// beginPreparing begins a task that makes what a pool wants, and tells first what came of it, if that is not nil. Where one is
// at it that is enough, but for a reload, after which it looks again.
func (a *App) beginPreparing(ctx context.Context, pool string, why renewal, first chan<- error) {
	m := &a.preparations
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.ended {
		return
	}
	if running := m.of[pool]; running != nil {
		running.again = running.again || why == told
		return
	}
	if m.of == nil {
		m.of = map[string]*preparation{}
	}
	m.of[pool] = &preparation{again: true}
	m.tasks.Go(func() {
		for {
			p, run, more := a.nextPreparing(ctx, pool)
			if !more {
				return
			}
			err := a.makePool(run, p, why)
			if first != nil {
				first <- err
			}
			why, first = told, nil
		}
	})
}

// nextPreparing returns the pool as its task is to make it now, and a context for that; false, and the task is over, where
// there is nothing more to do.
func (a *App) nextPreparing(ctx context.Context, pool string) (config.Pool, context.Context, bool) {
	m := &a.preparations
	m.mu.Lock()
	defer m.mu.Unlock()
	x := m.of[pool]
	if x.cancel != nil {
		x.cancel(nil)
	}
	p, configured := poolNamed(a.current(), pool)
	if !x.again || m.ended || !configured || ctx.Err() != nil {
		delete(m.of, pool)
		return config.Pool{}, nil, false
	}
	x.from, x.again = madeFrom(p), false
	ctx, x.cancel = context.WithCancelCause(ctx)
	return p, ctx, true
}

// end ends the preparations that which is true of. Their tasks look again at what is configured.
func (m *preparations) end(which func(pool string, from madeOf) bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for pool, x := range m.of {
		if x.cancel != nil && which(pool, x.from) {
			x.again = true
			x.cancel(errOutdated)
		}
	}
}

// stop ends all and waits for them.
func (m *preparations) stop() {
	m.mu.Lock()
	m.ended = true
	m.mu.Unlock()
	m.end(func(string, madeOf) bool { return true })
	m.tasks.Wait()
}
