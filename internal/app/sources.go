package app

import (
	"context"
	"maps"
	"sync"

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
