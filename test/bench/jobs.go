package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"flint"
	"flint/internal/app"
	"flint/internal/config"
	"flint/internal/githubsim"
)

// jobs runs jobs one after the other against the simulated GitHub and prints what flint adds around each: from the moment
// GitHub has it to the decision, and from the ready agent to the registered runner, less the time the simulated GitHub
// itself takes to make the runner's key.
func (b *bench) jobs(ctx context.Context, cfg config.Config) error {
	cfg.Network.Bridge, cfg.Network.IPv4 = "flintbenchj", netip.MustParsePrefix("10.213.80.0/24")
	cfg.Network.IPv6 = netip.MustParsePrefix("fd4f:6c69:6e74:80::/64")
	cfg.Pools = cfg.Pools[:1]
	cfg.Pools[0].Name, cfg.Pools[0].Max = "flint", 2 // so that no job waits for the VM before it to go
	l, err := app.ListenAhead(ctx, netip.AddrPortFrom(cfg.Network.IPv4.Masked().Addr().Next(), 0))
	if err != nil {
		return err
	}
	at := l.Addr().(*net.TCPAddr).AddrPort()
	var mu sync.Mutex
	queued, results := map[string]time.Time{}, map[string]flint.Result{}
	sim, err := githubsim.New(githubsim.Config{URL: "http://" + at.String(), Owner: "acme", Repo: "hello", Observe: func(e githubsim.Event) {
		mu.Lock()
		defer mu.Unlock()
		if e.Kind == githubsim.JobAssigned {
			queued[e.Job] = e.At
		}
	}})
	if err != nil {
		return errors.Join(err, l.Close())
	}
	var minting time.Duration
	server := &http.Server{ReadHeaderTimeout: time.Minute, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		start := time.Now()
		sim.Handler().ServeHTTP(w, r)
		if strings.HasSuffix(r.URL.Path, "/generatejitconfig") {
			mu.Lock()
			minting += time.Since(start)
			mu.Unlock()
		}
	})}
	cfg.GitHub.URL, cfg.GitHub.Repository = "http://"+at.String(), "acme/hello"
	cfg.GitHub.AppID, cfg.GitHub.InstallationID, cfg.GitHub.PrivateKey = sim.App().ID, sim.App().InstallationID, sim.App().PrivateKeyPEM
	if cfg.Runner.Dir, err = app.DemoRunner(ctx, cfg.StateDir, "images/demo-runner", nil); err != nil {
		return errors.Join(err, l.Close())
	}
	a, err := app.New(ctx, cfg, app.Options{
		Log: slog.New(slog.DiscardHandler), Instance: "benchjobs", LocalBase: true, Services: []netip.AddrPort{at},
		Result: func(r flint.Result, _ error) {
			mu.Lock()
			defer mu.Unlock()
			if r.Runner.Job != nil {
				results[r.Runner.Job.Name] = r
			}
		},
	})
	if err != nil {
		return errors.Join(err, l.Close())
	}
	defer a.Close(ctx)
	if err := errors.Join(a.Connect(ctx), a.Prepare(ctx)); err != nil {
		return err
	}
	if err := b.serveJobs(ctx, a, sim, server, l); err != nil {
		return err
	}
	b.reset()
	mu.Lock()
	defer mu.Unlock()
	for name, r := range results {
		b.lap("decide", r.Timeline[flint.Planned].Sub(queued[name]))
		b.lap("register", r.Timeline[flint.Registered].Sub(r.Timeline[flint.Ready])-minting/time.Duration(len(results)))
	}
	fmt.Printf("\n%d jobs one after the other\n", len(results))
	show("GitHub has the job → decision", b.laps["decide"])
	show("agent ready → registered, less GitHub", b.laps["register"])
	return nil
}

// serveJobs runs the coordinator until a workflow of b.runs jobs is over.
func (b *bench) serveJobs(ctx context.Context, a *app.App, sim *githubsim.Server, server *http.Server, l net.Listener) error {
	var src strings.Builder
	src.WriteString("on: push\njobs:\n")
	for n := range b.runs {
		fmt.Fprintf(&src, "  job%d:\n    runs-on: flint\n    steps:\n      - run: echo hello\n", n)
		if n > 0 {
			fmt.Fprintf(&src, "    needs: job%d\n", n-1)
		}
	}
	wf, err := githubsim.ParseWorkflow("bench.yml", []byte(src.String()))
	if err != nil {
		return err
	}
	run, err := sim.Submit(wf, githubsim.Trigger{})
	if err != nil {
		return err
	}
	serve, stop := context.WithCancel(ctx)
	defer stop()
	var tasks errgroup.Group
	tasks.Go(func() error { _ = server.Serve(l); return nil })
	tasks.Go(func() error {
		defer server.Close()
		return a.Serve(serve)
	})
	_, err = run.Wait(ctx)
	stop()
	return errors.Join(err, tasks.Wait())
}
