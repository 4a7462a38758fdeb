package app

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net/http/httptest"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"flint"
	"flint/internal/config"
	"flint/internal/githubsim"
	"flint/internal/guest"
	"flint/internal/host"
	"flint/internal/image"
	"flint/internal/vm/vmtest"
)

// coordinator is an App whose VMs are fakes in which the real third-party runner works, and a simulated GitHub.
type coordinator struct {
	*App
	sim     *githubsim.Server
	fake    *vmtest.Fake
	atOnce  atomic.Int64 // runners now
	highest atomic.Int64
	observe func(githubsim.Event) // may be nil; set before anything is submitted
	mu      sync.Mutex
	results []flint.Result
}

// newCoordinator makes one; change may alter its configuration, webhooks included.
func newCoordinator(t testing.TB, maxRunners int, change ...func(*config.Config)) *coordinator {
	t.Helper()
	runner := os.Getenv("FLINT_TEST_ACT_RUNNER")
	if runner == "" {
		t.Skip("needs github-act-runner: FLINT_TEST_ACT_RUNNER names none")
	}
	// The drive of the runner software, as the demo has it.
	start := filepath.Join(t.TempDir(), "start")
	script, err := os.ReadFile("../../images/demo-runner/start")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(start, script, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(runner, filepath.Join(filepath.Dir(start), "github-act-runner")); err != nil {
		t.Fatal(err)
	}
	c := newRig(t, maxRunners, change...)
	c.fake.Exec = func(ctx context.Context, _ guest.Command, stdin io.Reader, stdout, _ io.Writer) guest.Exit {
		n := c.atOnce.Add(1)
		defer c.atOnce.Add(-1)
		for h := c.highest.Load(); n > h && !c.highest.CompareAndSwap(h, n); h = c.highest.Load() {
		}
		cmd := exec.CommandContext(ctx, start)
		cmd.Dir, cmd.Stdin = t.TempDir(), stdin
		cmd.Stdout, cmd.Stderr = stdout, stdout
		if err := cmd.Run(); err != nil {
			return guest.Exit{Code: 1, Err: err.Error()}
		}
		return guest.Exit{}
	}
	return c
}

// newRig makes one whose guests do nothing yet.
func newRig(t testing.TB, maxRunners int, change ...func(*config.Config)) *coordinator {
	t.Helper()
	c := &coordinator{fake: &vmtest.Fake{}}
	front := httptest.NewUnstartedServer(nil)
	sim, err := githubsim.New(githubsim.Config{
		URL: "http://" + front.Listener.Addr().String(), Owner: "acme", Repo: "hello",
		Observe: func(e githubsim.Event) {
			if c.observe != nil {
				c.observe(e)
			}
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	front.Config.Handler = sim.Handler()
	front.Start()
	t.Cleanup(front.Close)
	t.Cleanup(sim.Close)
	c.sim = sim
	c.App = fakeApp(t, c, front.URL, maxRunners, change...)
	return c
}

const hookSecret = "a secret of the test"

// littleFree lets tests run where the disk is almost full.
var littleFree = config.Free{Bytes: flint.MiB}

func fakeApp(t testing.TB, c *coordinator, url string, maxRunners int, change ...func(*config.Config)) *App {
	t.Helper()
	dir := t.TempDir()
	cfg := config.Default()
	cfg.StateDir = dir
	cfg.Network.IPv4 = netip.MustParsePrefix("10.99.0.0/24")
	cfg.GitHub.URL, cfg.GitHub.Repository = url, "acme/hello"
	cfg.GitHub.AppID, cfg.GitHub.PrivateKey = c.sim.App().ID, c.sim.App().PrivateKeyPEM
	cfg.Host.CPUs, cfg.Host.Memory, cfg.Host.MinFree = 64, 64*flint.GiB, littleFree
	shape := config.Shape{CPUs: 1, Memory: 256 * flint.MiB, Disk: 64 * flint.MiB}
	cfg.Pools = []config.Pool{{Name: "flint", Image: "unused", Max: maxRunners, VM: shape}}
	for _, f := range change {
		f(&cfg)
	}
	if err := cfg.Complete(); err != nil {
		t.Fatal(err)
	}
	store, err := image.Open(filepath.Join(dir, "images"), slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	log := slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelInfo}))
	return &App{
		served: make(chan struct{}),
		cfg:    cfg, log: log, dir: filepath.Join(dir, "serve"), store: store, driver: c.fake,
		attach: func(context.Context, string) (host.Port, error) {
			return host.Port{Close: func(context.Context) error { return nil }}, nil
		},
		supply: map[string]host.Supply{"flint": {
			Shape: flint.Shape(shape), Kernel: file, Initrd: file, Modules: file, Base: file, Runner: file,
		}},
		opt: Options{Log: log, Result: func(r flint.Result, _ error) {
			c.mu.Lock()
			defer c.mu.Unlock()
			c.results = append(c.results, r)
		}},
	}
}

// serve runs the coordinator while body does, and returns when it has stopped.
func (c *coordinator) serve(t testing.TB, body func()) {
	t.Helper()
	ctx, stop := context.WithCancel(t.Context())
	if err := c.Connect(ctx); err != nil {
		t.Fatal(err)
	}
	if addr := c.WebhookAddr(); addr != nil {
		if _, err := c.sim.AddHook(githubsim.Hook{URL: "http://" + addr.String() + c.cfg.Webhook.Path, Secret: hookSecret}); err != nil {
			t.Fatal(err)
		}
	}
	served := make(chan error, 1)
	go func() { served <- c.Serve(ctx) }()
	body()
	stop()
	if err := <-served; err != nil {
		t.Errorf("serve: %v", err)
	}
}

func (c *coordinator) submit(t testing.TB, src string) *githubsim.Run {
	t.Helper()
	wf, err := githubsim.ParseWorkflow("ci.yml", []byte(src))
	if err != nil {
		t.Fatal(err)
	}
	run, err := c.sim.Submit(wf, githubsim.Trigger{})
	if err != nil {
		t.Fatal(err)
	}
	return run
}

// gone waits until every runner is gone and checks that nothing of any is left.
func (c *coordinator) gone(t testing.TB) {
	t.Helper()
	if left := c.sim.Inventory(); len(left.Runners) != 0 || left.OpenJobs != 0 {
		t.Errorf("left at GitHub: %+v", left)
	}
	if n := c.fake.Running(); n != 0 {
		t.Errorf("%d VMs left", n)
	}
	if entries, err := os.ReadDir(filepath.Join(c.dir, "runners")); err != nil || len(entries) != 0 {
		t.Errorf("records left: %v, %v", entries, err)
	}
	for _, s := range c.sim.Inventory().ScaleSets {
		if s.Owner != "" {
			t.Errorf("session of %s left", s.Name)
		}
	}
}

func TestTenJobsTwoAtATime(t *testing.T) {
	c := newCoordinator(t, 2)
	var jobs strings.Builder
	for n := range 10 {
		fmt.Fprintf(&jobs, "  job%d:\n    runs-on: flint\n    steps:\n      - run: echo hello from %d\n", n, n)
	}
	run := c.submit(t, "on: push\njobs:\n"+jobs.String())
	c.serve(t, func() {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
		defer cancel()
		if conclusion, err := run.Wait(ctx); err != nil || conclusion != githubsim.Success {
			t.Errorf("the run ended as %q, %v", conclusion, err)
		}
		// Who stops now ends the last runner before it has heard that.
		eventually(t, "all ten jobs are in the results of the runners", func() bool { return len(c.succeeded()) == 10 })
	})
	c.gone(t)
	if n := c.highest.Load(); n != 2 {
		t.Errorf("%d runners at the same time, want 2", n)
	}
}

// succeeded are the jobs of which the results of the runners say so.
func (c *coordinator) succeeded() map[string]bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	jobs := map[string]bool{}
	for _, r := range c.results {
		if r.Runner.Job != nil && r.Conclusion == "succeeded" {
			jobs[r.Runner.Job.Name] = true
		}
	}
	return jobs
}

func TestServeStoppedInTheMiddleLeavesNothing(t *testing.T) {
	c := newCoordinator(t, 2)
	run := c.submit(t, "on: push\njobs:\n  a:\n    runs-on: flint\n    steps:\n      - run: sleep 300\n  b:\n    runs-on: flint\n    steps:\n      - run: sleep 300\n")
	c.serve(t, func() {
		tick := time.NewTicker(20 * time.Millisecond)
		defer tick.Stop()
		deadline := time.After(5 * time.Minute)
		for c.atOnce.Load() < 2 {
			select {
			case <-tick.C:
			case <-deadline:
				t.Error("the jobs did not start")
				return
			}
		}
		run.ForceCancel() // else GitHub would keep the registrations of lost runners, and so their records
	})
	c.gone(t)
}

func byWebhooks(cfg *config.Config) {
	cfg.GitHub.Mode, cfg.GitHub.WebhookSecret = config.Webhooks, hookSecret
	cfg.Webhook.Listen, cfg.Webhook.Path = "127.0.0.1:0", "/from-github"
}

func TestJobsByWebhooks(t *testing.T) {
	c := newCoordinator(t, 2, byWebhooks)
	const job = "  job%d:\n    runs-on: %s\n    steps:\n      - run: echo hello\n"
	var run, before *githubsim.Run
	// This one is queued before anybody listens: no webhook tells of it.
	before = c.submit(t, "on: push\njobs:\n"+fmt.Sprintf(job, 0, "self-hosted"))
	c.serve(t, func() {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
		defer cancel()
		run = c.submit(t, "on: push\njobs:\n"+fmt.Sprintf(job, 1, "self-hosted")+fmt.Sprintf(job, 2, "flint")+fmt.Sprintf(job, 3, "[self-hosted, linux, flint]"))
		for _, r := range []*githubsim.Run{before, run} {
			if conclusion, err := r.Wait(ctx); err != nil || conclusion != githubsim.Success {
				t.Errorf("the run ended as %q, %v", conclusion, err)
			}
		}
	})
	c.gone(t)
	if n := len(c.results); n < 4 {
		t.Errorf("%d runners ended, want one for each of 4 jobs", n)
	}
}

func TestRunnersThatRegisterThemselves(t *testing.T) {
	c := newCoordinator(t, 1, byWebhooks, func(cfg *config.Config) { cfg.GitHub.Registration = "token" })
	run := c.submit(t, "on: push\njobs:\n  a:\n    runs-on: [self-hosted, flint]\n    steps:\n      - run: echo hello\n")
	c.serve(t, func() {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
		defer cancel()
		if conclusion, err := run.Wait(ctx); err != nil || conclusion != githubsim.Success {
			t.Errorf("the run ended as %q, %v", conclusion, err)
		}
	})
	c.gone(t)
}

func TestWhyJobsWait(t *testing.T) {
	c := newCoordinator(t, 1, byWebhooks)
	runs := map[string]*githubsim.Run{}
	submit := func(labels string) { // names the job by its labels
		runs[labels] = c.submit(t, "on: push\njobs:\n  j:\n    name: "+labels+"\n    runs-on: ["+labels+"]\n    steps:\n      - run: sleep 300\n")
	}
	submit("flint")
	c.serve(t, func() {
		wait(t, "a job runs", func() bool {
			runners := c.sim.Inventory().Runners
			return len(runners) == 1 && runners[0].Busy
		})
		submit("linux")
		submit("gpu")
		// Explain needs no person to know ids: everything that waits is listed.
		wait(t, "both waits are explained", func() bool {
			all, err := c.Explain(t.Context(), "")
			if err != nil {
				t.Fatal(err)
			}
			return len(all) == 2 && all[0].Pool == "flint" && all[0].Reason.Code == "pool.max" &&
				all[1].Job != nil && all[1].Job.Name == "gpu" && all[1].Reason.Code == "job.unmatched"
		})
		for labels, want := range map[string]string{"flint": "explain.running", "linux": "pool.max", "gpu": "job.unmatched"} {
			got, err := c.Explain(t.Context(), fmt.Sprintf("acme/hello %d", runs[labels].ID()))
			if err != nil || len(got) != 1 || got[0].Reason.Code != want {
				t.Errorf("runs-on %s: %+v, %v; want %s", labels, got, err, want)
			}
		}
		for _, run := range runs {
			run.ForceCancel()
		}
	})
	c.gone(t)
}

// wait waits until cond holds.
func wait(t *testing.T, what string, cond func() bool) {
	t.Helper()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	deadline := time.After(5 * time.Minute)
	for !cond() {
		select {
		case <-tick.C:
		case <-deadline:
			t.Errorf("in vain: %s", what)
			return
		}
	}
}
