package app

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
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
	leastSoftware   = "2.329.0"
)

// software is what is known of the runner software in the VMs. The zero value is software of unknown version.
type software struct {
	version  string
	released time.Time // zero: not known
	newest   bool      // GitHub has no newer one, so it takes this one whatever its age
	refused  bool      // a runner of it was refused
}

// readSoftware reads the file `version` of a runner.dir: the version in its first line, and in the second the day it was
// released (2026-11-03). Both may be missing.
func readSoftware(dir string) (software, error) {
	b, err := os.ReadFile(filepath.Join(dir, "version"))
	if errors.Is(err, fs.ErrNotExist) {
		return software{}, nil
	}
	if err != nil {
		return software{}, fmt.Errorf("read the version of the runner software: %w", err)
	}
	var s software
	lines := strings.Fields(string(b))
	if len(lines) > 0 {
		s.version = strings.TrimPrefix(lines[0], "v")
	}
	if len(lines) > 1 {
		if s.released, err = time.Parse(time.DateOnly, lines[1]); err != nil {
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
	case s.refused:
		return flint.Because("runner.deprecated", "GitHub refuses version %s of the runner software; put a newer one into runner.dir and restart flint", s.name())
	case s.version != "" && older(s.version, leastSoftware):
		return flint.Because("runner.too_old", "GitHub registers no runner software before %s, and this is %s; put a newer one into runner.dir and restart flint", leastSoftware, s.version)
	case !s.released.IsZero() && !s.newest && age > softwareLife:
		return flint.Because("runner.too_old", "GitHub gives no job to runner software older than 30 days, and %s is of %s; put a newer one into runner.dir and restart flint",
			s.name(), s.released.Format(time.DateOnly))
	}
	return flint.Reason{}
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

// softwareEvery is how often GitHub is asked for its newest runner software.
const softwareEvery = 24 * time.Hour

// watchSoftware compares the runner software with GitHub's newest, now and every day, and says how long it will be taken.
func (a *App) watchSoftware(ctx context.Context) error {
	tick := time.NewTicker(softwareEvery)
	defer tick.Stop()
	for {
		a.checkSoftware(ctx, time.Now())
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}

func (a *App) checkSoftware(ctx context.Context, now time.Time) {
	a.mu.Lock()
	s := a.software
	a.mu.Unlock()
	if s.version == "" {
		a.log.Debug("version of the runner software is not known")
		return
	}
	if version, published, err := a.github.LatestRunner(ctx); err != nil {
		a.log.Info("GitHub's newest runner software is not known", "err", err)
	} else {
		s.newest = !older(s.version, version)
		if version == s.version && s.released.IsZero() {
			s.released = published
		}
	}
	a.mu.Lock()
	s.refused = s.refused || a.software.refused
	a.software = s
	a.mu.Unlock()
	log := a.log.With("version", s.version)
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
	pools := a.cfg.FlintPools()
	a.mu.Lock()
	held := a.software.held(time.Now())
	a.mu.Unlock()
	for i := range pools {
		pools[i].Held = held
	}
	return pools
}
