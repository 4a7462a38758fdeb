package webhook

import (
	"cmp"
	"slices"
	"strings"
	"sync"
	"time"

	"flint"
)

const (
	// maxOpen bounds the jobs that wait or run, maxPassive those that are only remembered so that late news do not revive them.
	maxOpen    = 100_000
	maxPassive = 100_000
	// maxArrivals and arrivalTime bound the delivery ids that are remembered. GitHub redelivers for 3 days. What is forgotten
	// sooner does no harm: news that come twice change nothing.
	maxArrivals = 200_000
	arrivalTime = 4 * 24 * time.Hour
	// queueTime is when GitHub drops a job that no runner took.
	queueTime = 24 * time.Hour
	// passiveTime is how long a job is remembered that is over or somebody else's.
	passiveTime = 24 * time.Hour
	// runTime is more than GitHub lets a job run on a self-hosted runner, which is 5 days.
	runTime = 6 * 24 * time.Hour
	// maxSaid bounds the label sets whose mismatch was logged.
	maxSaid = 1000
)

// entry is a job with what the ledger works out for it.
type entry struct {
	*job
	pool  int          // index of the pool that a queued job belongs to; -1: none
	why   flint.Reason // why none
	heard time.Time    // when anybody last said that this is its state
}

// ledger is the state of all jobs in memory: what the store holds, and the counts that follow from it.
type ledger struct {
	matcher *matcher
	runner  func(name string) (pool string, ours bool)
	over    func(name string) bool
	unknown func(labels string, why flint.Reason) // told once per label set that no pool covers

	mu       sync.Mutex // guards what follows
	jobs     map[jobKey]*entry
	limit    int // of open; maxOpen
	open     int
	queued   []int               // per pool
	running  map[jobKey]*entry   // on runners that are, or were, ours
	untold   map[jobKey]struct{} // whose events are to be told
	number   []flint.Demand      // per pool, as last published
	seen     map[string]struct{} // the GUIDs of arrivals
	arrivals []arrival           // oldest first
	said     map[string]struct{} // label sets
}

func newLedger(m *matcher, runner func(string) (string, bool)) *ledger {
	l := &ledger{
		matcher: m, runner: runner, jobs: map[jobKey]*entry{}, queued: make([]int, len(m.pools)), running: map[jobKey]*entry{},
		untold: map[jobKey]struct{}{}, number: make([]flint.Demand, len(m.pools)), seen: map[string]struct{}{},
		said: map[string]struct{}{}, limit: maxOpen,
	}
	return l
}

// keep drops from c what is too old, or of a repository that no account serves any more.
func (c *contents) keep(m *matcher, now time.Time) {
	c.jobs = slices.DeleteFunc(c.jobs, func(j *job) bool { return j.check() != nil || !m.knows(j) || j.stale(now) })
	for _, j := range c.jobs {
		j.Expired = j.State == queued && now.Sub(j.First) > queueTime
	}
	c.arrivals = slices.DeleteFunc(c.arrivals, func(a arrival) bool { return now.Sub(a.at) > arrivalTime })
	c.arrivals = c.arrivals[max(0, len(c.arrivals)-maxArrivals):]
}

func (m *matcher) knows(j *job) bool {
	host, _, _ := strings.Cut(j.Place, "/")
	if j.Pool == "" && !m.concerns(j) {
		return false
	}
	return slices.ContainsFunc(m.pools, func(p served) bool { return p.scope.host == host && p.scope.covers(j.Repository, "") })
}

// index returns where a pool stands; -1: it is not fed by webhooks.
func (m *matcher) index(pool string) int {
	return slices.IndexFunc(m.pools, func(p served) bool { return p.pool.Name == pool })
}

// stale reports whether the record is of no use any more.
func (j *job) stale(now time.Time) bool {
	limit := passiveTime
	switch {
	case j.State == running && j.Pool != "":
		limit = runTime
	case j.State == queued:
		limit = queueTime + passiveTime
	case j.untold():
		limit = runTime
	}
	return now.Sub(j.At) > limit
}

// load takes over what the store held.
func (l *ledger) load(c *contents) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, j := range c.jobs {
		l.put(j, j.At)
	}
	l.arrivals = c.arrivals
	for _, a := range c.arrivals {
		l.seen[a.guid] = struct{}{}
	}
}

// install takes over what the store has written. Of two writes that return at the same time the later one stands, whichever
// comes here first. It reports whether any number may have changed.
func (l *ledger) install(changes []change, now time.Time) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	changed := false
	for _, c := range changes {
		have := l.jobs[c.key]
		switch {
		case c.to == nil:
			if have != nil && have.rev <= c.seen {
				l.remove(have)
				changed = true
			}
		case have != nil && have.rev >= c.to.rev:
			have.heard = now
		default:
			if have != nil {
				l.remove(have)
			}
			l.put(c.to, now)
			changed = true
		}
	}
	return changed
}

// put adds a job that is not there. The caller holds l.mu.
func (l *ledger) put(j *job, heard time.Time) {
	e := &entry{job: j, pool: -1, heard: heard}
	key := j.key()
	l.jobs[key] = e
	if j.open() {
		l.open++
	}
	if j.untold() {
		l.untold[key] = struct{}{}
	}
	switch {
	case j.State == queued && !j.Expired:
		e.pool, e.why = l.matcher.find(j)
		if e.pool >= 0 {
			l.queued[e.pool]++
		} else {
			l.complain(e)
		}
	case j.State == running && j.Pool != "":
		l.running[key] = e
	}
}

// remove takes a job out. The caller holds l.mu.
func (l *ledger) remove(e *entry) {
	key := e.key()
	delete(l.jobs, key)
	delete(l.running, key)
	delete(l.untold, key)
	if e.open() {
		l.open--
	}
	if e.pool >= 0 {
		l.queued[e.pool]--
	}
}

// complain says that no pool covers a job, once for each set of labels. The caller holds l.mu.
func (l *ledger) complain(e *entry) {
	labels := slices.Sorted(slices.Values(e.Labels))
	set := strings.ToLower(strings.Join(labels, ","))
	if _, done := l.said[set]; done || l.unknown == nil {
		return
	}
	if len(l.said) >= maxSaid {
		clear(l.said)
	}
	l.said[set] = struct{}{}
	l.unknown(set, e.why)
}

// resolve fills in whose pool the runner of a job is of.
func (l *ledger) resolve(j *job) {
	if j.Runner == "" || j.Pool != "" {
		return
	}
	if pool, ours := l.runner(j.Runner); ours && l.matcher.index(pool) >= 0 {
		j.Pool = pool
	}
}

// room reports whether a job may be taken: known already, or not yet too many.
func (l *ledger) room(j *job) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.open < l.limit || !j.open() || l.jobs[j.key()] != nil
}

// has reports whether a job is known.
func (l *ledger) has(key jobKey) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.jobs[key] != nil
}

// size is how many jobs are open.
func (l *ledger) size() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.open
}

// known reports whether a delivery was taken before.
func (l *ledger) known(guid string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	_, ok := l.seen[guid]
	return ok
}

// arrived remembers a delivery.
func (l *ledger) arrived(a arrival) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if _, ok := l.seen[a.guid]; !ok {
		l.seen[a.guid] = struct{}{}
		l.arrivals = append(l.arrivals, a)
	}
}

// outdated forgets deliveries that are too old or too many, and returns the last one's number; 0 when there is none.
func (l *ledger) outdated(now time.Time) (seq uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	n := max(0, len(l.arrivals)-maxArrivals)
	for n < len(l.arrivals) && now.Sub(l.arrivals[n].at) > arrivalTime {
		n++
	}
	for _, a := range l.arrivals[:n] {
		delete(l.seen, a.guid)
		seq = max(seq, a.seq)
	}
	l.arrivals = l.arrivals[n:]
	return seq
}

// same notes that somebody says again what we know, and reports whether it is that.
func (l *ledger) same(j *job, now time.Time) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	have := l.jobs[j.key()]
	if have == nil {
		return false
	}
	m := merge(have.job, j)
	if news(have.job, m) {
		return false
	}
	have.heard = now
	return true
}

// demand returns the number of each pool for which believed says yes. A number that is the same as before keeps its time. A
// job in progress counts as long as its runner is still ours: GitHub notices minutes after us that one has died.
func (l *ledger) demand(now time.Time, believed func(pool int) bool) []flint.Demand {
	l.mu.Lock()
	assigned := slices.Clone(l.queued)
	var runners []string
	for _, e := range l.running {
		runners = append(runners, e.Runner)
	}
	l.mu.Unlock()
	for _, r := range runners {
		pool, ours := l.runner(r)
		if i := l.matcher.index(pool); ours && i >= 0 && (l.over == nil || !l.over(r)) {
			assigned[i]++
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	var out []flint.Demand
	for i, n := range assigned {
		d := &l.number[i]
		if !believed(i) {
			*d = flint.Demand{} // believed anew, it begins anew
			continue
		}
		if d.Assigned != n || d.At.IsZero() {
			*d = flint.Demand{Pool: l.matcher.pools[i].pool.Name, Assigned: n, At: now}
		}
		out = append(out, *d)
	}
	return out
}

// unmatched returns the queued jobs that no pool covers, longest wait first.
func (l *ledger) unmatched() []Unmatched {
	l.mu.Lock()
	defer l.mu.Unlock()
	var out []Unmatched
	for _, e := range l.jobs {
		if e.State == queued && !e.Expired && e.pool < 0 {
			out = append(out, Unmatched{JobStatus: e.status(), Reason: e.why})
		}
	}
	slices.SortFunc(out, func(a, b Unmatched) int { return a.Queued.Compare(b.Queued) })
	return out
}

// silent returns up to n jobs that are open and of which nothing was heard for a while: first those that run here, then those
// that wait for a pool of ours, then the others; the longest silence first.
func (l *ledger) silent(before time.Time, n int, ours func(*job) bool) []*job {
	l.mu.Lock()
	var found []*entry
	for _, e := range l.jobs {
		if e.open() && e.heard.Before(before) && ours(e.job) {
			found = append(found, e)
		}
	}
	class := func(e *entry) int {
		switch {
		case e.State == running:
			return 0
		case e.pool >= 0:
			return 1
		}
		return 2
	}
	slices.SortFunc(found, func(a, b *entry) int {
		if d := class(a) - class(b); d != 0 {
			return d
		}
		return a.heard.Compare(b.heard)
	})
	l.mu.Unlock()
	var out []*job
	for _, e := range found[:min(n, len(found))] {
		out = append(out, e.job)
	}
	return out
}

// asked notes that GitHub was asked about a job.
func (l *ledger) asked(key jobKey, now time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if e := l.jobs[key]; e != nil {
		e.heard = now
	}
}

// old returns the jobs that time may have changed: expired, stale, or in progress on a runner that is perhaps ours. Of those
// that are only remembered it returns the oldest beyond maxPassive, too.
func (l *ledger) old(now time.Time) (keys []jobKey, surplus map[jobKey]bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	var passive []*entry
	for key, e := range l.jobs {
		switch {
		case e.stale(now), e.State == queued && !e.Expired && now.Sub(e.First) > queueTime,
			e.State == running && e.Pool == "" && now.Sub(e.At) < silentTime:
			keys = append(keys, key)
		case !e.open() && !e.untold():
			passive = append(passive, e)
		}
	}
	surplus = map[jobKey]bool{}
	if n := len(passive) - maxPassive; n > 0 {
		slices.SortFunc(passive, func(a, b *entry) int { return a.At.Compare(b.At) })
		for _, e := range passive[:n] {
			keys = append(keys, e.key())
			surplus[e.key()] = true
		}
	}
	return keys, surplus
}

// toTell returns the jobs of which there is an event to tell, in the order of their ids.
func (l *ledger) toTell() []*job {
	l.mu.Lock()
	defer l.mu.Unlock()
	var out []*job
	for key := range l.untold {
		out = append(out, l.jobs[key].job)
	}
	slices.SortFunc(out, func(a, b *job) int { return cmp.Compare(a.ID, b.ID) })
	return out
}
