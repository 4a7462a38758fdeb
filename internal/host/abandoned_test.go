package host_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

	"flint"
	"flint/internal/guest"
	"flint/internal/host"
)

// TestAbandonedJobs: a job whose runner is gone counts until GitHub has said how it ended or lets go of the registration, also
// in the next process.
func TestAbandonedJobs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, patient(nil))
		w.config.Deadlines.Job = time.Hour
		h := w.host()
		wants := func(what string, n int) {
			t.Helper()
			if got := h.Abandoned()["pool"]; got != n {
				t.Errorf("%s: %d jobs are abandoned, want %d", what, got, n)
			}
		}
		var ids []string
		for range 2 {
			id, ended := w.begin(t.Context(), h)
			ids = append(ids, id)
			note(t, h, flint.JobStarted, id)
			w.github.setBusy(true)
			wants("while it runs", len(ids)-1)
			w.fake.Crash(id)
			time.Sleep(time.Second)
			wants("while its runner ends", len(ids))
			if got := <-ended; !got.res.Lost {
				t.Fatalf("the job is not lost: %+v", got.res)
			}
			wants("when it is over", len(ids))
			w.github.setBusy(false)
		}
		w.github.setBusy(true)
		note(t, h, flint.JobCompleted, ids[0])
		wants("when GitHub has concluded one", 1)
		if err := h.Sweep(t.Context()); !errors.Is(err, flint.ErrConflict) {
			t.Errorf("sweep: %v", err)
		}
		wants("after a sweep in vain", 1)
		h = host.New(w.config)
		if err := h.Sweep(t.Context()); !errors.Is(err, flint.ErrConflict) {
			t.Errorf("sweep of the next process: %v", err)
		}
		wants("in the next process, which was not told", 2)
		w.github.setBusy(false)
		if err := h.Sweep(t.Context()); err != nil {
			t.Error(err)
		}
		wants("after a sweep", 0)
		w.nothingLeft()
	})
}

// TestConcludedJobsAreNotAbandoned, however long the runner's end takes and GitHub keeps its registration.
func TestConcludedJobsAreNotAbandoned(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var h *host.Host
		w := newWorld(t, runner(t, func(context.Context, io.Writer) guest.Exit {
			id := h.State().Runners[0].ID
			note(t, h, flint.JobStarted, id)
			note(t, h, flint.JobCompleted, id)
			if n := h.Abandoned(); len(n) != 0 {
				t.Errorf("abandoned: %v", n)
			}
			return guest.Exit{}
		}))
		h = w.host()
		w.github.setBusy(true)
		if _, err := h.Run(t.Context(), flint.Runner{ID: host.NewID("flint-", "pool"), Pool: "pool"}); !errors.Is(err, flint.ErrConflict) {
			t.Fatalf("the registration that stayed is not reported: %v", err)
		}
		h = host.New(w.config)
		if err := h.Sweep(t.Context()); err == nil || len(h.Abandoned()) != 0 {
			t.Errorf("%v, abandoned: %v", err, h.Abandoned())
		}
		w.github.setBusy(false)
		w.host()
		w.nothingLeft()
	})
}

// TestSweepWhereGitHubDoesNotAnswer: a start with many records must not wait for each.
func TestSweepWhereGitHubDoesNotAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, patient(nil))
		for n := range 30 {
			id := fmt.Sprintf("flint-%d", n)
			w.github.registered[id] = int64(n + 1)
			if err := os.MkdirAll(filepath.Join(w.dir, id), 0o700); err != nil {
				t.Fatal(err)
			}
			text := fmt.Sprintf(`{"version":1,"runner":{"id":%q,"pool":"pool","phase":"registered"},"github_id":%d,"register":true}`, id, n+1)
			if err := os.WriteFile(filepath.Join(w.dir, id, "runner.json"), []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		w.github.refuse = 1 << 30
		h := host.New(w.config)
		begin := time.Now()
		if err := h.Sweep(t.Context()); err == nil || time.Since(begin) > time.Minute {
			t.Errorf("%v after %s", err, time.Since(begin))
		}
		w.github.refuse = 0
		if err := h.Sweep(t.Context()); err != nil {
			t.Error(err)
		}
		w.nothingLeft()
	})
}
