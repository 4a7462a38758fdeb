package runnersoft

import (
	"log/slog"
	"time"

	"flint"
)

// What GitHub asks of the runner software, as its blog announced and enforces it since 2026: jobs go only to runners not
// older than 30 days, and registration needs 2.329.0.
const (
	day         = 24 * time.Hour
	life        = 30 * day
	warnDays    = 7 // before that
	oldestTaken = "2.329.0"
)

// RefusedFor is how long no runner is started after one was refused. That comes from a guest, so it is not believed for ever.
const RefusedFor = 15 * time.Minute

// mendDir is for software that a person put where it is.
const mendDir = "put a newer one into runner.dir and restart flint"

// TooOld reports whether GitHub registers no runner of this version.
func (s Software) TooOld() bool { return s.Version != "" && compare(s.Version, oldestTaken) < 0 }

// Aged is a version with its age.
type Aged struct {
	Software
	AgeDays *int `json:"age_days"` // nil where the day of its release is not known
	// DaysLeft is how long GitHub still gives it jobs, unless it stays the newest; nil where the age is not known.
	DaysLeft *int `json:"days_left"`
}

// Aged says how old a version is.
func (s Software) Aged(now time.Time) Aged {
	a := Aged{Software: s}
	if left, known := (Standing{Software: s}).Left(now); known {
		age := s.age(now)
		a.AgeDays, a.DaysLeft = &age, &left
	}
	return a
}

func (s Software) age(now time.Time) (days int) { return int(now.Sub(s.Released) / day) }

// Soon reports whether GitHub gives it no job in a few days, unless it stays the newest.
func (a Aged) Soon() bool { return a.DaysLeft != nil && *a.DaysLeft < warnDays }

// Standing is what GitHub thinks of the runner software in VMs. The zero value is software of unknown version.
type Standing struct {
	Software
	Newest bool   // GitHub has no newer one, so it takes this one whatever its age
	Mend   string // how a person gives the VMs a newer one; empty: mendDir
}

// Name is the version, or that it is not known.
func (s Standing) Name() string {
	if s.Version == "" {
		return "unknown"
	}
	return s.Version
}

// Beside compares the software with GitHub's newest release, and takes the day from that where it is this one.
func (s Standing) Beside(newest string, published time.Time) Standing {
	s.Newest = s.Version != "" && compare(s.Version, newest) >= 0
	if s.Version == newest && s.Released.IsZero() {
		s.Released = published
	}
	return s
}

// Left is for how many days GitHub will still take it; ends is false where that is not known, or has no end.
func (s Standing) Left(now time.Time) (days int, ends bool) {
	return max(0, int(s.Released.Add(life).Sub(now)/day)), !s.Released.IsZero() && !s.Newest
}

// Held says why no runner is to be started with this software, of which GitHub may have refused one; zero where GitHub will take it.
func (s Standing) Held(now time.Time, refused Refusal) flint.Reason {
	mend := s.Mend
	if mend == "" {
		mend = mendDir
	}
	switch {
	case s.TooOld():
		return flint.Because("runner.too_old", "GitHub registers no runner software before %s, and this is %s; %s", oldestTaken, s.Version, mend)
	case !s.Released.IsZero() && !s.Newest && now.Sub(s.Released) > life:
		return flint.Because("runner.too_old", "GitHub gives no job to runner software older than 30 days, and %s is of %s; %s",
			s.Name(), s.Released.Format(time.DateOnly), mend)
	}
	return refused.Held(now, "version "+s.Name(), mend)
}

// Tell says in the log how long GitHub will take it, where its version is known.
func (s Standing) Tell(log *slog.Logger, now time.Time) {
	if s.Version == "" {
		return
	}
	log = log.With("version", s.Version)
	if !s.Released.IsZero() {
		log = log.With("age_days", s.age(now))
	}
	left, ends := s.Left(now)
	switch why := s.Held(now, Refusal{}); {
	case !why.IsZero():
		log.Error("runner software", "reason", why)
	case ends && left < warnDays:
		log.Warn("runner software will soon be refused by GitHub", "days_left", left)
	default:
		log.Info("runner software", "newest", s.Newest)
	}
}

// Refusal is when GitHub refused a runner for its software; at the zero time it did not.
type Refusal struct{ At time.Time }

// Held says why no runner is to be started after a refusal; zero where one is. Which and mend say of what software it was, and how a
// person gives the VMs a newer one.
func (r Refusal) Held(now time.Time, which, mend string) flint.Reason {
	until := r.At.Add(RefusedFor)
	if !now.Before(until) {
		return flint.Reason{}
	}
	return flint.Because("runner.deprecated", "GitHub refused the runner software (%s) at %s; %s; it is tried again at %s",
		which, r.At.Format(time.TimeOnly), mend, until.Format(time.TimeOnly))
}
