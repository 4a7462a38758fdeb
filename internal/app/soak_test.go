package app

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"flint"
	"flint/internal/config"
	"flint/internal/githubsim"
	"flint/internal/githubsim/simrunner"
	"flint/internal/guest"
	"flint/internal/host"
	"flint/internal/image"
	"flint/internal/vm/vmtest"
)

// The soak: a coordinator, restarted without end and killed now and then, against a GitHub that misbehaves in every way it
// can. It lives in a bubble of testing/synctest, so that hours pass in seconds and every pause is the product's own.

// FLINT_SOAK_SEED repeats the choices of a run (what the Go scheduler and random names do differs still), FLINT_SOAK_JOBS and
// FLINT_SOAK_POOLS make it larger, and FLINT_SOAK_LOG names a file for the log.
func TestSoak(t *testing.T) {
	number := func(name string, otherwise uint64) uint64 {
		text, ok := os.LookupEnv(name)
		if !ok {
			return otherwise
		}
		n, err := strconv.ParseUint(text, 10, 64)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		return n
	}
	seed := number("FLINT_SOAK_SEED", rand.Uint64()%1_000_000)
	jobs, pools := int(number("FLINT_SOAK_JOBS", 150)), int(number("FLINT_SOAK_POOLS", 4))
	out := io.Discard
	if name := os.Getenv("FLINT_SOAK_LOG"); name != "" {
		f, err := os.Create(name)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		w := bufio.NewWriter(f)
		defer w.Flush()
		out = w
	}
	t.Logf("repeat with FLINT_SOAK_SEED=%d FLINT_SOAK_JOBS=%d FLINT_SOAK_POOLS=%d", seed, jobs, pools)
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		s := newSoak(t, seed, jobs, pools, dir, slog.New(slog.NewTextHandler(out, &slog.HandlerOptions{Level: slog.LevelDebug})))
		defer s.end()
		s.run()
		s.report(t.Output())
	})
}

// dice are random choices, safe for all goroutines of the bubble.
type dice struct {
	mu sync.Mutex
	r  *rand.Rand
}

func (d *dice) chance(p float64) bool { return d.float() < p }

func (d *dice) float() float64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.r.Float64()
}

func (d *dice) n(least, most int) int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return least + d.r.IntN(most-least+1)
}

func (d *dice) between(least, most time.Duration) time.Duration {
	return least + time.Duration(d.float()*float64(most-least))
}

const (
	gitHubAddress = "127.0.0.1:80"
	hookAddress   = "127.0.0.1:8080"
	soakToken     = "ghp_soak"
)

// soak is the world of one run.
type soak struct {
	t         *testing.T
	dice      *dice
	seed      uint64
	jobs      int
	log       *slog.Logger
	dir       string
	net       *memory
	sim       *githubsim.Server
	server    *http.Server
	fake      *vmtest.Fake
	guests    *line // of all VMs
	hooks     *line // of the simulated GitHub
	cfg       config.Config
	supply    map[string]host.Supply
	began     time.Time
	workflows map[string]*githubsim.Workflow

	mu     sync.Mutex
	app    *App // the one that runs; nil: none
	runs   []*githubsim.Run
	queued map[string]string // names, by job
	ended  map[string][]githubsim.Conclusion
	worked map[string]int      // how often a step was begun, by step
	told   map[string][]string // conclusions in the results of runners, by job
	counts map[string]int
}

// newSoak makes the world: GitHub, its network, and what VMs do.
func newSoak(t *testing.T, seed uint64, jobs, pools int, dir string, log *slog.Logger) *soak {
	t.Helper()
	s := &soak{
		t: t, seed: seed, jobs: jobs, log: log, dir: dir, dice: &dice{r: rand.New(rand.NewPCG(seed, 1))}, net: newMemory(), began: time.Now(),
		queued: map[string]string{}, ended: map[string][]githubsim.Conclusion{}, worked: map[string]int{}, told: map[string][]string{},
		counts: map[string]int{}, workflows: map[string]*githubsim.Workflow{},
	}
	s.guests, s.hooks = s.net.client(), s.net.client()
	s.fake = &vmtest.Fake{Exec: s.guest, BootDelay: 700 * time.Millisecond}
	var err error
	s.sim, err = githubsim.New(githubsim.Config{
		URL: "http://" + gitHubAddress, Owner: "acme", Repos: []githubsim.Repository{{Name: "hello"}, {Name: "widget"}, {Name: "depot"}},
		Token: soakToken, Keys: 8, Acquire: seed%2 == 0, Observe: s.observe, HookTransport: counting{s, s.hooks}, Log: log.With("who", "github"),
		Poll: 20 * time.Second, Lease: s.dice.between(90*time.Second, 5*time.Minute), QueueToken: s.dice.between(time.Minute, 10*time.Minute),
		SessionIdle: s.dice.between(10*time.Second, time.Minute),
	})
	if err != nil {
		t.Fatal(err)
	}
	l, err := s.net.listen(t.Context(), "tcp", gitHubAddress)
	if err != nil {
		t.Fatal(err)
	}
	github := s.sim.Handler()
	s.server = &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodPost && strings.HasSuffix(r.URL.Path, "/attempts") {
			s.add("webhooks asked for again", 1)
		}
		github.ServeHTTP(w, r)
	}), ReadHeaderTimeout: 10 * time.Second, ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelDebug)}
	go func() { _ = s.server.Serve(l) }() // until end; the bubble waits for it
	s.configure(pools)
	return s
}

// end takes the world down. The bubble then waits for whoever still runs, and fails when somebody does for ever.
func (s *soak) end() {
	s.sim.Close()
	_ = s.server.Close()
	s.guests.CloseIdleConnections()
	s.hooks.CloseIdleConnections()
}

// configure makes four accounts (organisation and repository, by scale sets and by webhooks) and shares the pools out.
func (s *soak) configure(pools int) {
	c := config.Default()
	c.StateDir = filepath.Join(s.dir, "state")
	c.Network.IPv4 = netip.MustParsePrefix("10.99.0.0/24")
	c.Webhook.Listen = hookAddress
	c.Host.Name, c.Host.CPUs, c.Host.Memory, c.Host.MinFree = "soak", 48, 64*flint.GiB, littleFree
	account := func(name, organization, repository, mode string) config.GitHub {
		g := config.NewGitHub()
		g.Name, g.URL, g.Organization, g.Repository, g.Mode = name, "http://"+gitHubAddress, organization, repository, mode
		if repository != "" {
			g.Token = soakToken
		} else {
			g.AppID, g.PrivateKey = s.sim.App().ID, s.sim.App().PrivateKeyPEM
		}
		if mode == config.Webhooks {
			scope := repository // that of the App itself is empty
			g.WebhookSecret = flint.Secret("secret of " + name)
			id, err := s.sim.AddHook(githubsim.Hook{URL: "http://" + hookAddress + "/webhook", Secret: g.WebhookSecret, Scope: scope})
			if err != nil {
				s.t.Fatal(err)
			}
			if repository != "" {
				g.WebhookHookID = id
			}
		}
		return g
	}
	c.GitHub = account("", "acme", "", config.ScaleSets)
	c.Accounts = []config.GitHub{
		account("hooks", "acme", "", config.Webhooks), account("widget", "", "acme/widget", config.ScaleSets), account("depot", "", "acme/depot", config.Webhooks),
	}
	file := filepath.Join(s.dir, "file")
	if err := os.WriteFile(file, nil, 0o644); err != nil {
		s.t.Fatal(err)
	}
	shape := config.Shape{CPUs: 1, Memory: 256 * flint.MiB, Disk: 64 * flint.MiB}
	s.supply = map[string]host.Supply{}
	for i := range pools {
		name := fmt.Sprintf("p%02d", i)
		c.Pools = append(c.Pools, config.Pool{
			Name: name, Image: "unused", Max: s.dice.n(3, 10), VM: shape, RerunLost: s.dice.chance(0.5), Account: soakAccounts[i%len(soakAccounts)],
		})
		s.supply[name] = host.Supply{Shape: flint.Shape(shape), Kernel: file, Initrd: file, Modules: file, Base: file, Runner: file}
	}
	if err := c.Complete(); err != nil {
		s.t.Fatal(err)
	}
	s.cfg = c
}

// soakAccounts is which account the next pool is of: those of the organisation have twice as many.
var soakAccounts = [...]string{"", "hooks", "widget", "depot", "", "hooks"}

// guest is what a VM does: it is the runner of the credential it reads, until it is ended.
func (s *soak) guest(ctx context.Context, _ guest.Command, stdin io.Reader, _, _ io.Writer) guest.Exit {
	s.add("VMs that became runners", 1)
	credential, err := bufio.NewReader(stdin).ReadString('\n')
	if err != nil {
		return guest.Exit{Code: 1, Err: err.Error()}
	}
	o := simrunner.Options{Client: &http.Client{Transport: while{ctx, s.guests}}, Quiet: true, Renew: 20 * time.Second, Work: func(ctx context.Context, step simrunner.Step) error {
		s.mu.Lock()
		s.worked[step.ID]++
		s.mu.Unlock()
		return simrunner.Script(ctx, step)
	}}
	if s.dice.chance(0.03) {
		o.Die = simrunner.Point(s.dice.n(int(simrunner.Decoded), int(simrunner.Completed)))
	}
	exit, err := simrunner.Run(ctx, strings.TrimSpace(credential), o)
	s.log.Debug("runner program ended", "who", "guest", "exit", exit, "err", err)
	if errors.Is(err, simrunner.ErrDied) {
		s.add("runner programs that died", 1)
		exit = 137
	}
	return guest.Exit{Code: exit}
}

// counting is the way of webhooks.
type counting struct {
	s *soak
	http.RoundTripper
}

// RoundTrip implements http.RoundTripper.
func (c counting) RoundTrip(r *http.Request) (*http.Response, error) {
	c.s.add("webhooks sent", 1)
	resp, err := c.RoundTripper.RoundTrip(r)
	switch {
	case err != nil:
		c.s.add("webhooks nobody answered", 1)
	case resp.StatusCode/100 == 2:
		c.s.add("webhooks accepted", 1)
	default:
		c.s.add("webhooks refused", 1)
	}
	return resp, err
}

// observe sees what happens at GitHub.
func (s *soak) observe(e githubsim.Event) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch e.Kind {
	case githubsim.JobQueued:
		s.queued[e.JobID] = e.Job
	case githubsim.JobCompleted:
		s.ended[e.JobID] = append(s.ended[e.JobID], e.Conclusion)
	}
}

// result is told how each runner ended.
func (s *soak) result(r flint.Result, _ error) { // its reason says it
	s.mu.Lock()
	defer s.mu.Unlock()
	s.counts["runners"]++
	s.counts["runners, "+r.Reason.Code]++
	if r.Runner.Job != nil && r.Conclusion != "" {
		s.told[r.Runner.Job.ID] = append(s.told[r.Runner.Job.ID], r.Conclusion)
	}
}

func (s *soak) add(what string, n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.counts[what] += n
}

// longest keeps how long the longest of some things took.
func (s *soak) longest(what string, began time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.counts[what] = max(s.counts[what], int(time.Since(began).Seconds()))
}

// instance is one life of the coordinator.
type instance struct {
	*App
	line *line
	stop context.CancelFunc
	over chan error
}

// start is the start of the program, on the state directory as it is.
func (s *soak) start() *instance {
	s.t.Helper()
	store, err := image.Open(filepath.Join(s.cfg.StateDir, "images"), s.log)
	if err != nil {
		s.t.Fatal(err)
	}
	i := &instance{line: s.net.client(), over: make(chan error, 1)}
	i.App = &App{
		cfg: s.cfg, log: s.log, dir: filepath.Join(s.cfg.StateDir, "serve"), store: store, driver: s.fake, supply: s.supply, served: make(chan struct{}),
		opt: Options{Log: s.log, Result: s.result}, transport: i.line, listen: s.net.listen,
		attach: func(context.Context, string) (host.Port, error) {
			return host.Port{Close: func(context.Context) error { return nil }}, nil
		},
	}
	var ctx context.Context
	ctx, i.stop = context.WithCancel(s.t.Context())
	began := time.Now()
	if err := i.Connect(ctx); err != nil {
		s.t.Fatal(err)
	}
	s.longest("longest start, seconds", began)
	go func() { i.over <- i.Serve(ctx) }()
	s.mu.Lock()
	s.app = i.App
	s.mu.Unlock()
	s.add("starts", 1)
	return i
}

// finish ends an instance the orderly way.
func (s *soak) finish(i *instance) {
	s.t.Helper()
	s.mu.Lock()
	s.app = nil
	s.mu.Unlock()
	began := time.Now()
	i.stop()
	if err := <-i.over; err != nil {
		s.t.Errorf("serve: %v", err)
	}
	s.longest("longest stop, seconds", began)
	if err := i.Close(context.Background()); err != nil {
		s.t.Errorf("close: %v", err)
	}
	i.line.CloseIdleConnections()
	if n := s.fake.Running(); n != 0 {
		s.t.Errorf("%d VMs outlive their coordinator", n)
	}
	c := i.hooks.Counts()
	s.add("webhooks known already", int(c.Duplicates))
	s.add("webhooks malformed or badly signed", int(c.Malformed+c.BadSignature))
}

// kill ends an instance as a power cut does: nobody outside hears of its end, and what it does after the cut leaves no trace.
func (s *soak) kill(i *instance) {
	s.t.Helper()
	synctest.Wait() // nobody is writing
	i.line.cut()
	s.net.cut(hookAddress)
	saved := filepath.Join(s.dir, "saved")
	if err := copyState(saved, s.cfg.StateDir); err != nil {
		s.t.Fatal(err)
	}
	s.finish(i)
	if err := errors.Join(os.RemoveAll(s.cfg.StateDir), os.Rename(saved, s.cfg.StateDir)); err != nil {
		s.t.Fatal(err)
	}
	s.add("starts after a kill", 1)
}

// copyState copies a state directory, its disks without what is on them.
func copyState(to, from string) error {
	return filepath.WalkDir(from, func(path string, d os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(from, path)
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		if d.IsDir() {
			return os.MkdirAll(filepath.Join(to, rel), info.Mode().Perm())
		}
		var b []byte
		if filepath.Ext(path) != ".ext4" {
			if b, err = os.ReadFile(path); err != nil {
				return err
			}
		}
		return os.WriteFile(filepath.Join(to, rel), b, info.Mode().Perm())
	})
}

// faultLimits are the highest chances of faults that hurt much; the others' is a quarter.
var faultLimits = map[string]float64{
	"DeleteScaleSets": 0.02, "RefuseVersions": 0.02, "ForgetWebhooks": 0.1, "SlowAnswers": 0.1, "ForbidRequests": 0.02, "LimitRequests": 0.05, "RefuseSessions": 0.4,
}

// misbehaviour draws what GitHub does wrong for a while.
func (s *soak) misbehaviour() githubsim.Faults {
	f := githubsim.Faults{Seed: s.seed}
	if s.dice.chance(0.15) {
		return f
	}
	v := reflect.ValueOf(&f).Elem()
	for i := range v.NumField() {
		if !s.dice.chance(0.35) {
			continue
		}
		switch field := v.Field(i); field.Interface().(type) {
		case float64:
			limit, ok := faultLimits[v.Type().Field(i).Name]
			if !ok {
				limit = 0.25
			}
			field.SetFloat(limit * s.dice.float())
		case time.Duration:
			field.Set(reflect.ValueOf(s.dice.between(time.Second, 30*time.Second)))
		}
	}
	f.Outage = s.dice.chance(0.05)
	if f.ReassignAfter > 0 {
		f.ReassignAfter = s.dice.between(30*time.Second, 5*time.Minute)
	}
	if f.RemoveIdleAfter > 0 {
		f.RemoveIdleAfter = s.dice.between(20*time.Second, 5*time.Minute)
	}
	if s.dice.chance(0.3) {
		f.Routes = githubsim.RoutesOfCoordinator | githubsim.RouteRunners
	}
	return f
}
