package webhook

import (
	"context"
	"errors"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"

	"flint"
)

const (
	sweepPeriod = 2 * time.Minute
	pollPeriod  = 5 * time.Minute
	tidyPeriod  = time.Minute
	// backoffMin is the first pause after a failure; each further one doubles it, up to twice the period.
	backoffMin = 15 * time.Second
)

// Run looks for lost webhooks, asks for the open jobs, tells events and drops what is old, until ctx ends. It returns nil.
// Deliveries are taken whether it runs or not.
func (r *Receiver) Run(ctx context.Context) error {
	var g errgroup.Group
	for _, a := range r.accounts {
		if a.cfg.API == nil {
			r.log.Info("lost webhooks are not looked for: GitHub cannot be asked", "account", a.cfg.Name)
			continue
		}
		g.Go(func() error { r.cycle(ctx, sweepPeriod, a.sweeper(r)); return nil })
		g.Go(func() error { r.cycle(ctx, pollPeriod, a.poller(r)); return nil })
	}
	g.Go(func() error { r.cycle(ctx, tidyPeriod, r.tidy); return nil })
	g.Go(func() error { r.tell(ctx); return nil })
	return g.Wait()
}

// errOff ends a cycle.
var errOff = errors.New("off from now on")

// cycle takes a step at once and then every period, spread by a tenth; after a failure with growing pauses.
func (r *Receiver) cycle(ctx context.Context, period time.Duration, step func(context.Context) error) {
	for failures := 0; ctx.Err() == nil; {
		wait := period
		switch err := step(ctx); {
		case errors.Is(err, errOff):
			return
		case err != nil:
			wait = min(2*period, backoffMin<<min(failures, 10))
			failures++
		default:
			failures = 0
		}
		pause(ctx, wait-time.Duration(r.jitter()*float64(wait)/10))
	}
}

// pause waits for d or the end of ctx.
func pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}

// report takes down how one way of asking went, and logs it when that is news.
func (r *Receiver) report(ctx context.Context, a *account, t *trouble, what string, err error) {
	if ctx.Err() != nil {
		return
	}
	if !a.note(t, time.Now(), err) {
		if err == nil {
			signal(r.changed) // the ledger may be believed now
		}
		return
	}
	signal(r.changed)
	if err == nil {
		r.log.Info("GitHub answers again", "account", a.cfg.Name, "asked_for", what)
		return
	}
	r.log.Warn("GitHub cannot be asked for what webhooks may have missed", "account", a.cfg.Name, "asked_for", what, "error", err)
}

// tidy drops jobs that waited longer than GitHub lets them, and forgets what is old.
func (r *Receiver) tidy(context.Context) error {
	now := time.Now()
	var errs []error
	keys, surplus := r.ledger.old(now)
	for some := range slices.Chunk(keys, chunk) {
		var changes []change
		for _, k := range some {
			changes = append(changes, change{key: k, apply: func(j *job) *job {
				if j != nil && surplus[k] && !j.open() && !j.untold() {
					return nil
				}
				return r.age(j, now)
			}})
		}
		errs = append(errs, r.write(changes, nil))
		for _, c := range changes {
			if c.to != nil && c.from != nil && c.to.Expired && !c.from.Expired {
				r.log.Warn("a queued job is dropped", "job", c.key.String(), "name", c.to.Name, "reason",
					flint.Because("job.expired", "no runner took it for %s, after which GitHub drops a job", queueTime))
			}
		}
	}
	if seq := r.ledger.outdated(now); seq > 0 {
		errs = append(errs, r.store.forget(seq))
	}
	err := errors.Join(errs...)
	if err != nil && r.sometimes("tidy") {
		r.log.Error("old webhooks are not forgotten", "error", err)
	}
	return err
}

// age returns what time makes of a record.
func (r *Receiver) age(j *job, now time.Time) *job {
	switch {
	case j == nil || j.stale(now):
		return nil
	case j.State == queued && !j.Expired && now.Sub(j.First) > queueTime:
		out := *j
		out.Expired = true
		return &out
	case j.State == running && j.Pool == "":
		out := *j
		if r.ledger.resolve(&out); out.Pool != "" { // it was registered by a process before this one
			return &out
		}
	}
	return j
}

// tell calls Config.Events for every job that met a runner of ours, until it has succeeded once for its newest state.
func (r *Receiver) tell(ctx context.Context) {
	failures := 0
	for ctx.Err() == nil {
		err := r.tellAll(ctx)
		r.mu.Lock()
		r.events = flint.Reason{}
		if err != nil {
			r.events = flint.Because("webhook.events", "what GitHub says of jobs cannot be recorded: %v", err)
		}
		r.mu.Unlock()
		if err == nil {
			failures = 0
			select {
			case <-ctx.Done():
			case <-r.told:
			}
			continue
		}
		if ctx.Err() != nil {
			return
		}
		if r.sometimes("events") {
			r.log.Error("what GitHub says of jobs cannot be recorded; it is tried again", "error", err)
		}
		pause(ctx, r.eventPause(failures))
		failures++
	}
}

// eventPause doubles from a tenth of a second to a minute and takes away up to half by chance.
func (r *Receiver) eventPause(failures int) time.Duration {
	d := min(time.Minute, 100*time.Millisecond<<min(failures, 12))
	return d - time.Duration(r.jitter()*float64(d)/2)
}

// tellAll tells what there is to tell. One event that fails does not hold up the others.
func (r *Receiver) tellAll(ctx context.Context) error {
	var errs []error
	for _, j := range r.ledger.toTell() {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		ev, told := j.event()
		if err := r.cfg.Events(ctx, ev); err != nil {
			errs = append(errs, err)
			continue
		}
		errs = append(errs, r.write([]change{{key: j.key(), apply: func(have *job) *job {
			if have == nil || have.Runner != told.Runner {
				return have
			}
			out := *have
			out.ToldStarted = out.ToldStarted || told.ToldStarted
			out.ToldCompleted = out.ToldCompleted || told.ToldCompleted
			return &out
		}}}, nil))
	}
	return errors.Join(errs...)
}
