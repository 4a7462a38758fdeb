package app

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path"
	"path/filepath"
	"time"

	"flint"
	"flint/internal/config"
	"flint/internal/runnersoft"
)

// RunnerFile is an archive of GitHub's runner software that a person gives.
type RunnerFile = runnersoft.File

// RunnerSoftware opens the store of GitHub's runner software that a configuration's flint uses. It touches nothing.
func RunnerSoftware(cfg config.Config, log *slog.Logger) *runnersoft.Store {
	return runnersoft.Open(runnersoft.Config{
		Dir: filepath.Join(cfg.StateDir, "runner-software"), API: cfg.Runner.Releases, Pinned: pinnedVersions(cfg), Log: log,
	})
}

// pinnedVersions are those of GitHub's runner software that a configuration names.
func pinnedVersions(cfg config.Config) (list []string) {
	if cfg.Runner.Version != "" {
		list = append(list, cfg.Runner.Version)
	}
	for _, p := range cfg.Pools {
		if p.RunnerVersion != "" {
			list = append(list, p.RunnerVersion)
		}
	}
	return list
}

// pinOf is the version that a pool pins; empty: it has what all have.
func pinOf(cfg config.Config, pool string) string {
	p, _ := poolNamed(cfg, pool)
	return p.RunnerVersion
}

// KeptRunner is one version of GitHub's runner software that is there.
type KeptRunner = runnersoft.Aged

// ListRunnerSoftware lists them, the newest first.
func ListRunnerSoftware(cfg config.Config, log *slog.Logger, now time.Time) ([]KeptRunner, error) {
	all, err := RunnerSoftware(cfg, log).List()
	list := make([]KeptRunner, 0, len(all))
	for _, s := range all {
		list = append(list, s.Aged(now))
	}
	return list, err
}

// UsedRunner is runner software that a configuration's VMs run.
type UsedRunner struct {
	KeptRunner
	Pool string // that pins it; empty: all that pin none
}

// UsedRunners returns the runner software that a configuration's VMs run, as far as it is there and its version is known.
func UsedRunners(cfg config.Config, log *slog.Logger, now time.Time) []UsedRunner {
	var all []UsedRunner
	note := func(s runnersoft.Software, pool string, err error) {
		if err == nil && s.Version != "" {
			all = append(all, UsedRunner{s.Aged(now), pool})
		}
	}
	if cfg.Runner.Dir != "" {
		s, err := runnersoft.Read(cfg.Runner.Dir)
		note(s, "", err)
		return all
	}
	pins := 0
	for _, p := range cfg.Pools {
		if p.RunnerVersion != "" {
			pins++
			s, err := RunnerSoftware(cfg, log).Get(p.RunnerVersion)
			note(s, p.Name, err)
		}
	}
	if pins == 0 || pins < len(cfg.Pools) {
		s, err := softwareOf(cfg, log)
		note(s, "", err)
	}
	return all
}

// keepsSoftware reports whether flint itself keeps the runner software of a configuration.
func keepsSoftware(cfg config.Config) bool { return cfg.Runner.Dir == "" && cfg.Runner.InImage == "" }

// softwareOf returns which of GitHub's runner software a configuration wants, as far as it is there.
func softwareOf(cfg config.Config, log *slog.Logger) (runnersoft.Software, error) {
	if !keepsSoftware(cfg) {
		return runnersoft.Software{}, fmt.Errorf("%w: the configuration has its own", flint.ErrNotFound)
	}
	store := RunnerSoftware(cfg, log)
	if v := cfg.Runner.Version; v != "" {
		return store.Get(v)
	}
	return store.Current()
}

// keepsSoftware reports whether this is a coordinator whose VMs run GitHub's runner software, which it keeps itself.
func (a *App) keepsSoftware() bool { return a.github != nil && keepsSoftware(a.cfg) }

// runners is the store of GitHub's runner software, with the pins of the configuration as it is now.
func (a *App) runners() *runnersoft.Store { return RunnerSoftware(a.current(), a.log) }

// prepareRunner makes the drive of the runner software. A coordinator that is told of none uses GitHub's, and fetches it if need be.
func (a *App) prepareRunner(ctx context.Context) error {
	dir := a.cfg.Runner.Dir
	keeps := a.keepsSoftware()
	if dir == "" && !keeps {
		return nil
	}
	done := a.opt.Progress.Step("runner software")
	if keeps {
		have, err := softwareOf(a.cfg, a.log)
		if errors.Is(err, flint.ErrNotFound) {
			have, err = a.runners().Pull(ctx, a.cfg.Runner.Version, a.opt.Progress)
		}
		if err != nil {
			done("", err)
			return err
		}
		dir = have.Dir
	}
	version, err := a.useRunner(ctx, dir)
	done(version, err)
	return err
}

// useRunner gives the next VMs the runner software of a directory. It returns what that calls itself.
func (a *App) useRunner(ctx context.Context, dir string) (version string, err error) {
	real, err := filepath.EvalSymlinks(dir)
	if err != nil {
		return "", fmt.Errorf("find the runner software: %w", err)
	}
	info, err := os.Stat(real)
	if err != nil {
		return "", fmt.Errorf("find the runner software: %w", err)
	}
	drive, err := a.store.Drive(ctx, real, a.opt.Progress)
	if err != nil {
		return "", err
	}
	defer a.letGo(ctx) // after mu
	a.mu.Lock()
	defer a.mu.Unlock()
	a.runnerDrive, a.runnerDir = drive.Path, info
	for pool, supply := range a.supply {
		if pinOf(a.current(), pool) == "" {
			supply.Runner = drive.Path
			a.supply[pool] = supply
		}
	}
	if !a.keepsSoftware() {
		return path.Base(drive.Version), nil // Connect has read its version
	}
	s := runnersoft.Standing{Mend: "flint fetches a newer one as soon as it can; or give it one: flint runner-software import FILE"}
	if s.Software, err = runnersoft.Read(dir); err != nil {
		return "", err
	}
	if a.cfg.Runner.Version != "" {
		s.Mend = "set runner.version to a newer one, or take it out, and restart flint"
	}
	if s.Version == a.software.Version {
		s.Newest = a.software.Newest
	} else {
		delete(a.refused, "") // that was another one
	}
	a.software = s
	return path.Base(drive.Version), nil
}

// followsNewest reports whether some pool's VMs get the newest runner software as it comes.
func (a *App) followsNewest() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.keepsSoftware() && a.cfg.Runner.Version == "" && a.runnerDir != nil
}

// pinsRunner reports whether a pool's VMs have runner software of their own.
func (a *App) pinsRunner(p config.Pool) bool { return p.RunnerVersion != "" && a.keepsSoftware() }

// poolRunner returns the drive of a pool's runner software: the one of its own version, or that of all.
func (a *App) poolRunner(ctx context.Context, p config.Pool) (string, error) {
	if !a.pinsRunner(p) {
		a.mu.Lock()
		drive := a.runnerDrive
		a.mu.Unlock()
		if drive != "" {
			return drive, nil
		}
		return a.firstRunner(ctx)
	}
	a.fetching.Lock()
	defer a.fetching.Unlock()
	done := a.opt.Progress.Step("runner software of " + p.Name)
	drive, err := a.pinRunner(ctx, p)
	done(p.RunnerVersion, err)
	return drive, err
}

// firstRunner prepares the runner software of all pools, for the first of them that needs it.
func (a *App) firstRunner(ctx context.Context) (string, error) {
	a.fetching.Lock()
	defer a.fetching.Unlock()
	drive := func() string {
		a.mu.Lock()
		defer a.mu.Unlock()
		return a.runnerDrive
	}
	if d := drive(); d != "" {
		return d, nil // another was quicker
	}
	if err := a.prepareRunner(ctx); err != nil {
		return "", err
	}
	return drive(), nil
}

// pinRunner makes the drive of the version that a pool pins.
func (a *App) pinRunner(ctx context.Context, p config.Pool) (string, error) {
	have, err := a.runners().Fetch(ctx, p.RunnerVersion, a.opt.Progress)
	if err != nil {
		return "", err
	}
	s := runnersoft.Standing{Mend: "set runner_version of the pool to a newer one, or take it out"}
	if s.Software, err = runnersoft.Read(have.Dir); err != nil {
		return "", err
	}
	dir, err := filepath.EvalSymlinks(have.Dir)
	if err != nil {
		return "", fmt.Errorf("find the runner software: %w", err)
	}
	drive, err := a.store.Drive(ctx, dir, a.opt.Progress)
	if err != nil {
		return "", err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.pinned == nil {
		a.pinned = map[string]runnersoft.Standing{}
	}
	s.Newest = a.pinned[p.RunnerVersion].Newest
	a.pinned[p.RunnerVersion] = s
	delete(a.refused, p.Name)
	return drive.Path, nil
}

// refreshSoftware fetches GitHub's newest runner software, where flint keeps it and none is pinned, and gives it to the next VMs.
// On failure the present one stays.
func (a *App) refreshSoftware(ctx context.Context, now time.Time) error {
	if !a.followsNewest() {
		return nil
	}
	_, err := a.runners().Pull(ctx, "", nil)
	if err == nil {
		err = a.takeCurrent(ctx)
	}
	if ctx.Err() != nil {
		return nil
	}
	a.mu.Lock()
	s := a.software
	if err == nil {
		a.software.Newest = true
	}
	a.mu.Unlock()
	if err == nil {
		return nil
	}
	log := a.log.With("version", s.Name())
	if left, ends := s.Left(now); ends {
		log = log.With("days_left", left)
	}
	var fault *flint.Fault
	if errors.As(err, &fault) {
		log = log.With("fix", fault.Fix)
	}
	log.Warn("runner software could not be refreshed, the present one stays", "err", err)
	return err
}

// followSoftware takes over what `flint runner-software` has made current since.
func (a *App) followSoftware(ctx context.Context) {
	if !a.followsNewest() {
		return
	}
	if err := a.takeCurrent(ctx); err != nil && ctx.Err() == nil {
		a.log.Warn("other runner software cannot be used, the present one stays", "err", err)
	}
}

// takeCurrent gives the next VMs the store's current version, if they do not have it yet.
func (a *App) takeCurrent(ctx context.Context) error {
	want, err := a.runners().Current()
	if errors.Is(err, flint.ErrNotFound) {
		return nil // a person removed all: the drive is still there
	}
	if err != nil {
		return err
	}
	info, err := os.Stat(want.Dir)
	if err != nil {
		return fmt.Errorf("find the runner software: %w", err)
	}
	a.mu.Lock()
	same := os.SameFile(a.runnerDir, info) && (a.software.Released.Equal(want.Released) || want.Released.IsZero())
	a.mu.Unlock()
	if same {
		return nil
	}
	version, err := a.useRunner(ctx, want.Dir)
	if err != nil {
		return err
	}
	a.log.Info("the next VMs have other runner software", "version", version)
	if a.demand != nil {
		a.demand.signal()
	}
	return nil
}
