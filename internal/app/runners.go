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
		Dir: filepath.Join(cfg.StateDir, "runner-software"), API: cfg.Runner.Releases, Pinned: cfg.Runner.Version, Log: log,
	})
}

// KeptRunner is one version of GitHub's runner software that is there.
type KeptRunner struct {
	runnersoft.Software
	AgeDays *int `json:"age_days"` // nil where the day of its release is not known
}

// ListRunnerSoftware lists them, the newest first.
func ListRunnerSoftware(cfg config.Config, log *slog.Logger, now time.Time) ([]KeptRunner, error) {
	all, err := RunnerSoftware(cfg, log).List()
	list := make([]KeptRunner, 0, len(all))
	for _, s := range all {
		k := KeptRunner{Software: s}
		if !s.Released.IsZero() {
			days := int(now.Sub(s.Released).Hours() / 24)
			k.AgeDays = &days
		}
		list = append(list, k)
	}
	return list, err
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

// prepareRunner makes the drive of the runner software. A coordinator that is told of none uses GitHub's, and fetches it if need be.
func (a *App) prepareRunner(ctx context.Context) error {
	dir := a.cfg.Runner.Dir
	keeps := a.github != nil && keepsSoftware(a.cfg)
	if dir == "" && !keeps {
		return nil
	}
	done := a.opt.Progress.Step("runner software")
	if keeps {
		a.runners = RunnerSoftware(a.cfg, a.log)
		have, err := softwareOf(a.cfg, a.log)
		if errors.Is(err, flint.ErrNotFound) {
			have, err = a.runners.Pull(ctx, a.cfg.Runner.Version, a.opt.Progress)
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
	a.mu.Lock()
	defer a.mu.Unlock()
	a.runnerDrive, a.runnerDir = drive.Path, info
	for pool, supply := range a.supply {
		supply.Runner = drive.Path
		a.supply[pool] = supply
	}
	if a.runners == nil {
		return path.Base(drive.Version), nil // Connect has read its version
	}
	s, err := readSoftware(dir)
	if err != nil {
		return "", err
	}
	s.mend = "flint fetches a newer one as soon as it can; or give it one: flint runner-software import FILE"
	if a.cfg.Runner.Version != "" {
		s.mend = "set runner.version to a newer one, or take it out, and restart flint"
	}
	if s.version == a.software.version {
		s.newest = a.software.newest
	} else {
		delete(a.refused, "") // that was another one
	}
	a.software = s
	return path.Base(drive.Version), nil
}

// refreshSoftware fetches GitHub's newest runner software, where flint keeps it and none is pinned, and gives it to the next VMs.
// On failure the present one stays.
func (a *App) refreshSoftware(ctx context.Context, now time.Time) error {
	if a.runners == nil || a.cfg.Runner.Version != "" {
		return nil
	}
	_, err := a.runners.Pull(ctx, "", nil)
	if err == nil {
		err = a.takeCurrent(ctx)
	}
	if ctx.Err() != nil {
		return nil
	}
	a.mu.Lock()
	s := a.software
	if err == nil {
		a.software.newest = true
	}
	a.mu.Unlock()
	if err == nil {
		return nil
	}
	log := a.log.With("version", s.name())
	if left, ends := s.left(now); ends {
		log = log.With("days_left", max(0, int(left.Hours()/24)))
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
	if a.runners == nil || a.cfg.Runner.Version != "" {
		return
	}
	if err := a.takeCurrent(ctx); err != nil && ctx.Err() == nil {
		a.log.Warn("other runner software cannot be used, the present one stays", "err", err)
	}
}

// takeCurrent gives the next VMs the store's current version, if they do not have it yet.
func (a *App) takeCurrent(ctx context.Context) error {
	want, err := a.runners.Current()
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
	same := os.SameFile(a.runnerDir, info) && (a.software.released.Equal(want.Released) || want.Released.IsZero())
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
