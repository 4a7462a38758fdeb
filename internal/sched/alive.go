package sched

import (
	"slices"
	"sync"
	"time"

	"flint"
)

// alive is a source whose numbers include jobs that no runner works on any more.
type alive struct {
	Source
	abandoned func() map[string]int // by pool

	mu    sync.Mutex
	taken map[string]abandonment // guarded by mu: what Demand last took out
}

type abandonment struct {
	jobs int
	at   time.Time // since when it has been so many
}

// Alive returns s without the jobs that no runner works on any more, which s includes: a VM that was started for one would wait in
// vain. The far end counts them, so they are put on top of the capacity that it compares its number with. Abandoned says how many
// there are of each pool.
func Alive(s Source, abandoned func() map[string]int) Source {
	return &alive{Source: s, abandoned: abandoned, taken: map[string]abandonment{}}
}

// Demand implements Source.
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

// Capacity implements Source.
func (a *alive) Capacity(pool string, n int) { a.Source.Capacity(pool, n+a.abandoned()[pool]) }
