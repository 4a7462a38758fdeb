package app

import (
	"context"
	"errors"
	"maps"
	"slices"
	"time"

	"flint"
	"flint/internal/config"
	"flint/internal/sched"
)

// Explain says why a job is where it is, see api.Backend. Its errors are faults.
func (a *App) Explain(ctx context.Context, query string) ([]flint.Explanation, error) {
	s := a.situation()
	if query == "" {
		return a.waiting(s), nil
	}
	jobs, err := a.github.Find(ctx, query)
	if err != nil {
		return nil, err
	}
	out := make([]flint.Explanation, 0, len(jobs))
	for _, j := range jobs {
		if j.Public && j.State == "queued" && s.Private == nil {
			s.Private = a.privatePools(ctx, s.Pools)
		}
		out = append(out, flint.Explanation{Job: &j, Reason: sched.Explain(j, s)})
	}
	return out, nil
}

// situation is what the reasons of waiting are made of.
func (a *App) situation() sched.Situation {
	s := sched.Situation{
		Now: time.Now(), Pools: a.pools(), Demand: a.demand.Demand(), Hosts: []flint.HostState{a.host.State()}, Sources: a.silence(),
	}
	a.mu.Lock()
	loop := a.loop
	a.mu.Unlock()
	if loop != nil {
		s.Waiting = loop.Waiting()
	}
	return s
}

// waiting lists everything that waits: pools that hear nothing, may not start what their jobs need, or could start nothing, and
// jobs no pool is for. It also lists the pools whose image could not be had anew.
func (a *App) waiting(s sched.Situation) []flint.Explanation {
	why := map[string]flint.Reason{}
	maps.Copy(why, s.Sources)
	for pool, r := range s.Waiting {
		if _, silent := why[pool]; !silent {
			why[pool] = r
		}
	}
	served := a.poolsOf(config.ScaleSets)
	for _, p := range s.Pools {
		if !why[p.Name].IsZero() || !slices.ContainsFunc(served, func(o flint.Pool) bool { return o.Name == p.Name }) {
			continue
		}
		if r := s.Closed(p); !r.IsZero() {
			why[p.Name] = r
		}
	}
	a.mu.Lock()
	for pool, r := range a.stale { // it does not keep jobs waiting, but somebody has to mend it
		if why[pool].IsZero() {
			why[pool] = r
		}
	}
	a.mu.Unlock()
	out := []flint.Explanation{}
	for _, pool := range slices.Sorted(maps.Keys(why)) {
		out = append(out, flint.Explanation{Pool: pool, Reason: why[pool]})
	}
	if a.hooks != nil {
		for _, u := range a.hooks.Unmatched() {
			out = append(out, flint.Explanation{Job: &u.JobStatus, Reason: u.Reason})
		}
	}
	return out
}

// privatePools names the pools whose runner group keeps the jobs of public repositories away. What GitHub does not tell is
// taken for served: the reason is then another, or none.
func (a *App) privatePools(ctx context.Context, pools []flint.Pool) map[string]bool {
	private := map[string]bool{}
	for _, p := range pools {
		serves, err := a.github.GroupServesPublic(ctx, p.Name)
		if err != nil && !errors.Is(err, flint.ErrNotFound) {
			a.log.Debug("runner group is not known", "pool", p.Name, "err", err)
		}
		private[p.Name] = err == nil && !serves
	}
	return private
}
