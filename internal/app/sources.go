package app

import (
	"context"
	"maps"
	"slices"
	"sync"
	"time"

	"flint"
	"flint/internal/sched"
)

// sources are several sources of demand as one: each pool is fed by one of them, by its account's mode.
type sources struct {
	all     []sched.Source
	changed chan struct{}

	mu sync.Mutex
	of map[string]sched.Source // by pool; guarded by mu
}

func newSources() *sources {
	return &sources{of: map[string]sched.Source{}, changed: make(chan struct{}, 1)}
}

// add makes s the source of pools.
func (m *sources) add(s sched.Source, pools []flint.Pool) {
	m.all = append(m.all, s)
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, p := range pools {
		m.of[p.Name] = s
	}
}

// assign makes the first source that of pools, and of no others: there is no other source.
func (m *sources) assign(pools []flint.Pool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	clear(m.of)
	for _, p := range pools {
		m.of[p.Name] = m.all[0]
	}
}

// signal wakes the scheduler.
func (m *sources) signal() {
	select {
	case m.changed <- struct{}{}:
	default:
	}
}

// Demand implements sched.Source.
func (m *sources) Demand() []flint.Demand {
	var all []flint.Demand
	for _, s := range m.all {
		all = append(all, s.Demand()...)
	}
	return all
}

// Changed implements sched.Source. It is signalled while forward runs.
func (m *sources) Changed() <-chan struct{} { return m.changed }

// Capacity implements sched.Source.
func (m *sources) Capacity(pool string, n int) {
	m.mu.Lock()
	s := m.of[pool]
	m.mu.Unlock()
	if s != nil {
		s.Capacity(pool, n)
	}
}

// alive is a source whose numbers include jobs that no runner works on any more. It takes them out: a VM that was started for
// one would wait in vain. GitHub itself counts them, so they are put on top of the capacity that it compares its number with.
type alive struct {
	sched.Source
	abandoned func() map[string]int // by pool

	mu    sync.Mutex
	taken map[string]abandonment // guarded by mu: what Demand last took out
}

type abandonment struct {
	jobs int
	at   time.Time // since when it has been so many
}

func newAlive(s sched.Source, abandoned func() map[string]int) *alive {
	return &alive{Source: s, abandoned: abandoned, taken: map[string]abandonment{}}
}

// Demand implements sched.Source.
func (a *alive) Demand() []flint.Demand {
	now, gone, list := time.Now(), a.abandoned(), slices.Clone(a.Source.Demand())
	a.mu.Lock()
	defer a.mu.Unlock()
	for i := range list {
		d := &list[i]
		taken := a.taken[d.Pool]
		if taken.jobs != gone[d.Pool] {
			taken = abandonment{jobs: gone[d.Pool], at: now}
			a.taken[d.Pool] = taken
		}
		d.Assigned = max(0, d.Assigned-taken.jobs)
		if taken.at.After(d.At) { // the number as the scheduler sees it has stood no longer
			d.At = taken.at
		}
	}
	return list
}

// Capacity implements sched.Source.
func (a *alive) Capacity(pool string, n int) { a.Source.Capacity(pool, n+a.abandoned()[pool]) }

// forward hands the signals of s on until ctx ends.
func (m *sources) forward(ctx context.Context, s sched.Source) error {
	for {
		select {
		case <-s.Changed():
		case <-ctx.Done():
			return nil
		}
		m.signal()
	}
}

// silence says of each pool that hears nothing from GitHub why.
func (a *App) silence() map[string]flint.Reason {
	why := a.github.Waiting()
	if a.hooks != nil {
		maps.Copy(why, a.hooks.Waiting())
	}
	return why
}
