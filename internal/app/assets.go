package app

import (
	"context"

	"flint/internal/config"
	"flint/internal/host"

	"flint"
)

// Assets makes what the configured pools' VMs boot, without opening a network or starting anything, and returns it by
// pool. Benchmarks and tests of drivers boot from it.
func Assets(ctx context.Context, cfg config.Config, opt Options) (map[string]host.Supply, error) {
	a := &App{cfg: cfg, opt: opt, log: opt.Log, supply: map[string]host.Supply{}}
	var err error
	if a.store, err = makeStore(cfg, a.log); err != nil {
		return nil, err
	}
	if err := a.Prepare(ctx); err != nil {
		return nil, err
	}
	return a.Supplies(), nil
}

// Scratch makes an empty scratch disk, as VMs get it, in the state directory's image store.
func Scratch(cfg config.Config, opt Options, path string, size flint.Bytes) error {
	store, err := makeStore(cfg, opt.Log)
	if err != nil {
		return err
	}
	return store.Scratch(path, size)
}

// DebianBase makes the root of a Debian release, as a build argument BASE takes it.
func DebianBase(ctx context.Context, cfg config.Config, opt Options, suite string) (string, error) {
	store, err := makeStore(cfg, opt.Log)
	if err != nil {
		return "", err
	}
	return store.DebianBase(ctx, suite, opt.Progress)
}
