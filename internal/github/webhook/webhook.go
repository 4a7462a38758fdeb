package webhook

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"

	"flint"
)

// Account is one GitHub account whose webhooks come here.
type Account struct {
	Name   string
	Secret flint.Secret // of its webhook; several accounts may have the same
	API    API          // nil: nothing is asked of GitHub, what is lost on the way stays lost
	// Pools are those that its webhooks feed. What their scopes do not cover is ignored; an empty scope covers everything.
	Pools []flint.Pool
}

// Config is what a Receiver works with. All fields but Elsewhere and Over are needed.
type Config struct {
	Accounts []Account
	// Elsewhere are the pools that hear of their jobs another way. Webhooks may tell of these jobs, too; they are ignored.
	Elsewhere []flint.Pool
	Dir       string // an existing private directory for the ledger
	Log       *slog.Logger
	// Events persists what GitHub says of a job that met one of our runners. It is called again until it succeeds, and may be
	// called twice for the same event (a crash), so the callee must not mind.
	Events func(context.Context, flint.JobEvent) error
	// Runner says whether a runner of this name is ours and of which pool. It must know a runner from before it is registered
	// until its end, and be quick.
	Runner func(name string) (pool string, ours bool)
	// Over says that a runner of ours has done its work: no demand stands for its job, although GitHub tells us a moment later
	// that it is completed. nil: no runner is.
	Over func(name string) bool
}

// Counts are the deliveries so far, by what became of them.
type Counts struct {
	Accepted     uint64 // persisted
	Duplicates   uint64 // known by their delivery id
	Foreign      uint64 // of another event, organisation or repository, or for GitHub's own machines
	BadSignature uint64 // answered 401
	Malformed    uint64 // answered 400
	TooLarge     uint64 // answered 413
	Limited      uint64 // answered 429 for their rate
	Refused      uint64 // answered 503: the ledger could not be written, or is full
}

// Unmatched is a queued job that no pool covers.
type Unmatched struct {
	flint.JobStatus
	Reason flint.Reason
}

// Receiver takes webhooks and keeps the ledger. Its methods are safe for concurrent use. It is a sched.Source.
type Receiver struct {
	cfg      Config
	log      *slog.Logger
	accounts []*account
	store    *store
	ledger   *ledger
	limiter  *rate.Limiter
	bodies   atomic.Int64 // bytes of bodies in memory
	counts   counters
	changed  chan struct{}
	told     chan struct{} // signalled when there is an event to tell
	jitter   func() float64

	mu       sync.Mutex
	loggedAt map[string]time.Time // guarded by mu: when a message was last logged
	events   flint.Reason         // guarded by mu: why events cannot be told
}

type counters struct {
	accepted, duplicates, foreign, badSignature, malformed, tooLarge, limited, refused atomic.Uint64
}

// Open reads the ledger, matches its jobs to the pools as they are now, and makes a Receiver. It does not talk to GitHub. Its
// faults are webhook.secret, webhook.scope and webhook.state. The caller closes the Receiver after Run and Serve have
// returned.
func Open(cfg Config) (*Receiver, error) {
	if cfg.Log == nil || cfg.Events == nil || cfg.Runner == nil || cfg.Dir == "" {
		return nil, errors.New("make webhook receiver: a field of its Config is missing")
	}
	r := &Receiver{
		cfg: cfg, log: cfg.Log, limiter: rate.NewLimiter(maxRate, maxBurst), changed: make(chan struct{}, 1),
		told: make(chan struct{}, 1), jitter: rand.Float64, loggedAt: map[string]time.Time{},
	}
	m := &matcher{}
	for _, a := range cfg.Accounts {
		acc, err := newAccount(a, m)
		if err != nil {
			return nil, err
		}
		r.accounts = append(r.accounts, acc)
	}
	for _, p := range cfg.Elsewhere {
		s, err := servedScope(p)
		if err != nil {
			return nil, err
		}
		m.elsewhere = append(m.elsewhere, served{pool: p, scope: s})
	}
	r.ledger = newLedger(m, cfg.Runner)
	r.ledger.over = cfg.Over
	r.ledger.unknown = func(labels string, why flint.Reason) {
		r.log.Warn("a queued job belongs to no pool", "labels", labels, "reason", why)
	}
	store, c, err := openStore(cfg.Dir, func(c *contents) { c.keep(m, time.Now()) }, cfg.Log)
	if err != nil {
		return nil, err
	}
	r.store = store
	r.ledger.load(c)
	for _, a := range r.accounts {
		a.swept = c.sweeps[a.cfg.Name]
	}
	return r, nil
}

func newAccount(cfg Account, m *matcher) (*account, error) {
	if cfg.Secret == "" {
		return nil, &flint.Fault{
			Code: "webhook.secret", What: fmt.Sprintf("take webhooks for account %q", cfg.Name), Kind: flint.ErrConfig,
			Err: errors.New("it has no webhook secret, so anybody could send them"),
			Fix: "set a secret in the webhook's settings on GitHub, and the same one here",
		}
	}
	a := &account{cfg: cfg, failed: map[string]*lost{}}
	for _, p := range cfg.Pools {
		s, err := servedScope(p)
		if err != nil {
			return nil, err
		}
		a.scopes = append(a.scopes, s)
		m.pools = append(m.pools, served{pool: p, scope: s, account: a})
	}
	return a, nil
}

func servedScope(p flint.Pool) (scope, error) {
	s, err := parseScope(p.Scope)
	if err != nil {
		return scope{}, &flint.Fault{
			Code: "webhook.scope", What: "serve pool " + p.Name, Kind: flint.ErrConfig, Err: err,
			Fix: "set the URL as the browser shows it: https://github.com/acme or https://github.com/acme/app",
		}
	}
	return s, nil
}

// Close closes the ledger. Deliveries that still come are answered 503.
func (r *Receiver) Close() error {
	if err := r.store.db.Close(); err != nil {
		return fmt.Errorf("close ledger of webhooks: %w", err)
	}
	return nil
}

// Demand implements sched.Source: the jobs that are queued for each pool, and those that run on its runners. A pool whose
// account has not been heard of since the start, or not for long while GitHub cannot be asked, is absent.
func (r *Receiver) Demand() []flint.Demand {
	now := time.Now()
	return r.ledger.demand(now, func(pool int) bool { return r.ledger.matcher.pools[pool].account.believed(now) })
}

// Changed implements sched.Source.
func (r *Receiver) Changed() <-chan struct{} { return r.changed }

// Capacity implements sched.Source. GitHub sends webhooks whatever the capacity.
func (r *Receiver) Capacity(string, int) {}

// Unmatched returns the queued jobs that no pool covers, the longest wait first.
func (r *Receiver) Unmatched() []Unmatched { return r.ledger.unmatched() }

// Waiting returns, by pool, why its demand may be incomplete.
func (r *Receiver) Waiting() map[string]flint.Reason {
	now := time.Now()
	r.mu.Lock()
	events := r.events
	r.mu.Unlock()
	out := map[string]flint.Reason{}
	for _, p := range r.ledger.matcher.pools {
		why := p.account.explain(p.pool.Name, now)
		if why.IsZero() {
			why = events
		}
		if !why.IsZero() {
			out[p.pool.Name] = why
		}
	}
	return out
}

// OpenJobs is how many jobs the ledger holds that want a runner or have one of ours.
func (r *Receiver) OpenJobs() int { return r.ledger.size() }

// Counts returns the counts of deliveries since Open.
func (r *Receiver) Counts() Counts {
	c := &r.counts
	return Counts{
		Accepted: c.accepted.Load(), Duplicates: c.duplicates.Load(), Foreign: c.foreign.Load(), BadSignature: c.badSignature.Load(),
		Malformed: c.malformed.Load(), TooLarge: c.tooLarge.Load(), Limited: c.limited.Load(), Refused: c.refused.Load(),
	}
}

// write applies changes, with the delivery that brought them, to the store and then to the ledger.
func (r *Receiver) write(changes []change, a *arrival) error {
	if err := r.store.update(changes, a); err != nil {
		return err
	}
	if a != nil {
		r.ledger.arrived(*a)
	}
	if r.ledger.install(changes, time.Now()) {
		signal(r.changed)
		signal(r.told)
	}
	return nil
}

// learn makes the change that adds what j says.
func (r *Receiver) learn(j *job) change {
	r.ledger.resolve(j)
	return change{key: j.key(), apply: func(have *job) *job {
		if m := merge(have, j); news(have, m) {
			return m
		}
		return have
	}}
}

// sometimes reports whether a message that anybody can provoke may be logged now: once a minute each.
func (r *Receiver) sometimes(message string) bool {
	now := time.Now()
	r.mu.Lock()
	defer r.mu.Unlock()
	if last, ok := r.loggedAt[message]; ok && now.Sub(last) < time.Minute {
		return false
	}
	r.loggedAt[message] = now
	return true
}

func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}
