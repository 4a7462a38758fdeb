package github

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"flint"
)

func TestLostJobIsTriedUntilThereIsNoUse(t *testing.T) {
	dir := t.TempDir()
	for name, tc := range map[string]struct {
		err  error
		want int // attempts within two hours
		says string
	}{
		"it runs again":         {nil, 1, "lost job runs again"},
		"GitHub knows it not":   {flint.ErrNotFound, 1, "lost job does not run again"},
		"it was run again once": {&flint.Fault{Code: "github.rerun", Err: errors.New("it was attempt 2")}, 1, "lost job does not run again"},
		"not given up yet":      {flint.ErrConflict, 62, "lost job does not run again"},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var log bytes.Buffer
				r, err := OpenReruns(filepath.Join(dir, "reruns.json"), slog.New(slog.NewTextHandler(&log, nil)))
				if err != nil {
					t.Fatal(err)
				}
				if err := r.Add(flint.Job{Name: "build"}, "flint-1"); err != nil {
					t.Fatal(err)
				}
				ctx, cancel := context.WithTimeout(t.Context(), 2*time.Hour)
				defer cancel()
				asked := 0
				ask := func(context.Context, flint.Job, string) error { asked++; return tc.err }
				if err := r.Run(ctx, ask); err != nil {
					t.Fatal(err)
				}
				if asked != tc.want || len(r.Pending()) > 0 || strings.Count(log.String(), tc.says) != 1 {
					t.Errorf("asked %d times, want %d; left: %v; said: %s", asked, tc.want, r.Pending(), log.String())
				}
			})
		})
	}
}

// TestRerunThatIsRefusedIsSaid: why a lost job cannot run again is said when it is known, not an hour later, and once.
func TestRerunThatIsRefusedIsSaid(t *testing.T) {
	var log bytes.Buffer
	r, err := OpenReruns(filepath.Join(t.TempDir(), "reruns.json"), slog.New(slog.NewTextHandler(&log, nil)))
	if err != nil {
		t.Fatal(err)
	}
	x := Lost{Runner: "flint-1", Job: flint.Job{Name: "build", Repository: "acme/app"}}
	refused := &flint.Fault{Code: "github.permission", What: "run it again", Fix: "give the GitHub App a permission", Err: errors.New("403")}
	for range 3 {
		r.tell(x, refused, false)
		r.tell(x, flint.ErrConflict, false) // GitHub has not given it up: that is as expected
	}
	if n := strings.Count(log.String(), "give the GitHub App a permission"); n != 1 {
		t.Errorf("it is said %d times, want once:\n%s", n, log.String())
	}
	r.tell(x, refused, true)
	if len(r.said) != 0 || !strings.Contains(log.String(), "lost job does not run again") {
		t.Errorf("at the end: %v,\n%s", r.said, log.String())
	}
}
