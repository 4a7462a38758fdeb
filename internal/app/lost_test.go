package app

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"testing"

	"flint"
	"flint/internal/config"
	"flint/internal/github"
	"flint/internal/vm/vmtest"
)

// holds is a GitHub that goes on to believe in every runner.
type holds struct{}

func (holds) Register(context.Context, flint.Runner) (flint.Registration, error) {
	return flint.Registration{}, flint.ErrConflict
}

func (holds) Remove(context.Context, string, int64) error { return flint.ErrConflict }

func (holds) Status(context.Context, string, int64) (flint.RunnerStatus, error) {
	return flint.RunnerStatus{Busy: true}, nil
}

// TestJobsOfADeadDaemonRunAgain: what the sweep at the start finds lost is put on the list, if its pool wants that, once.
func TestJobsOfADeadDaemonRunAgain(t *testing.T) {
	a := &App{
		dir: t.TempDir(), log: slog.New(slog.NewTextHandler(t.Output(), nil)), driver: &vmtest.Fake{},
		cfg: config.Config{Pools: []config.Pool{{Name: "again", RerunLost: true}, {Name: "once"}}},
	}
	var err error
	if a.reruns, err = github.OpenReruns(filepath.Join(a.dir, "reruns.json"), a.log); err != nil {
		t.Fatal(err)
	}
	for _, pool := range []string{"again", "once"} {
		dir := filepath.Join(a.dir, "runners", "flint-"+pool)
		if err := os.MkdirAll(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		record := `{"version":1,"runner":{"id":"flint-` + pool + `","pool":"` + pool + `","phase":"running",` +
			`"job":{"name":"build","repository":"acme/hello","run_id":3}},"register":true}`
		if err := os.WriteFile(filepath.Join(dir, "runner.json"), []byte(record), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for range 2 {
		if err := a.newHost(holds{}).Sweep(t.Context()); err == nil {
			t.Error("the registrations that stay are not reported")
		}
	}
	list := a.reruns.Pending()
	if len(list) != 1 || list[0].Runner != "flint-again" || list[0].Job.RunID != 3 || list[0].At.IsZero() {
		t.Errorf("the jobs to run again are %+v", list)
	}
	a.lost(flint.Runner{ID: "flint-again", Pool: "again"}, list[0].Job)
	if again, err := github.OpenReruns(filepath.Join(a.dir, "reruns.json"), a.log); err != nil || len(again.Pending()) != 1 {
		t.Errorf("told of twice, and read again: %+v, %v", again, err)
	}
}
