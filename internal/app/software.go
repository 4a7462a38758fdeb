package app

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"flint"
)

// What GitHub asks of the runner software, as its blog announced and enforces it since 2026: jobs go only to runners not
// older than 30 days, and registration needs 2.329.0.
const (
	softwareLife    = 30 * 24 * time.Hour
	softwareWarning = 7 * 24 * time.Hour // before that
	// refusedFor is how long no runner is started after one was refused. That comes from a guest, so it is not believed for ever.
	refusedFor    = 15 * time.Minute
	leastSoftware = "2.329.0"
)

// software is what is known of the runner software in the VMs. The zero value is software of unknown version.
type software struct {
	version  string
	released time.Time // zero: not known
	newest   bool      // GitHub has no newer one, so it takes this one whatever its age
	mend     string    // how a person gives the VMs a newer one; empty: mendDir
}

// mendDir is for software that a person put where it is.
const mendDir = "put a newer one into runner.dir and restart flint"

func (s software) howToMend() string {
	if s.mend == "" {
		return mendDir
	}
	return s.mend
}

// refusal is when GitHub refused a runner for its software, and until when it is not tried again.
type refusal struct{ at, until time.Time }

// softwareVersion is how GitHub numbers its runner software.
var softwareVersion = regexp.MustCompile(`^v?[0-9]+\.[0-9]+\.[0-9]+$`)

// readSoftware reads the file `version` of a runner.dir: the version in its first line, and in the second the day it was
// released (2026-11-03). Both may be missing, and software that is not GitHub's says what it likes.
func readSoftware(dir string) (software, error) {
	b, err := os.ReadFile(filepath.Join(dir, "version"))
	if errors.Is(err, fs.ErrNotExist) {
		return software{}, nil
	}
	if err != nil {
		return software{}, fmt.Errorf("read the version of the runner software: %w", err)
	}
	var s software
	first, rest, _ := strings.Cut(string(b), "\n")
	if first = strings.TrimSpace(first); !softwareVersion.MatchString(first) {
		return software{}, nil // it is another's program, which GitHub does not know by its age
	}
	s.version = strings.TrimPrefix(first, "v")
	second, _, _ := strings.Cut(rest, "\n")
	if second = strings.TrimSpace(second); second != "" {
		if s.released, err = time.Parse(time.DateOnly, second); err != nil {
			return software{}, &flint.Fault{
				Code: "runner.version", What: "read " + filepath.Join(dir, "version"), Kind: flint.ErrConfig, Err: err,
				Fix: "write the version in its first line and the day of its release in the second, such as 2026-11-03",
			}
		}
	}
	return s, nil
}

// held says why no runner is to be started with this software; zero where GitHub will take it.
func (s software) held(now time.Time) flint.Reason {
	age := now.Sub(s.released)
	switch {
	case s.version != "" && older(s.version, leastSoftware):
		return flint.Because("runner.too_old", "GitHub registers no runner software before %s, and this is %s; %s", leastSoftware, s.version, s.howToMend())
	case !s.released.IsZero() && !s.newest && age > softwareLife:
		return flint.Because("runner.too_old", "GitHub gives no job to runner software older than 30 days, and %s is of %s; %s",
			s.name(), s.released.Format(time.DateOnly), s.howToMend())
	}
	return flint.Reason{}
}

// held says why no runner is to be started after a refusal; zero where one is.
func (r refusal) held(now time.Time, which, mend string) flint.Reason {
	if !now.Before(r.until) {
		return flint.Reason{}
	}
	return flint.Because("runner.deprecated", "GitHub refused the runner software (%s) at %s; %s; it is tried again at %s",
		which, r.at.Format(time.TimeOnly), mend, r.until.Format(time.TimeOnly))
}

// refuse notes that GitHub refused the software of a pool's runner: that of all pools, unless each has its own in its image, or
// this one pins it.
func (a *App) refuse(pool string, now time.Time) {
	if a.cfg.Runner.InImage == "" && pinOf(a.current(), pool) == "" {
		pool = ""
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.refused == nil {
		a.refused = map[string]refusal{}
	}
	a.refused[pool] = refusal{at: now, until: now.Add(refusedFor)}
}

func (s software) name() string {
	if s.version == "" {
		return "unknown"
	}
	return s.version
}

// left is how long GitHub will still take it; ok is false where that is not known, or has no end.
func (s software) left(now time.Time) (left time.Duration, ok bool) {
	return s.released.Add(softwareLife).Sub(now), !s.released.IsZero() && !s.newest
}

// older compares versions number by number.
func older(a, b string) bool {
	as, bs := strings.Split(a, "."), strings.Split(b, ".")
	for i := range max(len(as), len(bs)) {
		var x, y int
		if i < len(as) {
			x, _ = strconv.Atoi(as[i])
		}
		if i < len(bs) {
			y, _ = strconv.Atoi(bs[i])
		}
		if x != y {
			return x < y
		}
	}
	return false
}

// softwareEvery is how often GitHub is asked for its newest runner software; softwareAgain, when it did not answer; softwareLook,
// how often flint looks whether a command has put another one in place.
const (
	softwareEvery = 24 * time.Hour
	softwareAgain = 15 * time.Minute
	softwareLook  = time.Minute
)

// watchSoftware fetches GitHub's newest runner software where flint keeps it, or else compares what it has with that, now and
// every day, and says how long it will be taken.
func (a *App) watchSoftware(ctx context.Context) error {
	next := time.NewTimer(0)
	defer next.Stop()
	look := time.NewTicker(softwareLook)
	defer look.Stop()
	for {
		select {
		case <-next.C:
			wait := softwareEvery
			if err := errors.Join(a.refreshSoftware(ctx, time.Now()), a.checkSoftware(ctx, time.Now())); err != nil {
				wait = softwareAgain
			}
			next.Reset(wait)
		case <-look.C:
			a.followSoftware(ctx)
		case <-ctx.Done():
			return nil
		}
	}
}

// checkSoftware returns an error where GitHub could not be asked.
func (a *App) checkSoftware(ctx context.Context, now time.Time) error {
	a.mu.Lock()
	s, pins := a.software, len(a.pinned)
	a.mu.Unlock()
	if s.version == "" && pins == 0 {
		a.log.Debug("version of the runner software is not known")
		return nil
	}
	version, published, err := a.github.LatestRunner(ctx)
	if err != nil {
		a.log.Info("GitHub's newest runner software is not known", "err", err)
	} else if s.version != "" {
		s.newest = !older(s.version, version)
		if version == s.version && s.released.IsZero() {
			s.released = published
		}
	}
	a.mu.Lock()
	a.software = s
	all := []software{s}
	for v, s := range a.pinned {
		if err == nil {
			s.newest = !older(v, version)
			a.pinned[v] = s
		}
		all = append(all, s)
	}
	a.mu.Unlock()
	for _, s := range all {
		if s.version != "" {
			s.tell(a.log, now)
		}
	}
	if errors.Is(err, flint.ErrNotFound) { // this server has none, and will not have one soon
		return nil
	}
	return err
}

// tell says how long software will be taken.
func (s software) tell(log *slog.Logger, now time.Time) {
	log = log.With("version", s.version)
	if !s.released.IsZero() {
		log = log.With("age_days", int(now.Sub(s.released).Hours()/24))
	}
	left, ends := s.left(now)
	switch why := s.held(now); {
	case !why.IsZero():
		log.Error("runner software", "reason", why)
	case ends && left < softwareWarning:
		log.Warn("runner software will soon be refused by GitHub", "days_left", int(left.Hours()/24))
	default:
		log.Info("runner software", "newest", s.newest)
	}
}

// pools are the configured pools as they are now.
func (a *App) pools() []flint.Pool {
	cfg := a.current()
	pools := a.reloading.pools(cfg)
	now := time.Now()
	a.mu.Lock()
	defer a.mu.Unlock()
	for i := range pools {
		if p := &pools[i]; p.Held.IsZero() {
			p.Held = a.softwareHeld(p.Name, pinOf(cfg, p.Name), now)
		}
	}
	return pools
}

// softwareHeld says why no runner of a pool, which pins a version or none, is to be started for its software; zero where one is.
// a.mu is held.
func (a *App) softwareHeld(pool, pin string, now time.Time) flint.Reason {
	s, refused := a.software, a.refused[""]
	if pin != "" {
		s, refused = a.pinned[pin], a.refused[pool]
	}
	if held := s.held(now); !held.IsZero() {
		return held
	}
	if held := refused.held(now, "version "+s.name(), s.howToMend()); !held.IsZero() {
		return held
	}
	return a.refused[pool].held(now, "that of pool "+pool, "put a newer one into its image and restart flint")
}
