package host

import (
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

	"flint"
)

// TestDeadlinesDoNotFollowTheClock: twenty minutes into a job flint is restarted, and meanwhile somebody sets the machine's
// clock. What is left of the job's hour is forty minutes all the same.
func TestDeadlinesDoNotFollowTheClock(t *testing.T) {
	for name, set := range map[string]time.Duration{"as it was": 0, "an hour forwards": time.Hour, "an hour back": -time.Hour} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				start := time.Now()
				h := New(Config{
					Dir: t.TempDir(), Log: slog.New(slog.DiscardHandler), BootTime: func() time.Duration { return 42*time.Hour + time.Since(start) },
				})
				l := newLife(h, flint.Runner{ID: "flint-a"}, Supply{})
				l.rec.Boot = bootID()
				if err := l.record(); err != nil {
					t.Fatal(err)
				}
				l.advance(flint.Registered)
				<-time.After(20 * time.Minute)

				rec, err := readRecord(filepath.Join(h.c.Dir, "flint-a"))
				if err != nil {
					t.Fatal(err)
				}
				at := rec.Runner.Timeline[flint.Registered]
				rec.Runner.Timeline[flint.Registered] = at.Add(-set) // what the clock of now calls that time
				heir := newLife(h, rec.Runner, Supply{})
				heir.rec, heir.adopted = rec, true
				if got := left(time.Hour, heir.began(flint.Registered)); got != 40*time.Minute {
					t.Errorf("%s are left", got)
				}
				// Of another boot only the time of day is known.
				heir.rec.Boot = "another"
				if got := left(2*time.Hour, heir.began(flint.Registered)); got != max(100*time.Minute-set, 1) {
					t.Errorf("after another boot %s are left", got)
				}
			})
		})
	}
}

// TestBootTime: it is the kernel's.
func TestBootTime(t *testing.T) {
	b, err := os.ReadFile("/proc/uptime")
	if err != nil {
		t.Skipf("needs /proc/uptime: %v", err)
	}
	var up float64
	if _, err := fmt.Sscan(string(b), &up); err != nil {
		t.Fatal(err)
	}
	if d := bootTime() - time.Duration(up*float64(time.Second)); d < -time.Second || d > time.Minute {
		t.Errorf("%s apart", d)
	}
}
