// Package github turns GitHub's scale sets into demand, and runners into registrations.
//
// It opens one message session per pool and polls it: what GitHub says is handled, persisted, and only then acknowledged.
// GitHub's own statistics are the demand; messages are never counted. It mints and removes the registrations of runners, and
// says why a pool hears nothing. It must not decide how many runners there are, must not know hosts or VMs, and keeps the
// types of the scale set library to itself.
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
	"sync"

	"flint"
)

// Config is what a Client works with.
type Config struct {
	URL            string       // of the organisation or repository, https://github.com/acme; for pools without a Scope of their own
	AppID          string       // client id or app id of the GitHub App
	InstallationID int64        // of the App; 0: looked up for each scope
	PrivateKey     flint.Secret // of the App, PEM
	Token          flint.Secret // a personal access token instead of the App
	Owner          string       // names the sessions; the same at every start of one coordinator
	StateDir       string       // an existing private directory for the journals, one file per pool
	Pools          []flint.Pool
	Log            *slog.Logger
	// Events persists what GitHub says of a job. An error means that the message is not acknowledged and comes again. An
	// event may come twice (a crash between this call and the acknowledgement), so the callee must not mind.
	Events func(context.Context, flint.JobEvent) error
	// Transport carries all requests; nil: one of its own, with the proxy of the environment.
	Transport http.RoundTripper
}

// Client is the coordinator's side of GitHub. Its methods are safe for concurrent use. It is a sched.Source and a
// host.Registrar.
type Client struct {
	cfg     Config
	scopes  []*scope // one per URL
	pollers []*poller
	changed chan struct{}
	jitter  func() float64

	mu      sync.Mutex
	runners map[string]*scope // guarded by mu: where the runners of this process are registered, by name
}

// New checks the configuration and makes a Client. It does not talk to GitHub. Its errors are faults: github.url, github.app,
// github.key, github.state.
func New(cfg Config) (*Client, error) {
	if err := cfg.check(); err != nil {
		return nil, err
	}
	if cfg.Transport == nil {
		cfg.Transport = http.DefaultTransport.(*http.Transport).Clone() // each call has its own deadline
	}
	c := &Client{cfg: cfg, changed: make(chan struct{}, 1), jitter: rand.Float64, runners: map[string]*scope{}}
	for _, p := range cfg.Pools {
		if p.Scope == "" {
			p.Scope = cfg.URL
		}
		s, err := c.scope(p.Scope)
		if err != nil {
			return nil, err
		}
		j, err := openJournal(cfg.StateDir, p.Name, cfg.Log)
		if err != nil {
			return nil, err
		}
		c.pollers = append(c.pollers, newPoller(c, s, p, j))
	}
	return c, nil
}

// check refuses what can be seen to be wrong without asking GitHub.
func (cfg *Config) check() error {
	switch {
	case cfg.Token == "" && cfg.AppID == "":
		return &flint.Fault{
			Code: "github.app", What: "sign in to GitHub", Kind: flint.ErrConfig,
			Err: errors.New("neither a GitHub App nor a token is configured"),
			Fix: "set github.app_id and github.private_key_file",
		}
	case cfg.Token == "":
		if _, err := parseKey(cfg.PrivateKey); err != nil {
			return &flint.Fault{
				Code: "github.key", What: "read the private key of the GitHub App", Kind: flint.ErrConfig, Err: err,
				Fix: "set github.private_key_file to the .pem file that GitHub offered when the key was generated",
			}
		}
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

// scope returns the scope of a URL, the same for the same URL.
func (c *Client) scope(url string) (*scope, error) {
	for _, s := range c.scopes {
		if s.url == url {
			return s, nil
		}
	}
	s, err := newScope(url, &c.cfg)
	if err != nil {
		return nil, err
	}
	c.scopes = append(c.scopes, s)
	return s, nil
}

// Run polls every pool until ctx ends, then deletes its sessions, within closeTimeout. It returns nil: what goes wrong is
// retried for ever and shown by Waiting.
func (c *Client) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	for _, p := range c.pollers {
		wg.Go(func() { p.run(ctx) })
	}
	wg.Wait()
	return nil
}

// Demand returns what GitHub last said of each pool. Absent are pools it has not spoken of, and those it has not been heard
// from for beliefTime: Waiting says why.
func (c *Client) Demand() []flint.Demand {
	demand := make([]flint.Demand, 0, len(c.pollers))
	for _, p := range c.pollers {
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
	if p := c.poller(pool); p != nil {
		p.setCapacity(max(0, n))
	}
}

// Waiting says, for each pool that hears nothing from GitHub at the moment, why.
func (c *Client) Waiting() []flint.Reason {
	var reasons []flint.Reason
	for _, p := range c.pollers {
		if r := p.currentReason(); !r.IsZero() {
			reasons = append(reasons, r)
		}
	}
	return reasons
}

func (c *Client) poller(pool string) *poller {
	i := slices.IndexFunc(c.pollers, func(p *poller) bool { return p.pool.Name == pool })
	if i < 0 {
		return nil
	}
	return c.pollers[i]
}
