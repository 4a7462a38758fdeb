package app

import (
	"errors"
	"log/slog"
	"net/http"
	"testing"
	"testing/synctest"
	"time"

	"flint"
	"flint/internal/config"
	"flint/internal/github"
	"flint/internal/runnersoft"
)

// TestRefusedSoftware: a refusal is known from a guest's exit code only, so it holds for a while, and where each image has its own
// software for its own pool.
func TestRefusedSoftware(t *testing.T) {
	for name, tt := range map[string]struct {
		inImage string
		held    int // pools
	}{"in a directory for all": {"", 2}, "in each image": {"auto", 1}} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				cfg := config.Default()
				cfg.Runner.InImage = tt.inImage
				cfg.Pools = []config.Pool{config.NewPool("a", "i"), config.NewPool("b", "i")}
				a := &App{cfg: cfg, log: slog.New(slog.DiscardHandler)}
				held := func() (n int) {
					for _, p := range a.pools() {
						if p.Held.Code == "runner.deprecated" {
							n++
						}
					}
					return n
				}
				a.ended(flint.Result{Runner: flint.Runner{ID: "r", Pool: "a"}, ExitCode: 7, Reason: flint.Because("runner.deprecated", "x")}, nil)
				if n := held(); n != tt.held || a.pools()[0].Held.IsZero() {
					t.Errorf("%d pools are held, want %d", n, tt.held)
				}
				time.Sleep(runnersoft.RefusedFor)
				if n := held(); n != 0 {
					t.Errorf("%d pools are held for ever", n)
				}
			})
		})
	}
}

// TestAgeIsAskedAgain: GitHub's newest software is not unknown for a whole day because it was away at the start.
func TestAgeIsAskedAgain(t *testing.T) {
	asked := 0
	synctest.Test(t, func(t *testing.T) {
		log := slog.New(slog.DiscardHandler)
		c, err := github.New(github.Config{
			Accounts: []github.Account{{URL: "https://github.com/acme", Token: "t"}}, Owner: "o", StateDir: t.TempDir(), Log: log,
			Events: (&App{}).note, Transport: noGitHub(func() { asked++ }),
		})
		if err != nil {
			t.Fatal(err)
		}
		a := &App{log: log, github: c, software: runnersoft.Standing{Software: runnersoft.Software{Version: "2.330.0"}}}
		go func() { _ = a.watchSoftware(t.Context()) }()
		time.Sleep(softwareAgain + time.Minute)
	})
	if asked != 2 {
		t.Errorf("asked %d times, want 2", asked)
	}
}

type noGitHub func()

func (f noGitHub) RoundTrip(*http.Request) (*http.Response, error) {
	f()
	return nil, errors.New("connection refused")
}
