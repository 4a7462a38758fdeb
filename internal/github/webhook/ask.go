package webhook

import (
	"cmp"
	"context"
	"errors"
	"maps"
	"slices"
	"time"

	"flint"
)

const (
	// openBudget and singleBudget are the requests one poll may make. With the sweeps that is under 2,000 of the 5,000 an hour
	// that an installation has at least.
	openBudget   = 100
	singleBudget = 40
	// silentTime is after how long without news GitHub is asked about a job.
	silentTime = 10 * time.Minute
	// listTime and callTime bound one listing and one call.
	listTime = 3 * time.Minute
	callTime = 30 * time.Second

	// deliveryTime is how long GitHub keeps deliveries.
	deliveryTime = 3 * 24 * time.Hour
	// overlap is what a sweep looks at once more: GitHub lists a delivery some time after it was made.
	overlap = 10 * time.Minute
	// flightTime is how long a delivery without an answer may still be under way.
	flightTime = time.Minute
	// maxAttempts is how often GitHub is asked to deliver a webhook again; maxRedeliver, how many of them in one sweep.
	maxAttempts  = 6
	maxRedeliver = 100
	// maxRefusals ends a sweep: GitHub then refuses the others, too.
	maxRefusals = 3
	// maxLost bounds the webhooks that wait for that.
	maxLost = 10_000
)

// lost is a webhook of which no delivery was answered 2xx.
type lost struct {
	guid     string
	id       int64     // of its newest delivery
	at       time.Time // of its oldest one that we have seen
	attempts int       // that we asked for
	next     time.Time // not before
}

// poller returns the step that asks for open jobs, and for those that nothing was heard of.
func (a *account) poller(r *Receiver) func(context.Context) error {
	return func(ctx context.Context) error {
		err := r.pollOpen(ctx, a)
		if err == nil { // otherwise that GitHub does not know a job may only mean that it hides it from us
			err = r.pollSilent(ctx, a)
		}
		r.report(ctx, a, &a.poll, "open jobs", err)
		return err
	}
}

func (r *Receiver) pollOpen(ctx context.Context, a *account) error {
	callCtx, cancel := context.WithTimeout(ctx, listTime)
	defer cancel()
	jobs, err := a.cfg.API.Open(callCtx, a.repositories(), openBudget)
	if errors.Is(err, errors.ErrUnsupported) {
		if !a.unlisted {
			a.unlisted = true
			r.log.Info("open jobs are not asked for; webhooks that get lost stay so", "account", a.cfg.Name, "error", err)
		}
		err = nil
	}
	return errors.Join(r.takeOver(a, jobs), err)
}

// takeOver adds what the REST API says of jobs.
func (r *Receiver) takeOver(a *account, statuses []flint.JobStatus) error {
	now := time.Now()
	var changes []change
	for _, s := range statuses {
		j, err := fromStatus(s, now)
		if err != nil {
			r.log.Debug("GitHub's list has a job that makes no sense", "account", a.cfg.Name, "error", err)
			continue
		}
		if place(j, "", []*account{a}) == nil || !r.concerns(j) {
			continue
		}
		r.ledger.resolve(j)
		if r.ledger.same(j, now) {
			continue
		}
		if !r.ledger.room(j) {
			if r.sometimes("full") {
				r.log.Error("the ledger is full; jobs are left out", "open", maxOpen)
			}
			continue
		}
		changes = append(changes, r.learn(j))
	}
	for some := range slices.Chunk(changes, chunk) {
		if err := r.write(some, nil); err != nil {
			return err
		}
	}
	return nil
}

// pollSilent asks one by one for jobs that are open and have not been heard of.
func (r *Receiver) pollSilent(ctx context.Context, a *account) error {
	ours := func(j *job) bool {
		s, ok := a.scope(j.Repository, "")
		return ok && s.place(j.Repository) == j.Place
	}
	for _, j := range r.ledger.silent(time.Now().Add(-silentTime), singleBudget, ours) {
		if err := r.pollJob(ctx, a, j); err != nil {
			return err
		}
	}
	return nil
}

func (r *Receiver) pollJob(ctx context.Context, a *account, j *job) error {
	callCtx, cancel := context.WithTimeout(ctx, callTime)
	defer cancel()
	s, err := a.cfg.API.Job(callCtx, j.Repository, j.ID)
	switch {
	case errors.Is(err, flint.ErrNotFound):
		// Its run was deleted, or we may not see it any more. If that is not so, it comes back by itself.
		r.log.Info("a job is forgotten: GitHub does not know it", "job", j.key().String(), "name", j.Name)
		return r.write([]change{{key: j.key(), apply: func(have *job) *job {
			if have == nil || have.State != j.State {
				return have
			}
			return nil
		}}}, nil)
	case err != nil:
		return err
	}
	if j.Repository != s.Repository {
		s.Repository = j.Repository // it was renamed; we know it by this name
	}
	r.ledger.asked(j.key(), time.Now())
	return r.takeOver(a, []flint.JobStatus{s})
}

// sweeper returns the step that has lost webhooks sent again.
func (a *account) sweeper(r *Receiver) func(context.Context) error {
	return func(ctx context.Context) error {
		err := r.sweep(ctx, a)
		if errors.Is(err, errors.ErrUnsupported) {
			r.log.Info("lost webhooks are not sent again: their deliveries cannot be seen; open jobs are still asked for",
				"account", a.cfg.Name, "error", err)
			return errOff
		}
		r.report(ctx, a, &a.sweep, "deliveries", err)
		return err
	}
}

func (r *Receiver) sweep(ctx context.Context, a *account) error {
	now := time.Now()
	upto := a.passed(now.Round(0), now.Sub(a.looked))
	since := upto
	if !a.swept.IsZero() {
		since = a.swept
	}
	since = since.Add(-overlap)
	if oldest := now.Add(-deliveryTime); since.Before(oldest) || a.swept.After(upto) { // the clock was set back: nobody knows since when
		since = oldest
	}
	callCtx, cancel := context.WithTimeout(ctx, listTime)
	defer cancel()
	list, err := a.cfg.API.Deliveries(callCtx, since)
	if errors.Is(err, errors.ErrUnsupported) {
		return err
	}
	r.sort(a, list, now)
	if again := r.redeliver(ctx, a, now); err == nil {
		err = again
	}
	if err != nil {
		return err
	}
	a.looked, a.swept = now, upto
	for _, l := range a.failed { // after a restart they are looked for again
		if l.attempts < maxAttempts && l.at.Before(a.swept) {
			a.swept = l.at
		}
	}
	err = r.store.swept(a.cfg.Name, a.swept)
	a.swept = upto
	return err
}

// passed is the time of a look that comes so long after the last one: by the machine's clock, unless that was set forwards
// meanwhile. What GitHub sends then bears times that are long over by that clock, and would be looked for no more.
func (a *account) passed(clock time.Time, since time.Duration) time.Time {
	if t := a.swept.Add(since); !a.looked.IsZero() && t.Before(clock) {
		return t
	}
	return clock
}

// sort groups deliveries by webhook and notes those that were lost.
func (r *Receiver) sort(a *account, list []Delivery, now time.Time) {
	groups := map[string][]Delivery{}
	for _, d := range list {
		if d.Event == "workflow_job" && d.GUID != "" && len(d.GUID) <= maxGUID {
			groups[d.GUID] = append(groups[d.GUID], d)
		}
	}
	for guid := range a.failed {
		if r.ledger.known(guid) {
			delete(a.failed, guid)
		}
	}
	for guid, attempts := range groups {
		arrived := func(d Delivery) bool { return d.Status >= 200 && d.Status < 300 }
		// One whose answer was lost has arrived all the same.
		if slices.ContainsFunc(attempts, arrived) || r.ledger.known(guid) {
			delete(a.failed, guid)
			continue
		}
		newest := slices.MaxFunc(attempts, func(a, b Delivery) int { return cmp.Or(a.At.Compare(b.At), cmp.Compare(a.ID, b.ID)) })
		if newest.Status == 0 && now.Sub(newest.At) < flightTime {
			continue
		}
		l := a.failed[guid]
		if l == nil {
			if len(a.failed) >= maxLost {
				continue // the poll finds its job
			}
			l = &lost{guid: guid, at: newest.At}
			a.failed[guid] = l
		}
		l.id, l.at = newest.ID, earlier(l.at, newest.At)
	}
}

// redeliver asks for the lost webhooks whose time has come, the oldest first.
func (r *Receiver) redeliver(ctx context.Context, a *account, now time.Time) error {
	due := slices.SortedFunc(maps.Values(a.failed), func(a, b *lost) int {
		return cmp.Or(a.at.Compare(b.at), cmp.Compare(a.guid, b.guid))
	})
	var errs []error
	asked := 0
	for _, l := range due {
		switch {
		case now.Sub(l.at) > deliveryTime, l.attempts >= maxAttempts && now.After(l.next):
			delete(a.failed, l.guid) // by now no sweep lists it
			continue
		case now.Before(l.next), l.attempts >= maxAttempts, asked >= maxRedeliver, len(errs) >= maxRefusals:
			continue
		}
		asked++
		l.attempts++
		callCtx, cancel := context.WithTimeout(ctx, callTime)
		err := a.cfg.API.Redeliver(callCtx, l.id)
		cancel()
		switch {
		case errors.Is(err, flint.ErrNotFound):
			l.attempts = maxAttempts
			r.log.Info("a lost webhook is not sent again: GitHub has forgotten it", "account", a.cfg.Name, "delivery", clean(l.guid))
		case err != nil:
			errs = append(errs, err)
		}
		l.next = now.Add(sweepPeriod << l.attempts)
		if err == nil && l.attempts == maxAttempts {
			r.log.Warn("a webhook was lost again and again; what it said is found by asking for its job, if at all",
				"account", a.cfg.Name, "delivery", clean(l.guid))
		}
	}
	if asked > 0 {
		r.log.Info("lost webhooks are sent again", "account", a.cfg.Name, "asked_for", asked, "refused", len(errs), "known", len(a.failed))
	}
	return errors.Join(errs...)
}
