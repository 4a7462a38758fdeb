package main

import (
	"bytes"
	"context"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"flint"
	"flint/internal/githubsim"
	"flint/internal/regular"
)

func newDev() *cobra.Command {
	c := &cobra.Command{Use: "dev", Short: "What helps to develop against flint"}
	c.AddCommand(newDevGitHub())
	return c
}

type devFlags struct {
	listen, url, org, repo, publicRepo, keyFile, webhook, secretFile, scenario string
	seed                                                                       uint64
	lease                                                                      time.Duration
}

const devListen = "127.0.0.1:8080"

func newDevGitHub() *cobra.Command {
	var f devFlags
	c := &cobra.Command{
		Use: "github", Short: "Serve a simulated GitHub, so that something else can be tested against it", Args: noArgs,
		Long: "Github serves the simulated GitHub that flint is tested with, until Ctrl-C: App authentication, the REST API of runners\n" +
			"and jobs, scale sets, registrations, webhooks and the runner's protocol. It prints what a client needs and then a line\n" +
			"for everything that happens. Whoever reaches its address can queue jobs. A scenario makes jobs come and GitHub misbehave.",
		Example: "  flint dev github --scenario bad-day.txt\n  flint dev github submit .github/workflows/ci.yml",
	}
	fl := c.Flags()
	fl.StringVar(&f.listen, "listen", devListen, "address to serve at")
	fl.StringVar(&f.url, "url", "", "address clients and runners reach it by (default http:// and the one it serves at)")
	fl.StringVar(&f.org, "org", "acme", "the organisation")
	fl.StringVar(&f.repo, "repo", "hello", "its private repository")
	fl.StringVar(&f.publicRepo, "public-repo", "", "a public repository beside it")
	fl.StringVar(&f.keyFile, "key-file", "flint-dev-github.pem", "where the App's private key is put while it serves")
	fl.StringVar(&f.webhook, "webhook", "", "where webhooks are posted")
	fl.StringVar(&f.secretFile, "webhook-secret-file", "", "file that holds the webhooks' secret")
	fl.StringVar(&f.scenario, "scenario", "", "file that says what happens, and when")
	fl.DurationVar(&f.lease, "lease", 10*time.Minute, "a job whose runner has not been heard for this long has failed; GitHub waits about 10m")
	fl.Uint64Var(&f.seed, "seed", 0, "decides when misbehaviour strikes (overrides the scenario's)")
	c.RunE = func(c *cobra.Command, _ []string) error {
		err := f.run(c)
		if c.Context().Err() != nil && stopped(c.Context(), err) == nil {
			return exitError(exitInterrupted)
		}
		return err
	}
	c.AddCommand(newDevSubmit())
	return c
}

// run serves until ctx is over.
func (f *devFlags) run(c *cobra.Command) (err error) {
	ctx, out := c.Context(), c.OutOrStdout()
	cfg, scenario, err := f.config()
	if err != nil {
		return err
	}
	log, err := logger(c, c.ErrOrStderr(), "error", true)
	if err != nil {
		return err
	}
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "tcp", f.listen)
	if err != nil {
		return &flint.Fault{
			Code: "dev.listen", What: "serve a simulated GitHub at " + f.listen, Kind: flint.ErrConflict, Err: err,
			Fix: "give a free address of this machine with --listen",
		}
	}
	defer func() { _ = l.Close() }()
	kept := &devLog{}
	show := &devEvents{out: io.MultiWriter(out, kept), style: styleOf(out)}
	if cfg.URL = f.url; cfg.URL == "" {
		cfg.URL = "http://" + l.Addr().String()
	}
	cfg.Log, cfg.Observe = log, show.event
	sim, err := githubsim.New(cfg)
	if err != nil {
		return err
	}
	defer sim.Close()
	key, err := writeKey(f.keyFile, sim.App().PrivateKeyPEM)
	if err != nil {
		return err
	}
	defer func() { _ = os.Remove(key) }()
	scenario.Did = func(what string) { show.say(time.Now(), yellow, "scenario", what) }
	show.introduce(cfg, sim.App(), key)

	server := &http.Server{Handler: devHandler(sim, kept), ReadHeaderTimeout: 10 * time.Second}
	tasks, tctx := errgroup.WithContext(ctx)
	tasks.Go(func() error { return ignoreClosed(server.Serve(l)) })
	tasks.Go(func() error {
		<-tctx.Done()
		sim.Close()
		return server.Close()
	})
	tasks.Go(func() error {
		_, err := sim.Play(tctx, scenario)
		if err == nil && f.scenario != "" {
			show.say(time.Now(), dim, "scenario", "over; what it switched on stays on")
		}
		return err
	})
	err = tasks.Wait()
	show.end(sim)
	return err
}

// config reads the files the flags name.
func (f *devFlags) config() (cfg githubsim.Config, scenario githubsim.Scenario, err error) {
	cfg = githubsim.Config{Owner: f.org, Repo: f.repo, Lease: f.lease}
	if f.publicRepo != "" {
		cfg.Repos = append(cfg.Repos, githubsim.Repository{Name: f.publicRepo, Public: true})
	}
	if f.scenario != "" {
		src, err := readNamed(f.scenario, "the scenario", "--scenario")
		if err != nil {
			return cfg, scenario, err
		}
		if scenario, err = githubsim.ParseScenario(f.scenario, src); err != nil {
			return cfg, scenario, err
		}
	}
	if f.seed != 0 {
		scenario.Seed = f.seed
	}
	if f.webhook != "" {
		hook := githubsim.Hook{URL: f.webhook}
		if f.secretFile != "" {
			secret, err := readNamed(f.secretFile, "the webhooks' secret", "--webhook-secret-file")
			if err != nil {
				return cfg, scenario, err
			}
			hook.Secret = flint.Secret(bytes.TrimSpace(secret))
		}
		cfg.Hooks = append(cfg.Hooks, hook)
	}
	return cfg, scenario, nil
}

func readNamed(path, what, flag string) ([]byte, error) {
	b, err := regular.Read(path, maxGiven)
	if err != nil {
		return nil, &flint.Fault{
			Code: "dev.file", What: "read " + what + ", " + path, Kind: flint.ErrNotFound, Err: err, Fix: "name a file that can be read with " + flag,
		}
	}
	return b, nil
}

// writeKey puts the key where only its owner can read it, and returns the absolute path. What is there is replaced only if it
// is a key as well.
func writeKey(path string, key flint.Secret) (string, error) {
	fault := func(err error) error {
		return &flint.Fault{
			Code: "dev.key", What: "write the App's private key " + path, Kind: flint.ErrConflict, Err: err, Fix: "give a path of a new file with --key-file",
		}
	}
	path, err := filepath.Abs(path)
	if err != nil {
		return "", fault(err)
	}
	switch old, err := regular.Read(path, maxGiven); {
	case errors.Is(err, os.ErrNotExist):
	case err != nil:
		return "", fault(err)
	default:
		if block, _ := pem.Decode(old); block == nil {
			return "", fault(errors.New("it exists and is no key"))
		}
		if err := os.Remove(path); err != nil {
			return "", fault(err)
		}
	}
	file, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return "", fault(err)
	}
	_, err = file.WriteString(string(key))
	if err = errors.Join(err, file.Close()); err != nil {
		return "", fault(errors.Join(err, os.Remove(path)))
	}
	return path, nil
}

// maxGiven bounds a file that somebody gives, such as a workflow, in bytes.
const maxGiven = 1 << 20

// devHandler is the simulated GitHub and, beside it, what lets runs be started and what happened be read from afar.
func devHandler(sim *githubsim.Server, log *devLog) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("/", sim.Handler())
	mux.Handle("GET /sim/log", log)
	mux.HandleFunc("POST /sim/runs", func(w http.ResponseWriter, r *http.Request) {
		// No browser sends this type to another site without asking first.
		if r.Header.Get("Content-Type") != workflowType {
			http.Error(w, "want a workflow file, of type "+workflowType, http.StatusUnsupportedMediaType)
			return
		}
		src, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxGiven))
		if err != nil {
			http.Error(w, "read workflow: "+err.Error(), http.StatusRequestEntityTooLarge)
			return
		}
		name := filepath.Base(r.URL.Query().Get("name"))
		wf, err := githubsim.ParseWorkflow(".github/workflows/"+name, src)
		var run *githubsim.Run
		if err == nil {
			run, err = sim.Submit(wf, githubsim.Trigger{})
		}
		if err != nil {
			http.Error(w, err.Error(), http.StatusUnprocessableEntity)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(http.StatusCreated)
		_ = json.NewEncoder(w).Encode(map[string]any{"run": run.ID()}) // a client that has gone is not our error
	})
	return mux
}

const workflowType = "application/yaml"

func newDevSubmit() *cobra.Command {
	c := &cobra.Command{
		Use: "submit FILE", Short: "Queue a run of a workflow file at a flint dev github",
		Args: func(c *cobra.Command, args []string) error {
			if len(args) != 1 {
				return usage(c, errors.New("want one workflow file"))
			}
			return nil
		},
	}
	address := c.Flags().String("url", "http://"+devListen, "address of the simulated GitHub")
	c.RunE = func(c *cobra.Command, args []string) error {
		src, err := readNamed(args[0], "the workflow", "flint dev github submit FILE")
		if err != nil {
			return err
		}
		id, err := submitWorkflow(c.Context(), strings.TrimRight(*address, "/"), filepath.Base(args[0]), src)
		if err != nil {
			return err
		}
		fmt.Fprintf(c.OutOrStdout(), "run %d\n", id)
		return nil
	}
	return c
}

func submitWorkflow(ctx context.Context, address, name string, src []byte) (run int64, err error) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	fault := func(err error) error {
		return &flint.Fault{
			Code: "dev.submit", What: "submit the workflow to " + address, Kind: flint.ErrUsage, Err: err,
			Fix: "name the address of a running flint dev github with --url, and mend the workflow if it says so",
		}
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, address+"/sim/runs?name="+name, bytes.NewReader(src))
	if err != nil {
		return 0, fault(err)
	}
	req.Header.Set("Content-Type", workflowType)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, fault(err)
	}
	defer func() { _ = resp.Body.Close() }()
	answer, err := io.ReadAll(io.LimitReader(resp.Body, maxGiven))
	if err != nil {
		return 0, fault(err)
	}
	if resp.StatusCode != http.StatusCreated {
		return 0, fault(fmt.Errorf("%s: %s", resp.Status, printable(strings.TrimSpace(string(answer)))))
	}
	var out struct {
		Run int64 `json:"run"`
	}
	if err := json.Unmarshal(answer, &out); err != nil {
		return 0, fault(fmt.Errorf("decode answer: %w", err))
	}
	return out.Run, nil
}
