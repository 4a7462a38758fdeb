package runnersoft

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"
	"time"
)

// standing is that of a version, of so many days ago; 0: it is not known.
func standing(version string, days float64, now time.Time) Standing {
	s := Standing{Software: Software{Version: version}}
	if days != 0 {
		s.Released = now.Add(-time.Duration(days * float64(day)))
	}
	return s
}

func TestWhatGitHubThinksOfSoftware(t *testing.T) {
	now := time.Date(2026, 11, 30, 12, 0, 0, 0, time.UTC)
	newest := func(s Standing) Standing { s.Newest = true; return s }
	mended := func(s Standing) Standing { s.Mend = "ask Ann"; return s }
	for name, tt := range map[string]struct {
		Standing
		held, says string // a reason's code, and a part of its text
		left       int
		ends       bool
		log        string
	}{
		"nothing is known":       {Standing: Standing{}},
		"another's, with a day":  {Standing: standing("", 31, now), held: "runner.too_old", says: "unknown is of 2026-10-30", ends: true},
		"fresh":                  {Standing: standing("2.335.0", 1, now), left: 29, ends: true, log: "level=INFO msg=\"runner software\" version=2.335.0 age_days=1"},
		"of unknown day":         {Standing: standing("2.335.0", 0, now), log: "level=INFO msg=\"runner software\" version=2.335.0 newest=false"},
		"a week before":          {Standing: standing("2.335.0", 23, now), left: 7, ends: true, log: "level=INFO"},
		"less than that":         {Standing: standing("2.335.0", 23.1, now), left: 6, ends: true, log: "level=WARN msg=\"runner software will soon be refused by GitHub\" version=2.335.0 age_days=23 days_left=6"},
		"on its last day":        {Standing: standing("2.335.0", 30, now), ends: true, log: "days_left=0"},
		"over":                   {Standing: standing("2.335.0", 30.1, now), held: "runner.too_old", says: "older than 30 days, and 2.335.0 is of 2026-10-31; put a newer one into runner.dir", ends: true, log: "level=ERROR"},
		"over and the newest":    {Standing: newest(standing("2.335.0", 90, now)), log: "level=INFO msg=\"runner software\" version=2.335.0 age_days=90 newest=true"},
		"the oldest it takes":    {Standing: standing("2.329.0", 1, now), left: 29, ends: true, log: "level=INFO"},
		"older, though fresh":    {Standing: mended(standing("2.328.9", 1, now)), held: "runner.too_old", says: "before 2.329.0, and this is 2.328.9; ask Ann", left: 29, ends: true, log: "level=ERROR"},
		"older, and of no day":   {Standing: standing("2.99.0", 0, now), held: "runner.too_old", says: "before 2.329.0", log: "level=ERROR"},
		"older, and the newest":  {Standing: newest(standing("2.328.0", 1, now)), held: "runner.too_old", says: "before 2.329.0", log: "level=ERROR"},
		"of a day that is ahead": {Standing: standing("2.335.0", -1, now), left: 31, ends: true, log: "level=INFO"},
	} {
		t.Run(name, func(t *testing.T) {
			if why := tt.Held(now, Refusal{}); why.Code != tt.held || !strings.Contains(why.Text, tt.says) {
				t.Errorf("held for %q: %s", why.Code, why)
			}
			if left, ends := tt.Left(now); ends != tt.ends || ends && left != tt.left {
				t.Errorf("%d days are left, which end: %v", left, ends)
			}
			var log bytes.Buffer
			tt.Tell(slog.New(slog.NewTextHandler(&log, nil)), now)
			if !strings.Contains(log.String(), tt.log) || (tt.log == "") != (log.Len() == 0) {
				t.Errorf("the log says %q", log.String())
			}
		})
	}
}

func TestAgeOfAVersion(t *testing.T) {
	now := time.Date(2026, 11, 30, 12, 0, 0, 0, time.UTC)
	for _, tt := range []struct {
		days      float64
		age, left int
		soon      bool
	}{{1.5, 1, 28, false}, {23, 23, 7, false}, {23.1, 23, 6, true}, {40, 40, 0, true}} {
		a := standing("2.335.0", tt.days, now).Aged(now)
		if a.AgeDays == nil || a.DaysLeft == nil || *a.AgeDays != tt.age || *a.DaysLeft != tt.left || a.Soon() != tt.soon || a.TooOld() {
			t.Errorf("after %v days: %+v", tt.days, a)
		}
	}
	if a := standing("2.328.0", 0, now).Aged(now); a.AgeDays != nil || a.DaysLeft != nil || a.Soon() || !a.TooOld() {
		t.Errorf("of a day that is not known: %+v", a)
	}
}

func TestBesideTheNewest(t *testing.T) {
	now := time.Date(2026, 11, 30, 12, 0, 0, 0, time.UTC)
	published := now.Add(-5 * day)
	for name, tt := range map[string]struct {
		have     Standing
		newest   bool
		released time.Time
	}{
		"older":                    {standing("2.334.0", 40, now), false, now.Add(-40 * day)},
		"older, and of no day":     {standing("2.334.9", 0, now), false, time.Time{}},
		"the same":                 {standing("2.335.0", 6, now), true, now.Add(-6 * day)},
		"the same, and of no day":  {standing("2.335.0", 0, now), true, published},
		"newer":                    {standing("2.1000.0", 0, now), true, time.Time{}},
		"of unknown version":       {Standing{}, false, time.Time{}},
		"no longer the newest one": {Standing{Software: Software{Version: "2.334.0"}, Newest: true}, false, time.Time{}},
	} {
		if got := tt.have.Beside("2.335.0", published); got.Newest != tt.newest || !got.Released.Equal(tt.released) || got.Version != tt.have.Version {
			t.Errorf("%s: %+v", name, got)
		}
	}
}

// TestRefusal: it is believed for a while, and says of what software it was.
func TestRefusal(t *testing.T) {
	at := time.Date(2026, 11, 30, 12, 0, 0, 0, time.UTC)
	s, refused := standing("2.335.0", 1, at), Refusal{At: at}
	const want = "GitHub refused the runner software (version 2.335.0) at 12:00:00; put a newer one into runner.dir and restart flint; it is tried again at 12:15:00"
	if why := s.Held(at.Add(RefusedFor-time.Second), refused); why.Code != "runner.deprecated" || why.Text != want {
		t.Errorf("%q: %s", why.Code, why)
	}
	if why := s.Held(at.Add(RefusedFor), refused); !why.IsZero() {
		t.Errorf("held for ever: %s", why)
	}
	if why := (Standing{}).Held(at, refused); !strings.Contains(why.Text, "(version unknown)") {
		t.Errorf("software of unknown version: %s", why)
	}
	if why := standing("2.328.0", 1, at).Held(at, refused); why.Code != "runner.too_old" { // what lasts goes before
		t.Errorf("%q: %s", why.Code, why)
	}
	if why := refused.Held(at, "that of pool a", "mend it"); !strings.Contains(why.Text, "(that of pool a) at 12:00:00; mend it;") {
		t.Errorf("%s", why)
	}
}
