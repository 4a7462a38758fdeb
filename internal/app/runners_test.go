package app

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"flint"
	"flint/internal/config"
	"flint/internal/github"
	"flint/internal/githubsim"
	"flint/internal/guest"
	"flint/internal/host"
	"flint/internal/image"
	"flint/internal/runnersoft"
)

// releases is a server of releases of a runner that is a script.
type releases struct {
	*httptest.Server
	listener string
	newest   atomic.Pointer[string]
	away     atomic.Bool
}

func newReleases(t *testing.T, listener, newest string) *releases {
	r := &releases{listener: listener}
	r.newest.Store(&newest)
	r.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
		version, named := strings.CutPrefix(req.URL.Path, "/repos/actions/runner/releases/tags/v")
		if !named {
			version = *r.newest.Load()
		}
		arch := map[string]string{"amd64": "x64", "arm64": "arm64"}[runtime.GOARCH]
		name := "actions-runner-linux-" + arch + "-" + version + ".tar.gz"
		content := runnerArchive(t, r.listener)
		switch {
		case r.away.Load():
			w.WriteHeader(http.StatusBadGateway)
		case req.URL.Path == "/file":
			_, _ = w.Write(content)
		default:
			fmt.Fprintf(w, `{"tag_name":"v%s","published_at":%q,"assets":[{"name":%q,"size":%d,"digest":"sha256:%x","browser_download_url":"%s/file"}]}`,
				version, time.Now().Add(-25*24*time.Hour).UTC().Format(time.RFC3339), name, len(content), sha256.Sum256(content), r.URL)
		}
	}))
	t.Cleanup(r.Close)
	return r
}

// runnerArchive packs a listener as GitHub packs its own.
func runnerArchive(t *testing.T, listener string) []byte {
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	w := tar.NewWriter(z)
	err := w.WriteHeader(&tar.Header{Name: "./bin/Runner.Listener", Typeflag: tar.TypeReg, Mode: 0o755, Size: int64(len(listener)), ModTime: time.Unix(1, 0)})
	if err == nil {
		_, err = w.Write([]byte(listener))
	}
	if err := errors.Join(err, w.Close(), z.Close()); err != nil {
		t.Error(err)
	}
	return b.Bytes()
}

// standIn does what GitHub's runner does, by a third-party one: it keeps everything below the directory above its own program.
func standIn(runner string) string {
	return `#!/bin/sh
cd "$(dirname "$(dirname "$(readlink -f "$0")")")" || exit 1
mkdir -p _diag || exit 1
case $1 in
run) exec ` + runner + ` run --once --terminal=true ;;
esac
args=
for a; do [ "$a" = --disableupdate ] || args="$args $a"; done
exec ` + runner + ` $args
`
}

// inOfficialLayout has the guests run the software that the coordinator keeps.
func inOfficialLayout(t *testing.T, cfg func(*config.Config)) (*coordinator, *releases) {
	runner := os.Getenv("FLINT_TEST_ACT_RUNNER")
	if runner == "" {
		t.Skip("needs github-act-runner: FLINT_TEST_ACT_RUNNER names none")
	}
	far := newReleases(t, standIn(runner), "2.335.0")
	c := newRig(t, 1, cfg, func(cfg *config.Config) { cfg.Runner.Releases = far.URL })
	c.fake.Exec = func(ctx context.Context, _ guest.Command, stdin io.Reader, stdout, _ io.Writer) guest.Exit {
		cmd := exec.CommandContext(ctx, filepath.Join(c.cfg.StateDir, "runner-software", "current", "start"))
		cmd.Dir, cmd.Stdin = t.TempDir(), stdin
		cmd.Stdout, cmd.Stderr = stdout, stdout
		if err := cmd.Run(); err != nil {
			return guest.Exit{Code: 1, Err: err.Error()}
		}
		return guest.Exit{}
	}
	return c, far
}

// TestJobWithGitHubsRunner: a configuration that says nothing of runner software gets GitHub's, and a job runs with it.
func TestJobWithGitHubsRunner(t *testing.T) {
	for name, cfg := range map[string]func(*config.Config){
		"by JIT configuration": func(*config.Config) {},
		"that registers itself": func(cfg *config.Config) {
			byWebhooks(cfg)
			cfg.GitHub.Registration = "token"
		},
	} {
		t.Run(name, func(t *testing.T) {
			c, _ := inOfficialLayout(t, cfg)
			run := c.submit(t, "on: push\njobs:\n  a:\n    runs-on: [flint]\n    steps:\n      - run: echo hello\n")
			ctx, stop := context.WithCancel(t.Context())
			defer stop()
			if err := c.Connect(ctx); err != nil {
				t.Fatal(err)
			}
			if err := c.prepareRunner(ctx); err != nil {
				t.Fatal(err)
			}
			if addr := c.WebhookAddr(); addr != nil {
				if _, err := c.sim.AddHook(githubsim.Hook{URL: "http://" + addr.String() + c.cfg.Webhook.Path, Secret: hookSecret}); err != nil {
					t.Fatal(err)
				}
			}
			served := make(chan error, 1)
			go func() { served <- c.Serve(ctx) }()
			wctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
			defer cancel()
			if conclusion, err := run.Wait(wctx); err != nil || conclusion != githubsim.Success {
				t.Errorf("the run ended as %q, %v", conclusion, err)
			}
			stop()
			if err := <-served; err != nil {
				t.Errorf("serve: %v", err)
			}
			c.gone(t)
			if entries, err := os.ReadDir(filepath.Join(c.cfg.StateDir, "runner-software", "current")); err != nil || len(entries) != 3 {
				t.Errorf("something was written beside the software: %v, %v", entries, err)
			}
		})
	}
}

// keeper is an App that keeps GitHub's runner software, and does nothing else.
func keeper(t *testing.T, url, version string) *App {
	cfg := config.Default()
	cfg.StateDir, cfg.Runner.Releases, cfg.Runner.Version = t.TempDir(), url, version
	log := slog.New(slog.DiscardHandler)
	store, err := image.Open(filepath.Join(cfg.StateDir, "images"), log)
	if err != nil {
		t.Fatal(err)
	}
	return &App{cfg: cfg, log: log, store: store, github: &github.Client{}, supply: map[string]host.Supply{"flint": {Base: "b"}}}
}

func TestRefreshOfTheSoftware(t *testing.T) {
	far := newReleases(t, "#!/bin/sh\n", "2.334.0")
	a := keeper(t, far.URL, "")
	var log bytes.Buffer
	a.log = slog.New(slog.NewTextHandler(&log, nil))
	if err := a.prepareRunner(t.Context()); err != nil {
		t.Fatal(err)
	}
	first := a.supply["flint"]
	if a.software.Version != "2.334.0" || a.software.Released.IsZero() || first.Runner == "" || first.Base != "b" {
		t.Fatalf("%+v, %+v", a.software, first)
	}
	newer := "2.335.0"
	far.newest.Store(&newer)
	far.away.Store(true)
	if err := a.refreshSoftware(t.Context(), time.Now()); err == nil {
		t.Error("no error")
	}
	if said := log.String(); a.supply["flint"].Runner != first.Runner || !strings.Contains(said, "the present one stays") ||
		!strings.Contains(said, "days_left=4") || !strings.Contains(said, "runner-software import") {
		t.Errorf("%s", said)
	}
	far.away.Store(false)
	a.refuse("flint", time.Now()) // the old one
	if err := a.refreshSoftware(t.Context(), time.Now()); err != nil {
		t.Fatal(err)
	}
	if a.software.Version != "2.335.0" || !a.software.Newest || a.supply["flint"].Runner == first.Runner || len(a.refused) != 0 {
		t.Errorf("%+v, %+v, refused %v", a.software, a.supply["flint"], a.refused)
	}
	// A person goes back, with a command.
	if _, err := RunnerSoftware(a.cfg, a.log).Pull(t.Context(), "2.334.0", nil); err != nil {
		t.Fatal(err)
	}
	a.followSoftware(t.Context())
	if a.software.Version != "2.334.0" || a.supply["flint"].Runner != first.Runner {
		t.Errorf("%+v, %+v", a.software, a.supply["flint"])
	}
	// And gives another of the same version.
	path := filepath.Join(t.TempDir(), "x.tgz")
	if err := os.WriteFile(path, runnerArchive(t, "#!/bin/sh\nexit 1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := RunnerSoftware(a.cfg, a.log).Import(t.Context(), RunnerFile{Path: path, Version: "2.334.0"}, nil); err != nil {
		t.Fatal(err)
	}
	a.followSoftware(t.Context())
	if a.supply["flint"].Runner == first.Runner {
		t.Error("the old one of that version is still used")
	}
}

// TestPoolPinsItsSoftware: its VMs stay with that while those of others get the newest, and it is removed by nothing.
func TestPoolPinsItsSoftware(t *testing.T) {
	far := newReleases(t, "#!/bin/sh\n", "2.335.0")
	a := keeper(t, far.URL, "")
	pinned := config.NewPool("old", "i")
	pinned.RunnerVersion = "2.333.0"
	a.cfg.Pools = []config.Pool{config.NewPool("flint", "i"), pinned}
	prepare := func() {
		t.Helper()
		for _, p := range a.cfg.Pools {
			drive, err := a.poolRunner(t.Context(), p)
			if err != nil {
				t.Fatal(err)
			}
			a.supply[p.Name] = host.Supply{Runner: drive}
		}
	}
	prepare()
	old := a.supply["old"].Runner
	if old == "" || old == a.supply["flint"].Runner || a.software.Version != "2.335.0" || a.pinned["2.333.0"].Version != "2.333.0" {
		t.Fatalf("%+v, %+v, %+v", a.supply, a.software, a.pinned)
	}
	for _, newer := range []string{"2.336.0", "2.337.0", "2.338.0"} {
		far.newest.Store(&newer)
		if err := a.refreshSoftware(t.Context(), time.Now()); err != nil {
			t.Fatal(err)
		}
	}
	if a.supply["old"].Runner != old || a.software.Version != "2.338.0" {
		t.Errorf("%+v, %+v", a.supply, a.software)
	}
	list, err := ListRunnerSoftware(a.cfg, a.log, time.Now())
	if err != nil || len(list) != 3 || list[2].Version != "2.333.0" || !list[2].Pinned || *list[2].AgeDays != 25 || *list[2].DaysLeft != 4 {
		t.Errorf("%+v, %v", list, err)
	}
	// Its age, and a refusal, hold up this pool alone.
	held := func() map[string]string {
		all := map[string]string{}
		for _, p := range a.pools() {
			all[p.Name] = p.Held.Code
		}
		return all
	}
	a.refuse("old", time.Now())
	if h := held(); h["old"] != "runner.deprecated" || h["flint"] != "" {
		t.Errorf("%v", h)
	}
	prepare()
	s := a.pinned["2.333.0"]
	s.Released = time.Now().Add(-31 * 24 * time.Hour)
	a.pinned["2.333.0"] = s
	if h := held(); h["old"] != "runner.too_old" || h["flint"] != "" {
		t.Errorf("%v", h)
	}
}

// TestAllPoolsPin: nothing else is fetched, not even later.
func TestAllPoolsPin(t *testing.T) {
	far := newReleases(t, "#!/bin/sh\n", "2.335.0")
	a := keeper(t, far.URL, "")
	pool := config.NewPool("flint", "i")
	pool.RunnerVersion = "2.334.0"
	a.cfg.Pools = []config.Pool{pool}
	if _, err := a.poolRunner(t.Context(), pool); err != nil {
		t.Fatal(err)
	}
	if err := a.refreshSoftware(t.Context(), time.Now()); err != nil {
		t.Fatal(err)
	}
	if list, err := ListRunnerSoftware(a.cfg, a.log, time.Now()); err != nil || len(list) != 1 || list[0].Version != "2.334.0" || list[0].Current {
		t.Errorf("%+v, %v", list, err)
	}
	far.away.Store(true)
	if _, err := a.poolRunner(t.Context(), pool); err != nil {
		t.Errorf("what is there needs no GitHub: %v", err)
	}
}

func TestPinnedSoftware(t *testing.T) {
	far := newReleases(t, "#!/bin/sh\n", "2.335.0")
	a := keeper(t, far.URL, "2.334.0")
	if err := a.prepareRunner(t.Context()); err != nil || a.software.Version != "2.334.0" {
		t.Fatalf("%+v, %v", a.software, err)
	}
	if err := a.refreshSoftware(t.Context(), time.Now()); err != nil || a.software.Version != "2.334.0" {
		t.Errorf("%+v, %v", a.software, err)
	}
	far.away.Store(true) // what is there needs nobody
	b := keeper(t, far.URL, "2.334.0")
	b.cfg.StateDir = a.cfg.StateDir
	if err := b.prepareRunner(t.Context()); err != nil {
		t.Error(err)
	}
	b.cfg.Runner.Version = "2.333.0"
	var fault *flint.Fault
	if err := b.prepareRunner(t.Context()); !errors.As(err, &fault) || fault.Code != "runner.unreachable" {
		t.Errorf("got %v", err)
	}
	why := a.software.Held(time.Now().Add(60*24*time.Hour), runnersoft.Refusal{})
	if why.Code != "runner.too_old" || !strings.Contains(why.Text, "runner.version") {
		t.Errorf("it is too old, and: %v", why)
	}
}

// TestOwnSoftware: nothing is fetched where the configuration has its own, or nothing serves.
func TestOwnSoftware(t *testing.T) {
	for name, change := range map[string]func(*App){
		"in the images": func(a *App) { a.cfg.Runner.InImage = "auto" },
		"no GitHub":     func(a *App) { a.github = nil },
		"in a directory": func(a *App) {
			a.cfg.Runner.Dir = t.TempDir()
			if err := os.WriteFile(filepath.Join(a.cfg.Runner.Dir, "start"), []byte("#!/bin/sh\n"), 0o755); err != nil {
				t.Fatal(err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			a := keeper(t, "http://127.0.0.1:1", "")
			change(a)
			if err := a.prepareRunner(t.Context()); err != nil {
				t.Error(err)
			}
			if err := a.refreshSoftware(t.Context(), time.Now()); err != nil {
				t.Error(err)
			}
			if _, err := os.Stat(filepath.Join(a.cfg.StateDir, "runner-software")); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("a store was made: %v", err)
			}
		})
	}
}
