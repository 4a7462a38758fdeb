package app

import (
	"bytes"
	"errors"
	"log/slog"
	"strings"
	"testing"

	"flint"
)

// TestRerunThatIsRefusedIsSaid: why a lost job cannot run again is said when it is known, not an hour later, and once.
func TestRerunThatIsRefusedIsSaid(t *testing.T) {
	var log bytes.Buffer
	a := &App{log: slog.New(slog.NewTextHandler(&log, nil)), reruns: &reruns{}}
	x := rerun{Runner: "flint-1", Job: flint.Job{Name: "build", Repository: "acme/app"}}
	refused := &flint.Fault{Code: "github.permission", What: "run it again", Fix: "give the GitHub App a permission", Err: errors.New("403")}
	for range 3 {
		a.reran(x, refused, false)
		a.reran(x, flint.ErrConflict, false) // GitHub has not given it up: that is as expected
	}
	if n := strings.Count(log.String(), "give the GitHub App a permission"); n != 1 {
		t.Errorf("it is said %d times, want once:\n%s", n, log.String())
	}
	a.reran(x, refused, true)
	if len(a.reruns.said) != 0 || !strings.Contains(log.String(), "lost job does not run again") {
		t.Errorf("at the end: %v,\n%s", a.reruns.said, log.String())
	}
}
