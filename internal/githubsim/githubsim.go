// Package githubsim is a GitHub that real clients and real runners can talk to, without GitHub: the REST API of runners and
// jobs, webhooks, the scale set API, registration, the runner's sessions, its run service, results and live log. Tests and
// `flint demo` stand on it.
//
// It plans real workflow files and hands their `run:` steps to whoever is registered; it never runs a step itself,
// opens no network connection but to the webhooks it is told of, and keeps everything in memory. Its HTTP side faces guests, so every body is
// bounded and every token checked. It must not know any other room of flint: to it, the coordinator is one more client.
package githubsim

import (
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"flint"
)

// Config says what the simulated GitHub is. URL, Owner and Repo are required.
type Config struct {
	URL   string // base URL as guests and the coordinator reach it: http://10.80.0.1:8080, without a path
	Owner string // the organisation
	Repo  string // the repository runs belong to that name none; the first of Repos when empty
	Log   *slog.Logger
	// Repos are the organisation's repositories. Repo is put before them, as a private one, unless it is among them.
	Repos      []Repository
	Enterprise string       // slug of the enterprise the organisation is part of; none when empty
	Token      flint.Secret // a personal access token, which has the installation's permissions; none when empty
	// Permissions takes away what the App may do, or lessens it: {"actions": "read"}, {"administration": ""}. A permission
	// that is not named is granted in full.
	Permissions map[string]string
	RateLimit   int    // REST requests an hour of each caller; 15,000 when zero, which is GitHub's highest
	Hooks       []Hook // told of what happens
	// HookTransport carries the webhooks; nil: one of its own.
	HookTransport http.RoundTripper
	Reviewed      []string // environments a job waits for until Approve
	// RunnerVersion and RunnerReleased are of the newest release of the runner's software. When zero, it is a version that
	// was published five days before New.
	RunnerVersion  string
	RunnerReleased time.Time
	// Observe is called for every Event, in order, one at a time. It must not block for long; it may call the Server.
	Observe func(Event)

	Poll        time.Duration // how long an empty long poll lasts; 50 s when zero. Runners give up after 100 s
	Lease       time.Duration // a job whose runner has not renewed it for this long has failed; 10 min when zero. Runners renew every 60 s
	QueueToken  time.Duration // life of a message queue token, after which a session must be refreshed; 1 h when zero
	Unserved    time.Duration // how long a job is queued, with no scale set that has its labels, until JobUnserved says so; 10 s when zero
	SessionIdle time.Duration // a scale set session without a poll for this long gives way to a new one; 1 min when zero
	// Acquire makes the coordinator acquire each job (JobAvailable, then acquirejobs), as GitHub Enterprise Server does.
	// Otherwise jobs are assigned without asking, as on github.com.
	Acquire bool
	// Keys is how many RSA keys, of 1,024 bits, the runners share, which makes thousands of them cheap: for tests. When zero,
	// each has its own, of 2,048.
	Keys int
}

// App is the GitHub App whose credentials the coordinator is configured with.
type App struct {
	ID             int64
	ClientID       string // as good an issuer as the ID
	InstallationID int64
	PrivateKeyPEM  flint.Secret // PKCS #1
}

// Server is the simulated GitHub. Its methods may be called from any goroutine.
type Server struct {
	cfg    Config
	app    App
	appKey *rsa.PublicKey
	signer []byte // of the admin tokens, which are JWTs because clients read their expiry
	creds  *credentials
	hub    *hub
	keys   keys
	feeds  feeds
	policy *policy
	rates  *rates
}

// adminTokenLife is that of the token runner-registration hands out; github.com's lives about 17 minutes.
const adminTokenLife = 17 * time.Minute

// New makes a simulated GitHub with one App installed. Nothing listens yet: serve its Handler.
func New(cfg Config) (*Server, error) {
	if err := cfg.complete(); err != nil {
		return nil, err
	}
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		return nil, fmt.Errorf("make the App's key: %w", err)
	}
	block := pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(key)})
	s := &Server{
		cfg:    cfg,
		app:    App{ID: appID, ClientID: "Iv23liSimulated", InstallationID: installationID, PrivateKeyPEM: flint.Secret(block)},
		appKey: &key.PublicKey,
		signer: randomBytes(32),
		creds:  newCredentials(),
		hub:    newHub(cfg),
		keys:   keys{reuse: cfg.Keys},
		policy: newPolicy(cfg),
		rates:  newRates(cfg.RateLimit),
	}
	for _, h := range cfg.Hooks {
		if _, err := s.AddHook(h); err != nil {
			s.Close()
			return nil, err
		}
	}
	return s, nil
}

func (c *Config) complete() error {
	u, err := url.Parse(c.URL)
	if err == nil && (u.Host == "" || strings.Trim(u.Path, "/") != "" || (u.Scheme != "http" && u.Scheme != "https")) {
		err = errors.New("want http://host:port")
	}
	if err != nil {
		return fmt.Errorf("read base URL %q: %w", c.URL, err)
	}
	c.URL = strings.TrimRight(c.URL, "/")
	if c.Repo == "" && len(c.Repos) > 0 {
		c.Repo = c.Repos[0].Name
	}
	if c.Owner == "" || c.Repo == "" {
		return errors.New("make simulated GitHub: owner and repository are required")
	}
	if !slices.ContainsFunc(c.Repos, func(r Repository) bool { return strings.EqualFold(r.Name, c.Repo) }) {
		c.Repos = append([]Repository{{Name: c.Repo}}, c.Repos...)
	}
	if c.RateLimit <= 0 {
		c.RateLimit = 15_000
	}
	if c.RunnerVersion == "" {
		c.RunnerVersion = "2.335.1"
	}
	if c.RunnerReleased.IsZero() {
		c.RunnerReleased = time.Now().Add(-5 * 24 * time.Hour)
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	for _, d := range []struct {
		v   *time.Duration
		def time.Duration
	}{
		{&c.Poll, 50 * time.Second},
		{&c.Lease, 10 * time.Minute},
		{&c.QueueToken, time.Hour},
		{&c.SessionIdle, time.Minute},
		{&c.Unserved, 10 * time.Second},
	} {
		if *d.v <= 0 {
			*d.v = d.def
		}
	}
	return nil
}

// App returns what the coordinator's configuration needs to authenticate.
func (s *Server) App() App { return s.app }

// Handler returns the HTTP side. Its server should set ReadHeaderTimeout but neither ReadTimeout nor WriteTimeout,
// which would cut the long polls short.
func (s *Server) Handler() http.Handler {
	mux := http.NewServeMux()
	s.routeREST(mux)
	s.routeScaleSets(mux)
	s.routeOAuth(mux)
	s.routeBroker(mux)
	s.routeRunService(mux)
	s.routeResults(mux)
	mux.HandleFunc("GET /feed", s.serveFeed)
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		s.cfg.Log.Warn("refuse unknown route", "method", r.Method, "path", clip(r.URL.Path, 200))
		writeError(w, errNotFound("no such route"))
	})
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		// Runners join base URLs and paths carelessly and ask for //session.
		r.URL.Path = collapseSlashes(r.URL.Path)
		r.URL.RawPath = ""
		s.cfg.Log.Debug("serve", "method", r.Method, "path", clip(r.URL.Path, 200))
		s.misbehave(mux, w, r)
	})
}

func collapseSlashes(p string) string {
	if !strings.Contains(p, "//") {
		return p
	}
	return "/" + strings.Join(slices.DeleteFunc(strings.Split(p, "/"), func(s string) bool { return s == "" }), "/")
}

// Close ends every long poll and live log, stops every timer, and waits for the webhook that is being sent. Runs that are not
// over stay as they are, and Wait returns an error for them.
func (s *Server) Close() {
	s.hub.close()
	s.feeds.close()
	s.hub.hooks.close()
}

// RunnerInfo is one registration GitHub still has.
type RunnerInfo struct {
	ID       int64
	Name     string
	ScaleSet string // name; empty when it belongs to none
	Labels   []string
	Online   bool // it has a session
	Busy     bool // it has a job
}

// Runners returns the registrations that still exist, in the order they were made. None left means none leaked.
func (s *Server) Runners() []RunnerInfo { return s.hub.runnerInfos() }

// ScaleSetInfo is one scale set as GitHub sees it.
type ScaleSetInfo struct {
	ID       int64
	Name     string
	Labels   []string
	Owner    string // of its session; empty when it has none
	Capacity int    // what its last poll advertised; -1 before the first
	Assigned int    // jobs assigned, those that run included
	Running  int
}

// Inventory is everything the simulated GitHub holds for its clients.
type Inventory struct {
	ScaleSets []ScaleSetInfo
	Runners   []RunnerInfo
	OpenJobs  int // jobs of all runs that are not over
}

// Inventory returns what there is now.
func (s *Server) Inventory() Inventory { return s.hub.inventory() }
