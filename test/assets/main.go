// Command assets makes what tests and benchmarks boot real VMs from: kernel, initramfs, modules, the demo image, the demo
// runner's drive and program, and a scratch disk, as links in one directory.
//
// Tests name that directory in FLINT_TEST_ASSETS. It uses the same code as flint itself; it must not have ways of its own
// to make anything.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"

	"flint"
	"flint/internal/app"
	"flint/internal/config"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	state := flag.String("state", "build/state", "state directory, shared with make demo")
	out := flag.String("out", "build/test-assets", "directory of links")
	agent := flag.String("agent", "build/flint-agent", "the guest's program")
	flag.Parse()
	if err := run(ctx, *state, *out, *agent); err != nil {
		fmt.Fprintln(os.Stderr, "assets:", err)
		var fault *flint.Fault
		if errors.As(err, &fault) {
			fmt.Fprintln(os.Stderr, "  fix:", fault.Fix)
		}
		os.Exit(1)
	}
}

func run(ctx context.Context, state, out, agent string) error {
	opt := app.Options{
		Log:       slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn})),
		LocalBase: true,
		Progress: func(m flint.Milestone) {
			if m.Done && m.Err == nil {
				fmt.Printf("assets: %s: %s (%.1f s)\n", m.Step, m.Detail, m.Took.Seconds())
			}
		},
	}
	cfg := config.Default()
	cfg.StateDir, cfg.VM.Agent = state, agent
	cfg.Pools = []config.Pool{{Name: "demo", Image: "./images/demo", Max: 1}}
	if err := cfg.Complete(); err != nil {
		return err
	}
	runner, err := app.DemoRunner(ctx, cfg.StateDir, "images/demo-runner", opt.Progress)
	if err != nil {
		return err
	}
	cfg.Runner.Dir = runner
	supplies, err := app.Assets(ctx, cfg, opt)
	if err != nil {
		return err
	}
	s := supplies["demo"]
	if err := os.MkdirAll(out, 0o755); err != nil {
		return err
	}
	for name, target := range map[string]string{
		"vmlinux": s.Kernel, "initrd": s.Initrd, "modules.ext4": s.Modules, "base.ext4": s.Base, "runner.ext4": s.Runner,
		"github-act-runner": filepath.Join(runner, "github-act-runner"),
	} {
		link := filepath.Join(out, name)
		if err := os.Remove(link); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		if err := os.Symlink(target, link); err != nil {
			return err
		}
	}
	scratch := filepath.Join(out, "scratch.ext4")
	if err := os.Remove(scratch); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return app.Scratch(cfg, opt, scratch, 4*flint.GiB)
}
