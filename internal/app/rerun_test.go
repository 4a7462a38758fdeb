package app

import (
	"context"
	"errors"
	"path/filepath"
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
	}{
		"it runs again":         {nil, 1},
		"GitHub knows it not":   {flint.ErrNotFound, 1},
		"it was run again once": {&flint.Fault{Code: "github.rerun", Err: errors.New("it was attempt 2")}, 1},
		"not given up yet":      {flint.ErrConflict, 62},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r, err := openReruns(filepath.Join(dir, "reruns.json"))
				if err != nil {
					t.Fatal(err)
				}
				if err := r.add(rerun{Runner: "flint-1", Lost: time.Now()}); err != nil {
					t.Fatal(err)
				}
				ctx, cancel := context.WithTimeout(t.Context(), 2*time.Hour)
				defer cancel()
				asked, over := 0, false
				ask := func(context.Context, flint.Job, string) error { asked++; return tc.err }
				if err := r.run(ctx, ask, func(_ rerun, _ error, o bool) { over = o }); err != nil {
					t.Fatal(err)
				}
				if asked != tc.want || !over || len(r.pending()) > 0 {
					t.Errorf("asked %d times, want %d; over: %t; left: %v", asked, tc.want, over, r.pending())
				}
			})
		})
	}
}
