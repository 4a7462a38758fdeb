package github

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"sync"
	"time"

	"flint"
)

const (
	// pollPace is the least time between two polls when the first brought nothing: a server that answers at once, or a
	// capacity that rises by the millisecond, must not make a storm.
	pollPace = 200 * time.Millisecond
	// backoffMin and backoffMax bound the pause after an error; a server's own Retry-After may make it longer, up to retryMax.
	backoffMin = time.Second
	backoffMax = time.Minute
	retryMax   = 15 * time.Minute
	// beliefTime is how long GitHub's last number is believed while nothing is heard from it. A reopened session takes seconds,
	// GitHub's own troubles minutes; after that another coordinator may long have had the jobs.
	beliefTime = 3 * time.Minute
	// closeTimeout bounds the deletion of a session at the end.
	closeTimeout = 5 * time.Second
)

// poller keeps one pool's message session.
type poller struct {
	client *Client
	scope  *scope
	pool   flint.Pool

	// For the goroutine of run only:
	journal  *journal
	svc      *service // nil: not signed in
	session  *session // nil: none open
	left     *leftSession
	last     int // the last message acknowledged in this session
	acquired int // jobs acquired since the last statistics
	started  time.Time
	tracked  bool // since is the begin of the present trouble
	since    time.Time

	mu       sync.Mutex // guards what follows
	set      int        // the scale set's id; 0: not known
	demand   *flint.Demand
	heard    time.Time    // when GitHub last answered a poll or opened the session
	reason   flint.Reason // of the present trouble
	said     flint.Reason // what was logged of it last
	capacity int
	asked    int    // the capacity of the poll under way
	giveUp   func() // ends the poll under way; nil: none is
}

// leftSession is a session that could not be closed, because its service was signed out.
type leftSession struct {
	set int
	id  string
}

func newPoller(c *Client, s *scope, pool flint.Pool, j *journal) *poller {
	return &poller{client: c, scope: s, pool: pool, journal: j}
}

// run polls until ctx ends, and deletes the session on the way out.
func (p *poller) run(ctx context.Context) {
	failures := 0
	for ctx.Err() == nil {
		polled := p.session != nil
		err := p.step(ctx)
		if err == nil {
			if polled {
				failures = 0 // the steps before the poll prove little: GitHub may refuse only that
			}
			p.well()
			continue
		}
		if ctx.Err() != nil {
			break
		}
		failures++
		p.trouble(err)
		p.let(ctx, err)
		pause(ctx, p.backoff(failures, err))
	}
	if p.session != nil {
		p.leave(context.WithoutCancel(ctx))
	}
	if p.left != nil {
		p.client.cfg.Log.Warn("message session is left to time out", "pool", p.pool.Name, "error", "GitHub has signed us out")
	}
}

// step brings the pool one thing further: signed in, scale set known, session open, jobs acquired, message handled.
func (p *poller) step(ctx context.Context) (err error) {
	if p.svc == nil {
		p.svc, err = p.scope.service(ctx)
		return err
	}
	if p.scaleSet() == 0 {
		return p.findSet(ctx)
	}
	if p.session == nil {
		return p.open(ctx)
	}
	if err := p.acquire(ctx); err != nil {
		return err
	}
	m, err := p.poll(ctx)
	if err != nil || m == nil {
		return err
	}
	return p.handle(ctx, m)
}

func (p *poller) findSet(ctx context.Context) error {
	id, err := p.svc.scaleSet(ctx, p.pool)
	if err != nil {
		return err
	}
	p.client.cfg.Log.Info("scale set found", "pool", p.pool.Name, "scope", p.scope.name, "id", id)
	if p.journal.at.Set != id {
		if err := p.journal.save(position{Set: id}); err != nil {
			return err
		}
	}
	p.mu.Lock()
	p.set = id
	p.mu.Unlock()
	return nil
}

func (p *poller) open(ctx context.Context) error {
	if l := p.left; l != nil {
		p.left = nil
		if err := p.svc.discard(ctx, l.set, l.id); err != nil {
			p.client.cfg.Log.Warn("message session is left to time out", "pool", p.pool.Name, "error", err)
		}
	}
	s, stats, err := p.svc.open(ctx, p.scaleSet(), p.client.cfg.Owner)
	if refused(err) == http.StatusConflict {
		return &flint.Fault{
			Code: "github.session", What: fmt.Sprintf("listen to scale set %s of %s", p.pool.Name, p.scope.name),
			Kind: flint.ErrConflict, Err: err,
			Fix: "stop the other coordinator that serves a pool of this name, or rename the pool; " +
				"the session of one that was killed is given up by GitHub after some minutes",
		}
	}
	if err != nil {
		return err
	}
	p.session, p.last = s, 0
	p.hear(stats)
	return nil
}

// poll waits for the next message; nil when there is none, or when a higher capacity made the question obsolete.
func (p *poller) poll(ctx context.Context) (*message, error) {
	pause(ctx, pollPace-time.Since(p.started))
	p.started = time.Now()
	pollCtx, cancel := context.WithCancel(ctx)
	defer cancel()
	p.mu.Lock()
	capacity := p.capacity
	p.asked, p.giveUp = capacity, cancel
	p.mu.Unlock()

	m, err := p.session.next(pollCtx, p.last, capacity)

	p.mu.Lock()
	p.giveUp = nil
	p.mu.Unlock()
	if err != nil && pollCtx.Err() != nil && ctx.Err() == nil {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if m == nil {
		p.hear(nil) // no news: the last number stands
		return nil, nil
	}
	p.started = time.Time{} // more may be behind it
	return m, nil
}

// handle takes note of a message, persists it, and then acknowledges it. Anything that fails leaves it unacknowledged, and
// it comes again; what was persisted before is not told twice.
func (p *poller) handle(ctx context.Context, m *message) error {
	p.hear(m.stats)
	at := position{Set: p.scaleSet(), Message: m.id, Digest: m.digest(), Pending: p.journal.at.Pending}
	if j := p.journal.at; j.Message != at.Message || j.Digest != at.Digest {
		for _, e := range m.events {
			// The pools of a scope share its jobs: a runner may take one that another pool was told of.
			e.Pool = p.client.poolOf(e.Runner, p.pool.Name)
			if err := p.client.cfg.Events(ctx, e); err != nil {
				return fmt.Errorf("persist event of runner %s: %w", e.Runner, err)
			}
		}
		if room := maxPending - len(at.Pending); room > 0 {
			at.Pending = append(at.Pending[:len(at.Pending):len(at.Pending)], m.available[:min(room, len(m.available))]...)
		}
		if err := p.journal.save(at); err != nil {
			return err
		}
	}
	if err := p.session.acknowledge(ctx, m.id); err != nil {
		return err
	}
	p.last = m.id
	return nil
}

// acquire asks for the jobs that GitHub offered, as far as there is capacity that no job has yet. Those that GitHub does not
// give are gone or another's.
func (p *poller) acquire(ctx context.Context) error {
	pending := p.journal.at.Pending
	n := min(len(pending), p.free())
	if n <= 0 {
		return nil
	}
	got, err := p.session.acquire(ctx, pending[:n])
	if refused(err) == http.StatusNotFound { // this GitHub assigns by itself
		got, err = 0, nil
	}
	if err != nil {
		return err
	}
	p.acquired += got
	at := p.journal.at
	at.Pending = pending[n:]
	return p.journal.save(at)
}

// free is how many runners we could have that no job is assigned to.
func (p *poller) free() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	n := p.capacity - p.acquired
	if p.demand != nil {
		n -= p.demand.Assigned
	}
	return n
}

// hear notes that GitHub has spoken, and publishes the statistics it sent, if any; without, the last number stands. A number
// that is the same as before keeps its time, unless it was in doubt: the scheduler waits until one has stood for a while.
func (p *poller) hear(s *statistics) {
	now := time.Now()
	p.mu.Lock()
	stood := p.demand != nil && !p.doubtful(now)
	p.heard = now
	switch d := p.demand; {
	case s != nil:
		p.demand = &flint.Demand{Pool: p.pool.Name, Assigned: s.assigned, Available: s.available, At: now}
		if stood && d.Assigned == s.assigned {
			p.demand.At = d.At
		}
	case d != nil && !stood:
		d.At = now
	}
	p.mu.Unlock()
	if s != nil {
		p.acquired = 0
		p.client.signal()
	}
}

// doubtful reports whether the last number is too old to be believed. The caller holds p.mu.
func (p *poller) doubtful(now time.Time) bool {
	return !p.reason.IsZero() && now.Sub(p.heard) > beliefTime
}

// let drops what an error has made useless. After what may pass by itself, everything is kept: a session given up too early
// is refused again for minutes.
func (p *poller) let(ctx context.Context, err error) {
	var e *callError
	if !errors.As(err, &e) || e.status == http.StatusConflict && p.session == nil {
		return
	}
	if e.transient() && (p.session == nil || p.session.usable()) {
		return
	}
	if p.session != nil {
		p.leave(ctx)
	}
	if e.status != http.StatusNotFound || e.signedOut() {
		p.svc = nil
	}
	p.mu.Lock()
	p.set = 0
	p.mu.Unlock()
}

// leave closes the session as well as it can.
func (p *poller) leave(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, closeTimeout)
	defer cancel()
	err := p.session.close(ctx)
	if e := (*callError)(nil); errors.As(err, &e) && e.signedOut() {
		p.left, err = &leftSession{p.scaleSet(), p.session.id()}, nil
	}
	if err != nil {
		p.client.cfg.Log.Warn("message session is left to time out", "pool", p.pool.Name, "error", err)
	}
	p.session = nil
}

// trouble records why the pool hears nothing, and logs it when that is news.
func (p *poller) trouble(err error) {
	if !p.tracked {
		p.tracked, p.since = true, time.Now()
	}
	r := reason(p.pool.Name, err, p.since)
	p.mu.Lock()
	p.reason = r
	r = p.explained(time.Now())
	news := r != p.said
	p.said = r
	p.mu.Unlock()
	if news {
		p.client.cfg.Log.Warn("no demand from GitHub", "pool", p.pool.Name, "reason", r)
		p.client.signal()
	}
}

// explained is the reason of the present trouble, and what follows from it. The caller holds p.mu.
func (p *poller) explained(now time.Time) flint.Reason {
	if p.demand == nil || p.demand.Assigned == 0 || !p.doubtful(now) {
		return p.reason
	}
	return flint.Because(p.reason.Code, "%s; no runner is started for the %d jobs of %s any more", p.reason.Text,
		p.demand.Assigned, p.heard.Format(time.TimeOnly))
}

// well ends the trouble. Signing in and finding the scale set are not enough for that: the session must be open, and GitHub
// must have answered since.
func (p *poller) well() {
	if !p.tracked || p.session == nil {
		return
	}
	p.mu.Lock()
	heard := !p.heard.Before(p.since)
	if heard {
		p.reason, p.said = flint.Reason{}, flint.Reason{}
	}
	p.mu.Unlock()
	if !heard {
		return
	}
	p.tracked = false
	p.client.cfg.Log.Info("GitHub is heard again", "pool", p.pool.Name, "after", time.Since(p.since).Round(time.Second))
	p.client.signal()
}

func (p *poller) setCapacity(n int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.capacity = n
	// A poll that has heard nothing for so long is left to its time-out: capacity that rises again and again must not hide
	// that GitHub does not answer.
	if p.giveUp != nil && n > p.asked && time.Since(p.heard) < pollTimeout {
		p.giveUp()
	}
}

func (p *poller) currentDemand() (flint.Demand, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.demand == nil || p.doubtful(time.Now()) {
		return flint.Demand{}, false
	}
	return *p.demand, true
}

func (p *poller) currentReason() flint.Reason {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.explained(time.Now())
}

func (p *poller) scaleSet() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.set
}

// backoff doubles from backoffMin to backoffMax and takes away up to half by chance; GitHub's own wish goes before it.
func (p *poller) backoff(failures int, err error) time.Duration {
	d := backoffMax
	if shift := failures - 1; shift < 6 {
		d = min(backoffMax, backoffMin<<max(0, shift))
	}
	d -= time.Duration(p.client.jitter() * float64(d) / 2)
	var e *callError
	if errors.As(err, &e) {
		d = max(d, min(e.retry, retryMax))
	}
	return d
}

// pause waits for d or the end of ctx.
func pause(ctx context.Context, d time.Duration) {
	if d <= 0 {
		return
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}
