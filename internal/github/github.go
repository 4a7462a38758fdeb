// Package github turns GitHub's scale sets into demand, and runners into registrations.
//
// It opens one message session per pool of a scale set account and polls it: what GitHub says is handled, persisted, and only
// then acknowledged. GitHub's own statistics are the demand; messages are never counted. For all accounts it mints, looks up
// and removes the registrations of runners, asks what GitHub knows of jobs and of the webhooks it sent, and for lost jobs to
// run again; it says why a pool hears nothing. It keeps to GitHub's limits. It must not decide how many runners there are,
// must not know hosts or VMs, must not receive webhooks, and keeps the types of the libraries to itself.
package github

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"

	"flint"
)

// Config is what a Client works with.
type Config struct {
	Accounts []Account
	Owner    string // names the sessions; the same at every start of one coordinator
	// Prefix begins the names of all our runners and of nobody else's: flint-1a2b3c-. Without it nothing is pruned, and a name
	// that is taken is never ours, but for scale sets.
	Prefix   string
	StateDir string // an existing private directory for the journals, one file per pool
	Pools    []flint.Pool
	Log      *slog.Logger
	// Events persists what GitHub says of a job. An error means that the message is not acknowledged and comes again. An
	// event may come twice (a crash between this call and the acknowledgement), so the callee must not mind.
	Events func(context.Context, flint.JobEvent) error
	// Transport carries all requests; nil: one of its own, with the proxy of the environment.
	Transport http.RoundTripper
}

// Client is the coordinator's side of GitHub. Its methods are safe for concurrent use. It is a sched.Source and a
// host.Registrar.
type Client struct {
	cfg      Config
	accounts []*account
	changed  chan struct{}
	moved    chan struct{} // signalled when pools has changed
	jitter   func() float64

	mu      sync.Mutex
	scopes  []*scope           // guarded by mu: those of the pools, one per account and URL; only grows
	pools   []*served          // guarded by mu; replaced, never changed
	runners map[string]*served // guarded by mu: whose the runners of this process are, by name
}

// served is a pool, and where it is served.
type served struct {
	flint.Pool
	scope  *scope
	poller *poller // nil: its jobs are heard of by webhooks
}

// New checks the configuration and makes a Client. It does not talk to GitHub. Its errors are faults: github.url, github.app,
// github.key, github.state, github.account, github.pool.
func New(cfg Config) (*Client, error) {
	if err := cfg.check(); err != nil {
		return nil, err
	}
	if cfg.Transport == nil {
		cfg.Transport = http.DefaultTransport.(*http.Transport).Clone() // each call has its own deadline
	}
	c := &Client{
		cfg: cfg, changed: make(chan struct{}, 1), moved: make(chan struct{}, 1), jitter: rand.Float64, runners: map[string]*served{},
	}
	for _, a := range cfg.Accounts {
		if c.account(a.Name) != nil {
			return nil, accountFault("configure the GitHub accounts", fmt.Errorf("two are called %q", a.Name))
		}
		made, err := newAccount(a, cfg.Transport)
		if err != nil {
			return nil, err
		}
		c.accounts = append(c.accounts, made)
	}
	if err := c.SetPools(cfg.Pools); err != nil {
		return nil, err
	}
	return c, nil
}

// SetPools changes which pools are served; on error nothing changes. A pool that was served before and has the same account,
// scope, group and labels goes on; the session of one that is gone or another now is deleted while Run runs. Runners of pools
// that are gone stay known. Its faults are github.account, github.pool and github.state.
func (c *Client) SetPools(pools []flint.Pool) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	var all []*served
	for _, p := range pools {
		at, err := c.serve(p, all)
		if err != nil {
			return err
		}
		all = append(all, at)
	}
	c.pools = all
	select {
	case c.moved <- struct{}{}:
	default:
	}
	return nil
}

// serve makes or finds how a pool is served, beside the others. The caller holds c.mu.
func (c *Client) serve(p flint.Pool, others []*served) (*served, error) {
	a := c.account(p.Account)
	if a == nil && p.Account == "" && len(c.accounts) == 1 {
		a = c.accounts[0]
	}
	if a == nil {
		return nil, accountFault("serve pool "+p.Name, fmt.Errorf("no GitHub account is called %q", p.Account))
	}
	s, err := c.scope(a, p.Scope)
	if err != nil {
		return nil, err
	}
	for _, other := range others {
		switch {
		case other.Name == p.Name:
			return nil, poolFault(p.Name, errors.New("another pool has the same name"))
		case a.Mode == ScaleSets && other.poller != nil && other.scope.url == s.url && strings.EqualFold(setName(other.Pool), setName(p)):
			return nil, poolFault(p.Name, fmt.Errorf("pool %s has the scale set %s of %s already", other.Name, setName(p), s.name))
		}
	}
	if i := slices.IndexFunc(c.pools, func(old *served) bool { return old.same(p, s) }); i >= 0 {
		return c.pools[i], nil
	}
	at := &served{Pool: p, scope: s}
	if a.Mode != ScaleSets {
		return at, nil
	}
	j, err := openJournal(c.cfg.StateDir, p.Name, c.cfg.Log)
	if err != nil {
		return nil, err
	}
	at.poller = newPoller(c, s, p, j)
	return at, nil
}

// same reports whether p, in scope s, is served as this pool is: what else is in a Pool is not GitHub's.
func (at *served) same(p flint.Pool, s *scope) bool {
	return at.Name == p.Name && at.scope == s && at.Group == p.Group && slices.Equal(at.Labels, p.Labels)
}

func accountFault(what string, err error) error {
	return &flint.Fault{
		Code: "github.account", What: what, Kind: flint.ErrConfig, Err: err,
		Fix: "give each GitHub account a name of its own, and each pool the name of one of them",
	}
}

func poolFault(pool string, err error) error {
	return &flint.Fault{
		Code: "github.pool", What: "serve pool " + pool, Kind: flint.ErrConfig, Err: err,
		Fix: "give one of the pools another name and another first label",
	}
}

// check refuses what can be seen to be wrong without asking GitHub.
func (cfg *Config) check() error {
	if len(cfg.Accounts) == 0 {
		return accountFault("sign in to GitHub", errors.New("no account is configured"))
	}
	if cfg.Owner == "" {
		return errors.New("make GitHub client: no owner name")
	}
	if cfg.Log == nil || cfg.Events == nil {
		return errors.New("make GitHub client: no logger or no Events")
	}
	if st, err := os.Stat(cfg.StateDir); err != nil || !st.IsDir() {
		if err == nil {
			err = fmt.Errorf("%s is not a directory", cfg.StateDir)
		}
		return &flint.Fault{
			Code: "github.state", What: "open the directory of the GitHub journals", Kind: flint.ErrConfig, Err: err,
			Fix: "make the directory, or set state_dir to one that exists",
		}
	}
	return nil
}

// account returns the account of a name; nil where there is none.
func (c *Client) account(name string) *account {
	for _, a := range c.accounts {
		if a.Name == name {
			return a
		}
	}
	return nil
}

// scope returns an account's scope of a URL, the same for the same URL; its own without one. It must be on the account's
// server: another has no business with its credentials. The caller holds c.mu.
func (c *Client) scope(a *account, url string) (*scope, error) {
	if url == "" {
		url = a.URL
	}
	for _, s := range c.scopes {
		if s.account == a && s.url == url {
			return s, nil
		}
	}
	s := a.base
	if url != a.base.url {
		var err error
		if s, err = newScope(url, a); err != nil {
			return nil, err
		}
	}
	if s.api != a.base.api {
		return nil, accountFault("use "+url, fmt.Errorf("it is on another server than %s of its account", a.URL))
	}
	c.scopes = append(c.scopes, s)
	return s, nil
}

// Run polls every pool until ctx ends, then deletes its sessions, within closeTimeout. It returns nil: what goes wrong is
// retried for ever and shown by Waiting.
func (c *Client) Run(ctx context.Context) error {
	ends := map[*poller]func(){} // end a poller and wait for that
	end := func(p *poller) {
		ends[p]()
		delete(ends, p)
	}
	for {
		now := c.pollers()
		for p := range ends {
			if !slices.Contains(now, p) {
				end(p) // before another one may take its scale set
			}
		}
		for _, p := range now {
			if ends[p] != nil {
				continue
			}
			pctx, cancel := context.WithCancel(ctx)
			var running sync.WaitGroup
			running.Go(func() { p.run(pctx) })
			ends[p] = func() {
				cancel()
				running.Wait()
			}
		}
		select {
		case <-c.moved:
		case <-ctx.Done():
			for p := range ends {
				end(p)
			}
			return nil
		}
	}
}

// pollers are those of the pools as they are now.
func (c *Client) pollers() []*poller {
	c.mu.Lock()
	defer c.mu.Unlock()
	var all []*poller
	for _, p := range c.pools {
		if p.poller != nil {
			all = append(all, p.poller)
		}
	}
	return all
}

// places are the scopes of all pools so far.
func (c *Client) places() []*scope {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.scopes)
}

// Demand returns what GitHub last said of each pool. Absent are pools it has not spoken of, and those it has not been heard
// from for beliefTime: Waiting says why.
func (c *Client) Demand() []flint.Demand {
	pollers := c.pollers()
	demand := make([]flint.Demand, 0, len(pollers))
	for _, p := range pollers {
		if d, ok := p.currentDemand(); ok {
			demand = append(demand, d)
		}
	}
	return demand
}

// Changed is signalled when Demand or Waiting may have changed.
func (c *Client) Changed() <-chan struct{} { return c.changed }

func (c *Client) signal() {
	select {
	case c.changed <- struct{}{}:
	default:
	}
}

// Capacity tells how many runners the pool has and could still start. GitHub assigns no more jobs than that. The number is
// read when a poll starts, so a poll that was begun with a smaller one is given up and asked anew.
func (c *Client) Capacity(pool string, n int) {
	if p := c.served(pool); p != nil && p.poller != nil {
		p.poller.setCapacity(max(0, n))
	}
}

// Waiting says, for each pool with a message session that hears nothing from GitHub at the moment, why.
func (c *Client) Waiting() map[string]flint.Reason {
	reasons := map[string]flint.Reason{}
	for _, p := range c.pollers() {
		if r := p.currentReason(); !r.IsZero() {
			reasons[p.pool.Name] = r
		}
	}
	return reasons
}

// served returns the pool of a name; nil where there is none.
func (c *Client) served(pool string) *served {
	c.mu.Lock()
	defer c.mu.Unlock()
	i := slices.IndexFunc(c.pools, func(p *served) bool { return p.Name == pool })
	if i < 0 {
		return nil
	}
	return c.pools[i]
}
