package githubsim

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/actions/scaleset"
	"github.com/actions/scaleset/listener"
)

// rig is a simulated GitHub that listens on loopback, what its observer saw, and clients of it.
type rig struct {
	*Server
	t    *testing.T
	http *httptest.Server

	mu      sync.Mutex
	events  []Event
	changed chan struct{}
}

func newRig(t *testing.T, cfg Config) *rig {
	t.Helper()
	r := &rig{t: t, changed: make(chan struct{})}
	r.http = httptest.NewUnstartedServer(nil)
	cfg.URL = "http://" + r.http.Listener.Addr().String()
	cfg.Owner, cfg.Repo = "acme", "widget"
	if cfg.Poll == 0 {
		cfg.Poll = 5 * time.Second
	}
	cfg.Log = slog.New(slog.NewTextHandler(testWriter{t}, &slog.HandlerOptions{Level: slog.LevelInfo}))
	cfg.Observe = func(e Event) {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.events = append(r.events, e)
		close(r.changed)
		r.changed = make(chan struct{})
	}
	s, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	r.Server = s
	r.http.Config.Handler = s.Handler()
	r.http.Start()
	t.Cleanup(func() {
		s.Close()
		r.http.Close()
	})
	return r
}

// testWriter is where log lines of a test go.
type testWriter struct{ t *testing.T }

func (w testWriter) Write(p []byte) (int, error) {
	w.t.Log(strings.TrimRight(string(p), "\n"))
	return len(p), nil
}

// until waits for an event that f accepts, those that were included.
func (r *rig) until(f func(Event) bool) Event {
	r.t.Helper()
	deadline := time.After(5 * time.Minute)
	for {
		r.mu.Lock()
		i := slices.IndexFunc(r.events, f)
		changed := r.changed
		var e Event
		if i >= 0 {
			e = r.events[i]
		}
		r.mu.Unlock()
		if i >= 0 {
			return e
		}
		select {
		case <-changed:
		case <-deadline:
			r.t.Fatalf("the event did not come; there were:\n%s", r.dump())
		}
	}
}

func (r *rig) untilKind(k Kind) Event {
	r.t.Helper()
	return r.until(func(e Event) bool { return e.Kind == k })
}

func (r *rig) seen() []Event {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.events)
}

func (r *rig) dump() string {
	var b strings.Builder
	for _, e := range r.seen() {
		fmt.Fprintf(&b, "%-17s %s|%s %s %s %q\n", e.Kind, e.Job, e.Step, e.Runner, e.Conclusion, e.Line)
	}
	return b.String()
}

// lines returns the live log of a job, one line each.
func (r *rig) lines(job string) string {
	var b strings.Builder
	for _, e := range r.seen() {
		if e.Kind == LogLine && e.Job == job {
			b.WriteString(e.Line + "\n")
		}
	}
	return b.String()
}

func (r *rig) client() *scaleset.Client {
	r.t.Helper()
	c, err := scaleset.NewClientWithGitHubApp(scaleset.ClientWithGitHubAppConfig{
		GitHubConfigURL: r.cfg.URL + "/acme",
		GitHubAppAuth: scaleset.GitHubAppAuth{
			ClientID: strconv.FormatInt(r.App().ID, 10), InstallationID: r.App().InstallationID, PrivateKey: string(r.App().PrivateKeyPEM),
		},
	}, scaleset.WithRetryMax(1))
	if err != nil {
		r.t.Fatal(err)
	}
	return c
}

func (r *rig) scaleSet(c *scaleset.Client, name string) *scaleset.RunnerScaleSet {
	r.t.Helper()
	s, err := c.CreateRunnerScaleSet(r.t.Context(), &scaleset.RunnerScaleSet{Name: name, RunnerGroupID: 1})
	if err != nil {
		r.t.Fatal(err)
	}
	return s
}

func mustParse(t *testing.T, src string) *Workflow {
	t.Helper()
	w, err := ParseWorkflow(".github/workflows/ci.yml", []byte(src))
	if err != nil {
		t.Fatal(err)
	}
	return w
}

// waitRun waits for a run and checks how it ended.
func (r *rig) waitRun(run *Run, want Conclusion) {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(r.t.Context(), 5*time.Minute)
	defer cancel()
	got, err := run.Wait(ctx)
	if err != nil || got != want {
		r.t.Fatalf("run ended %q, %v; want %q. Events:\n%s", got, err, want, r.dump())
	}
}

// fleet is a coordinator on the official listener: it starts one runner for every job asked for.
type fleet struct {
	r      *rig
	client *scaleset.Client
	set    *scaleset.RunnerScaleSet
	start  func(ctx context.Context, name, jit string)

	mu        sync.Mutex
	launched  int
	completed int
	results   []string
	peak      int
	wg        sync.WaitGroup
}

// runFleet runs a fleet until the test ends.
func (r *rig) runFleet(label string, maxRunners int, start func(ctx context.Context, name, jit string)) *fleet {
	r.t.Helper()
	f := &fleet{r: r, client: r.client(), start: start}
	f.set = r.scaleSet(f.client, label)
	session, err := r.client().MessageSessionClient(r.t.Context(), f.set.ID, "test")
	if err != nil {
		r.t.Fatal(err)
	}
	l, err := listener.New(session, listener.Config{ScaleSetID: f.set.ID, MaxRunners: maxRunners})
	if err != nil {
		r.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var done sync.WaitGroup
	done.Go(func() {
		if err := l.Run(ctx, f); err != nil && ctx.Err() == nil {
			r.t.Errorf("listener ended: %v", err)
		}
	})
	r.t.Cleanup(func() {
		cancel()
		done.Wait()
		f.wg.Wait()
		if err := session.Close(context.Background()); err != nil {
			r.t.Errorf("close session: %v", err)
		}
	})
	return f
}

func (f *fleet) HandleJobStarted(context.Context, *scaleset.JobStarted) error { return nil }

func (f *fleet) HandleJobCompleted(_ context.Context, j *scaleset.JobCompleted) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if j.RunnerName != "" {
		f.completed++
	}
	f.results = append(f.results, j.Result)
	return nil
}

func (f *fleet) HandleDesiredRunnerCount(ctx context.Context, count int) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for f.launched-f.completed < count {
		f.launched++
		f.peak = max(f.peak, f.launched-f.completed)
		name := fmt.Sprintf("flint-%d-%d", f.set.ID, f.launched)
		jit, err := f.client.GenerateJitRunnerConfig(ctx, &scaleset.RunnerScaleSetJitRunnerSetting{Name: name}, f.set.ID)
		if err != nil {
			return 0, err
		}
		f.wg.Go(func() { f.start(ctx, name, jit.EncodedJITConfig) })
	}
	return f.launched - f.completed, nil
}

// actRunnerProgram returns the path of the real third-party runner, or skips the test.
func actRunnerProgram(t *testing.T) string {
	t.Helper()
	path := os.Getenv("FLINT_TEST_ACT_RUNNER")
	if path == "" {
		module := filepath.Join("..", "..", "images", "demo-runner")
		if _, err := os.Stat(filepath.Join(module, "go.mod")); err != nil {
			t.Skip("needs github-act-runner: neither FLINT_TEST_ACT_RUNNER nor images/demo-runner is there")
		}
		path = filepath.Join(t.TempDir(), "runner")
		build := exec.CommandContext(t.Context(), "go", "build", "-C", module, "-o", path, "github.com/ChristopherHX/github-act-runner")
		build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOFLAGS=-mod=readonly")
		if out, err := build.CombinedOutput(); err != nil {
			t.Skipf("needs github-act-runner: build images/demo-runner: %v\n%s", err, out)
		}
	}
	return path
}

// actRunner returns how to start the real third-party runner, or skips the test.
func actRunner(t *testing.T) func(ctx context.Context, name, jit string) {
	t.Helper()
	path := actRunnerProgram(t)
	return func(ctx context.Context, name, jit string) {
		dir := t.TempDir()
		// The job may run detached; ending the test ends it.
		cmd := exec.CommandContext(t.Context(), path, "run", "--terminal=false")
		cmd.Dir = dir
		cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + dir, "ACTIONS_RUNNER_INPUT_JITCONFIG=" + jit}
		var out bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &out
		cmd.WaitDelay = time.Minute
		if err := cmd.Run(); err != nil && t.Context().Err() == nil {
			t.Errorf("runner %s: %v\n%s", name, err, out.String())
		}
		if testing.Verbose() {
			t.Logf("runner %s said:\n%s", name, out.String())
		}
	}
}

// post sends a JSON body with a token and returns the status.
func (r *rig) post(method, path, token, body string) int {
	r.t.Helper()
	req, err := http.NewRequestWithContext(r.t.Context(), method, r.cfg.URL+path, strings.NewReader(body))
	if err != nil {
		r.t.Fatal(err)
	}
	if token != "" {
		req.Header.Set("Authorization", "Bearer "+token)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		r.t.Fatal(err)
	}
	_ = resp.Body.Close()
	return resp.StatusCode
}

func asFault[T error](t *testing.T, err error) T {
	t.Helper()
	var want T
	if !errors.As(err, &want) {
		t.Fatalf("got %v (%T), want a %T", err, err, want)
	}
	return want
}
