package sched

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"flint"
)

// Interval is how often a Loop looks when nothing woke it.
const Interval = 5 * time.Second

const (
	// backoffMin and backoffMax bound how long a pool rests after a runner of it failed.
	backoffMin = time.Second
	backoffMax = time.Minute
	// proof is how long a runner must have been registered to show, without a job, that its pool works.
	proof = 30 * time.Second
)

// Config is what a Loop works with. All fields but Jitter are needed.
type Config struct {
	Pools  func() []flint.Pool       // the pools as configured now; called on every pass
	Source Source                    // where demand comes from
	Hosts  []Host                    // where runners go; their State().Name must differ and not change
	NewID  func(pool string) string  // a name for a new runner, unique for ever
	Done   func(flint.Result, error) // told how each runner ended; called concurrently
	Log    *slog.Logger
	Jitter func() float64 // in [0,1), spreads retries; nil: random
}

// Loop keeps the supply of runners at what Plan says. Make it with New, and Run it once.
type Loop struct {
	cfg     Config
	flights map[string]*flight // by runner ID; the loop's goroutine only
	exits   chan exit
	pools   map[string]*poolState // the loop's goroutine only

	mu       sync.Mutex
	waiting  map[string]flint.Reason // by pool; never changed; guarded by mu
	lastPass time.Time               // guarded by mu
}

// flight is a runner whose Host.Run has not returned.
type flight struct {
	runner  flint.Runner
	cancel  context.CancelCauseFunc
	seen    bool // its host has shown it in State
	stopped bool // we cancelled it
	// failures is the pool's count when it started: a runner that still has the pool's number is the one that tries it out.
	failures int
}

// exit is what Host.Run returned for one flight.
type exit struct {
	id  string
	res flint.Result
	err error
}

// poolState is what the loop remembers of a pool between passes.
type poolState struct {
	failures  int          // since a runner last worked
	notBefore time.Time    // no start before
	why       flint.Reason // of the last failure
	logged    level        // what was logged last
	waits     flint.Reason // what was logged last as the reason for waiting
}

// level is the line that is logged when it changes.
type level struct{ assigned, have, target int }

// New makes a Loop.
func New(cfg Config) *Loop {
	if cfg.Jitter == nil {
		cfg.Jitter = rand.Float64
	}
	return &Loop{cfg: cfg, flights: map[string]*flight{}, exits: make(chan exit), pools: map[string]*poolState{}}
}

// Run observes, plans and applies until ctx ends, then waits for the runners. Ending ctx ends the runners too (Host.Run
// releases what they hold); a caller that wants them to finish lets Pools return a Max of 0 and waits before it does so.
// It returns nil.
func (l *Loop) Run(ctx context.Context) error {
	tick := time.NewTicker(Interval)
	defer tick.Stop()
	for ctx.Err() == nil {
		next := l.pass(ctx, time.Now())
		select {
		case <-ctx.Done():
		case <-l.cfg.Source.Changed():
		case <-tick.C:
		case <-next:
		case e := <-l.exits:
			l.ended(ctx, e)
		}
	}
	for len(l.flights) > 0 {
		l.ended(ctx, <-l.exits)
	}
	return nil
}

// Waiting returns why pools have fewer runners than their jobs need, by pool, as of the last pass.
func (l *Loop) Waiting() map[string]flint.Reason {
	l.mu.Lock()
	defer l.mu.Unlock()
	return maps.Clone(l.waiting)
}

// Passed is when the last pass ended; zero before the first. While Run runs and its context has not ended, one follows
// another after Interval at most.
func (l *Loop) Passed() time.Time {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.lastPass
}

// view is what one pass sees. Its host states are the pass's own copy: starts are added as they are dispatched.
type view struct {
	now     time.Time
	pools   []flint.Pool
	limited []flint.Pool // the pools with the Max they may reach now
	demand  []flint.Demand
	hosts   []flint.HostState // in the order of Config.Hosts
}

// pass is one round. It returns a channel that wakes the loop when the first resting pool may start again; nil if none rests.
func (l *Loop) pass(ctx context.Context, now time.Time) <-chan time.Time {
	v := &view{now: now, pools: l.cfg.Pools(), demand: l.cfg.Source.Demand()}
	l.observe(v)
	l.limit(v)
	waits := map[string]flint.Reason{}
	for _, a := range Plan(now, v.limited, v.demand, v.hosts) {
		switch a.Verb {
		case Start:
			l.start(ctx, v, a)
		case Stop:
			l.stop(a)
		case Wait:
			waits[a.Pool] = l.explain(now, a)
		}
	}
	l.report(v)
	l.remember(waits)
	return l.wake(now)
}

// observe merges the hosts' records with what only the loop knows. A runner counts from the moment it was decided, even if its
// host does not show it yet; one that was shown before and is not any more is gone, only its exit has not arrived yet; and one
// we have stopped is no supply unless a job was quicker.
func (l *Loop) observe(v *view) {
	for _, h := range l.cfg.Hosts {
		s := h.State()
		s.Runners = slices.Clone(s.Runners)
		for i, r := range s.Runners {
			f := l.flights[r.ID]
			if f == nil {
				continue
			}
			f.seen = true
			if r.Phase == flint.Running || r.Phase == flint.Registered && v.now.Sub(r.Timeline[flint.Registered]) > proof {
				l.works(f)
			}
			if f.stopped && r.Phase < flint.Running {
				s.Runners[i].Phase = flint.Finishing
			}
		}
		v.hosts = append(v.hosts, s)
	}
	for _, f := range l.flights {
		if f.seen {
			continue
		}
		r := f.runner
		if f.stopped {
			r.Phase = flint.Finishing
		}
		v.add(r)
	}
}

// add puts a runner on its host's list and takes its room.
func (v *view) add(r flint.Runner) {
	for i := range v.hosts {
		h := &v.hosts[i]
		if h.Name != r.Host {
			continue
		}
		h.Runners = append(h.Runners, r)
		for _, p := range v.pools {
			if p.Name == r.Pool {
				take(h, p.Shape)
			}
		}
	}
}

// count returns how many runners of a pool are or will be of use, and how many are on their way out.
func (v *view) count(pool string) (have, ending int) {
	for _, h := range v.hosts {
		for _, r := range h.Runners {
			switch {
			case r.Pool != pool:
			case supplies(r.Phase):
				have++
			case r.Phase == flint.Finishing:
				ending++
			}
		}
	}
	return have, ending
}

// works ends a pool's rest if f is the runner that was to try it out. It is called when f
// has a job, or has waited for one long enough.
func (l *Loop) works(f *flight) {
	st := l.state(f.runner.Pool)
	if f.failures == st.failures {
		st.failures, f.failures = 0, 0
		st.notBefore = time.Time{}
	}
}

// limit sets the Max each pool may reach now: a pool that rests gets no runner, and one whose last runner failed gets one at a
// time until one has a job. That keeps a broken image or host from starting VMs without end.
func (l *Loop) limit(v *view) {
	v.limited = slices.Clone(v.pools)
	for i := range v.limited {
		p := &v.limited[i]
		st := l.state(p.Name)
		if st.failures == 0 {
			continue
		}
		trial := 1
		if v.now.Before(st.notBefore) || l.trying(p.Name, st.failures) {
			trial = 0
		}
		have, ending := v.count(p.Name)
		p.Max = min(p.Max, have+ending+trial)
	}
}

// trying reports whether a runner that is to try the pool out is on its way.
func (l *Loop) trying(pool string, failures int) bool {
	for _, f := range l.flights {
		if f.runner.Pool == pool && f.failures == failures {
			return true
		}
	}
	return false
}

// start dispatches one runner and adds it to the view.
func (l *Loop) start(ctx context.Context, v *view, a Action) {
	i := slices.IndexFunc(v.hosts, func(h flint.HostState) bool { return h.Name == a.Host })
	host := l.cfg.Hosts[i]
	r := flint.Runner{
		ID: l.cfg.NewID(a.Pool), Pool: a.Pool, Host: a.Host, Phase: flint.Planned,
		Timeline: flint.Timeline{flint.Planned: v.now}, Reason: a.Reason,
	}
	if l.flights[r.ID] != nil {
		l.cfg.Log.Error("start runner: its name is in use", "runner", r.ID, "pool", a.Pool)
		return
	}
	runCtx, cancel := context.WithCancelCause(ctx)
	l.flights[r.ID] = &flight{runner: r, cancel: cancel, failures: l.state(a.Pool).failures}
	l.cfg.Log.Info("start runner", "runner", r.ID, "pool", a.Pool, "host", a.Host, "reason", a.Reason)
	v.add(r)
	r.Timeline = maps.Clone(r.Timeline) // the host writes its own
	// Run waits for this goroutine: it reads one exit for every flight.
	go func() {
		res, err := host.Run(runCtx, r)
		l.cfg.Done(res, err)
		l.exits <- exit{r.ID, res, err}
	}()
}

// stop ends a runner. One that was adopted from before a restart is not ours to cancel: its host gives it its deadlines.
func (l *Loop) stop(a Action) {
	f := l.flights[a.Runner]
	if f == nil || f.stopped {
		return
	}
	f.stopped = true
	l.cfg.Log.Info("stop runner", "runner", a.Runner, "pool", a.Pool, "host", a.Host, "reason", a.Reason)
	f.cancel(fmt.Errorf("%w: %s", flint.ErrUnneeded, a.Reason.Text))
}

// ended takes note of a runner whose Host.Run returned.
func (l *Loop) ended(ctx context.Context, e exit) {
	f := l.flights[e.id]
	delete(l.flights, e.id)
	f.cancel(context.Canceled)
	if onlyRelease(e.err) {
		e.err = nil // the host says so and tries again; the runner itself did as well as its result tells
	}
	why := failure(f.runner, e)
	if why.IsZero() {
		if !f.stopped {
			l.works(f)
		}
		return
	}
	log := l.cfg.Log.With("runner", e.id, "pool", f.runner.Pool, "host", f.runner.Host)
	if f.stopped || ctx.Err() != nil {
		log.Info("runner ended early", "err", e.err)
		return
	}
	st := l.state(f.runner.Pool)
	// Runners that started together fail together: they count as one failure, or the pause would grow by their number.
	if f.failures == st.failures {
		st.failures++
		wait := backoff(st.failures, l.cfg.Jitter)
		st.notBefore = time.Now().Add(wait)
		st.why = why
		log = log.With("pause", wait)
	}
	log.Error("runner failed", "reason", why)
}

// onlyRelease reports whether err says nothing but that something was not released. An error that wraps flint.ErrRelease
// itself is one, whatever its cause; several joined errors are one if each of them is.
func onlyRelease(err error) bool {
	for err != nil && err != flint.ErrRelease {
		many, ok := err.(interface{ Unwrap() []error })
		if !ok {
			err = errors.Unwrap(err)
			continue
		}
		branches := many.Unwrap()
		return slices.Contains(branches, flint.ErrRelease) ||
			len(branches) > 0 && !slices.ContainsFunc(branches, func(e error) bool { return !onlyRelease(e) })
	}
	return err != nil
}

// failure says in what way a runner failed; zero if it did not. A job that failed is no failure of its runner, nor is it one
// that its host ended because no job came. A runner program that ends with an error before it had a job is one: the next
// would do the same (GitHub refuses its version, for example).
func failure(r flint.Runner, e exit) flint.Reason {
	var fault *flint.Fault
	switch {
	case e.err == nil && (e.res.ExitCode == 0 || e.res.Runner.Job != nil):
		return flint.Reason{}
	case errors.Is(e.err, flint.ErrUnneeded):
		return flint.Reason{}
	case e.res.Lost:
		return flint.Because(e.res.Reason.Code, "runner %s on host %s: %s", r.ID, r.Host, e.res.Reason.Text)
	case e.err == nil && e.res.Reason.IsZero():
		return flint.Because("runner.exit", "runner %s on host %s ended with code %d before it had a job", r.ID, r.Host, e.res.ExitCode)
	case e.err == nil:
		return flint.Because(e.res.Reason.Code, "runner %s on host %s ended before it had a job: %s", r.ID, r.Host, e.res.Reason.Text)
	case errors.As(e.err, &fault):
		return flint.Because(fault.Code, "runner %s on host %s failed: %v; %s", r.ID, r.Host, e.err, fault.Fix)
	case errors.Is(e.err, flint.ErrGuest):
		return flint.Because("guest.failing", "the guest of runner %s on host %s failed: %v", r.ID, r.Host, e.err)
	}
	return flint.Because("host.failing", "runner %s on host %s failed: %v", r.ID, r.Host, e.err)
}

// backoff doubles from backoffMin to backoffMax; the jitter takes away up to half, so that many do not retry as one.
func backoff(failures int, jitter func() float64) time.Duration {
	d := backoffMax
	if shift := failures - 1; shift < 6 {
		d = min(backoffMax, backoffMin<<max(0, shift))
	}
	return d - time.Duration(jitter()*float64(d)/2)
}

// explain replaces the reason of a wait that the loop itself has caused.
func (l *Loop) explain(now time.Time, a Action) flint.Reason {
	st := l.state(a.Pool)
	if st.failures == 0 || a.Reason.Code != "pool.max" {
		return a.Reason
	}
	if now.Before(st.notBefore) {
		return flint.Because(st.why.Code, "pool %s rests until %s: %s", a.Pool, st.notBefore.Format(time.TimeOnly), st.why.Text)
	}
	return flint.Because(st.why.Code, "pool %s tries one runner at a time: %s", a.Pool, st.why.Text)
}

// report tells the source what the pools can take, and logs current against target where they changed.
func (l *Loop) report(v *view) {
	free := newRoom(v.hosts)
	assigned := map[string]int{}
	for _, d := range v.demand {
		assigned[d.Pool] = d.Assigned
	}
	for i, p := range v.limited {
		have, _ := v.count(p.Name)
		more, target := 0, have
		if p.Held.IsZero() {
			more = free.fit(p.Shape, max(0, p.Max-have))
			target = max(0, min(v.pools[i].Max, assigned[p.Name]))
		}
		l.cfg.Source.Capacity(p.Name, have+more)
		now := level{assigned[p.Name], have, target}
		if st := l.state(p.Name); now != st.logged {
			st.logged = now
			l.cfg.Log.Info("runners", "pool", p.Name, "assigned", now.assigned, "current", now.have, "target", now.target)
		}
	}
}

// remember keeps the reasons of waiting for Waiting, and logs those that are new.
func (l *Loop) remember(waits map[string]flint.Reason) {
	for _, pool := range slices.Sorted(maps.Keys(waits)) {
		if waits[pool] != l.state(pool).waits {
			l.cfg.Log.Info("jobs wait", "pool", pool, "reason", waits[pool])
		}
	}
	for pool, st := range l.pools {
		st.waits = waits[pool]
	}
	l.mu.Lock()
	l.waiting, l.lastPass = waits, time.Now()
	l.mu.Unlock()
}

// wake returns a channel that is ready when the first resting pool may start again.
func (l *Loop) wake(now time.Time) <-chan time.Time {
	var first time.Time
	for _, st := range l.pools {
		if st.notBefore.After(now) && (first.IsZero() || st.notBefore.Before(first)) {
			first = st.notBefore
		}
	}
	if first.IsZero() {
		return nil
	}
	return time.After(first.Sub(now))
}

func (l *Loop) state(pool string) *poolState {
	st := l.pools[pool]
	if st == nil {
		st = &poolState{logged: level{-1, -1, -1}}
		l.pools[pool] = st
	}
	return st
}
