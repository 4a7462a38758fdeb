package githubsim

import (
	"hash/fnv"
	"maps"
	"slices"
	"sync"
	"time"
)

// Faults are the ways in which the simulated GitHub misbehaves. The zero value behaves. A chance is between 0 and 1, of each
// occasion on which the fault could strike.
type Faults struct {
	// Seed decides when chances strike: the nth occasion of a fault strikes or not by the seed alone, whatever else goes on.
	Seed uint64
	// Routes are where the faults of HTTP strike: those from FailRequests to ForbidRequests, and Outage. When zero, where a
	// coordinator asks.
	Routes Routes
	// Outage answers every request with 503.
	Outage bool

	RefuseSessions    float64 // 409 for a scale set session, though there is no other
	ReplayMessages    float64 // a new session hears again what old ones acknowledged, up to 100 messages
	ExpireQueueTokens float64 // the token a poll or an acknowledgement comes with ends then and there
	ExpireAdminTokens float64 // the same for the token of the scale set API, before the time it names itself
	ExceedCapacity    float64 // a poll brings one job more than it had capacity for
	RepeatAssignments float64 // a job is assigned once more after it is over
	DeleteScaleSets   float64 // a poll finds its scale set deleted
	RefuseRemovals    float64 // JobStillRunning, though the runner is idle
	RefuseNames       float64 // AgentExists, though the name is free
	RefuseVersions    float64 // RunnerVersionTooOld for a runner that comes online

	LoseWebhooks    float64 // not sent, and recorded as one nobody answered
	ForgetWebhooks  float64 // neither sent nor recorded
	RepeatWebhooks  float64 // sent twice
	DelayWebhooks   float64 // sent WebhookDelay later
	ReorderWebhooks float64 // sent after the next ones
	FailDeliveries  float64 // 502 from the deliveries API

	FailRequests   float64 // 500, 502 or 503, before anything took place
	LoseAnswers    float64 // 502, though everything took place
	CutAnswers     float64 // the connection breaks in the middle of the answer
	SlowAnswers    float64 // SlowBy passes before anything takes place
	LimitRequests  float64 // 429 with Retry-After
	ForbidRequests float64 // 403 with X-RateLimit-Reset

	SlowBy       time.Duration // 2 s when zero
	RetryAfter   time.Duration // 1 s when zero, and whole seconds on the wire
	WebhookDelay time.Duration // 5 s when zero

	ReassignAfter   time.Duration // an assigned job that no runner took is taken back, three times; then it fails. Never when zero
	RemoveIdleAfter time.Duration // a registration without a job is removed so long after it was made. Never when zero
	StatisticsLag   time.Duration // how old a scale set's statistics are
}

// Routes are kinds of request.
type Routes uint

// The kinds of request, by who asks for what.
const (
	RouteREST       Routes = 1 << iota // the REST API, but for deliveries
	RouteDeliveries                    // deliveries of webhooks
	RouteScaleSets                     // the scale set API
	RouteQueue                         // polls and acknowledgements of scale set messages
	RouteRunners                       // what runners ask, logs excepted

	RoutesOfCoordinator = RouteREST | RouteDeliveries | RouteScaleSets | RouteQueue
)

// The faults' names, as scenarios, counts and the documentation have them.
const (
	refuseSessions    = "refuse sessions"
	replayMessages    = "replay messages"
	expireQueueTokens = "expire queue tokens"
	expireAdminTokens = "expire admin tokens"
	exceedCapacity    = "exceed capacity"
	repeatAssignments = "repeat assignments"
	deleteScaleSets   = "delete scale-sets"
	refuseRemovals    = "refuse removals"
	refuseNames       = "refuse names"
	refuseVersions    = "refuse versions"
	loseWebhooks      = "lose webhooks"
	forgetWebhooks    = "forget webhooks"
	repeatWebhooks    = "repeat webhooks"
	delayWebhooks     = "delay webhooks"
	reorderWebhooks   = "reorder webhooks"
	failDeliveries    = "fail deliveries"
	failRequests      = "fail requests"
	loseAnswers       = "lose answers"
	cutAnswers        = "cut answers"
	slowAnswers       = "slow answers"
	limitRequests     = "limit requests"
	forbidRequests    = "forbid requests"

	slowBy        = "slow answers by"
	retryAfter    = "retry after"
	webhookDelay  = "delay webhooks by"
	reassignAfter = "reassign jobs after"
	removeIdle    = "remove idle runners after"
	statisticsLag = "delay statistics by"

	outage = "outage" // counted, and not a chance
)

// chances and lengths find the switches by their names.
func (f *Faults) chances() map[string]*float64 {
	return map[string]*float64{
		refuseSessions: &f.RefuseSessions, replayMessages: &f.ReplayMessages, expireQueueTokens: &f.ExpireQueueTokens,
		expireAdminTokens: &f.ExpireAdminTokens, exceedCapacity: &f.ExceedCapacity, repeatAssignments: &f.RepeatAssignments,
		deleteScaleSets: &f.DeleteScaleSets, refuseRemovals: &f.RefuseRemovals, refuseNames: &f.RefuseNames, refuseVersions: &f.RefuseVersions,
		loseWebhooks: &f.LoseWebhooks, forgetWebhooks: &f.ForgetWebhooks, repeatWebhooks: &f.RepeatWebhooks, delayWebhooks: &f.DelayWebhooks,
		reorderWebhooks: &f.ReorderWebhooks, failDeliveries: &f.FailDeliveries, failRequests: &f.FailRequests, loseAnswers: &f.LoseAnswers,
		cutAnswers: &f.CutAnswers, slowAnswers: &f.SlowAnswers, limitRequests: &f.LimitRequests, forbidRequests: &f.ForbidRequests,
	}
}

func (f *Faults) lengths() map[string]*time.Duration {
	return map[string]*time.Duration{
		slowBy: &f.SlowBy, retryAfter: &f.RetryAfter, webhookDelay: &f.WebhookDelay,
		reassignAfter: &f.ReassignAfter, removeIdle: &f.RemoveIdleAfter, statisticsLag: &f.StatisticsLag,
	}
}

// faultNames returns the names of all switches a scenario can set: those with a chance, then those with a time.
func faultNames() (chances, times []string) {
	var f Faults
	return slices.Sorted(maps.Keys(f.chances())), slices.Sorted(maps.Keys(f.lengths()))
}

// Misbehave sets how the server misbehaves from now on. What is under way goes on as it began.
func (s *Server) Misbehave(f Faults) { s.hub.faults.put(f) }

// Misbehaved returns how often each fault has struck, by its name.
func (s *Server) Misbehaved() map[string]int { return s.hub.faults.counted() }

// faults decides when a fault strikes, and counts. Its methods may be called with the hub's lock or without.
type faults struct {
	mu      sync.Mutex
	set     Faults
	chance  map[string]float64       // those of set
	length  map[string]time.Duration // those of set
	rolls   map[string]uint64        // occasions so far
	counts  map[string]int
	revoked map[digest]time.Time // admin tokens that ended early, until they would have ended
}

func newFaults() *faults {
	return &faults{
		chance: map[string]float64{}, length: map[string]time.Duration{},
		rolls: map[string]uint64{}, counts: map[string]int{}, revoked: map[digest]time.Time{},
	}
}

func (m *faults) put(f Faults) {
	if f.Routes == 0 {
		f.Routes = RoutesOfCoordinator
	}
	for d, def := range map[*time.Duration]time.Duration{&f.SlowBy: 2 * time.Second, &f.RetryAfter: time.Second, &f.WebhookDelay: 5 * time.Second} {
		if *d <= 0 {
			*d = def
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if f.Seed != m.set.Seed {
		clear(m.rolls)
	}
	m.set = f
	for name, p := range f.chances() {
		m.chance[name] = *p
	}
	for name, d := range f.lengths() {
		m.length[name] = *d
	}
}

// settings returns what is set now.
func (m *faults) settings() Faults {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.set
}

// alter changes the settings in place.
func (m *faults) alter(change func(*Faults)) {
	f := m.settings()
	change(&f)
	m.put(f)
}

func (m *faults) counted() map[string]int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return maps.Clone(m.counts)
}

// strikes reports whether a fault strikes now.
func (m *faults) strikes(name string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	p := m.chance[name]
	if p <= 0 {
		return false
	}
	n := m.rolls[name]
	m.rolls[name] = n + 1
	if uniform(m.set.Seed, name, n) >= p {
		return false
	}
	m.counts[name]++
	return true
}

// time returns a time that is set; 0 when it is not.
func (m *faults) time(name string) time.Duration {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.length[name]
}

// count notes that a fault struck which has no chance of its own.
func (m *faults) count(name string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.counts[name]++
}

// uniform is the nth number between 0 and 1 of a name's own sequence.
func uniform(seed uint64, name string, n uint64) float64 {
	h := fnv.New64a()
	_, _ = h.Write([]byte(name)) // never fails
	// The finaliser of SplitMix64: each of seed, name and n alone changes every bit with even odds.
	x := seed*0x9e3779b97f4a7c15 ^ h.Sum64() + (n+1)*0xd1342543de82ef95
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return float64((x^x>>31)>>11) / (1 << 53)
}

// webhook decides what becomes of one delivery.
func (m *faults) webhook(string) fate {
	const overtaken = 100 * time.Millisecond
	f := fate{never: m.strikes(forgetWebhooks), lost: m.strikes(loseWebhooks), again: m.strikes(repeatWebhooks)}
	if m.strikes(reorderWebhooks) {
		f.delay = overtaken
	}
	if m.strikes(delayWebhooks) {
		f.delay = m.time(webhookDelay)
	}
	return f
}
